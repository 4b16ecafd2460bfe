"""A block of the network, convolution, norm, ReLU and pool, in passes that never store what they can compute.

Forward: the convolution takes the moments of each tile as it stores y and ẏ; those of a plane's tiles are combined; one
more pass pools. Backward: one pass over y and ẏ takes the four sums of a plane, of ū, ūh, ū̇ and ū̇h + ūḣ, from which
γ̄̇, β̄̇ and the coefficients below follow; then ȳ and ȳ̇ are made wherever a gradient of the convolution loads them:

    ȳ = c₀ ū + c₁ + c₂ h          ȳ̇ = c₀ ū̇ + d₀ ū + d₁ + d₂ h + c₂ rstd (ẏ − k1)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Activations, Precision, accumulator
from .configurations import configuration
from .convolution import empty_input, empty_output, terms_last, turned
from .entry import architecture, launch, tl, triton
from .planes import Planes
from .products import COEFFICIENTS, MOMENTS, Moments, convolve, correlate
from .windows import block_of, empty_numbers, empty_pool, launch_windows, load_windows, plane_sum, pooled_of


@triton.jit
def _combine(
    moments: tl.tensor,  # (B, TILES, MOMENTS, C)
    mean: tl.tensor,  # (B, C)
    rstd: tl.tensor,
    k1: tl.tensor,
    k2: tl.tensor,
    EPS: tl.constexpr,
    C: tl.constexpr,
    PIXELS: tl.constexpr,  # of a plane
    TILE: tl.constexpr,  # pixels of a tile; the last one has what is left
    CHANNELS: tl.constexpr,
) -> None:
    """The numbers of a plane from its tiles': a deviation from the mean is the tile's own and that of the tile's mean."""
    ACC: tl.constexpr = mean.dtype.element_ty
    TILES: tl.constexpr = (PIXELS + TILE - 1) // TILE
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    c = program % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < C
    sample = (program // BLOCKS).to(tl.int64)
    moments += sample * (TILES * MOMENTS * C) + c

    total = tl.zeros((CHANNELS,), ACC)
    total_dot = tl.zeros((CHANNELS,), ACC)
    for tile in range(TILES):
        count = tl.minimum(PIXELS - tile * TILE, TILE)
        place = moments + tile * (MOMENTS * C)
        total += count * tl.load(place, exists, 0)
        total_dot += count * tl.load(place + C, exists, 0)
    mu = total / PIXELS
    mu_dot = total_dot / PIXELS

    total = tl.zeros((CHANNELS,), ACC)
    total_dot = tl.zeros((CHANNELS,), ACC)
    for tile in range(TILES):
        count = tl.minimum(PIXELS - tile * TILE, TILE)
        place = moments + tile * (MOMENTS * C)
        deviation = tl.load(place, exists, 0) - mu
        deviation_dot = tl.load(place + C, exists, 0) - mu_dot
        total += tl.load(place + 2 * C, exists, 0) + count * deviation * deviation
        total_dot += tl.load(place + 3 * C, exists, 0) + count * deviation * deviation_dot
    r = 1 / tl.sqrt(total / PIXELS + EPS)
    plane = sample * C + c
    tl.store(mean + plane, mu, exists)
    tl.store(rstd + plane, r, exists)
    tl.store(k1 + plane, mu_dot, exists)
    tl.store(k2 + plane, r * (total_dot / PIXELS), exists)


@triton.jit
def _pool(
    y: tl.tensor,  # (B, C, H, W)
    y_dot: tl.tensor,
    mean: tl.tensor,  # (B, C)
    rstd: tl.tensor,
    k1: tl.tensor,
    k2: tl.tensor,
    gamma: tl.tensor,  # (C,)
    beta: tl.tensor,
    gamma_dot: tl.tensor,
    beta_dot: tl.tensor,
    p: tl.tensor,  # (B, C, H//2, W//2)
    p_dot: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> None:
    """Norm, ReLU and pool where the planes' numbers are known."""
    ACC: tl.constexpr = mean.dtype.element_ty
    TOTAL: tl.constexpr = ((H + 1) // 2) * ((W + 1) // 2)
    sample, c, exists = block_of(C, CHANNELS)
    y += sample * (C * H * W)
    y_dot += sample * (C * H * W)
    p += sample * (C * (H // 2) * (W // 2))
    p_dot += sample * (C * (H // 2) * (W // 2))
    plane = sample * C + c
    mu = tl.load(mean + plane, exists, 0)
    r = tl.load(rstd + plane, exists, 0)
    mu_dot = tl.load(k1 + plane, exists, 0)
    h_y_dot = tl.load(k2 + plane, exists, 0)
    g = tl.load(gamma + c, exists, 0).to(ACC)
    b = tl.load(beta + c, exists, 0).to(ACC)
    g_dot = tl.load(gamma_dot + c, exists, 0).to(ACC)
    b_dot = tl.load(beta_dot + c, exists, 0).to(ACC)
    for start in range(0, TOTAL, WINDOWS):
        ys = load_windows(y, ACC, c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        yds = load_windows(y_dot, ACC, c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        pooled = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
        pooled_dot = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
        for row in tl.static_range(2):
            h = (ys[row] - mu) * r
            h_dot = r * (yds[row] - mu_dot - h * h_y_dot)
            u = g * h + b
            pooled += tl.where(u > 0, u, 0)
            pooled_dot += tl.where(u > 0, g_dot * h + g * h_dot + b_dot, 0)
        offset, mask = pooled_of(c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        tl.store(p + offset, tl.sum(pooled, 2, keep_dims=True) * 0.25, mask)
        tl.store(p_dot + offset, tl.sum(pooled_dot, 2, keep_dims=True) * 0.25, mask)


@triton.jit
def _coefficients(
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
    gamma_bar_dot: tl.tensor,  # (B, C): the sum over samples is the caller's
    beta_bar_dot: tl.tensor,
    coefficients: tl.tensor,  # (B, COEFFICIENTS, C)
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> None:
    """The sums of a plane, and what follows from them: γ̄̇, β̄̇, and the coefficients of ȳ and ȳ̇ (`_behind_norm`)."""
    ACC: tl.constexpr = mean.dtype.element_ty
    TOTAL: tl.constexpr = ((H + 1) // 2) * ((W + 1) // 2)
    sample, c, exists = block_of(C, CHANNELS)
    y += sample * (C * H * W)
    y_dot += sample * (C * H * W)
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

    beta_sum = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
    gamma_sum = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
    beta_sum_dot = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
    gamma_sum_dot = tl.zeros((CHANNELS, WINDOWS, 2), ACC)
    for start in range(0, TOTAL, WINDOWS):
        ys = load_windows(y, ACC, c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        yds = load_windows(y_dot, ACC, c, start, C, H, W, CHANNELS_LAST, WINDOWS)
        # Zero outside the pool, so windows that are not whole add nothing to the sums.
        offset, mask = pooled_of(c, start, C, H, W, CHANNELS_LAST, WINDOWS)
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
    beta_total = plane_sum(beta_sum)
    gamma_total = plane_sum(gamma_sum)
    beta_total_dot = plane_sum(beta_sum_dot)
    gamma_total_dot = plane_sum(gamma_sum_dot)
    tl.store(gamma_bar_dot + plane, gamma_total_dot, exists)
    tl.store(beta_bar_dot + plane, beta_total_dot, exists)

    # ȳ = rstd (h̄ − E[h̄] − h E[h h̄]); its derivative is −rstd k2 ȳ, for rstd's, and that of the bracket. There
    # ḣ = rstd (ẏ − k1 − h k2), whose part along h joins the other's.
    scale = -r / (H * W)
    of_u = r * g
    constant = scale * g * beta_total
    of_h = scale * g * gamma_total
    dot_of_u = r * g_dot - r * h_y_dot * of_u
    dot_constant = scale * (g_dot * beta_total + g * beta_total_dot) - r * h_y_dot * constant
    dot_of_h = scale * (g_dot * gamma_total + g * gamma_total_dot) - 2 * r * h_y_dot * of_h
    place = coefficients + sample * (COEFFICIENTS * C) + c
    tl.store(place, mu, exists)
    tl.store(place + C, r, exists)
    tl.store(place + 2 * C, mu_dot, exists)
    tl.store(place + 3 * C, g, exists)
    tl.store(place + 4 * C, b, exists)
    tl.store(place + 5 * C, of_u, exists)
    tl.store(place + 6 * C, constant, exists)
    tl.store(place + 7 * C, of_h, exists)
    tl.store(place + 8 * C, dot_of_u, exists)
    tl.store(place + 9 * C, dot_constant, exists)
    tl.store(place + 10 * C, dot_of_h, exists)
    tl.store(place + 11 * C, r * of_h, exists)


def conv_norm_relu_pool_dual(
    x: Tensor,
    x_dot: Tensor | None,
    weight: Tensor,
    weight_dot: Tensor,
    gamma: Tensor,
    beta: Tensor,
    gamma_dot: Tensor,
    beta_dot: Tensor,
    padding: int,
    eps: float,
    precision: Precision,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor, Activations]:
    """See `mtt_fast.kernels.conv_norm_relu_pool_dual`."""
    known, y_dot = y is not None, empty_output(x, weight, padding)
    y = empty_output(x, weight, padding) if y is None else y
    weights = terms_last(weight), terms_last(weight_dot)
    operation = "conv_norm_relu_pool_tangent" if known else "conv_norm_relu_pool_dual"
    moments = convolve(operation, x, x_dot, *weights, y, y_dot, padding, precision, known=known, moments=True)
    assert moments is not None
    numbers = _combined(moments, y, eps)
    planes = Planes.of(y, y_dot)
    p, p_dot = empty_pool(y, planes), empty_pool(y, planes)
    launch_windows(_pool, "block_pool", planes, y, y_dot, *numbers, gamma, beta, gamma_dot, beta_dot, p, p_dot)
    return p, p_dot, [x, x_dot, y, y_dot, *numbers]


def conv_norm_relu_pool_dual_backward(
    activations: Activations,
    weight: Tensor,
    weight_dot: Tensor,
    gamma: Tensor,
    beta: Tensor,
    gamma_dot: Tensor,
    beta_dot: Tensor,
    p_bar: Tensor,
    p_bar_dot: Tensor,
    padding: int,
    precision: Precision,
    wants_x_bar: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.conv_norm_relu_pool_dual_backward`. `beta_dot` moves no gradient of this operation."""
    x, x_dot, y, y_dot, *numbers = activations
    activations.clear()
    planes = Planes.of(y, y_dot, p_bar, p_bar_dot)
    gamma_sum, beta_sum = empty_numbers(y), empty_numbers(y)
    shape = (planes.samples, COEFFICIENTS.value, planes.channels)
    coefficients = torch.empty(shape, dtype=accumulator(y.dtype), device=y.device)
    bars = (p_bar, p_bar_dot, coefficients)
    results = (gamma_sum, beta_sum, coefficients)
    arguments = (*numbers, gamma, beta, gamma_dot, p_bar, p_bar_dot)
    launch_windows(_coefficients, "block_coefficients", planes, y, y_dot, *arguments, *results)

    name = "conv_norm_relu_pool_dual_weight_gradient"
    weight_bar_dot = correlate(name, x, x_dot, y, y_dot, padding, precision, bars)
    del x, x_dot
    x_bar = empty_input(y, weight, padding) if wants_x_bar else None
    x_bar_dot = empty_input(y, weight, padding)
    weights = terms_last(turned(weight)), terms_last(turned(weight_dot))
    name = "conv_norm_relu_pool_dual_input_gradient"
    convolve(name, y, y_dot, *weights, x_bar, x_bar_dot, 2 - padding, precision, bars)
    return x_bar, x_bar_dot, weight_bar_dot, gamma_sum.sum(0), beta_sum.sum(0)


def _combined(moments: Moments, y: Tensor, eps: float) -> list[Tensor]:
    """mean, rstd, k1, k2 (B, C) from the moments of the tiles."""
    planes = Planes.of(y)
    numbers = [torch.empty(y.shape[:2], dtype=moments.values.dtype, device=y.device) for _ in range(4)]
    row = configuration("block_combine", "", architecture(y.device))
    launch(
        _combine,
        planes.samples * triton.cdiv(planes.channels, row["CHANNELS"]),
        *(moments.values, *numbers),
        EPS=eps,
        C=planes.channels,
        PIXELS=planes.height * planes.width,
        TILE=moments.pixels,
        **row,
    )
    return numbers
