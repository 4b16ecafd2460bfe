"""Compute a whole block, convolution, norm, ReLU and pool, and its backward in plain torch: one part after the other."""

from __future__ import annotations

from torch import Tensor

from ..types import Activations, Affine, Precision
from .conv import conv3x3_dual, conv3x3_dual_input_gradient, conv3x3_dual_weight_gradient, conv3x3_tangent
from .norm import norm_relu_pool_dual, norm_relu_pool_dual_backward


def conv_norm_relu_pool_dual(
    x: Tensor,
    x_dot: Tensor | None,
    weight: Tensor,
    weight_dot: Tensor,
    affine: Affine,
    affine_dot: Affine,
    padding: int,
    eps: float,
    precision: Precision = "fp32",
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor, Activations]:
    """Return p, ṗ (B, K, H'//2, W'//2) and the activations. `y` (B, K, H', W') is W∗x if known."""
    arguments = (x, x_dot, weight, weight_dot, padding, precision)
    known, y_dot = conv3x3_dual(*arguments) if y is None else (y, conv3x3_tangent(*arguments))
    p, p_dot, stats = norm_relu_pool_dual(known, y_dot, affine, affine_dot, eps)
    return p, p_dot, Activations(x, x_dot, known, y_dot, stats)


def conv_norm_relu_pool_dual_backward(
    activations: Activations,
    weight: Tensor,
    weight_dot: Tensor,
    affine: Affine,
    affine_dot: Affine,
    p_bar: Tensor,
    p_bar_dot: Tensor,
    padding: int,
    precision: Precision = "fp32",
    wants_x_bar: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """Return x̄ (None unless wanted), x̄̇ (B, C, H, W), W̄̇ (K, C, 3, 3), γ̄̇, β̄̇ (K,). Leaves the activations in place."""
    x, x_dot, y_dot, stats = activations.x, activations.x_dot, activations.y_dot, activations.stats
    assert y_dot is not None
    assert stats is not None
    y_bar, y_bar_dot, gamma_bar_dot, beta_bar_dot = norm_relu_pool_dual_backward(
        activations.y, y_dot, stats, affine, affine_dot, p_bar, p_bar_dot
    )
    weight_bar_dot = conv3x3_dual_weight_gradient(x, x_dot, y_bar, y_bar_dot, padding, precision)
    backwards = (y_bar, y_bar_dot, weight, weight_dot, padding, precision)
    x_bar, x_bar_dot = conv3x3_dual_input_gradient(*backwards)
    return x_bar if wants_x_bar else None, x_bar_dot, weight_bar_dot, gamma_bar_dot, beta_bar_dot
