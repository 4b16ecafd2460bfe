"""Choose the back end that computes an operation: Triton's on CUDA, the native one on a CPU, else the reference."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import native, reference, triton
from .types import ConvLayer, Precision

# Triton's own switch: its kernels then run on the CPU, interpreted and slow, in place of the native ones.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def native_available() -> bool:
    """Return whether the native CPU kernels are in use: installed, and not turned off by `MTT_FAST_NATIVE=0`."""
    return native.available


def has_kernels(device: torch.device) -> bool:
    """Return whether a back end has kernels for `device`, so that the reference is not all there is.

    Raises `ImportError` for a CUDA device where Triton is missing: a GPU is never left idle in silence.
    """
    if device.type == "cuda" or (_INTERPRETED and device.type == "cpu"):
        triton.load()
        return True
    return device.type == "cpu" and native.available


def implementation_of(operation: str, tensor: Tensor, precision: Precision | None = None) -> Callable[..., Any]:
    """Return the fastest implementation of `operation` that a back end has for tensors like `tensor`.

    `precision` is that of a product's factors, for the operations that have any, and is passed on to the implementation.
    The native back end knows `fp32` alone.
    """
    if operation in triton.OPERATIONS and _runs_triton(tensor):
        implementation: Callable[..., Any] = getattr(triton, operation)
    elif native.has(operation, tensor) and precision in (None, "fp32"):
        return getattr(native, operation)  # type: ignore[no-any-return]
    else:
        implementation = getattr(reference, operation)
    return implementation if precision is None else partial(implementation, precision=precision)


def fused_implementation_of(
    operation: str, x: Tensor, weight: Tensor, padding: int, precision: Precision, row: str | None = None
) -> Callable[..., Any] | None:
    """Return the implementation that does a whole block's `operation` at once, None where its parts are faster.

    `row` names the operation in the table of configurations where its name there is another.
    """
    if not (_runs_triton(x) and triton.is_fused(row or operation, x, weight, padding, precision)):
        return None
    return partial(getattr(triton, operation), precision=precision)


def compile_ahead(call: Callable[[], object]) -> None:
    """Make a `call` on a GPU that compiles the kernels it launches, in parallel, and runs none of them.

    What it computes has no meaning, so it must not depend on any value. Raises what `call` does.
    """
    triton.compile_ahead(call)


def work_bytes(batch: int, layers: Sequence[ConvLayer], dtype: torch.dtype, device: torch.device) -> int:
    """Return the bytes that a step's convolutions keep beside their results: all operations, on all `layers`.

    On the CPU they are kept from one call to the next, some for each of torch's threads. Elsewhere, and for the
    reference, only the library that convolves knows how many it takes, and 0 is returned.
    """
    if device.type != "cpu" or not native.has("conv3x3", torch.empty(0, dtype=dtype)):
        return 0
    return native.work_bytes(batch, layers, dtype)


def release_memory() -> None:
    """Give back to the system the memory that the native kernels keep from one call to the next and nobody uses."""
    native.release_memory()


def _runs_triton(tensor: Tensor) -> bool:
    """Return whether Triton's kernels run on `tensor`: on a GPU's, and on a CPU's where Triton interprets them."""
    return tensor.is_cuda or (_INTERPRETED and tensor.device.type == "cpu")
