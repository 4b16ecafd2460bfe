"""Normalise, scale, take ReLU and average-pool 2×2, with derivatives.

The kernels are those of norm_single_pass.py if one tile holds a plane, and those of norm_three_passes.py for larger planes.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..types import Affine, Convolved, PartialPlanes, PlaneStats, planes_of
from . import norm_single_pass, norm_three_passes
from .channels_last_planes import by_channels_last, fits, tile_of
from .configurations import Configuration
from .planes import Planes, empty_pool, empty_stat, output_buffer


@by_channels_last
def norm_relu_pool(y: Convolved, affine: Affine, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool`."""
    whole = planes_of(y)
    planes = Planes.from_tensors(whole)
    p = empty_pool(whole, planes)
    mean, rstd = (empty_stat(whole) for _ in range(2))
    kernels, tile = _kernels_and_tile("norm_relu_pool", planes, y)
    kernels.forward(planes, tile, y, None, mean, rstd, None, None, *affine, None, None, p, None, eps=eps)
    return p, mean, rstd


@by_channels_last
def norm_relu_pool_backward(
    y: Tensor, mean: Tensor, rstd: Tensor, affine: Affine, p_bar: Convolved, reuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool_backward`."""
    planes = Planes.from_tensors(y, planes_of(p_bar))
    y_bar = output_buffer(y, reuse)
    kernels, tile = _kernels_and_tile("norm_relu_pool_backward", planes, p_bar)
    arguments = (y, None, mean, rstd, None, None, *affine, None)
    bars = {"p_bar": p_bar, "p_bar_dot": None, "y_bar": y_bar, "y_bar_dot": None}
    beta_sums, gamma_sums = kernels.backward(planes, tile, *arguments, **bars).unbind(1)
    return y_bar, gamma_sums, beta_sums


@by_channels_last
def norm_relu_pool_dual(
    y: Convolved, y_dot: Convolved, affine: Affine, affine_dot: Affine, eps: float
) -> tuple[Tensor, Tensor, PlaneStats]:
    """See `mtt_fast.kernels.norm_relu_pool_dual`."""
    whole = planes_of(y)
    planes = Planes.from_tensors(whole, planes_of(y_dot))
    p, p_dot = planes.empty_pair(whole, planes.channels, planes.height // 2, planes.width // 2)
    stats = PlaneStats(*(empty_stat(whole) for _ in range(4)))
    kernels, tile = _kernels_and_tile("norm_relu_pool_dual", planes, y, y_dot)
    kernels.forward(planes, tile, y, y_dot, *stats, *affine, *affine_dot, p, p_dot, eps=eps)
    return p, p_dot, stats


@by_channels_last
def norm_relu_pool_dual_backward(
    y: Tensor,
    y_dot: Tensor,
    stats: PlaneStats,
    affine: Affine,
    affine_dot: Affine,
    p_bar: Convolved,
    p_bar_dot: Convolved,
    reuse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool_dual_backward`. No gradient of this operation depends on β̇."""
    planes = Planes.from_tensors(y, y_dot, planes_of(p_bar), planes_of(p_bar_dot))
    y_bar, y_bar_dot = output_buffer(y, reuse), output_buffer(y_dot, reuse)
    arguments = (y, y_dot, *stats, *affine, affine_dot.gamma)
    kernels, tile = _kernels_and_tile("norm_relu_pool_dual_backward", planes, p_bar, p_bar_dot)
    bars = {"p_bar": p_bar, "p_bar_dot": p_bar_dot, "y_bar": y_bar, "y_bar_dot": y_bar_dot}
    sums = kernels.backward(planes, tile, *arguments, **bars)
    beta_sums_dot, gamma_sums_dot = sums[:, 2:].unbind(1)
    return y_bar, y_bar_dot, gamma_sums_dot, beta_sums_dot


def _kernels_and_tile(operation: str, planes: Planes, *read: Convolved) -> tuple[ModuleType, Configuration]:
    """Return the module whose kernels compute `operation`, and the tile of the table that decides it.

    `read` are the planes that the operation reads first, perhaps as partial sums.
    """
    partial = any(isinstance(each, PartialPlanes) for each in read)
    tile = tile_of(operation, planes, planes_of(read[0]), partial)
    return (norm_single_pass if fits(planes, tile) else norm_three_passes), tile
