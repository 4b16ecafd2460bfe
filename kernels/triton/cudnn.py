"""Convolve 3×3 with cuDNN, through torch: the primal convolutions, and their derivatives as sums of these.

Only deterministic algorithms of cuDNN are allowed. cuDNN's heuristics choose among them; nothing is timed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ..types import PackedWeight, Precision, Weight, accumulator, in_format_of, plane_dtype
from .planes import stacked

_one_thread = threading.Lock()  # cuDNN's settings are those of the process


def conv3x3(x: Tensor, weight: Weight, padding: int, precision: Precision) -> Tensor:
    """See `mtt_fast.kernels.conv3x3`."""
    x_factor, weight_factor = _factors(precision, x, weight)
    with _precision(precision):
        y = F.conv2d(x_factor, weight_factor, padding=padding)
    return in_format_of(x, y.to(x.dtype))


def conv3x3_input_gradient(y_bar: Tensor, weight: Weight, padding: int, precision: Precision) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_input_gradient`."""
    y_factor, weight_factor = _factors(precision, y_bar, weight)
    with _precision(precision):
        x_bar = F.conv_transpose2d(y_factor, weight_factor, padding=padding)
    return in_format_of(y_bar, x_bar.to(y_bar.dtype))


def conv3x3_weight_gradient(x: Tensor, y_bar: Tensor, padding: int, precision: Precision) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_weight_gradient`."""
    shape, (x_factor, y_factor) = (y_bar.shape[1], x.shape[1], 3, 3), _factors(precision, x, y_bar)
    with _precision(precision):
        weight_bar: Tensor = conv2d_weight(x_factor, shape, y_factor, padding=padding)
    return weight_bar.to(accumulator(x.dtype))[None]


def conv3x3_dual(
    x: Tensor, x_dot: Tensor | None, weight: Weight, weight_dot: Weight, padding: int, precision: Precision
) -> tuple[Tensor, Tensor]:
    """See `mtt_fast.kernels.conv3x3_dual`."""
    y_dot = conv3x3_tangent(x, x_dot, weight, weight_dot, padding, precision)
    return conv3x3(x, weight, padding, precision), y_dot


def conv3x3_tangent(
    x: Tensor, x_dot: Tensor | None, weight: Weight, weight_dot: Weight, padding: int, precision: Precision
) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_tangent`."""
    y_dot = conv3x3(x, weight_dot, padding, precision)
    return y_dot if x_dot is None else y_dot.add_(conv3x3(x_dot, weight, padding, precision))


def conv3x3_dual_input_gradient(
    y_bar: Tensor, y_bar_dot: Tensor, weight: Weight, weight_dot: Weight, padding: int, precision: Precision
) -> tuple[Tensor, Tensor]:
    """See `mtt_fast.kernels.conv3x3_dual_input_gradient`."""
    x_bar_dot = conv3x3_input_gradient_tangent(y_bar, y_bar_dot, weight, weight_dot, padding, precision)
    return conv3x3_input_gradient(y_bar, weight, padding, precision), x_bar_dot


def conv3x3_input_gradient_tangent(
    y_bar: Tensor, y_bar_dot: Tensor, weight: Weight, weight_dot: Weight, padding: int, precision: Precision
) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_input_gradient_tangent`."""
    x_bar_dot = conv3x3_input_gradient(y_bar, weight_dot, padding, precision)
    return x_bar_dot.add_(conv3x3_input_gradient(y_bar_dot, weight, padding, precision))


def conv3x3_dual_weight_gradient(
    x: Tensor, x_dot: Tensor | None, y_bar: Tensor, y_bar_dot: Tensor, padding: int, precision: Precision
) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_dual_weight_gradient`.

    It is one product over twice the samples where `stacked` can join the operands in memory, else two.
    """
    if x_dot is None:
        return conv3x3_weight_gradient(x, y_bar_dot, padding, precision)
    xs, y_bars = stacked(x, x_dot), stacked(y_bar_dot, y_bar)
    if xs is not None and y_bars is not None:
        return conv3x3_weight_gradient(xs, y_bars, padding, precision)
    weight_bar_dot = conv3x3_weight_gradient(x, y_bar_dot, padding, precision)
    return weight_bar_dot.add_(conv3x3_weight_gradient(x_dot, y_bar, padding, precision))


def _factors(precision: Precision, planes: Tensor, other: Weight) -> tuple[Tensor, Tensor]:
    """Return `planes` and `other` in the dtype in which they are multiplied, which is also the dtype of cuDNN's result."""
    if isinstance(other, PackedWeight):
        other = other.straight.permute(0, 3, 1, 2)
    dtype = plane_dtype(planes.dtype, precision)
    return planes.to(dtype), other.to(dtype)


@contextmanager
def _precision(precision: Precision) -> Iterator[None]:
    """Allow cuDNN only deterministic algorithms, and tf32 only if `precision` is tf32, while other threads wait.

    `torch.backends.cudnn.flags` would also read `allow_tf32`, which raises an error where the caller has set `fp32_precision`.
    """
    cudnn: Any = torch.backends.cudnn
    settings = (
        (cudnn, "enabled", True),
        (cudnn, "benchmark", False),
        (cudnn, "deterministic", True),
        (cudnn.conv, "fp32_precision", "tf32" if precision == "tf32" else "ieee"),
    )
    with _one_thread:
        before = [getattr(owner, name) for owner, name, _ in settings]
        try:
            for owner, name, value in settings:
                setattr(owner, name, value)
            yield
        finally:
            for (owner, name, _), value in zip(settings, before, strict=True):
                setattr(owner, name, value)
