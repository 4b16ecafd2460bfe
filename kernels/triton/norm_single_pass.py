"""Normalise, take ReLU and pool channels_last planes that fit in registers, with derivatives. Larger ones: norm_three_passes.py.

A program reads its planes once and starts all loads before the first use. It keeps the planes in the dtype in which they were
loaded, since values of 16 bits take half the registers. One kernel computes the primal's values and, with a direction, their
derivatives. Without a direction, all `_dot` arguments, k1 and k2 are None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Convolved, accumulator, planes_of
from .channels_last_planes import launch_whole_planes, pooled_pixels, program_part, quarter_pixels, sum_four, sum_two
from .configurations import Configuration
from .launch import tl, triton
from .norm_three_passes import coefficients, coefficients_dot
from .partial_planes import load_planes, part_arguments, part_counts
from .planes import Planes


@triton.jit
def _load_quarters(
    planes: tl.tensor,  # of the sample: (H, W, C)
    parts: tl.tensor | None,  # of the sample, if the planes are in COUNT parts of `size` elements
    c: tl.tensor,  # (1, BLOCK_C)
    channel_mask: tl.tensor,
    size: tl.tensor | None,
    COUNT: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    WHOLE: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return the four quarters of all windows of a sample's planes, (WINDOWS, BLOCK_C) each, with partial sums added up."""
    window = tl.arange(0, WINDOWS)[:, None]
    pixel0, mask0 = quarter_pixels(window, 0, H, W, WHOLE)
    pixel1, mask1 = quarter_pixels(window, 1, H, W, WHOLE)
    pixel2, mask2 = quarter_pixels(window, 2, H, W, WHOLE)
    pixel3, mask3 = quarter_pixels(window, 3, H, W, WHOLE)
    return (
        load_planes(planes, parts, pixel0 * C + c, mask0 & channel_mask, size, COUNT, COUNT),
        load_planes(planes, parts, pixel1 * C + c, mask1 & channel_mask, size, COUNT, COUNT),
        load_planes(planes, parts, pixel2 * C + c, mask2 & channel_mask, size, COUNT, COUNT),
        load_planes(planes, parts, pixel3 * C + c, mask3 & channel_mask, size, COUNT, COUNT),
    )


@triton.jit
def _store_quarters(
    planes: tl.tensor,  # of the sample: (H, W, C)
    quarters: tl.tuple,
    c: tl.tensor,  # (1, BLOCK_C)
    channel_mask: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    WHOLE: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> None:
    """Store the four quarters of all windows of a sample's planes."""
    window = tl.arange(0, WINDOWS)[:, None]
    for quarter in tl.static_range(4):
        pixel, mask = quarter_pixels(window, quarter, H, W, WHOLE)
        tl.store(planes + pixel * C + c, quarters[quarter], mask & channel_mask)


@triton.jit
def _window_sum(quarters: tl.tuple, ACC: tl.constexpr) -> tl.tensor:
    """Return the sum of the four quarters, (WINDOWS, BLOCK_C), in ACC."""
    upper = quarters[0].to(ACC) + quarters[1].to(ACC)
    return upper + (quarters[2].to(ACC) + quarters[3].to(ACC))


@triton.jit
def _forward(
    y: tl.tensor,  # (B, H, W, C)
    y_dot: tl.tensor | None,
    mean: tl.tensor,  # (B, C)
    rstd: tl.tensor,
    k1: tl.tensor | None,
    k2: tl.tensor | None,
    gamma: tl.tensor,  # (C,)
    beta: tl.tensor,
    gamma_dot: tl.tensor | None,
    beta_dot: tl.tensor | None,
    p: tl.tensor,  # (B, H//2, W//2, C)
    p_dot: tl.tensor | None,
    parts: tl.tensor | None,  # (COUNT, B, H, W, C): of y; then y is stored
    parts_dot: tl.tensor | None,  # (COUNT_DOT, B, H, W, C): of ẏ
    size: tl.tensor | None,  # elements of a part
    EPS: tl.constexpr,
    COUNT: tl.constexpr,
    COUNT_DOT: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> None:
    """Store p, mean and rstd and, with a direction, ṗ, k1 and k2 of whole planes."""
    ACC: tl.constexpr = mean.dtype.element_ty
    sample, _, c, channel_mask = program_part(1, C, BLOCK_C)
    plane = sample * C + c
    window = tl.arange(0, WINDOWS)[:, None]
    begin = sample * (H * W * C)
    if parts is not None:
        parts += begin
    if parts_dot is not None:
        parts_dot += begin
    ys = _load_quarters(y + begin, parts, c, channel_mask, size, COUNT, C, H, W, WHOLE, WINDOWS)
    if y_dot is not None:
        yds = _load_quarters(y_dot + begin, parts_dot, c, channel_mask, size, COUNT_DOT, C, H, W, WHOLE, WINDOWS)
    if parts is not None:
        _store_quarters(y + begin, ys, c, channel_mask, C, H, W, WHOLE, WINDOWS)
    if parts_dot is not None:
        _store_quarters(y_dot + begin, yds, c, channel_mask, C, H, W, WHOLE, WINDOWS)

    g, b = tl.load(gamma + c, channel_mask, 0).to(ACC), tl.load(beta + c, channel_mask, 0).to(ACC)
    total = tl.zeros((WINDOWS, BLOCK_C), ACC)
    total_dot = tl.zeros((WINDOWS, BLOCK_C), ACC)
    if y_dot is None:
        mu = tl.sum(_window_sum(ys, ACC), 0, keep_dims=True) / (H * W)
    else:
        mu, mu_dot = sum_two(_window_sum(ys, ACC), _window_sum(yds, ACC))
        mu, mu_dot = mu / (H * W), mu_dot / (H * W)
    for quarter in tl.static_range(4):
        _, mask = quarter_pixels(window, quarter, H, W, WHOLE)
        deviation = tl.where(mask, ys[quarter].to(ACC) - mu, 0)
        total += deviation * deviation
        if y_dot is not None:
            # subtracting k1 leaves the sum the same, since E[h] = 0, and less cancels
            total_dot += deviation * (yds[quarter].to(ACC) - mu_dot)
    if y_dot is None:
        square = tl.sum(total, 0, keep_dims=True)
    else:
        square, square_dot = sum_two(total, total_dot)
    r = 1 / tl.sqrt(square / (H * W) + EPS)
    tl.store(mean + plane, mu, channel_mask)
    tl.store(rstd + plane, r, channel_mask)

    pooled = tl.zeros((WINDOWS, BLOCK_C), ACC)
    pooled_dot = tl.zeros((WINDOWS, BLOCK_C), ACC)
    if y_dot is not None:
        h_y_dot = r * (square_dot / (H * W))
        g_dot, b_dot = tl.load(gamma_dot + c, channel_mask, 0).to(ACC), tl.load(beta_dot + c, channel_mask, 0).to(ACC)
        y_dot_factor = g * r  # u̇ = γ̇ h + γ ḣ + β̇, with ḣ = rstd (ẏ − k1 − h k2)
        h_factor = g_dot - y_dot_factor * h_y_dot
        tl.store(k1 + plane, mu_dot, channel_mask)
        tl.store(k2 + plane, h_y_dot, channel_mask)
    for quarter in tl.static_range(4):
        h = (ys[quarter].to(ACC) - mu) * r
        u = g * h + b
        pooled += tl.where(u <= 0, 0, u)
        if y_dot is not None:
            deviation_dot = yds[quarter].to(ACC) - mu_dot
            pooled_dot += tl.where(u <= 0, 0, h_factor * h + (y_dot_factor * deviation_dot + b_dot))
    pixel, mask = pooled_pixels(window, H, W, WHOLE)
    offsets = sample * ((H // 2) * (W // 2) * C) + pixel * C + c
    tl.store(p + offsets, pooled * 0.25, mask & channel_mask)
    if y_dot is not None:
        tl.store(p_dot + offsets, pooled_dot * 0.25, mask & channel_mask)


@triton.jit
def _backward(
    y: tl.tensor,  # (B, H, W, C)
    y_dot: tl.tensor | None,
    mean: tl.tensor,  # (B, C)
    rstd: tl.tensor,
    k1: tl.tensor | None,
    k2: tl.tensor | None,
    gamma: tl.tensor,  # (C,)
    beta: tl.tensor,
    gamma_dot: tl.tensor | None,
    p_bar: tl.tensor,  # (B, H//2, W//2, C)
    p_bar_dot: tl.tensor | None,
    sums: tl.tensor,  # (B, 2 or 4, C)
    y_bar: tl.tensor,  # (B, H, W, C); may be the memory of y
    y_bar_dot: tl.tensor | None,
    parts: tl.tensor | None,  # (COUNT, B, H//2, W//2, C): of p̄; then p̄ is stored
    parts_dot: tl.tensor | None,  # (COUNT_DOT, B, H//2, W//2, C): of p̄̇
    size: tl.tensor | None,  # elements of a part
    COUNT: tl.constexpr,
    COUNT_DOT: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> None:
    """Store ȳ, the sums over planes and, with a direction, ȳ̇ of whole planes."""
    ACC: tl.constexpr = mean.dtype.element_ty
    SUMS: tl.constexpr = 2 if y_dot is None else 4
    sample, _, c, channel_mask = program_part(1, C, BLOCK_C)
    plane = sample * C + c
    window = tl.arange(0, WINDOWS)[:, None]
    pooled, mask = pooled_pixels(window, H, W, WHOLE)
    pooled = sample * ((H // 2) * (W // 2) * C) + pooled * C + c
    ys = _load_quarters(y + sample * (H * W * C), None, c, channel_mask, None, 0, C, H, W, WHOLE, WINDOWS)
    # p̄ loads as zero outside the pooled plane, so incomplete windows add nothing to the sums.
    p_bars = load_planes(p_bar, parts, pooled, mask & channel_mask, size, COUNT, COUNT)
    share = p_bars.to(ACC) * 0.25
    mu, r = tl.load(mean + plane, channel_mask, 0), tl.load(rstd + plane, channel_mask, 0)
    g, b = tl.load(gamma + c, channel_mask, 0).to(ACC), tl.load(beta + c, channel_mask, 0).to(ACC)
    beta_sum = tl.zeros((WINDOWS, BLOCK_C), ACC)
    gamma_sum = tl.zeros((WINDOWS, BLOCK_C), ACC)
    if y_dot is not None:
        yds = _load_quarters(y_dot + sample * (H * W * C), None, c, channel_mask, None, 0, C, H, W, WHOLE, WINDOWS)
        p_bars_dot = load_planes(p_bar_dot, parts_dot, pooled, mask & channel_mask, size, COUNT_DOT, COUNT_DOT)
        share_dot = p_bars_dot.to(ACC) * 0.25
        mu_dot, h_y_dot = tl.load(k1 + plane, channel_mask, 0), tl.load(k2 + plane, channel_mask, 0)
        g_dot = tl.load(gamma_dot + c, channel_mask, 0).to(ACC)
        beta_sum_dot = tl.zeros((WINDOWS, BLOCK_C), ACC)
        gamma_sum_dot = tl.zeros((WINDOWS, BLOCK_C), ACC)
    if parts is not None:
        tl.store(p_bar + pooled, p_bars, mask & channel_mask)
    if parts_dot is not None:
        tl.store(p_bar_dot + pooled, p_bars_dot, mask & channel_mask)
    for quarter in tl.static_range(4):
        h = (ys[quarter].to(ACC) - mu) * r
        active = g * h + b > 0
        u_bar = tl.where(active, share, 0)
        beta_sum += u_bar
        gamma_sum += u_bar * h
        if y_dot is not None:
            h_dot = (yds[quarter].to(ACC) - mu_dot - h * h_y_dot) * r
            u_bar_dot = tl.where(active, share_dot, 0)
            beta_sum_dot += u_bar_dot
            gamma_sum_dot += u_bar_dot * h + u_bar * h_dot

    sums += sample * (SUMS * C) + c
    if y_dot is None:
        beta_total, gamma_total = sum_two(beta_sum, gamma_sum)
    else:
        beta_total, gamma_total, beta_total_dot, gamma_total_dot = sum_four(
            beta_sum, gamma_sum, beta_sum_dot, gamma_sum_dot
        )
    c0, c1, c2 = coefficients(beta_total, gamma_total, r, g, H * W)
    tl.store(sums, beta_total, channel_mask)
    tl.store(sums + C, gamma_total, channel_mask)
    if y_dot is not None:
        d0, d1, d2 = coefficients_dot(
            beta_total, gamma_total, beta_total_dot, gamma_total_dot, r, h_y_dot, g, g_dot, H * W
        )
        tl.store(sums + 2 * C, beta_total_dot, channel_mask)
        tl.store(sums + 3 * C, gamma_total_dot, channel_mask)
    for quarter in tl.static_range(4):
        pixel, mask = quarter_pixels(window, quarter, H, W, WHOLE)
        offsets = sample * (H * W * C) + pixel * C + c
        h = (ys[quarter].to(ACC) - mu) * r
        active = g * h + b > 0
        u_bar = tl.where(active, share, 0)
        tl.store(y_bar + offsets, c0 * u_bar + (c2 * h + c1), mask & channel_mask)
        if y_dot is not None:
            u_bar_dot = tl.where(active, share_dot, 0)
            deviation = yds[quarter].to(ACC) - mu_dot
            value = c0 * u_bar_dot + d0 * u_bar + (d2 * h + (c2 * r * deviation + d1))
            tl.store(y_bar_dot + offsets, value, mask & channel_mask)


def forward(
    planes: Planes, tile: Configuration, y: Convolved, y_dot: Convolved | None, *rest: Tensor | None, eps: float
) -> None:
    """Write the same results as `norm_three_passes.forward`. The kernel itself adds up partial sums of y and ẏ."""
    arguments = (None if y_dot is None else planes_of(y_dot), *rest, *part_arguments(y, y_dot))
    launch_whole_planes(_forward, planes, tile, planes_of(y), *arguments, **part_counts(y, y_dot), EPS=eps)


def backward(
    planes: Planes,
    tile: Configuration,
    y: Tensor,
    *rest: Tensor | None,
    p_bar: Convolved,
    p_bar_dot: Convolved | None,
    y_bar: Tensor,
    y_bar_dot: Tensor | None,
) -> Tensor:
    """Write and return the same results as `norm_three_passes.backward`. The kernel itself adds up partial sums of p̄ and p̄̇."""
    shape = (planes.samples, 2 if y_bar_dot is None else 4, planes.channels)
    sums = torch.empty(shape, dtype=accumulator(y.dtype), device=y.device)
    bars = (planes_of(p_bar), None if p_bar_dot is None else planes_of(p_bar_dot))
    arguments = (*rest, *bars, sums, y_bar, y_bar_dot, *part_arguments(p_bar, p_bar_dot))
    launch_whole_planes(_backward, planes, tile, y, *arguments, **part_counts(p_bar, p_bar_dot))
    return sums
