"""Compute `norm_relu_pool` and its derivatives in plain torch."""

from __future__ import annotations

from torch import Tensor

from ..types import Affine, PlaneStats
from .planes import per_channel, per_plane, plane_mean, planes_like, pool, unpool, widened

# h = (y − mean) rstd, u = γ h + β, z = max(u, 0), p = 2×2 means of z. No bar or dot of mean and rstd is passed on, since
# a second derivative must take into account how they depend on y.


def norm_relu_pool(y: Tensor, affine: Affine, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return p (B, C, H//2, W//2), mean (B, C), rstd (B, C). `y`: (B, C, H, W)."""
    gamma, beta = affine
    mean, rstd = _statistics(y, eps)
    u = _normalised(y, mean, rstd) * per_channel(gamma) + per_channel(beta)
    return pool(u.relu(), y), mean, rstd


def norm_relu_pool_backward(
    y: Tensor, mean: Tensor, rstd: Tensor, affine: Affine, p_bar: Tensor, reuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ȳ (B, C, H, W), γ̄ and β̄ (B, C), one summand per sample. `p_bar`: (B, C, H//2, W//2). `reuse` is ignored."""
    gamma, beta = affine
    h = _normalised(y, mean, rstd)
    u_bar = unpool(p_bar, y) * (h * per_channel(gamma) + per_channel(beta) > 0)
    h_bar = u_bar * per_channel(gamma)
    y_bar = per_plane(rstd) * (h_bar - plane_mean(h_bar) - h * plane_mean(h * h_bar))
    return planes_like(y, y_bar), (u_bar * h).sum((2, 3)), u_bar.sum((2, 3))


def norm_relu_pool_dual(
    y: Tensor, y_dot: Tensor, affine: Affine, affine_dot: Affine, eps: float
) -> tuple[Tensor, Tensor, PlaneStats]:
    """Return p, ṗ (B, C, H//2, W//2) and the statistics of the planes."""
    (gamma, beta), (gamma_dot, beta_dot) = affine, affine_dot
    mean, rstd = _statistics(y, eps)
    h = _normalised(y, mean, rstd)
    stats = PlaneStats(mean, rstd, k1=widened(y_dot).mean((2, 3)), k2=(h * y_dot).mean((2, 3)))
    h_dot = _normalised_dot(h, y_dot, stats)
    u = h * per_channel(gamma) + per_channel(beta)
    u_dot = h * per_channel(gamma_dot) + h_dot * per_channel(gamma) + per_channel(beta_dot)
    return pool(u.relu(), y), pool(u_dot * (u > 0), y), stats


def norm_relu_pool_dual_backward(
    y: Tensor,
    y_dot: Tensor,
    stats: PlaneStats,
    affine: Affine,
    affine_dot: Affine,
    p_bar: Tensor,
    p_bar_dot: Tensor,
    reuse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ȳ, ȳ̇ (B, C, H, W) and γ̄̇, β̄̇ (B, C), the derivatives of the results of `norm_relu_pool_backward`."""
    (gamma, beta), (gamma_dot, _) = affine, affine_dot  # no gradient of this operation depends on β̇
    rstd = stats.rstd
    h = _normalised(y, stats.mean, rstd)
    h_dot = _normalised_dot(h, y_dot, stats)
    mask = h * per_channel(gamma) + per_channel(beta) > 0
    u_bar, u_bar_dot = unpool(p_bar, y) * mask, unpool(p_bar_dot, y) * mask
    h_bar = u_bar * per_channel(gamma)
    h_bar_dot = u_bar * per_channel(gamma_dot) + u_bar_dot * per_channel(gamma)
    along = plane_mean(h * h_bar)
    q = h_bar - plane_mean(h_bar) - h * along
    q_dot = h_bar_dot - plane_mean(h_bar_dot) - h_dot * along - h * plane_mean(h_dot * h_bar + h * h_bar_dot)
    y_bar = per_plane(rstd) * q
    y_bar_dot = per_plane(rstd) * (q_dot - per_plane(rstd * stats.k2) * q)  # the derivative of rstd is −rstd² k2
    gamma_bar_dot = (u_bar_dot * h + u_bar * h_dot).sum((2, 3))
    return planes_like(y, y_bar), planes_like(y, y_bar_dot), gamma_bar_dot, u_bar_dot.sum((2, 3))


def _statistics(y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = widened(y)
    mean = y.mean((2, 3))
    return mean, ((y - per_plane(mean)).square().mean((2, 3)) + eps).rsqrt()


def _normalised(y: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (y - per_plane(mean)) * per_plane(rstd)


def _normalised_dot(h: Tensor, y_dot: Tensor, stats: PlaneStats) -> Tensor:
    return per_plane(stats.rstd) * (y_dot - per_plane(stats.k1) - h * per_plane(stats.k2))
