"""Which twin of an operation answers: for CUDA the one in Triton, on a CPU the native one, else the definition itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import native, reference, triton
from .formats import Precision

# Triton's own switch: what is for a GPU runs on the CPU, slowly, and takes the place of what is for a CPU.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def native_available() -> bool:
    """Return whether the compiled CPU twins are in use: installed, and not turned off by `MTT_FAST_NATIVE=0`."""
    return native.available


def has_twins(device: torch.device) -> bool:
    """Return whether the operations have twins of their own for `device`, and not only their definitions.

    Raises `ImportError` for a CUDA device where Triton is missing: a GPU is never left idle in silence.
    """
    if device.type == "cuda" or (_INTERPRETED and device.type == "cpu"):
        return triton.fuses is not None  # looking it up imports Triton
    return device.type == "cpu" and native.available


def release_memory() -> None:
    """Give back to the system what the native twins keep from one call to the next and nobody uses."""
    native.release_memory()


def twin_of(operation: str, tensor: Tensor, precision: Precision | None = None) -> Callable[..., Any]:
    """Return the implementation of `operation` for tensors like `tensor`: the fastest there is.

    `precision` is that of a product's factors, for the operations that have any. The native twins know `fp32` alone.
    """
    if operation in triton.__all__ and _takes_triton(tensor):
        found: Callable[..., Any] = getattr(triton, operation)
    elif native.has(operation, tensor) and precision in (None, "fp32"):
        return getattr(native, operation)  # type: ignore[no-any-return]
    else:
        found = getattr(reference, operation)
    return found if precision is None else partial(found, precision=precision)


def fused_twin_of(
    operation: str, x: Tensor, weight: Tensor, padding: int, precision: Precision, way: str | None = None
) -> Callable[..., Any] | None:
    """Return the twin that does a whole block's `operation` at once, if there is one and it is faster than the parts.

    `way` is the operation's name in the table if that is another.
    """
    if not (_takes_triton(x) and triton.fuses(way or operation, x, weight, padding, precision)):
        return None
    return partial(getattr(triton, operation), precision=precision)


def _takes_triton(tensor: Tensor) -> bool:
    """Return whether Triton's kernels run on `tensor`: on a GPU's, and on a CPU's where Triton interprets them."""
    return tensor.is_cuda or (_INTERPRETED and tensor.device.type == "cpu")
