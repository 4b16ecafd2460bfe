"""Compute `bias_relu_pool` and its derivatives in plain torch."""

from __future__ import annotations

from torch import Tensor

from .planes import per_channel, planes_like, pool, unpool

# u = y + β, z = max(u, 0), p = 2×2 means of z: the same block without its norm. All is linear except for the mask of the ReLU,
# so the derivatives need y and β only for the mask.


def bias_relu_pool(y: Tensor, beta: Tensor) -> Tensor:
    """Return p (B, C, H//2, W//2). `y`: (B, C, H, W); `beta`: (C,)."""
    u = y + per_channel(beta)
    return pool(u.relu(), y)


def bias_relu_pool_backward(y: Tensor, beta: Tensor, p_bar: Tensor, reuse: bool = False) -> tuple[Tensor, Tensor]:
    """Return ȳ (B, C, H, W) and β̄ (B, C), one summand per sample. `p_bar`: (B, C, H//2, W//2). `reuse` is ignored."""
    y_bar = unpool(p_bar, y) * (y + per_channel(beta) > 0)
    return planes_like(y, y_bar), y_bar.sum((2, 3))


def bias_relu_pool_dual(y: Tensor, y_dot: Tensor, beta: Tensor, beta_dot: Tensor) -> tuple[Tensor, Tensor]:
    """Return p, ṗ (B, C, H//2, W//2)."""
    u_dot = y_dot + per_channel(beta_dot)
    return bias_relu_pool(y, beta), pool(u_dot * (y + per_channel(beta) > 0), y)


def bias_relu_pool_dual_backward(
    y: Tensor, beta: Tensor, p_bar: Tensor, p_bar_dot: Tensor, reuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ȳ, ȳ̇ (B, C, H, W) and β̄̇ (B, C), the last two the derivatives of the results of `bias_relu_pool_backward`."""
    y_bar, _ = bias_relu_pool_backward(y, beta, p_bar)
    y_bar_dot, beta_bar_dot = bias_relu_pool_backward(y, beta, p_bar_dot)
    return y_bar, y_bar_dot, beta_bar_dot
