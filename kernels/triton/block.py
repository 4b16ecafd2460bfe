"""Compute a whole block, convolution, norm, ReLU and pool, in passes that never store a tensor that they can compute again.

Forward: the convolution takes the moments of each tile as it stores y and ẏ; the moments of a plane's tiles are combined;
one more pass pools. Backward: one pass over y and ẏ takes the four sums of a plane, of ū, ūh, ū̇ and ū̇h + ūḣ, from which
γ̄̇, β̄̇ and the coefficients below follow; then ȳ and ȳ̇ are made wherever a gradient of the convolution loads them:

    ȳ = c₀ ū + c₁ + c₂ h          ȳ̇ = c₀ ū̇ + d₀ ū + d₁ + d₂ h + c₂ rstd (ẏ − k1)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Activations, Affine, PlaneStats, Precision, accumulator
from .configurations import configuration
from .conv import empty_input, empty_output, rotate180, to_krsc
from .implicit_gemm import COEFFICIENTS, MOMENTS, Moments, convolve, correlate
from .launch import architecture, launch, tl, triton
from .norm import four_sums, pool_dual
from .planes import Planes
from .windows import block_of, empty_pool, empty_stat, launch_windows


@triton.jit
def _combine(
    moments: tl.tensor,  # (B, TILES, MOMENTS, C)
    mean: tl.tensor,  # (B, C)
    rstd: tl.tensor,
    k1: tl.tensor,
    k2: tl.tensor,
    EPS: tl.constexpr,
    C: tl.constexpr,
    HW: tl.constexpr,
    BLOCK_M: tl.constexpr,  # pixels of a tile; the last one has the rest
    BLOCK_C: tl.constexpr,
) -> None:
    """Combine the moments of tiles into the statistics of planes: a deviation is the tile's own and that of the tile's mean."""
    ACC: tl.constexpr = mean.dtype.element_ty
    TILES: tl.constexpr = (HW + BLOCK_M - 1) // BLOCK_M
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c = program % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = c < C
    sample = (program // BLOCKS).to(tl.int64)
    moments += sample * (TILES * MOMENTS * C) + c

    total = tl.zeros((BLOCK_C,), ACC)
    total_dot = tl.zeros((BLOCK_C,), ACC)
    for tile in range(TILES):
        count = tl.minimum(HW - tile * BLOCK_M, BLOCK_M)
        place = moments + tile * (MOMENTS * C)
        total += count * tl.load(place, exists, 0)
        total_dot += count * tl.load(place + C, exists, 0)
    mu = total / HW
    mu_dot = total_dot / HW

    total = tl.zeros((BLOCK_C,), ACC)
    total_dot = tl.zeros((BLOCK_C,), ACC)
    for tile in range(TILES):
        count = tl.minimum(HW - tile * BLOCK_M, BLOCK_M)
        place = moments + tile * (MOMENTS * C)
        deviation = tl.load(place, exists, 0) - mu
        deviation_dot = tl.load(place + C, exists, 0) - mu_dot
        total += tl.load(place + 2 * C, exists, 0) + count * deviation * deviation
        total_dot += tl.load(place + 3 * C, exists, 0) + count * deviation * deviation_dot
    r = 1 / tl.sqrt(total / HW + EPS)
    plane = sample * C + c
    tl.store(mean + plane, mu, exists)
    tl.store(rstd + plane, r, exists)
    tl.store(k1 + plane, mu_dot, exists)
    tl.store(k2 + plane, r * (total_dot / HW), exists)


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
    BLOCK_C: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> None:
    """Normalise, take ReLU and pool planes whose statistics are known."""
    ACC: tl.constexpr = mean.dtype.element_ty
    sample, c, exists = block_of(C, BLOCK_C)
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
    pool_dual(
        y, y_dot, p, p_dot, c, mu, r, mu_dot, h_y_dot, g, b, g_dot, b_dot,
        ACC, C, H, W, CHANNELS_LAST, BLOCK_C, WINDOWS,
    )  # fmt: skip


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
    BLOCK_C: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> None:
    """Sum over each plane, and store what follows: γ̄̇, β̄̇, and the coefficients of ȳ and ȳ̇ (`_gradients_before_norm`)."""
    ACC: tl.constexpr = mean.dtype.element_ty
    sample, c, exists = block_of(C, BLOCK_C)
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

    beta_total, gamma_total, beta_total_dot, gamma_total_dot = four_sums(
        y, y_dot, p_bar, p_bar_dot, c, mu, r, mu_dot, h_y_dot, g, b,
        ACC, C, H, W, CHANNELS_LAST, BLOCK_C, WINDOWS,
    )  # fmt: skip
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
    affine: Affine,
    affine_dot: Affine,
    padding: int,
    eps: float,
    precision: Precision,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor, Activations]:
    """See `mtt_fast.kernels.conv_norm_relu_pool_dual`."""
    known, y_dot = y is not None, empty_output(x, weight, padding)
    y = empty_output(x, weight, padding) if y is None else y
    weights = to_krsc(weight), to_krsc(weight_dot)
    operation = "conv_norm_relu_pool_tangent" if known else "conv_norm_relu_pool_dual"
    moments = convolve(operation, x, x_dot, *weights, y, y_dot, padding, precision, known=known, moments=True)
    assert moments is not None
    stats = _combined(moments, y, eps)
    planes = Planes.of(y, y_dot)
    p, p_dot = empty_pool(y, planes), empty_pool(y, planes)
    launch_windows(_pool, "block_pool", planes, y, y_dot, *stats, *affine, *affine_dot, p, p_dot)
    return p, p_dot, Activations(x, x_dot, y, y_dot, stats)


def conv_norm_relu_pool_dual_backward(
    activations: Activations,
    weight: Tensor,
    weight_dot: Tensor,
    affine: Affine,
    affine_dot: Affine,
    p_bar: Tensor,
    p_bar_dot: Tensor,
    padding: int,
    precision: Precision,
    wants_x_bar: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.conv_norm_relu_pool_dual_backward`. β̇ moves no gradient of this operation."""
    x, x_dot, y, y_dot, stats = activations.take()
    assert y_dot is not None
    assert stats is not None
    planes = Planes.of(y, y_dot, p_bar, p_bar_dot)
    gamma_sum, beta_sum = empty_stat(y), empty_stat(y)
    shape = (planes.samples, COEFFICIENTS.value, planes.channels)
    coefficients = torch.empty(shape, dtype=accumulator(y.dtype), device=y.device)
    bars = (p_bar, p_bar_dot, coefficients)
    results = (gamma_sum, beta_sum, coefficients)
    arguments = (y, y_dot, *stats, *affine, affine_dot.gamma, p_bar, p_bar_dot)
    launch_windows(_coefficients, "block_coefficients", planes, *arguments, *results)

    name = "conv_norm_relu_pool_dual_weight_gradient"
    weight_bar_dot = correlate(name, x, x_dot, y, y_dot, padding, precision, bars)
    del x, x_dot
    x_bar = empty_input(y, weight, padding) if wants_x_bar else None
    x_bar_dot = empty_input(y, weight, padding)
    weights = to_krsc(rotate180(weight)), to_krsc(rotate180(weight_dot))
    name = "conv_norm_relu_pool_dual_input_gradient"
    convolve(name, y, y_dot, *weights, x_bar, x_bar_dot, 2 - padding, precision, bars)
    return x_bar, x_bar_dot, weight_bar_dot, gamma_sum.sum(0), beta_sum.sum(0)


def _combined(moments: Moments, y: Tensor, eps: float) -> PlaneStats:
    """Return the statistics of the planes of `y`, combined from the moments of their tiles."""
    planes = Planes.of(y)
    stats = PlaneStats(*(empty_stat(y) for _ in range(4)))
    row = configuration("block_combine", "", architecture(y.device))
    launch(
        _combine,
        planes.samples * triton.cdiv(planes.channels, row["BLOCK_C"]),
        *(moments.values, *stats),
        EPS=eps,
        C=planes.channels,
        HW=planes.height * planes.width,
        BLOCK_M=moments.block_m,
        **row,
    )
    return stats
