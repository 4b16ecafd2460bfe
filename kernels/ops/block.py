"""Convolve, normalise, take ReLU and pool in a direction, and the backward: a whole block of ConvNet."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..checks import check_convolution, check_correlation, check_planes, check_tensors
from ..types import Activations, Affine, Precision, accumulator
from .conv import (
    conv3x3_dual,
    conv3x3_dual_input_gradient,
    conv3x3_dual_weight_gradient,
    conv3x3_input_gradient_tangent,
    conv3x3_tangent,
)
from .norm import norm_relu_pool_dual, norm_relu_pool_dual_backward, with_dots


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
    """Return p, ṗ of a whole block, and the activations that its backward takes.

    That is `conv3x3_dual`, or `conv3x3_tangent` where `y` is known, and `norm_relu_pool_dual` of the results: at once
    where a back end does so and is faster, else one after the other. Shapes, formats, errors: of those.
    """
    op = "conv_norm_relu_pool_dual"
    inputs = {"x": x} if x_dot is None else {"x": x, "x_dot": x_dot}
    check_convolution(op, padding, inputs, {"weight": weight, "weight_dot": weight_dot}, 1)
    row = op if y is None else "conv_norm_relu_pool_tangent"
    fused = dispatch.fused_implementation_of(op, x, weight, padding, precision, row)
    if fused is not None:
        check_tensors(op, x, with_dots(affine, affine_dot), (len(weight),), dtype=accumulator(x.dtype))
        if y is not None:
            check_correlation(op, padding, inputs, {"y": y})
        return fused(x, x_dot, weight, weight_dot, affine, affine_dot, padding, eps, y=y)  # type: ignore[no-any-return]
    if y is None:
        y, y_dot = conv3x3_dual(x, x_dot, weight, weight_dot, padding, precision)
    else:
        y_dot = conv3x3_tangent(x, x_dot, weight, weight_dot, padding, precision)
    p, p_dot, stats = norm_relu_pool_dual(y, y_dot, affine, affine_dot, eps)
    return p, p_dot, Activations(x, x_dot, y, y_dot, stats)


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
    """Return of a whole block x̄ (None unless wanted), x̄̇ (B, C, H, W), W̄̇ (K, C, 3, 3), γ̄̇ and β̄̇ (K,).

    `activations` are those that `conv_norm_relu_pool_dual` returned. They are taken, so that each tensor is freed as soon
    as it is needed no more. The operation is `norm_relu_pool_dual_backward`, then `conv3x3_dual_weight_gradient` and
    `conv3x3_dual_input_gradient`: at once, without ever storing ȳ and ȳ̇, where a back end does so and is faster, else
    one after the other. Shapes, formats, errors: of those.
    """
    op = "conv_norm_relu_pool_dual_backward"
    if activations.is_empty:
        raise ValueError(f"{op}: expected the activations of one forward, found none left; used twice?")
    if activations.y_dot is None or activations.stats is None:
        raise ValueError(
            f"{op}: expected activations of conv_norm_relu_pool_dual, found those of a block without a norm"
        )
    check_convolution(op, padding, {"x": activations.x}, {"weight": weight, "weight_dot": weight_dot}, 1)
    fused = dispatch.fused_implementation_of(op, activations.x, weight, padding, precision)
    if fused is not None:
        channels, pooled = with_dots(affine, affine_dot), {"p_bar": p_bar, "p_bar_dot": p_bar_dot}
        check_planes(op, activations.y, {}, channels, None, pooled)
        return fused(  # type: ignore[no-any-return]
            activations, weight, weight_dot, affine, affine_dot, p_bar, p_bar_dot, padding, wants_x_bar=wants_x_bar
        )
    x, x_dot, y, y_dot, stats = activations.take()
    assert y_dot is not None
    assert stats is not None
    y_bar, y_bar_dot, gamma_bar_dot, beta_bar_dot = norm_relu_pool_dual_backward(
        y, y_dot, stats, affine, affine_dot, p_bar, p_bar_dot, reuse=True
    )
    del y, y_dot
    weight_bar_dot = conv3x3_dual_weight_gradient(x, x_dot, y_bar, y_bar_dot, padding, precision)
    del x, x_dot
    if wants_x_bar:
        x_bar, x_bar_dot = conv3x3_dual_input_gradient(y_bar, y_bar_dot, weight, weight_dot, padding, precision)
        return x_bar, x_bar_dot, weight_bar_dot, gamma_bar_dot, beta_bar_dot
    x_bar_dot = conv3x3_input_gradient_tangent(y_bar, y_bar_dot, weight, weight_dot, padding, precision)
    return None, x_bar_dot, weight_bar_dot, gamma_bar_dot, beta_bar_dot
