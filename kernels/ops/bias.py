"""Add a bias, take ReLU and pool 2×2, with derivatives: the end of a block without a norm."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..checks import check_planes
from ..types import Convolved
from .conv import add_planes


def bias_relu_pool(y: Convolved, beta: Tensor) -> Tensor:
    """Return 2×2 averages of relu(y + β) (B, C, H//2, W//2): `norm_relu_pool` without the norm.

    `y` (B, C, H, W), contiguous or channels_last, as is the result; `beta` (C,). An odd last row or column is not pooled. All of
    one floating dtype and device; if planes are float16 or bfloat16, β is float32. Planes from a convolution may be partial sums,
    which are added up, as in `norm_relu_pool`. Raises `ValueError` for anything else.
    """
    (y,) = add_planes(y)
    check_planes("bias_relu_pool", y, planes={"y": y}, channels={"beta": beta})
    p: Tensor = dispatch.implementation_of("bias_relu_pool", y)(y, beta)
    return p


def bias_relu_pool_backward(y: Tensor, beta: Tensor, p_bar: Convolved, *, reuse: bool = False) -> tuple[Tensor, Tensor]:
    """Return the gradient ȳ (B, C, H, W) and summands (S, C) of β̄, given the gradient `p_bar` (B, C, H//2, W//2).

    `y` and `beta` are those of `bias_relu_pool`. ReLU's derivative at 0 is 0. With `reuse`, ȳ may be written over `y`.
    Raises `ValueError` as `bias_relu_pool` does.
    """
    (p_bar,) = add_planes(p_bar)
    check_planes("bias_relu_pool_backward", y, {"y": y}, {"beta": beta}, pooled={"p_bar": p_bar})
    y_bar, beta_bar = dispatch.implementation_of("bias_relu_pool_backward", y)(y, beta, p_bar, reuse)
    return y_bar, beta_bar


def bias_relu_pool_dual(y: Convolved, y_dot: Convolved, beta: Tensor, beta_dot: Tensor) -> tuple[Tensor, Tensor]:
    """Return p and its derivative ṗ in the direction (`y_dot`, `beta_dot`). All else is as in `bias_relu_pool`."""
    y, y_dot = add_planes(y, y_dot)
    check_planes("bias_relu_pool_dual", y, {"y": y, "y_dot": y_dot}, {"beta": beta, "beta_dot": beta_dot})
    p, p_dot = dispatch.implementation_of("bias_relu_pool_dual", y)(y, y_dot, beta, beta_dot)
    return p, p_dot


def bias_relu_pool_dual_backward(
    y: Tensor, beta: Tensor, p_bar: Convolved, p_bar_dot: Convolved, *, reuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient ȳ and its derivative ȳ̇ (B, C, H, W), and summands (S, C) of β̄̇, the derivative of β's gradient.

    `p_bar` (B, C, H//2, W//2) is the gradient of p and `p_bar_dot` its derivative. ẏ and β̇ are not needed, since the operation
    is linear between ReLU's kinks. With `reuse`, ȳ may be written over `y`. Shapes, formats and errors are those of
    `bias_relu_pool`.
    """
    p_bar, p_bar_dot = add_planes(p_bar, p_bar_dot)
    pooled = {"p_bar": p_bar, "p_bar_dot": p_bar_dot}
    check_planes("bias_relu_pool_dual_backward", y, {"y": y}, {"beta": beta}, pooled=pooled)
    y_bar, y_bar_dot, beta_bar_dot = dispatch.implementation_of("bias_relu_pool_dual_backward", y)(
        y, beta, p_bar, p_bar_dot, reuse
    )
    return y_bar, y_bar_dot, beta_bar_dot
