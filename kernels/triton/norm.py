"""Normalise, scale, take ReLU and average-pool 2×2, with derivatives.

For channels_last planes, this module calls the kernels of norm_three_passes.py if the planes are large, and those of
norm_single_pass.py if one tile holds a plane. The kernels here are for contiguous planes. A program loops over the planes of its
channels three times: for the mean, the variance and the result. It loads the windows of contiguous_planes.py. Incomplete windows
count in the statistics and are not pooled. Where one tile holds the plane, the compiler merges the loads of the three loops, so the plane
is read once and stays in registers.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..types import Affine, Convolved, PartialPlanes, PlaneStats, planes_of
from . import norm_single_pass, norm_three_passes
from .channels_last_planes import fits, tile_of
from .configurations import Configuration
from .contiguous_planes import (
    launch_windows,
    load_windows,
    plane_sum,
    pooled_offsets,
    program_block,
    row_offsets,
)
from .launch import tl, triton
from .partial_planes import add_planes
from .planes import Planes, empty_pool, empty_stat, output_buffer


@triton.jit
def _forward(
    y: tl.tensor,  # (B, C, H, W)
    gamma: tl.tensor,  # (C,)
    beta: tl.tensor,
    p: tl.tensor,  # (B, C, H//2, W//2)
    mean: tl.tensor,  # (B, C)
    rstd: tl.tensor,
    EPS: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> None:
    """Store p, mean and rstd of contiguous planes."""
    ACC: tl.constexpr = mean.dtype.element_ty
    TOTAL: tl.constexpr = ((H + 1) // 2) * ((W + 1) // 2)
    sample, c, channel_mask = program_block(C, BLOCK_C)
    y += sample * (C * H * W)
    p += sample * (C * (H // 2) * (W // 2))

    total = tl.zeros((BLOCK_C, WINDOWS, 2), ACC)
    for start in range(0, TOTAL, WINDOWS):
        ys = load_windows(y, ACC, c, start, C, H, W, WINDOWS)
        total += ys[0] + ys[1]
    mu = plane_sum(total) / (H * W)

    total = tl.zeros((BLOCK_C, WINDOWS, 2), ACC)
    for start in range(0, TOTAL, WINDOWS):
        ys = load_windows(y, ACC, c, start, C, H, W, WINDOWS)
        for row in tl.static_range(2):
            _, mask = row_offsets(c, start, row, C, H, W, WINDOWS)
            deviation = tl.where(mask, ys[row] - mu, 0)
            total += deviation * deviation
    r = 1 / tl.sqrt(plane_sum(total) / (H * W) + EPS)

    g = tl.load(gamma + c, channel_mask, 0).to(ACC)
    b = tl.load(beta + c, channel_mask, 0).to(ACC)
    for start in range(0, TOTAL, WINDOWS):
        ys = load_windows(y, ACC, c, start, C, H, W, WINDOWS)
        pooled = tl.zeros((BLOCK_C, WINDOWS, 2), ACC)
        for row in tl.static_range(2):
            u = g * ((ys[row] - mu) * r) + b
            pooled += tl.where(u <= 0, 0, u)
        offset, mask = pooled_offsets(c, start, C, H, W, WINDOWS)
        tl.store(p + offset, tl.sum(pooled, 2, keep_dims=True) * 0.25, mask)
    tl.store(mean + sample * C + c, mu, channel_mask)
    tl.store(rstd + sample * C + c, r, channel_mask)


@triton.jit
def _backward(
    y: tl.tensor,  # (B, C, H, W)
    mean: tl.tensor,  # (B, C)
    rstd: tl.tensor,
    gamma: tl.tensor,  # (C,)
    beta: tl.tensor,
    p_bar: tl.tensor,  # (B, C, H//2, W//2)
    y_bar: tl.tensor,  # (B, C, H, W)
    gamma_bar: tl.tensor,  # (B, C): the caller sums over the samples
    beta_bar: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> None:
    """Store ȳ of contiguous planes, and summands of γ̄ and β̄."""
    ACC: tl.constexpr = mean.dtype.element_ty
    TOTAL: tl.constexpr = ((H + 1) // 2) * ((W + 1) // 2)
    sample, c, channel_mask = program_block(C, BLOCK_C)
    y += sample * (C * H * W)
    y_bar += sample * (C * H * W)
    p_bar += sample * (C * (H // 2) * (W // 2))
    plane = sample * C + c
    mu = tl.load(mean + plane, channel_mask, 0)
    r = tl.load(rstd + plane, channel_mask, 0)
    g = tl.load(gamma + c, channel_mask, 0).to(ACC)
    b = tl.load(beta + c, channel_mask, 0).to(ACC)

    beta_sum = tl.zeros((BLOCK_C, WINDOWS, 2), ACC)
    gamma_sum = tl.zeros((BLOCK_C, WINDOWS, 2), ACC)
    for start in range(0, TOTAL, WINDOWS):
        ys = load_windows(y, ACC, c, start, C, H, W, WINDOWS)
        # p̄ loads as zero outside the pooled plane, so incomplete windows add nothing to the sums.
        offset, mask = pooled_offsets(c, start, C, H, W, WINDOWS)
        share = tl.load(p_bar + offset, mask, 0).to(ACC) * 0.25
        for row in tl.static_range(2):
            h = (ys[row] - mu) * r
            u_bar = tl.where(g * h + b > 0, share, 0)
            beta_sum += u_bar
            gamma_sum += u_bar * h
    beta_total = plane_sum(beta_sum)
    gamma_total = plane_sum(gamma_sum)
    h_bar_mean = g * beta_total / (H * W)
    hh_bar_mean = g * gamma_total / (H * W)

    for start in range(0, TOTAL, WINDOWS):
        ys = load_windows(y, ACC, c, start, C, H, W, WINDOWS)
        offset, mask = pooled_offsets(c, start, C, H, W, WINDOWS)
        share = tl.load(p_bar + offset, mask, 0).to(ACC) * 0.25
        for row in tl.static_range(2):
            h = (ys[row] - mu) * r
            u_bar = tl.where(g * h + b > 0, share, 0)
            offset, mask = row_offsets(c, start, row, C, H, W, WINDOWS)
            tl.store(y_bar + offset, r * (g * u_bar - h_bar_mean - h * hh_bar_mean), mask)
    tl.store(gamma_bar + plane, gamma_total, channel_mask)
    tl.store(beta_bar + plane, beta_total, channel_mask)


@triton.jit
def _dual(
    y: tl.tensor,  # (B, C, H, W)
    y_dot: tl.tensor,
    gamma: tl.tensor,  # (C,)
    beta: tl.tensor,
    gamma_dot: tl.tensor,
    beta_dot: tl.tensor,
    p: tl.tensor,  # (B, C, H//2, W//2)
    p_dot: tl.tensor,
    mean: tl.tensor,  # (B, C)
    rstd: tl.tensor,
    k1: tl.tensor,
    k2: tl.tensor,
    EPS: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> None:
    """Store p, ṗ and the statistics of contiguous planes."""
    ACC: tl.constexpr = mean.dtype.element_ty
    TOTAL: tl.constexpr = ((H + 1) // 2) * ((W + 1) // 2)
    sample, c, channel_mask = program_block(C, BLOCK_C)
    y += sample * (C * H * W)
    y_dot += sample * (C * H * W)
    p += sample * (C * (H // 2) * (W // 2))
    p_dot += sample * (C * (H // 2) * (W // 2))

    total = tl.zeros((BLOCK_C, WINDOWS, 2), ACC)
    total_dot = tl.zeros((BLOCK_C, WINDOWS, 2), ACC)
    for start in range(0, TOTAL, WINDOWS):
        ys = load_windows(y, ACC, c, start, C, H, W, WINDOWS)
        yds = load_windows(y_dot, ACC, c, start, C, H, W, WINDOWS)
        total += ys[0] + ys[1]
        total_dot += yds[0] + yds[1]
    mu = plane_sum(total) / (H * W)
    mu_dot = plane_sum(total_dot) / (H * W)

    total = tl.zeros((BLOCK_C, WINDOWS, 2), ACC)
    total_dot = tl.zeros((BLOCK_C, WINDOWS, 2), ACC)
    for start in range(0, TOTAL, WINDOWS):
        ys = load_windows(y, ACC, c, start, C, H, W, WINDOWS)
        yds = load_windows(y_dot, ACC, c, start, C, H, W, WINDOWS)
        for row in tl.static_range(2):
            _, mask = row_offsets(c, start, row, C, H, W, WINDOWS)
            deviation = tl.where(mask, ys[row] - mu, 0)
            total += deviation * deviation
            # subtracting k1 leaves the sum the same, since E[h] = 0, and less cancels
            total_dot += deviation * (yds[row] - mu_dot)
    r = 1 / tl.sqrt(plane_sum(total) / (H * W) + EPS)
    h_y_dot = r * (plane_sum(total_dot) / (H * W))

    g = tl.load(gamma + c, channel_mask, 0).to(ACC)
    b = tl.load(beta + c, channel_mask, 0).to(ACC)
    g_dot = tl.load(gamma_dot + c, channel_mask, 0).to(ACC)
    b_dot = tl.load(beta_dot + c, channel_mask, 0).to(ACC)
    for start in range(0, TOTAL, WINDOWS):
        ys = load_windows(y, ACC, c, start, C, H, W, WINDOWS)
        yds = load_windows(y_dot, ACC, c, start, C, H, W, WINDOWS)
        pooled = tl.zeros((BLOCK_C, WINDOWS, 2), ACC)
        pooled_dot = tl.zeros((BLOCK_C, WINDOWS, 2), ACC)
        for row in tl.static_range(2):
            h = (ys[row] - mu) * r
            h_dot = r * (yds[row] - mu_dot - h * h_y_dot)
            u = g * h + b
            pooled += tl.where(u <= 0, 0, u)
            pooled_dot += tl.where(u <= 0, 0, g_dot * h + g * h_dot + b_dot)
        offset, mask = pooled_offsets(c, start, C, H, W, WINDOWS)
        tl.store(p + offset, tl.sum(pooled, 2, keep_dims=True) * 0.25, mask)
        tl.store(p_dot + offset, tl.sum(pooled_dot, 2, keep_dims=True) * 0.25, mask)
    plane = sample * C + c
    tl.store(mean + plane, mu, channel_mask)
    tl.store(rstd + plane, r, channel_mask)
    tl.store(k1 + plane, mu_dot, channel_mask)
    tl.store(k2 + plane, h_y_dot, channel_mask)


@triton.jit
def _dual_backward(
    y: tl.tensor,  # (B, C, H, W)
    y_dot: tl.tensor,
    mean: tl.tensor,  # (B, C)
    rstd: tl.tensor,
    k1: tl.tensor,
    k2: tl.tensor,
    gamma: tl.tensor,  # (C,)
    beta: tl.tensor,
    gamma_dot: tl.tensor,
    p_bar: tl.tensor,  # (B, C, H//2, W//2)
    p_bar_dot: tl.tensor,
    y_bar: tl.tensor,  # (B, C, H, W)
    y_bar_dot: tl.tensor,
    gamma_bar_dot: tl.tensor,  # (B, C): the caller sums over the samples
    beta_bar_dot: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> None:
    """Store ȳ and ȳ̇ of contiguous planes, and summands of γ̄̇ and β̄̇."""
    ACC: tl.constexpr = mean.dtype.element_ty
    TOTAL: tl.constexpr = ((H + 1) // 2) * ((W + 1) // 2)
    sample, c, channel_mask = program_block(C, BLOCK_C)
    y += sample * (C * H * W)
    y_dot += sample * (C * H * W)
    y_bar += sample * (C * H * W)
    y_bar_dot += sample * (C * H * W)
    p_bar += sample * (C * (H // 2) * (W // 2))
    p_bar_dot += sample * (C * (H // 2) * (W // 2))
    plane = sample * C + c
    mu = tl.load(mean + plane, channel_mask, 0)
    r = tl.load(rstd + plane, channel_mask, 0)
    mu_dot = tl.load(k1 + plane, channel_mask, 0)
    h_y_dot = tl.load(k2 + plane, channel_mask, 0)
    g = tl.load(gamma + c, channel_mask, 0).to(ACC)
    b = tl.load(beta + c, channel_mask, 0).to(ACC)
    g_dot = tl.load(gamma_dot + c, channel_mask, 0).to(ACC)

    # All that the gradients and their derivatives need of a plane follows from four sums: of ū, ūh, ū̇ and ū̇h + ūḣ.
    beta_sum = tl.zeros((BLOCK_C, WINDOWS, 2), ACC)
    gamma_sum = tl.zeros((BLOCK_C, WINDOWS, 2), ACC)
    beta_sum_dot = tl.zeros((BLOCK_C, WINDOWS, 2), ACC)
    gamma_sum_dot = tl.zeros((BLOCK_C, WINDOWS, 2), ACC)
    for start in range(0, TOTAL, WINDOWS):
        ys = load_windows(y, ACC, c, start, C, H, W, WINDOWS)
        yds = load_windows(y_dot, ACC, c, start, C, H, W, WINDOWS)
        # p̄ loads as zero outside the pooled plane, so incomplete windows add nothing to the sums.
        offset, mask = pooled_offsets(c, start, C, H, W, WINDOWS)
        share = tl.load(p_bar + offset, mask, 0).to(ACC) * 0.25
        share_dot = tl.load(p_bar_dot + offset, mask, 0).to(ACC) * 0.25
        for row in tl.static_range(2):
            h = (ys[row] - mu) * r
            h_dot = r * (yds[row] - mu_dot - h * h_y_dot)
            active = g * h + b > 0
            u_bar = tl.where(active, share, 0)
            u_bar_dot = tl.where(active, share_dot, 0)
            beta_sum += u_bar
            gamma_sum += u_bar * h
            beta_sum_dot += u_bar_dot
            gamma_sum_dot += u_bar_dot * h + u_bar * h_dot
    beta_total, gamma_total = plane_sum(beta_sum), plane_sum(gamma_sum)
    beta_total_dot, gamma_total_dot = plane_sum(beta_sum_dot), plane_sum(gamma_sum_dot)
    h_bar_mean = g * beta_total / (H * W)
    hh_bar_mean = g * gamma_total / (H * W)
    h_bar_mean_dot = (g_dot * beta_total + g * beta_total_dot) / (H * W)
    hh_bar_mean_dot = (g_dot * gamma_total + g * gamma_total_dot) / (H * W)

    for start in range(0, TOTAL, WINDOWS):
        ys = load_windows(y, ACC, c, start, C, H, W, WINDOWS)
        yds = load_windows(y_dot, ACC, c, start, C, H, W, WINDOWS)
        offset, mask = pooled_offsets(c, start, C, H, W, WINDOWS)
        share = tl.load(p_bar + offset, mask, 0).to(ACC) * 0.25
        share_dot = tl.load(p_bar_dot + offset, mask, 0).to(ACC) * 0.25
        for row in tl.static_range(2):
            h = (ys[row] - mu) * r
            h_dot = r * (yds[row] - mu_dot - h * h_y_dot)
            active = g * h + b > 0
            u_bar = tl.where(active, share, 0)
            u_bar_dot = tl.where(active, share_dot, 0)
            q = g * u_bar - h_bar_mean - h * hh_bar_mean
            q_dot = g_dot * u_bar + g * u_bar_dot - h_bar_mean_dot - h_dot * hh_bar_mean - h * hh_bar_mean_dot
            offset, mask = row_offsets(c, start, row, C, H, W, WINDOWS)
            tl.store(y_bar + offset, r * q, mask)
            tl.store(y_bar_dot + offset, r * (q_dot - r * h_y_dot * q), mask)  # the derivative of r is −r² k2
    tl.store(gamma_bar_dot + plane, gamma_total_dot, channel_mask)
    tl.store(beta_bar_dot + plane, beta_total_dot, channel_mask)


def norm_relu_pool(y: Convolved, affine: Affine, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool`."""
    whole = planes_of(y)
    planes = Planes.from_tensors(whole)
    p = empty_pool(whole, planes)
    mean, rstd = (empty_stat(whole) for _ in range(2))
    if planes.channels_last:
        kernels, tile = _channels_last_module("norm_relu_pool", planes, y)
        kernels.forward(planes, tile, y, None, mean, rstd, None, None, *affine, None, None, p, None, eps=eps)
    else:
        launch_windows(_forward, "norm_relu_pool", planes, *add_planes(y), *affine, p, mean, rstd, EPS=eps)
    return p, mean, rstd


def norm_relu_pool_backward(
    y: Tensor, mean: Tensor, rstd: Tensor, affine: Affine, p_bar: Convolved, reuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool_backward`."""
    planes = Planes.from_tensors(y, planes_of(p_bar))
    y_bar = output_buffer(y, reuse)
    if planes.channels_last:
        kernels, tile = _channels_last_module("norm_relu_pool_backward", planes, p_bar)
        arguments = (y, None, mean, rstd, None, None, *affine, None)
        bars = {"p_bar": p_bar, "p_bar_dot": None, "y_bar": y_bar, "y_bar_dot": None}
        beta_sums, gamma_sums = kernels.backward(planes, tile, *arguments, **bars).unbind(1)
        return y_bar, gamma_sums, beta_sums
    gamma_sums, beta_sums = (empty_stat(y) for _ in range(2))
    results = (*add_planes(p_bar), y_bar, gamma_sums, beta_sums)
    launch_windows(_backward, "norm_relu_pool_backward", planes, y, mean, rstd, *affine, *results)
    return y_bar, gamma_sums, beta_sums


def norm_relu_pool_dual(
    y: Convolved, y_dot: Convolved, affine: Affine, affine_dot: Affine, eps: float
) -> tuple[Tensor, Tensor, PlaneStats]:
    """See `mtt_fast.kernels.norm_relu_pool_dual`."""
    whole = planes_of(y)
    planes = Planes.from_tensors(whole, planes_of(y_dot))
    p, p_dot = planes.empty_pair(whole, planes.channels, planes.height // 2, planes.width // 2)
    stats = PlaneStats(*(empty_stat(whole) for _ in range(4)))
    if planes.channels_last:
        kernels, tile = _channels_last_module("norm_relu_pool_dual", planes, y, y_dot)
        kernels.forward(planes, tile, y, y_dot, *stats, *affine, *affine_dot, p, p_dot, eps=eps)
    else:
        arguments = (*add_planes(y, y_dot), *affine, *affine_dot, p, p_dot, *stats)
        launch_windows(_dual, "norm_relu_pool_dual", planes, *arguments, EPS=eps)
    return p, p_dot, stats


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
    if planes.channels_last:
        kernels, tile = _channels_last_module("norm_relu_pool_dual_backward", planes, p_bar, p_bar_dot)
        bars = {"p_bar": p_bar, "p_bar_dot": p_bar_dot, "y_bar": y_bar, "y_bar_dot": y_bar_dot}
        sums = kernels.backward(planes, tile, *arguments, **bars)
        beta_sums_dot, gamma_sums_dot = sums[:, 2:].unbind(1)
        return y_bar, y_bar_dot, gamma_sums_dot, beta_sums_dot
    gamma_sums_dot, beta_sums_dot = (empty_stat(y) for _ in range(2))
    results = (*add_planes(p_bar, p_bar_dot), y_bar, y_bar_dot, gamma_sums_dot, beta_sums_dot)
    launch_windows(_dual_backward, "norm_relu_pool_dual_backward", planes, *arguments, *results)
    return y_bar, y_bar_dot, gamma_sums_dot, beta_sums_dot


def _channels_last_module(operation: str, planes: Planes, *read: Convolved) -> tuple[ModuleType, Configuration]:
    """Return the module whose kernels compute `operation` of channels_last planes, and the tile of the table that decides it.

    `read` are the planes that the operation reads first, perhaps as partial sums.
    """
    partial = any(isinstance(each, PartialPlanes) for each in read)
    tile = tile_of(operation, planes, planes_of(read[0]), partial)
    return (norm_single_pass if fits(planes, tile) else norm_three_passes), tile
