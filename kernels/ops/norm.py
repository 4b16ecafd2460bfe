"""Normalise each plane, take ReLU and pool 2×2, with derivatives: the end of a block with an instance norm."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..checks import check_planes
from ..types import Affine, Convolved, PlaneStats, planes_of


def norm_relu_pool(y: Convolved, affine: Affine, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return 2×2 averages of relu(γ h + β), with h = `y` normalised over each plane, and the planes' mean and rstd.

    `y` (B, C, H, W), contiguous or channels_last, as is p (B, C, H//2, W//2); γ, β (C,) are `affine`; mean, rstd (B, C).
    rstd is 1/√(variance + eps). An odd last row or column counts in the statistics and is not pooled.

    Planes from a convolution, such as y, may be partial sums (`PartialPlanes`), which are added up and stored in the tensor that
    `planes_of` returns. All are of one floating dtype and device; if planes are float16 or bfloat16, the statistics, γ and β are
    float32. Raises `ValueError` for anything else.
    """
    check_planes("norm_relu_pool", planes_of(y), planes={"y": y}, channels=affine._asdict())
    implementation = dispatch.implementation_of("norm_relu_pool", planes_of(y))
    p, mean, rstd = implementation(dispatch.readable(y), affine, eps)
    return p, mean, rstd


def norm_relu_pool_backward(
    y: Tensor, mean: Tensor, rstd: Tensor, affine: Affine, p_bar: Convolved, *, reuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient ȳ (B, C, H, W) and summands (S, C) of γ̄ and β̄, given the gradient `p_bar` (B, C, H//2, W//2).

    The other arguments are the arguments and results of `norm_relu_pool`. `p_bar` may be partial sums. ReLU's derivative at 0 is
    0. With `reuse`, ȳ may be written over `y`. Raises `ValueError` as `norm_relu_pool` does.
    """
    op, stats = "norm_relu_pool_backward", {"mean": mean, "rstd": rstd}
    check_planes(op, y, {"y": y}, affine._asdict(), stats, {"p_bar": p_bar})
    implementation = dispatch.implementation_of(op, y)
    y_bar, gamma_bar, beta_bar = implementation(y, mean, rstd, affine, dispatch.readable(p_bar), reuse)
    return y_bar, gamma_bar, beta_bar


def norm_relu_pool_dual(
    y: Convolved, y_dot: Convolved, affine: Affine, affine_dot: Affine, eps: float
) -> tuple[Tensor, Tensor, PlaneStats]:
    """Return p, its derivative ṗ in the direction (`y_dot`, `affine_dot`), and the statistics for the backward.

    `y` and `y_dot` may be partial sums. Shapes, formats and errors are those of `norm_relu_pool`.
    """
    op = "norm_relu_pool_dual"
    check_planes(op, planes_of(y), {"y": y, "y_dot": y_dot}, with_dots(affine, affine_dot))
    implementation = dispatch.implementation_of(op, planes_of(y))
    p, p_dot, stats = implementation(dispatch.readable(y), dispatch.readable(y_dot), affine, affine_dot, eps)
    return p, p_dot, stats


def norm_relu_pool_dual_backward(
    y: Tensor,
    y_dot: Tensor,
    stats: PlaneStats,
    affine: Affine,
    affine_dot: Affine,
    p_bar: Convolved,
    p_bar_dot: Convolved,
    *,
    reuse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradient ȳ and its derivative ȳ̇ (B, C, H, W), and summands (S, C) of γ̄̇ and β̄̇.

    The arguments are those of `norm_relu_pool_dual`, the statistics that it returned, and the gradient `p_bar`
    (B, C, H//2, W//2) with its derivative `p_bar_dot`, which may be partial sums. With `reuse`, ȳ and ȳ̇ may be written over
    `y` and `y_dot`. Shapes, formats and errors are those of `norm_relu_pool`.
    """
    op = "norm_relu_pool_dual_backward"
    check_planes(
        op,
        y,
        planes={"y": y, "y_dot": y_dot},
        channels=with_dots(affine, affine_dot),
        stats=stats._asdict(),
        pooled={"p_bar": p_bar, "p_bar_dot": p_bar_dot},
    )
    implementation = dispatch.implementation_of(op, y)
    y_bar, y_bar_dot, gamma_bar_dot, beta_bar_dot = implementation(
        y, y_dot, stats, affine, affine_dot, dispatch.readable(p_bar), dispatch.readable(p_bar_dot), reuse
    )
    return y_bar, y_bar_dot, gamma_bar_dot, beta_bar_dot


def with_dots(affine: Affine, affine_dot: Affine) -> dict[str, Tensor]:
    """Return γ, β and their derivatives, under their names in error messages."""
    return affine._asdict() | {f"{name}_dot": value for name, value in affine_dot._asdict().items()}
