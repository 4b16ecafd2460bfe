"""Instance norm, affine, ReLU and 2×2 average pooling in one pass, and what the mixed step needs of its derivatives.

A program owns a block of channels of one sample and walks over their planes three times: mean, variance, result. It walks
in 2×2 windows, so that a thread holds what it pools; an odd last row or column makes windows that are not whole, which
count in the statistics and not in the pool. Where one tile holds the plane, the compiler merges the three walks' loads
into one, so the plane is read once and stays in registers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .configurations import Configuration, configuration
from .entry import architecture, launch, tl, triton
from .planes import Planes, accumulator


@triton.jit
def _block(C: tl.constexpr, CHANNELS: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Sample (int64), channels (CHANNELS, 1, 1) and which of them exist."""
    blocks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    c = (program % blocks) * CHANNELS + tl.arange(0, CHANNELS)[:, None, None]
    return (program // blocks).to(tl.int64), c, c < C


@triton.jit
def _row(
    c: tl.tensor,
    start: tl.tensor,
    ROW: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Where the upper or lower pixels of the windows lie in a sample, and which exist: (CHANNELS, WINDOWS, 2)."""
    window = start + tl.arange(0, WINDOWS)[None, :, None]
    columns: tl.constexpr = (W + 1) // 2
    row = 2 * (window // columns) + ROW
    column = 2 * (window % columns) + tl.arange(0, 2)[None, None, :]
    pixel = row * W + column
    offset = pixel * C + c if CHANNELS_LAST else c * (H * W) + pixel
    return offset, (c < C) & (row < H) & (column < W)


@triton.jit
def _pooled(
    c: tl.tensor,
    start: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Where the pooled values of the windows lie in a sample, and which exist: (CHANNELS, WINDOWS, 1)."""
    window = start + tl.arange(0, WINDOWS)[None, :, None]
    columns: tl.constexpr = (W + 1) // 2
    row = window // columns
    column = window % columns
    pixel = row * (W // 2) + column
    offset = pixel * C + c if CHANNELS_LAST else c * ((H // 2) * (W // 2)) + pixel
    return offset, (c < C) & (row < H // 2) & (column < W // 2)


@triton.jit
def _load_windows(
    pointer: tl.tensor,
    ACC: tl.constexpr,
    c: tl.tensor,
    start: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Both rows, in ACC. They are loaded before anything is stored, or the loads of two walks could not be merged."""
    upper, upper_mask = _row(c, start, 0, C, H, W, CHANNELS_LAST, WINDOWS)
    lower, lower_mask = _row(c, start, 1, C, H, W, CHANNELS_LAST, WINDOWS)
    return tl.load(pointer + upper, upper_mask, 0).to(ACC), tl.load(pointer + lower, lower_mask, 0).to(ACC)


@triton.jit
def _sum(tile: tl.tensor) -> tl.tensor:
    """(CHANNELS, WINDOWS, 2) -> (CHANNELS, 1, 1)."""
    return tl.sum(tl.sum(tile, 2, keep_dims=True), 1, keep_dims=True)


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
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> None:
    ACC: tl.constexpr = mean.dtype.element_ty
    TOTAL: tl.constexpr = ((H + 1) // 2) * ((W + 1) // 2)
    sample, c, exists = _block(C, CHANNELS)
    y += sample * (C * H * W)
    p += sample * (C * (H // 2) * (W // 2))

    total = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
    for start in range(0, TOTAL, WINDOWS):
        ys = _load_windows(y, ACC, c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        total += ys[0] + ys[1]
    mu = _sum(total) / (H * W)

    total = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
    for start in range(0, TOTAL, WINDOWS):
        ys = _load_windows(y, ACC, c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        for row in tl.static_range(2):
            _, mask = _row(c, start, row, C, H, W, CHANNELS_LAST, WINDOWS)
            deviation = tl.where(mask, ys[row] - mu, 0)
            total += deviation * deviation
    r = 1 / tl.sqrt(_sum(total) / (H * W) + EPS)

    g = tl.load(gamma + c, exists, 0).to(ACC)
    b = tl.load(beta + c, exists, 0).to(ACC)
    for start in range(0, TOTAL, WINDOWS):
        ys = _load_windows(y, ACC, c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        pooled = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
        for row in tl.static_range(2):
            u = g * ((ys[row] - mu) * r) + b
            pooled += tl.where(u > 0, u, 0)
        offset, mask = _pooled(c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        tl.store(p + offset, tl.sum(pooled, 2, keep_dims=True) * 0.25, mask)
    tl.store(mean + sample * C + c, mu, exists)
    tl.store(rstd + sample * C + c, r, exists)


@triton.jit
def _backward(
    y: tl.tensor,  # (B, C, H, W)
    mean: tl.tensor,  # (B, C)
    rstd: tl.tensor,
    gamma: tl.tensor,  # (C,)
    beta: tl.tensor,
    p_bar: tl.tensor,  # (B, C, H//2, W//2)
    y_bar: tl.tensor,  # (B, C, H, W)
    gamma_bar: tl.tensor,  # (B, C): the sum over samples is the caller's
    beta_bar: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> None:
    ACC: tl.constexpr = mean.dtype.element_ty
    TOTAL: tl.constexpr = ((H + 1) // 2) * ((W + 1) // 2)
    sample, c, exists = _block(C, CHANNELS)
    y += sample * (C * H * W)
    y_bar += sample * (C * H * W)
    p_bar += sample * (C * (H // 2) * (W // 2))
    plane = sample * C + c
    mu = tl.load(mean + plane, exists, 0)
    r = tl.load(rstd + plane, exists, 0)
    g = tl.load(gamma + c, exists, 0).to(ACC)
    b = tl.load(beta + c, exists, 0).to(ACC)

    beta_sum = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
    gamma_sum = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
    for start in range(0, TOTAL, WINDOWS):
        ys = _load_windows(y, ACC, c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        # Zero outside the pool, so windows that are not whole add nothing to the sums.
        offset, mask = _pooled(c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        share = tl.load(p_bar + offset, mask, 0).to(ACC) * 0.25
        for row in tl.static_range(2):
            h = (ys[row] - mu) * r
            u_bar = tl.where(g * h + b > 0, share, 0)
            beta_sum += u_bar
            gamma_sum += u_bar * h
    beta_total = _sum(beta_sum)
    gamma_total = _sum(gamma_sum)
    h_bar_mean = g * beta_total / (H * W)
    hh_bar_mean = g * gamma_total / (H * W)

    for start in range(0, TOTAL, WINDOWS):
        ys = _load_windows(y, ACC, c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        offset, mask = _pooled(c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        share = tl.load(p_bar + offset, mask, 0).to(ACC) * 0.25
        for row in tl.static_range(2):
            h = (ys[row] - mu) * r
            u_bar = tl.where(g * h + b > 0, share, 0)
            offset, mask = _row(c, start, row, C, H, W, CHANNELS_LAST, WINDOWS)
            tl.store(y_bar + offset, r * (g * u_bar - h_bar_mean - h * hh_bar_mean), mask)
    tl.store(gamma_bar + plane, gamma_total, exists)
    tl.store(beta_bar + plane, beta_total, exists)


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
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> None:
    ACC: tl.constexpr = mean.dtype.element_ty
    TOTAL: tl.constexpr = ((H + 1) // 2) * ((W + 1) // 2)
    sample, c, exists = _block(C, CHANNELS)
    y += sample * (C * H * W)
    y_dot += sample * (C * H * W)
    p += sample * (C * (H // 2) * (W // 2))
    p_dot += sample * (C * (H // 2) * (W // 2))

    total = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
    total_dot = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
    for start in range(0, TOTAL, WINDOWS):
        ys = _load_windows(y, ACC, c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        yds = _load_windows(y_dot, ACC, c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        total += ys[0] + ys[1]
        total_dot += yds[0] + yds[1]
    mu = _sum(total) / (H * W)
    mu_dot = _sum(total_dot) / (H * W)

    total = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
    total_dot = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
    for start in range(0, TOTAL, WINDOWS):
        ys = _load_windows(y, ACC, c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        yds = _load_windows(y_dot, ACC, c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        for row in tl.static_range(2):
            _, mask = _row(c, start, row, C, H, W, CHANNELS_LAST, WINDOWS)
            deviation = tl.where(mask, ys[row] - mu, 0)
            total += deviation * deviation
            total_dot += deviation * (yds[row] - mu_dot)  # E[h] = 0: the same sum, with less to cancel
    r = 1 / tl.sqrt(_sum(total) / (H * W) + EPS)
    h_y_dot = r * (_sum(total_dot) / (H * W))

    g = tl.load(gamma + c, exists, 0).to(ACC)
    b = tl.load(beta + c, exists, 0).to(ACC)
    g_dot = tl.load(gamma_dot + c, exists, 0).to(ACC)
    b_dot = tl.load(beta_dot + c, exists, 0).to(ACC)
    for start in range(0, TOTAL, WINDOWS):
        ys = _load_windows(y, ACC, c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        yds = _load_windows(y_dot, ACC, c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        pooled = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
        pooled_dot = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
        for row in tl.static_range(2):
            h = (ys[row] - mu) * r
            h_dot = r * (yds[row] - mu_dot - h * h_y_dot)
            u = g * h + b
            pooled += tl.where(u > 0, u, 0)
            pooled_dot += tl.where(u > 0, g_dot * h + g * h_dot + b_dot, 0)
        offset, mask = _pooled(c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        tl.store(p + offset, tl.sum(pooled, 2, keep_dims=True) * 0.25, mask)
        tl.store(p_dot + offset, tl.sum(pooled_dot, 2, keep_dims=True) * 0.25, mask)
    plane = sample * C + c
    tl.store(mean + plane, mu, exists)
    tl.store(rstd + plane, r, exists)
    tl.store(k1 + plane, mu_dot, exists)
    tl.store(k2 + plane, h_y_dot, exists)


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
    gamma_bar_dot: tl.tensor,  # (B, C): the sum over samples is the caller's
    beta_bar_dot: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> None:
    ACC: tl.constexpr = mean.dtype.element_ty
    TOTAL: tl.constexpr = ((H + 1) // 2) * ((W + 1) // 2)
    sample, c, exists = _block(C, CHANNELS)
    y += sample * (C * H * W)
    y_dot += sample * (C * H * W)
    y_bar += sample * (C * H * W)
    y_bar_dot += sample * (C * H * W)
    p_bar += sample * (C * (H // 2) * (W // 2))
    p_bar_dot += sample * (C * (H // 2) * (W // 2))
    plane = sample * C + c
    mu = tl.load(mean + plane, exists, 0)
    r = tl.load(rstd + plane, exists, 0)
    mu_dot = tl.load(k1 + plane, exists, 0)
    h_y_dot = tl.load(k2 + plane, exists, 0)
    g = tl.load(gamma + c, exists, 0).to(ACC)
    b = tl.load(beta + c, exists, 0).to(ACC)
    g_dot = tl.load(gamma_dot + c, exists, 0).to(ACC)

    # Everything that the tangent needs of a plane follows from four sums: of ū, ūh, ū̇ and ū̇h + ūḣ.
    beta_sum = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
    gamma_sum = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
    beta_sum_dot = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
    gamma_sum_dot = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
    for start in range(0, TOTAL, WINDOWS):
        ys = _load_windows(y, ACC, c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        yds = _load_windows(y_dot, ACC, c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        offset, mask = _pooled(c, start, C, H, W, CHANNELS_LAST, WINDOWS)
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
    beta_total = _sum(beta_sum)
    gamma_total = _sum(gamma_sum)
    beta_total_dot = _sum(beta_sum_dot)
    gamma_total_dot = _sum(gamma_sum_dot)
    h_bar_mean = g * beta_total / (H * W)
    along = g * gamma_total / (H * W)
    h_bar_mean_dot = (g_dot * beta_total + g * beta_total_dot) / (H * W)
    along_dot = (g_dot * gamma_total + g * gamma_total_dot) / (H * W)

    for start in range(0, TOTAL, WINDOWS):
        ys = _load_windows(y, ACC, c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        yds = _load_windows(y_dot, ACC, c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        offset, mask = _pooled(c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        share = tl.load(p_bar + offset, mask, 0).to(ACC) * 0.25
        share_dot = tl.load(p_bar_dot + offset, mask, 0).to(ACC) * 0.25
        for row in tl.static_range(2):
            h = (ys[row] - mu) * r
            h_dot = r * (yds[row] - mu_dot - h * h_y_dot)
            active = g * h + b > 0
            u_bar = tl.where(active, share, 0)
            u_bar_dot = tl.where(active, share_dot, 0)
            q = g * u_bar - h_bar_mean - h * along
            q_dot = g_dot * u_bar + g * u_bar_dot - h_bar_mean_dot - h_dot * along - h * along_dot
            offset, mask = _row(c, start, row, C, H, W, CHANNELS_LAST, WINDOWS)
            tl.store(y_bar + offset, r * q, mask)
            tl.store(y_bar_dot + offset, r * (q_dot - r * h_y_dot * q), mask)  # the derivative of r is −r² k2
    tl.store(gamma_bar_dot + plane, gamma_total_dot, exists)
    tl.store(beta_bar_dot + plane, beta_total_dot, exists)


def norm_relu_pool(y: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool`. mean and rstd are float32 for bfloat16 `y`, here and below."""
    planes = Planes.of(y)
    p = _empty_pool(y, planes)
    mean, rstd = (_empty_numbers(y) for _ in range(2))
    _launch(_forward, "norm_relu_pool", planes, y, gamma, beta, p, mean, rstd, EPS=eps)
    return p, mean, rstd


def norm_relu_pool_backward(
    y: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, p_bar: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool_backward`."""
    planes = Planes.of(y, p_bar)
    y_bar = torch.empty_like(y)
    gamma_bar, beta_bar = (_empty_numbers(y) for _ in range(2))
    arguments = (y, mean, rstd, gamma, beta, p_bar, y_bar, gamma_bar, beta_bar)
    _launch(_backward, "norm_relu_pool_backward", planes, *arguments)
    return y_bar, gamma_bar.sum(0), beta_bar.sum(0)


def norm_relu_pool_dual(
    y: Tensor, y_dot: Tensor, gamma: Tensor, beta: Tensor, gamma_dot: Tensor, beta_dot: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool_dual`."""
    planes = Planes.of(y, y_dot)
    p, p_dot = (_empty_pool(y, planes) for _ in range(2))
    mean, rstd, k1, k2 = (_empty_numbers(y) for _ in range(4))
    arguments = (y, y_dot, gamma, beta, gamma_dot, beta_dot, p, p_dot, mean, rstd, k1, k2)
    _launch(_dual, "norm_relu_pool_dual", planes, *arguments, EPS=eps)
    return p, p_dot, mean, rstd, k1, k2


def norm_relu_pool_dual_backward(
    y: Tensor,
    y_dot: Tensor,
    mean: Tensor,
    rstd: Tensor,
    k1: Tensor,
    k2: Tensor,
    gamma: Tensor,
    beta: Tensor,
    gamma_dot: Tensor,
    beta_dot: Tensor,
    p_bar: Tensor,
    p_bar_dot: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool_dual_backward`. `beta_dot` moves no gradient of this operation."""
    planes = Planes.of(y, y_dot, p_bar, p_bar_dot)
    y_bar, y_bar_dot = torch.empty_like(y), torch.empty_like(y)
    gamma_bar_dot, beta_bar_dot = (_empty_numbers(y) for _ in range(2))
    numbers = (mean, rstd, k1, k2, gamma, beta, gamma_dot)
    results = (y_bar, y_bar_dot, gamma_bar_dot, beta_bar_dot)
    _launch(_dual_backward, "norm_relu_pool_dual_backward", planes, y, y_dot, *numbers, p_bar, p_bar_dot, *results)
    return y_bar, y_bar_dot, gamma_bar_dot.sum(0), beta_bar_dot.sum(0)


def _empty_pool(y: Tensor, planes: Planes) -> Tensor:
    return planes.empty(y, planes.channels, planes.height // 2, planes.width // 2)


def _empty_numbers(y: Tensor) -> Tensor:
    return torch.empty(y.shape[:2], dtype=accumulator(y.dtype), device=y.device)


def _launch(kernel: Any, operation: str, planes: Planes, y: Tensor, *rest: Tensor, **constants: float) -> None:
    row = _configuration(operation, planes, architecture(y.device))
    launch(
        kernel,
        planes.samples * triton.cdiv(planes.channels, row["CHANNELS"]),
        y,
        *rest,
        **constants,
        C=planes.channels,
        H=planes.height,
        W=planes.width,
        CHANNELS_LAST=planes.channels_last,
        **row,
    )


def _configuration(operation: str, planes: Planes, architecture: str) -> Configuration:
    """One row for each format and number of windows, which is rounded up to a power of four."""
    windows = triton.cdiv(planes.height, 2) * triton.cdiv(planes.width, 2)
    size = next(size for size in (16, 64, 256, 1024, 4096) if windows <= size or size == 4096)
    return configuration(operation, f"{str(planes.memory_format)[6:]}-{size}", architecture)
