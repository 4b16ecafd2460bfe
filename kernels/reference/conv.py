"""Compute `conv3x3` and its derivatives in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ..types import HALF_PRECISIONS, Convolved, PartialPlanes, Precision, planes_of
from .planes import planes_like, widened

# Stride 1, no bias: an instance norm removes any shift, so a bias before it has no effect, and its gradients are exactly
# zero. Without a norm `bias_relu_pool` adds the bias.


def add_planes(*planes: Convolved) -> tuple[Tensor, ...]:
    """Return planes (B, C, H, W) as tensors. Parts are added up in their order, and the sum is rounded once and stored."""
    for each in planes:
        if isinstance(each, PartialPlanes):
            total = torch.zeros_like(each.parts[0])
            for part in each.parts:
                total += part
            each.planes.copy_(total)
    return tuple(map(planes_of, planes))


def conv3x3(x: Tensor, weight: Tensor, padding: int, precision: Precision = "fp32") -> Tensor:
    """Return W∗x (B, K, H + 2·padding − 2, W + 2·padding − 2). `x`: (B, C, H, W); `weight`: (K, C, 3, 3)."""
    return planes_like(x, _convolved(x, weight, padding, precision))


def conv3x3_input_gradient(y_bar: Tensor, weight: Tensor, padding: int, precision: Precision = "fp32") -> Tensor:
    """Return x̄ = Wᵀ∗ȳ (B, C, H, W)."""
    return planes_like(y_bar, _convolved_back(y_bar, weight, padding, precision))


def conv3x3_weight_gradient(x: Tensor, y_bar: Tensor, padding: int, precision: Precision = "fp32") -> Tensor:
    """Return W̄ = ȳ ⋆ x (1, K, C, 3, 3)."""
    shape, factors = (y_bar.shape[1], x.shape[1], 3, 3), _factors(precision, x, y_bar)
    weight_bar: Tensor = conv2d_weight(factors[0], shape, factors[1], padding=padding)
    return weight_bar.contiguous()[None]


def conv3x3_tangent(
    x: Tensor, x_dot: Tensor | None, weight: Tensor, weight_dot: Tensor, padding: int, precision: Precision = "fp32"
) -> Tensor:
    """Return ẏ = Ẇ∗x + W∗ẋ. `x_dot` None means zero, since images do not depend on the parameters."""
    y_dot = _convolved(x, weight_dot, padding, precision)
    return planes_like(x, y_dot if x_dot is None else y_dot + _convolved(x_dot, weight, padding, precision))


def conv3x3_dual(
    x: Tensor, x_dot: Tensor | None, weight: Tensor, weight_dot: Tensor, padding: int, precision: Precision = "fp32"
) -> tuple[Tensor, Tensor]:
    """Return y = W∗x and ẏ = Ẇ∗x + W∗ẋ."""
    y_dot = conv3x3_tangent(x, x_dot, weight, weight_dot, padding, precision)
    return conv3x3(x, weight, padding, precision), y_dot


def conv3x3_dual_input_gradient(
    y_bar: Tensor,
    y_bar_dot: Tensor,
    weight: Tensor,
    weight_dot: Tensor,
    padding: int,
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor]:
    """Return x̄ = Wᵀ∗ȳ and x̄̇ = Ẇᵀ∗ȳ + Wᵀ∗ȳ̇ (B, C, H, W)."""
    x_bar = conv3x3_input_gradient(y_bar, weight, padding, precision)
    return x_bar, conv3x3_input_gradient_tangent(y_bar, y_bar_dot, weight, weight_dot, padding, precision)


def conv3x3_input_gradient_tangent(
    y_bar: Tensor,
    y_bar_dot: Tensor,
    weight: Tensor,
    weight_dot: Tensor,
    padding: int,
    precision: Precision = "fp32",
) -> Tensor:
    """Return x̄̇ = Ẇᵀ∗ȳ + Wᵀ∗ȳ̇ (B, C, H, W)."""
    along_weight = _convolved_back(y_bar, weight_dot, padding, precision)
    return planes_like(y_bar, along_weight + _convolved_back(y_bar_dot, weight, padding, precision))


def conv3x3_dual_weight_gradient(
    x: Tensor, x_dot: Tensor | None, y_bar: Tensor, y_bar_dot: Tensor, padding: int, precision: Precision = "fp32"
) -> Tensor:
    """Return W̄̇ = ȳ̇ ⋆ x + ȳ ⋆ ẋ (1, K, C, 3, 3). `x_dot` None is zero."""
    weight_bar_dot = conv3x3_weight_gradient(x, y_bar_dot, padding, precision)
    return (
        weight_bar_dot if x_dot is None else weight_bar_dot + conv3x3_weight_gradient(x_dot, y_bar, padding, precision)
    )


def rounded(factor: Tensor, precision: Precision) -> Tensor:
    """Return a float32 `factor` rounded to `precision` as tensor cores round it, ties to even; others are returned as they are.

    tf32 and fp16 keep 10 bits of the mantissa, bf16 seven. fp16 has five bits of exponent.
    """
    if factor.dtype != torch.float32 or precision == "fp32":
        return factor
    if precision in HALF_PRECISIONS:
        return factor.to(HALF_PRECISIONS[precision]).float()
    bits = factor.view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & -0x2000).view(torch.float32)


def _convolved(x: Tensor, weight: Tensor, padding: int, precision: Precision) -> Tensor:
    return F.conv2d(*_factors(precision, x, weight), padding=padding)


def _convolved_back(y_bar: Tensor, weight: Tensor, padding: int, precision: Precision) -> Tensor:
    return F.conv_transpose2d(*_factors(precision, y_bar, weight), padding=padding)


def _factors(precision: Precision, planes: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    precision = next((name for name, dtype in HALF_PRECISIONS.items() if dtype == planes.dtype), precision)
    return rounded(widened(planes), precision), rounded(widened(other), precision)
