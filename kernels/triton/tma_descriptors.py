"""Make TMA descriptors of planes and weights. TMA is the tensor memory accelerator of sm_90 and later.

A box is the tile that TMA loads or stores at once. The hardware computes its addresses. It loads zeros for elements outside the
tensor, and stores nothing there. It requires three things: channels are the innermost dimension, all other strides are multiples
of 16 bytes, and a box begins at a multiple of 16 bytes in the innermost dimension. (A box that began elsewhere caused an illegal
instruction.) `fits` checks all of this for planes.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..types import Precision
from .configurations import Configuration, box_configuration
from .implicit_gemm import effective_precision, shape_classes
from .launch import TensorDescriptor, architecture, tl, triton
from .planes import Planes

BOX = ("BOX_B", "BOX_H", "BOX_W")  # samples, rows, columns


@triton.jit
def box_origin(
    tile: tl.tensor, H: tl.constexpr, W: tl.constexpr, BOX_B: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the first sample, row and column of the box with number `tile`."""
    ROWS: tl.constexpr = (H + BOX_H - 1) // BOX_H
    COLUMNS: tl.constexpr = (W + BOX_W - 1) // BOX_W
    return tile // (ROWS * COLUMNS) * BOX_B, tile // COLUMNS % ROWS * BOX_H, tile % COLUMNS * BOX_W


def fits(operation: str, inputs: Planes, outputs: Planes, precision: Precision, tensors: list[Tensor]) -> bool:
    """Return whether TMA can load and store `tensors`, which have the shapes of `inputs` or `outputs`.

    They must be channels_last, and float32 for products in fp32 and tf32, else of 16 bits. A pixel must take a multiple of
    16 bytes, and memory must begin at one. For a weight gradient in 16 bits, the sides of ȳ must be powers of two.
    """
    dtype = tensors[0].dtype
    wide = effective_precision(dtype, precision) in ("fp32", "tf32")
    by_rows = operation.endswith("weight_gradient") and not wide
    return (
        not (by_rows and any(side & (side - 1) for side in (outputs.height, outputs.width)))
        and dtype.itemsize == (4 if wide else 2)
        and all(planes.channels_last for planes in (inputs, outputs))
        and all(planes.channels * dtype.itemsize % 16 == 0 for planes in (inputs, outputs))
        and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    )


def tile_of(
    operation: str, inputs: Planes, outputs: Planes, precision: Precision, tensors: list[Tensor]
) -> Configuration:
    """Return the configuration of `operation`, with BLOCK_N and BLOCK_K limited to the channels.

    Raises `ValueError` for planes that TMA cannot load (`fits`).
    """
    if not fits(operation, inputs, outputs, precision, tensors):
        raise ValueError(
            f"{operation}: expected channels_last planes of whole 16 bytes a pixel, for a weight gradient in 16 bits with sides "
            f"that are powers of two, found {inputs}, {outputs}"
        )
    classes = shape_classes(inputs, outputs, effective_precision(tensors[0].dtype, precision))
    row = dict(box_configuration(operation, architecture(tensors[0].device), *classes))
    row["BLOCK_N"] = min(row["BLOCK_N"], max(16, triton.next_power_of_2(outputs.channels)))
    row["BLOCK_K"] = min(row["BLOCK_K"], max(16, triton.next_power_of_2(inputs.channels)))
    return row


def box_of(pixels: int, planes: Planes, most_columns: int = 16) -> tuple[int, int, int]:
    """Return the samples, rows and columns of a box of `pixels`: first columns up to `most_columns`, then rows, then samples."""
    columns = min(most_columns, pixels, triton.next_power_of_2(planes.width))
    rows = min(pixels // columns, triton.next_power_of_2(planes.height))
    return pixels // (rows * columns), rows, columns


def count_boxes(planes: Planes, box: tuple[int, int, int]) -> int:
    """Return the number of boxes that cover `planes`."""
    sizes = (planes.samples, planes.height, planes.width)
    return math.prod(triton.cdiv(size, length) for size, length in zip(sizes, box, strict=True))


def describe_planes(planes: Tensor, box: tuple[int, int, int], channels: int) -> TensorDescriptor:
    """Return a descriptor (B, H, W, C) of channels_last planes (B, C, H, W), with boxes of `box` pixels × `channels`."""
    samples, all_channels, height, width = planes.shape
    return describe(planes, (samples, height, width, all_channels), (*box, channels))


def describe_weights(weight: Tensor, outputs: int, inputs: int) -> TensorDescriptor:
    """Return a descriptor (CO, 9·CI) of weights (CO, 3, 3, CI), with boxes of `outputs` × `inputs` channels.

    A box may reach past the last input channel into the next tap. The box of pixels has zeros there, so the product is right.
    """
    return describe(weight, (len(weight), weight[0].numel()), (outputs, inputs))


def describe(tensor: Tensor, shape: tuple[int, ...], block: tuple[int, ...]) -> TensorDescriptor:
    """Return a descriptor of `tensor` as contiguous memory of `shape`, with boxes of `block`.

    The strides are computed from `shape`, so that those of dimensions of length one are multiples of 16 bytes too.
    """
    strides = [1]
    for length in reversed(shape[1:]):
        strides.insert(0, strides[0] * length)
    return TensorDescriptor(tensor, list(shape), strides, list(block))
