"""Choose the back end that computes an operation: Triton's on CUDA, the native one on a CPU, else the reference."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from . import native, reference, triton
from .types import ConvLayer, Convolved, ImageBlockBytes, Precision, WeightBytes, accumulator, planes_of

Implementation = Callable[..., Any]

_PRECISIONS = get_args(Precision)

# with Triton's own switch, its kernels run on the CPU in Triton's interpreter, in place of the native ones
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def native_available() -> bool:
    """Return whether the native CPU kernels are in use: installed, and not turned off by `MTT_FAST_NATIVE=0`."""
    return native.available


def has_kernels(device: torch.device) -> bool:
    """Return whether `device` has a back end other than the reference.

    Raises `ImportError` for a CUDA device if Triton is missing, so that a GPU is never silently unused.
    """
    if _runs_triton(device):
        triton.load()
        return True
    return device.type == "cpu" and native.available


def implementation_of(operation: str, tensor: Tensor, precision: Precision | None = None) -> Implementation:
    """Return the fastest implementation of `operation` for tensors like `tensor`.

    `precision`, for operations with matrix products, is bound to the implementation. The native back end has only `fp32`.
    Raises `ValueError` for an unknown precision.
    """
    if precision is not None:
        _check_precision(operation, precision)
    if operation in triton.OPERATIONS and _runs_triton(tensor.device):
        implementation: Implementation = getattr(triton, operation)
    elif native.has(operation, tensor) and precision in (None, "fp32"):
        return getattr(native, operation)  # type: ignore[no-any-return]
    else:
        implementation = getattr(reference, operation)
    return implementation if precision is None else partial(implementation, precision=precision)


def has_image_block(layer: ConvLayer, device: torch.device) -> bool:
    """Return whether a back end computes the first block, with instance norm, without storing planes before the pool.

    Triton's does, for at most 3 channels and a multiple of 16 filters.
    """
    return _runs_triton(device) and triton.has_image_block(layer.channels, layer.filters)


def block_implementation_of(
    operation: str, channels: int, filters: int | None, device: torch.device, precision: Precision
) -> Implementation:
    """Return the implementation of an `operation` of the first block: Triton's if `has_image_block`, else the reference.

    `filters` is None for `image_patches`, which depends only on the images. Raises `ValueError` for an unknown precision.
    """
    _check_precision(operation, precision)
    has_kernels = _runs_triton(device) and triton.has_image_block(channels, filters)
    return partial(getattr(triton if has_kernels else reference, operation), precision=precision)


def readable(planes: Convolved) -> Convolved:
    """Return planes in a form that the back end of their device takes: partial sums only for Triton, else added up."""
    return planes if _runs_triton(planes_of(planes).device) else reference.add_planes(planes)[0]


def compile_ahead(call: Callable[[], object]) -> None:
    """Compile the kernels that `call` launches on a GPU, in parallel, and run none of them.

    Tensors that `call` computes are uninitialised, so it must not depend on their values. Raises what `call` raises.
    """
    triton.compile_ahead(call)


def workspace_bytes(
    batch: int, layers: Sequence[ConvLayer], dtype: torch.dtype, device: torch.device, precision: Precision
) -> int:
    """Return the bytes of workspace that the convolutions of a step take, in all operations on all `layers` of planes of `dtype`.

    On a CPU the workspace is kept between calls, with a part for each of torch's threads. On CUDA it is an allowance for cuDNN's
    convolutions. For the reference it is unknown; 0 is returned.
    """
    if _runs_triton(device):
        return triton.workspace_bytes(batch, layers, dtype, device, precision)  # type: ignore[no-any-return]
    if device.type != "cpu" or not native.has("conv3x3", torch.empty(0, dtype=dtype, device=device)):
        return 0
    return native.workspace_bytes(batch, layers, dtype)


def weight_bytes(
    batch: int, layers: Sequence[ConvLayer], dtype: torch.dtype, device: torch.device, precision: Precision
) -> list[WeightBytes]:
    """Return the `WeightBytes` of each of `layers`, with planes of `dtype`."""
    if _runs_triton(device):
        return triton.weight_bytes(batch, layers, dtype, device, precision)  # type: ignore[no-any-return]
    return [WeightBytes(0, 9 * layer.channels * layer.filters * accumulator(dtype).itemsize) for layer in layers]


def image_block_bytes(
    batch: int, layer: ConvLayer, dtype: torch.dtype, device: torch.device, precision: Precision
) -> ImageBlockBytes:
    """Return the bytes of a first block, with planes of `dtype`, for whose `layer` `has_image_block` is true."""
    return triton.image_block_bytes(batch, layer, dtype, device, precision)  # type: ignore[no-any-return]


def release_memory() -> None:
    """Free the workspace that the native kernels keep between calls, except what is in use."""
    native.release_memory()


def _check_precision(operation: str, precision: str) -> None:
    if precision not in _PRECISIONS:
        raise ValueError(f"{operation}: expected precision {', '.join(_PRECISIONS)}, found {precision!r}")


def _runs_triton(device: torch.device) -> bool:
    """Return whether Triton's kernels run on `device`: an NVIDIA GPU, or a CPU with Triton's interpreter."""
    if device.type == "cuda":
        return torch.version.hip is None  # AMD GPUs are called cuda too; the kernels use NVIDIA's features
    return _INTERPRETED and device.type == "cpu"
