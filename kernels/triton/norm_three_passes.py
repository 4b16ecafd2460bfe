"""Normalise, take ReLU and pool channels_last planes, with derivatives, in three kernels over parts of large planes.

The forward kernels compute the moments of parts, then the statistics of planes, then the pooled values. The backward kernels
sum ū and ūh over parts, with a direction also ū̇ and ū̇h + ūḣ, then add up the parts, then compute the gradients. These are
linear in the values of a pixel:

    ȳ = c₀ ū + c₁ + c₂ h          ȳ̇ = c₀ ū̇ + d₀ ū + d₁ + d₂ h + c₂ rstd (ẏ − k1)

One kernel computes the primal's values and, with a direction, their derivatives. Without a direction, all `_dot` arguments, k1
and k2 are None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Convolved, accumulator
from .channels_last_planes import (
    combine_parts,
    launch_parts,
    parts_of_pixels,
    parts_of_windows,
    pooled_pixels,
    program_part,
    quarter_pixels,
    sum_four,
    sum_two,
    within,
)
from .configurations import Configuration
from .launch import tl, triton
from .partial_planes import add_pair
from .planes import Planes


@triton.jit
def _moments(
    y: tl.tensor,  # (B, H, W, C)
    y_dot: tl.tensor | None,
    parts: tl.tensor,  # (B, PARTS, 2 or 4, C)
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WINDOWS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Store the mean of each part and Σ(y − mean)². With a direction, store the mean of ẏ and Σ(y − mean)(ẏ − mean of ẏ) too.

    The sums are over differences from the first pixel of the part. Since that pixel is itself in the sum, cancellation is
    bounded: what cancels is at most the result times the number of pixels in the part.
    """
    ACC: tl.constexpr = parts.dtype.element_ty
    HW: tl.constexpr = H * W
    PIXELS: tl.constexpr = 4 * WINDOWS * TILES
    MOMENTS: tl.constexpr = 2 if y_dot is None else 4
    sample, part, c, channel_mask = program_part(PARTS, C, BLOCK_C)
    first = part * PIXELS
    count = tl.minimum(HW - first, PIXELS).to(ACC)
    y += sample * (HW * C)
    base = tl.load(y + first * C + c, channel_mask, 0)
    total = tl.zeros((WINDOWS, BLOCK_C), ACC)
    square = tl.zeros((WINDOWS, BLOCK_C), ACC)
    if y_dot is not None:
        y_dot += sample * (HW * C)
        base_dot = tl.load(y_dot + first * C + c, channel_mask, 0)
        total_dot = tl.zeros((WINDOWS, BLOCK_C), ACC)
        square_dot = tl.zeros((WINDOWS, BLOCK_C), ACC)
    for tile in range(TILES):
        ys: tl.tuple = ()  # all loads start before the first is used
        yds: tl.tuple = ()
        for quarter in tl.static_range(4):
            pixel = first + (4 * tile + quarter) * WINDOWS + tl.arange(0, WINDOWS)[:, None]
            mask = within(pixel, HW, WHOLE) & channel_mask
            ys += (tl.load(y + pixel * C + c, mask, 0),)
            if y_dot is not None:
                yds += (tl.load(y_dot + pixel * C + c, mask, 0),)
        for quarter in tl.static_range(4):
            pixel = first + (4 * tile + quarter) * WINDOWS + tl.arange(0, WINDOWS)[:, None]
            mask = within(pixel, HW, WHOLE) & channel_mask
            v = tl.where(mask, ys[quarter].to(ACC) - base.to(ACC), 0)
            total += v
            square += v * v
            if y_dot is not None:
                v_dot = tl.where(mask, yds[quarter].to(ACC) - base_dot.to(ACC), 0)
                total_dot += v_dot
                square_dot += v * v_dot
    pointers = parts + (sample * PARTS + part) * (MOMENTS * C) + c
    if y_dot is None:
        sum_of, square_of = sum_two(total, square)
    else:
        sum_of, square_of, sum_of_dot, square_of_dot = sum_four(total, square, total_dot, square_dot)
        mean_dot = sum_of_dot / count
        tl.store(pointers + 2 * C, base_dot.to(ACC) + mean_dot, channel_mask)
        tl.store(pointers + 3 * C, square_of_dot - sum_of / count * mean_dot * count, channel_mask)
    mean = sum_of / count
    tl.store(pointers, base.to(ACC) + mean, channel_mask)
    tl.store(pointers + C, square_of - mean * mean * count, channel_mask)


@triton.jit
def _statistics(
    parts: tl.tensor,  # (B, PARTS, 2 or 4, C)
    mean: tl.tensor,  # (B, C)
    rstd: tl.tensor,
    k1: tl.tensor | None,
    k2: tl.tensor | None,
    EPS: tl.constexpr,
    C: tl.constexpr,
    HW: tl.constexpr,
    PIXELS: tl.constexpr,  # of a part; the last part may have fewer
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
) -> None:
    """Store the statistics of planes, given the moments of their parts.

    A pixel's deviation from the plane's mean is its deviation from its part's mean, plus the deviation of that mean.
    """
    ACC: tl.constexpr = mean.dtype.element_ty
    MOMENTS: tl.constexpr = 2 if k1 is None else 4
    sample, _, c, channel_mask = program_part(1, C, BLOCK_C)
    parts += sample * (PARTS * MOMENTS * C) + c
    total = tl.zeros((BLOCK_PARTS, BLOCK_C), ACC)
    total_dot = tl.zeros((BLOCK_PARTS, BLOCK_C), ACC)
    for start in range(0, PARTS, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)[:, None]
        mask = (part < PARTS) & channel_mask
        count = tl.minimum(HW - part * PIXELS, PIXELS).to(ACC)
        total += count * tl.load(parts + part * (MOMENTS * C), mask, 0)
        if k1 is not None:
            total_dot += count * tl.load(parts + part * (MOMENTS * C) + 2 * C, mask, 0)
    mu = tl.sum(total, 0, keep_dims=True) / HW
    mu_dot = tl.sum(total_dot, 0, keep_dims=True) / HW

    total = tl.zeros((BLOCK_PARTS, BLOCK_C), ACC)
    total_dot = tl.zeros((BLOCK_PARTS, BLOCK_C), ACC)
    for start in range(0, PARTS, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)[:, None]
        mask = (part < PARTS) & channel_mask
        count = tl.where(mask, tl.minimum(HW - part * PIXELS, PIXELS), 0).to(ACC)
        pointers = parts + part * (MOMENTS * C)
        deviation = tl.load(pointers, mask, 0) - mu
        total += tl.load(pointers + C, mask, 0) + count * deviation * deviation
        if k1 is not None:
            deviation_dot = tl.load(pointers + 2 * C, mask, 0) - mu_dot
            total_dot += tl.load(pointers + 3 * C, mask, 0) + count * deviation * deviation_dot
    r = 1 / tl.sqrt(tl.sum(total, 0, keep_dims=True) / HW + EPS)
    plane = sample * C + c
    tl.store(mean + plane, mu, channel_mask)
    tl.store(rstd + plane, r, channel_mask)
    if k1 is not None:
        tl.store(k1 + plane, mu_dot, channel_mask)
        tl.store(k2 + plane, r * (tl.sum(total_dot, 0, keep_dims=True) / HW), channel_mask)


@triton.jit
def _pool(
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
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WINDOWS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Normalise, take ReLU and pool one part of the planes, given their statistics."""
    ACC: tl.constexpr = mean.dtype.element_ty
    sample, part, c, channel_mask = program_part(PARTS, C, BLOCK_C)
    plane = sample * C + c
    mu, r = tl.load(mean + plane, channel_mask, 0), tl.load(rstd + plane, channel_mask, 0)
    g, b = tl.load(gamma + c, channel_mask, 0).to(ACC), tl.load(beta + c, channel_mask, 0).to(ACC)
    y += sample * (H * W * C)
    p += sample * ((H // 2) * (W // 2) * C)
    if y_dot is not None:
        mu_dot, h_y_dot = tl.load(k1 + plane, channel_mask, 0), tl.load(k2 + plane, channel_mask, 0)
        b_dot = tl.load(beta_dot + c, channel_mask, 0).to(ACC)
        y_dot_factor = g * r  # u̇ = γ̇ h + γ ḣ + β̇, with ḣ = rstd (ẏ − k1 − h k2)
        h_factor = tl.load(gamma_dot + c, channel_mask, 0).to(ACC) - y_dot_factor * h_y_dot
        y_dot += sample * (H * W * C)
        p_dot += sample * ((H // 2) * (W // 2) * C)
    for tile in range(TILES):
        window = (part * TILES + tile) * WINDOWS + tl.arange(0, WINDOWS)[:, None]
        pooled = tl.zeros((WINDOWS, BLOCK_C), ACC)
        pooled_dot = tl.zeros((WINDOWS, BLOCK_C), ACC)
        for quarter in tl.static_range(4):
            pixel, mask = quarter_pixels(window, quarter, H, W, WHOLE)
            h = (tl.load(y + pixel * C + c, mask & channel_mask, 0).to(ACC) - mu) * r
            u = g * h + b
            pooled += tl.where(u <= 0, 0, u)
            if y_dot is not None:
                deviation_dot = tl.load(y_dot + pixel * C + c, mask & channel_mask, 0).to(ACC) - mu_dot
                pooled_dot += tl.where(u <= 0, 0, h_factor * h + (y_dot_factor * deviation_dot + b_dot))
        pooled_pixel, mask = pooled_pixels(window, H, W, WHOLE)
        tl.store(p + pooled_pixel * C + c, pooled * 0.25, mask & channel_mask)
        if y_dot is not None:
            tl.store(p_dot + pooled_pixel * C + c, pooled_dot * 0.25, mask & channel_mask)


@triton.jit
def _sums(
    y: tl.tensor,  # (B, H, W, C)
    y_dot: tl.tensor | None,
    mean: tl.tensor,  # (B, C)
    rstd: tl.tensor,
    k1: tl.tensor | None,
    k2: tl.tensor | None,
    gamma: tl.tensor,  # (C,)
    beta: tl.tensor,
    p_bar: tl.tensor,  # (B, H//2, W//2, C)
    p_bar_dot: tl.tensor | None,
    parts: tl.tensor,  # (B, PARTS, 2 or 4, C)
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WINDOWS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Store the sums of ū and ūh over each part and, with a direction, those of ū̇ and ū̇h + ūḣ."""
    ACC: tl.constexpr = mean.dtype.element_ty
    SUMS: tl.constexpr = 2 if y_dot is None else 4
    AT_ONCE: tl.constexpr = 4 if y.dtype.element_ty.primitive_bitwidth == 16 else 2  # quarters that registers can hold
    sample, part, c, channel_mask = program_part(PARTS, C, BLOCK_C)
    plane = sample * C + c
    mu, r = tl.load(mean + plane, channel_mask, 0), tl.load(rstd + plane, channel_mask, 0)
    g, b = tl.load(gamma + c, channel_mask, 0).to(ACC), tl.load(beta + c, channel_mask, 0).to(ACC)
    y += sample * (H * W * C)
    p_bar += sample * ((H // 2) * (W // 2) * C)
    beta_sum = tl.zeros((WINDOWS, BLOCK_C), ACC)
    gamma_sum = tl.zeros((WINDOWS, BLOCK_C), ACC)
    if y_dot is not None:
        mu_dot, h_y_dot = tl.load(k1 + plane, channel_mask, 0), tl.load(k2 + plane, channel_mask, 0)
        y_dot += sample * (H * W * C)
        p_bar_dot += sample * ((H // 2) * (W // 2) * C)
        beta_sum_dot = tl.zeros((WINDOWS, BLOCK_C), ACC)
        gamma_sum_dot = tl.zeros((WINDOWS, BLOCK_C), ACC)
    for tile in range(TILES):
        window = (part * TILES + tile) * WINDOWS + tl.arange(0, WINDOWS)[:, None]
        # p̄ loads as zero outside the pooled plane, so incomplete windows add nothing to the sums.
        pooled_pixel, mask = pooled_pixels(window, H, W, WHOLE)
        share = tl.load(p_bar + pooled_pixel * C + c, mask & channel_mask, 0).to(ACC) * 0.25
        if y_dot is not None:
            share_dot = tl.load(p_bar_dot + pooled_pixel * C + c, mask & channel_mask, 0).to(ACC) * 0.25
        for begin in tl.static_range(0, 4, AT_ONCE):
            ys: tl.tuple = ()  # all loads start before the first is used
            yds: tl.tuple = ()
            for quarter in tl.static_range(AT_ONCE):
                pixel, mask = quarter_pixels(window, begin + quarter, H, W, WHOLE)
                ys += (tl.load(y + pixel * C + c, mask & channel_mask, 0),)
                if y_dot is not None:
                    yds += (tl.load(y_dot + pixel * C + c, mask & channel_mask, 0),)
            for quarter in tl.static_range(AT_ONCE):
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
    pointers = parts + (sample * PARTS + part) * (SUMS * C) + c
    if y_dot is None:
        beta_total, gamma_total = sum_two(beta_sum, gamma_sum)
    else:
        beta_total, gamma_total, beta_total_dot, gamma_total_dot = sum_four(
            beta_sum, gamma_sum, beta_sum_dot, gamma_sum_dot
        )
        tl.store(pointers + 2 * C, beta_total_dot, channel_mask)
        tl.store(pointers + 3 * C, gamma_total_dot, channel_mask)
    tl.store(pointers, beta_total, channel_mask)
    tl.store(pointers + C, gamma_total, channel_mask)


@triton.jit
def _add_parts(
    parts: tl.tensor,  # (B, PARTS, SUMS, C)
    sums: tl.tensor,  # (B, SUMS, C)
    C: tl.constexpr,
    PARTS: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
) -> None:
    """Add up the sums of all parts of a plane."""
    sample, index, c, channel_mask = program_part(SUMS, C, BLOCK_C)
    total = tl.zeros((BLOCK_PARTS, BLOCK_C), sums.dtype.element_ty)
    for start in range(0, PARTS, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)[:, None]
        pointers = parts + ((sample * PARTS + part) * SUMS + index) * C + c
        total += tl.load(pointers, (part < PARTS) & channel_mask, 0)
    tl.store(sums + (sample * SUMS + index) * C + c, tl.sum(total, 0, keep_dims=True), channel_mask)


@triton.jit
def coefficients(
    beta_total: tl.tensor, gamma_total: tl.tensor, r: tl.tensor, g: tl.tensor, HW: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return c₀, c₁ and c₂ of each plane.

    They follow from ȳ = rstd (h̄ − E[h̄] − h E[h h̄]) with h̄ = γ ū.
    """
    scale = -r * g / HW
    return r * g, scale * beta_total, scale * gamma_total


@triton.jit
def coefficients_dot(
    beta_total: tl.tensor,
    gamma_total: tl.tensor,
    beta_total_dot: tl.tensor,
    gamma_total_dot: tl.tensor,
    r: tl.tensor,
    h_y_dot: tl.tensor,
    g: tl.tensor,
    g_dot: tl.tensor,
    HW: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return d₀, d₁ and d₂ of each plane.

    They follow from the derivative of rstd, −rstd² k2, and from ḣ = rstd (ẏ − k1 − h k2), of which one term is a multiple of h.
    """
    c0, c1, c2 = coefficients(beta_total, gamma_total, r, g, HW)
    d1 = -r / HW * (g_dot * beta_total + g * beta_total_dot) - r * h_y_dot * c1
    d2 = -r / HW * (g_dot * gamma_total + g * gamma_total_dot) - 2 * r * h_y_dot * c2
    return r * (g_dot - h_y_dot * c0), d1, d2


@triton.jit
def _gradients(
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
    y_bar: tl.tensor,  # (B, H, W, C); may be the memory of y: a pixel is read before it is written
    y_bar_dot: tl.tensor | None,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WINDOWS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Store ȳ and, with a direction, ȳ̇ of one part of the planes, given the sums over the planes."""
    ACC: tl.constexpr = mean.dtype.element_ty
    SUMS: tl.constexpr = 2 if y_dot is None else 4
    sample, part, c, channel_mask = program_part(PARTS, C, BLOCK_C)
    plane = sample * C + c
    mu, r = tl.load(mean + plane, channel_mask, 0), tl.load(rstd + plane, channel_mask, 0)
    g, b = tl.load(gamma + c, channel_mask, 0).to(ACC), tl.load(beta + c, channel_mask, 0).to(ACC)
    sums += sample * (SUMS * C) + c
    beta_total, gamma_total = tl.load(sums, channel_mask, 0), tl.load(sums + C, channel_mask, 0)
    c0, c1, c2 = coefficients(beta_total, gamma_total, r, g, H * W)
    y += sample * (H * W * C)
    y_bar += sample * (H * W * C)
    p_bar += sample * ((H // 2) * (W // 2) * C)
    if y_dot is not None:
        mu_dot, h_y_dot = tl.load(k1 + plane, channel_mask, 0), tl.load(k2 + plane, channel_mask, 0)
        g_dot = tl.load(gamma_dot + c, channel_mask, 0).to(ACC)
        totals_dot = tl.load(sums + 2 * C, channel_mask, 0), tl.load(sums + 3 * C, channel_mask, 0)
        d0, d1, d2 = coefficients_dot(
            beta_total, gamma_total, totals_dot[0], totals_dot[1], r, h_y_dot, g, g_dot, H * W
        )
        y_dot += sample * (H * W * C)
        y_bar_dot += sample * (H * W * C)
        p_bar_dot += sample * ((H // 2) * (W // 2) * C)
    for tile in range(TILES):
        window = (part * TILES + tile) * WINDOWS + tl.arange(0, WINDOWS)[:, None]
        pooled_pixel, mask = pooled_pixels(window, H, W, WHOLE)
        share = tl.load(p_bar + pooled_pixel * C + c, mask & channel_mask, 0).to(ACC) * 0.25
        if y_dot is not None:
            share_dot = tl.load(p_bar_dot + pooled_pixel * C + c, mask & channel_mask, 0).to(ACC) * 0.25
        for quarter in tl.static_range(4):
            pixel, mask = quarter_pixels(window, quarter, H, W, WHOLE)
            offsets = pixel * C + c
            h = (tl.load(y + offsets, mask & channel_mask, 0).to(ACC) - mu) * r
            active = g * h + b > 0
            u_bar = tl.where(active, share, 0)
            if y_dot is not None:
                deviation = tl.load(y_dot + offsets, mask & channel_mask, 0).to(ACC) - mu_dot
                u_bar_dot = tl.where(active, share_dot, 0)
                value = c0 * u_bar_dot + d0 * u_bar + (d2 * h + (c2 * r * deviation + d1))
                tl.store(y_bar_dot + offsets, value, mask & channel_mask)
            tl.store(y_bar + offsets, c0 * u_bar + (c2 * h + c1), mask & channel_mask)


def forward(
    planes: Planes, tile: Configuration, y: Convolved, y_dot: Convolved | None, *rest: Tensor | None, eps: float
) -> None:
    """Write p, mean and rstd and, with a direction, ṗ, k1 and k2.

    `rest` is mean, rstd, k1, k2, gamma, beta, gamma_dot, beta_dot, p, p_dot. Partial sums of y and ẏ are added up first.
    """
    y, y_dot = add_pair(y, y_dot)  # two kernels read them
    stats, dual = rest[:4], y_dot is not None
    count = parts_of_pixels(planes, tile)
    parts = _empty_parts(y, planes, count, 4 if dual else 2)
    launch_parts(_moments, planes, tile, count, y, y_dot, parts)
    pixels = 4 * tile["WINDOWS"] * tile["TILES"]
    constants = {"EPS": eps, "HW": planes.height * planes.width, "PIXELS": pixels}
    combine_parts(_statistics, planes, 1, count, parts, *stats, **constants)
    launch_parts(_pool, planes, tile, parts_of_windows(planes, tile), y, y_dot, *rest)


def backward(
    planes: Planes,
    tile: Configuration,
    y: Tensor,
    *rest: Tensor | None,  # y_dot, mean, rstd, k1, k2, gamma, beta, gamma_dot
    p_bar: Convolved,
    p_bar_dot: Convolved | None,
    y_bar: Tensor,
    y_bar_dot: Tensor | None,
) -> Tensor:
    """Write `y_bar` and, with a direction, `y_bar_dot`. Return the sums over planes, (B, 2 or 4, C).

    These are the sums of ū and ūh and, with a direction, of ū̇ and ū̇h + ūḣ. Partial sums of p̄ and p̄̇ are added up first.
    """
    bars = add_pair(p_bar, p_bar_dot)  # two kernels read them
    count, sums = parts_of_windows(planes, tile), 2 if y_bar_dot is None else 4
    parts, totals = _empty_parts(y, planes, count, sums), _empty_parts(y, planes, 1, sums)
    *stats_and_affine, _ = rest
    launch_parts(_sums, planes, tile, count, y, *stats_and_affine, *bars, parts)
    combine_parts(_add_parts, planes, sums, count, parts, totals, SUMS=sums)
    launch_parts(_gradients, planes, tile, count, y, *rest, *bars, totals, y_bar, y_bar_dot)
    return totals[:, 0]


def _empty_parts(y: Tensor, planes: Planes, parts: int, numbers: int) -> Tensor:
    """Allocate `numbers` values for each part of each plane, (B, parts, numbers, C)."""
    shape = (planes.samples, parts, numbers, planes.channels)
    return torch.empty(shape, dtype=accumulator(y.dtype), device=y.device)
