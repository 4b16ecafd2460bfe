"""Choose how a GPU computes a convolution, by the table configurations.toml: Triton with pointer or TMA loads, or cuDNN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..types import ConvLayer, Precision, WeightBytes, accumulator, plane_dtype, weight_of
from . import cudnn, implicit_gemm, tma_convolve, tma_correlate
from .configurations import backend_of
from .conv import POINTERS, TMA
from .implicit_gemm import effective_precision, shape_classes
from .launch import architecture
from .planes import Planes
from .tma_descriptors import fits

BACKENDS: dict[str, Any] = {"triton": POINTERS, "tma": TMA, "cudnn": cudnn}

_CUDNN_PLANES = 5
"""Workspace of cuDNN in full precision, as a multiple of the larger of a convolution's input and output.

On an H200 a step on 100 × 3 × 32² images took 246 MiB more than its tensors in fp32, which is 4.7 times its largest planes.
With tf32 it took no more than its tensors.
"""


def dispatched(operation: str) -> Callable[..., Any]:
    """Return a function that computes the convolution `operation` with the table's back end for its arguments."""

    @wraps(getattr(cudnn, operation))
    def run(*operands: Any, precision: Precision) -> Any:
        result, planes = result_planes(operation, *operands), _plane_operands(operation, operands)
        backend = _backend(operation, Planes.from_tensors(planes[0]), result, precision, planes)
        return getattr(BACKENDS[backend], operation)(*operands, precision)

    return run


def weight_bytes(
    batch: int, layers: Sequence[ConvLayer], dtype: torch.dtype, device: torch.device, precision: Precision
) -> list[WeightBytes]:
    """See `mtt_fast.kernels.weight_bytes`."""
    x, layer_bytes = torch.empty(0, dtype=dtype, device=device), []
    products = plane_dtype(dtype, precision)
    for layer in layers:
        inputs, outputs = _planes_of_layer(batch, layer)
        counts, copies = [1], []
        for operation in ("conv3x3_weight_gradient", "conv3x3_dual_weight_gradient"):
            planes = (operation, inputs, outputs, precision)
            backend = _backend(*planes, [x])
            if backend != "cudnn":
                correlation = tma_correlate if backend == "tma" else implicit_gemm
                counts.append(correlation.count_summands(*planes, x))
            copies.append(tma_correlate.copied_bytes(operation, inputs, outputs, x) if backend == "tma" else 0)
        parts = []
        for operation, count in (("conv3x3_input_gradient", 1), ("conv3x3_dual_input_gradient", 3)):
            planes = (operation, outputs, inputs, precision)
            uses_tma = _backend(*planes, [x]) == "tma"
            parts.append(tma_convolve.part_bytes(*planes, x, count) if uses_tma else 0)
        size = 9 * layer.channels * layer.filters
        summands = max(counts) * size * accumulator(dtype).itemsize
        layer_bytes.append(WeightBytes(2 * size * products.itemsize, summands, *copies, *parts))
    return layer_bytes


def workspace_bytes(
    batch: int, layers: Sequence[ConvLayer], dtype: torch.dtype, device: torch.device, precision: Precision
) -> int:
    """See `mtt_fast.kernels.workspace_bytes`."""
    x, most = torch.empty(0, dtype=dtype, device=device), 0
    for layer in layers if effective_precision(dtype, precision) in ("fp32", "fp64") else ():
        inputs, outputs = _planes_of_layer(batch, layer)
        convolutions = {
            "conv3x3": (inputs, outputs),
            "conv3x3_input_gradient": (outputs, inputs),
            "conv3x3_weight_gradient": (inputs, outputs),
        }
        if any(_backend(each, *planes, precision, [x]) == "cudnn" for each, planes in convolutions.items()):
            most = max(most, inputs.sample_size, outputs.sample_size)
    return _CUDNN_PLANES * batch * most * dtype.itemsize


def _planes_of_layer(batch: int, layer: ConvLayer) -> tuple[Planes, Planes]:
    """Return the shapes of the input planes and of the output planes of a layer."""
    inputs = Planes(batch, layer.channels, layer.height, layer.width, torch.channels_last)
    return inputs, Planes(batch, layer.filters, layer.out_height, layer.out_width, torch.channels_last)


def _backend(operation: str, inputs: Planes, outputs: Planes, precision: Precision, planes: list[Tensor]) -> str:
    """Return the table's back end for the dtype and device of `planes`, but `triton` in place of `tma` if TMA cannot load these."""
    classes = shape_classes(inputs, outputs, effective_precision(planes[0].dtype, precision))
    backend = backend_of(operation, architecture(planes[0].device), *classes)
    return "triton" if backend == "tma" and not fits(operation, inputs, outputs, precision, planes) else backend


def _plane_operands(operation: str, operands: tuple[Any, ...]) -> list[Tensor]:
    """Return the operands that are planes: all but the padding for a weight gradient, else the first half (the others are weights)."""
    tensors = operands[:-1]
    planes = tensors if operation.endswith("weight_gradient") else tensors[: len(tensors) // 2]
    return [each for each in planes if each is not None]


def result_planes(operation: str, *arguments: Any) -> Planes:
    """Return the shape of a convolution's result; for a weight gradient, that of the planes ȳ with which x is correlated."""
    planes, (factor, padding) = Planes.from_tensors(arguments[0]), arguments[-2:]
    if operation.endswith("weight_gradient"):
        return Planes.from_tensors(factor)
    is_input_gradient = "input_gradient" in operation
    growth = (2 - 2 * padding) if is_input_gradient else (2 * padding - 2)
    filters, input_channels, *_ = weight_of(factor).shape
    channels = input_channels if is_input_gradient else filters
    return Planes(planes.samples, channels, planes.height + growth, planes.width + growth, planes.memory_format)
