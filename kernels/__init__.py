"""The operations that the engine is made of: functions of tensors that know nothing of distillation.

Each is defined in plain torch in `reference.py` (any device) and may have a faster twin. The functions here check their
arguments and choose the twin. They are not differentiable: the engine wraps them in an `autograd.Function`.
"""

from __future__ import annotations

import torch
from torch import Tensor

if __name__ != "mtt_fast.kernels":  # it can be found as `kernels` too, which would be a second set of modules
    raise ImportError("import mtt_fast.kernels, not kernels")

from . import native, reference

__all__ = ["native_available", "squared_distance"]


def native_available() -> bool:
    """Return whether the compiled CPU twins are in use: installed, and not turned off by `MTT_FAST_NATIVE=0`."""
    return native.available


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return |a − b|², accumulated in float64, as a float64 scalar on the device of `a`.

    `a`, `b`: (P,), contiguous, of one device and one of float32, float64, bfloat16. For vectors on the CPU the native
    twin's result does not depend on the number of threads. Raises `ValueError` for anything
    else, and for a tensor that requires grad.
    """
    if a.dim() != 1 or a.shape != b.shape:
        raise ValueError(
            f"squared_distance: expected two vectors of one size, found {tuple(a.shape)}, {tuple(b.shape)}"
        )
    if a.dtype != b.dtype or a.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"squared_distance: expected one of float32, float64, bfloat16, found {a.dtype}, {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"squared_distance: expected one device, found {a.device} and {b.device}")
    if not (a.is_contiguous() and b.is_contiguous()):
        raise ValueError(f"squared_distance: expected contiguous vectors, found strides {a.stride()}, {b.stride()}")
    if a.requires_grad or b.requires_grad:
        raise ValueError("squared_distance: is not differentiable, found a vector that requires grad; detach it")
    if a.device.type == "cpu" and native.available:
        return native.squared_distance(a, b)
    return reference.squared_distance(a, b)
