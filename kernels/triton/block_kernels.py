"""Pool the first block's planes, sum patches for its gradients, and carry gradients back to patches and to images.

block.py says where each kernel is used. Every kernel computes u = f·x̃ again, since that takes less time than reading u would.
There are K filters, BLOCK_C in a program. The planes, which are never stored, have H' × W' = (HP − 2) × (WP − 2) pixels, and
PH × PW pooled ones.
"""

from __future__ import annotations

from .launch import tl, triton
from .partial_planes import load_planes
from .patches import (
    add_up_parts,
    fold_norm,
    fold_norm_tangent,
    load_patches,
    load_weights,
    moments,
    product,
    round_factor,
    weight_offsets,
)
from .powers import inverse


@triton.jit
def _program_block(parts: tl.tensor, K: tl.constexpr, BLOCK_C: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the program's sample (int64), its part of the windows, and its filters (BLOCK_C,)."""
    BLOCKS: tl.constexpr = K // BLOCK_C
    program = tl.program_id(0)
    sample = (program // (BLOCKS * parts)).to(tl.int64)
    return sample, program // BLOCKS % parts, program % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def pool(
    images: tl.tensor,  # (B, HP, WP, C)
    gram: tl.tensor,  # (B, gram_parts, 9 C + 1, 9 C + 1)
    gram_parts: tl.tensor,
    weight: tl.tensor,  # (K, C, 3, 3)
    weight_dot: tl.tensor | None,
    gamma: tl.tensor,  # (K,)
    beta: tl.tensor,
    gamma_dot: tl.tensor | None,
    beta_dot: tl.tensor | None,
    folded: tl.tensor,  # (B, TERMS, K): f
    folded_dot: tl.tensor | None,
    stats: tl.tensor,  # (B, 4, K): mean, rstd, k1, k2, for images minus their shift
    p: tl.tensor,  # (B, PH, PW, K)
    p_dot: tl.tensor | None,
    parts: tl.tensor,  # number of parts of a sample's windows
    tiles: tl.tensor,  # in one part
    EPS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    HP: tl.constexpr,
    WP: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    WINDOWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    """Store p and, with a direction, ṗ. For the backward, store the statistics and the weights with the norm folded in.

    A program folds the norm for its own filters, which saves a launch. All parts of a sample's windows repeat the same folding.
    """
    PW: tl.constexpr = (WP - 2) // 2
    ALL: tl.constexpr = (HP - 2) // 2 * PW
    sample, part, c = _program_block(parts, K, BLOCK_C)
    # all loads for the folding start before the first of them is used
    weights, g, b = load_weights(weight, c, C, TERMS), tl.load(gamma + c), tl.load(beta + c)
    if p_dot is not None:
        weights_dot = load_weights(weight_dot, c, C, TERMS)
        g_dot, b_dot = tl.load(gamma_dot + c), tl.load(beta_dot + c)
    mean, covariance = moments(gram, sample, gram_parts, C, (HP - 2) * (WP - 2), TERMS)
    w, mu, r, covariance_w = fold_norm(mean, covariance, weights, g, b, EPS, C, TERMS, PRECISION, ACC)
    square = sample * (TERMS * K) + tl.arange(0, TERMS)[:, None] * K + c[None, :]
    stats += sample * (4 * K) + c
    tl.store(folded + square, w)
    tl.store(stats, mu.to(ACC))
    tl.store(stats + K, r.to(ACC))
    if p_dot is not None:
        w_dot, k1, k2 = fold_norm_tangent(
            mean, covariance_w, r, weights, weights_dot, g, g_dot, b_dot, C, TERMS, PRECISION, ACC
        )
        tl.store(folded_dot + square, w_dot)
        tl.store(stats + 2 * K, k1.to(ACC))
        tl.store(stats + 3 * K, k2.to(ACC))
    images += sample * (HP * WP * C)
    begin = sample * (ALL * K)
    for tile in range(tiles):
        window = (part * tiles + tile) * WINDOWS + tl.arange(0, WINDOWS)
        mask = (window < ALL)[:, None]
        window = tl.minimum(window, ALL - 1)
        row, column = window // PW * 2, window % PW * 2
        pooled = tl.zeros((WINDOWS, BLOCK_C), ACC)
        if p_dot is not None:
            pooled_dot = tl.zeros((WINDOWS, BLOCK_C), ACC)
        for pixel in tl.range(0, 4, loop_unroll_factor=UNROLL):
            xs = load_patches(images, row + pixel // 2, column + pixel % 2, C, WP, TERMS)
            u = product(xs, w, ACC, PRECISION)
            inactive = u <= 0  # a comparison with > would turn NaN into zero
            pooled += tl.where(inactive, 0, u)
            if p_dot is not None:
                pooled_dot += tl.where(inactive, 0, product(xs, w_dot, ACC, PRECISION))
        offsets = window[:, None] * K + c[None, :]
        tl.store(p + begin + offsets, pooled * 0.25, mask)
        if p_dot is not None:
            tl.store(p_dot + begin + offsets, pooled_dot * 0.25, mask)


@triton.jit
def _pixel_share(p_bars: tl.tensor, ACC: tl.constexpr, PRECISION: tl.constexpr) -> tl.tensor:
    """Return the gradient of each pixel in its window, a quarter of p̄, rounded."""
    return round_factor(p_bars.to(ACC) * 0.25, PRECISION)


@triton.jit
def sum_patches(
    images: tl.tensor,  # (B, HP, WP, C)
    folded: tl.tensor,  # (B, TERMS, K)
    p_bar: tl.tensor,  # (B, PH, PW, K)
    p_bar_dot: tl.tensor | None,
    sums: tl.tensor,  # (B, parts, TERMS, K)
    sums_dot: tl.tensor | None,
    parts: tl.tensor,  # number of parts of a sample's windows
    tiles: tl.tensor,  # in one part
    p_bar_parts: tl.tensor | None,  # (COUNT, B, PH, PW, K): of p̄; then p̄ is stored
    p_bar_dot_parts: tl.tensor | None,  # (COUNT_DOT, B, PH, PW, K): of p̄̇
    size: tl.tensor | None,  # elements of a part of p̄
    COUNT: tl.constexpr,
    COUNT_DOT: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr,  # parts that are loaded at the same time: more would not fit in registers
    C: tl.constexpr,
    K: tl.constexpr,
    HP: tl.constexpr,
    WP: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    WINDOWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Store U = Σ x̃ū and, with a direction, U̇ = Σ x̃ū̇, summed over one part of the windows."""
    PW: tl.constexpr = (WP - 2) // 2
    ALL: tl.constexpr = (HP - 2) // 2 * PW
    sample, part, c = _program_block(parts, K, BLOCK_C)
    images += sample * (HP * WP * C)
    begin = sample * (ALL * K)
    p_bar += begin
    if p_bar_parts is not None:
        p_bar_parts += begin
    if p_bar_dot is not None:
        p_bar_dot += begin
    if p_bar_dot_parts is not None:
        p_bar_dot_parts += begin
    square = tl.arange(0, TERMS)[:, None] * K + c[None, :]
    w = tl.load(folded + sample * (TERMS * K) + square)
    total = tl.zeros((TERMS, BLOCK_C), ACC)
    if p_bar_dot is not None:
        total_dot = tl.zeros((TERMS, BLOCK_C), ACC)
    for tile in range(tiles):
        window = (part * tiles + tile) * WINDOWS + tl.arange(0, WINDOWS)
        mask = (window < ALL)[:, None]
        window = tl.minimum(window, ALL - 1)
        row, column = window // PW * 2, window % PW * 2
        offsets = window[:, None] * K + c[None, :]
        p_bars = load_planes(p_bar, p_bar_parts, offsets, mask, size, COUNT, PARTS_AT_ONCE)
        share = _pixel_share(p_bars, ACC, PRECISION)
        if p_bar_dot is not None:
            p_bars_dot = load_planes(p_bar_dot, p_bar_dot_parts, offsets, mask, size, COUNT_DOT, PARTS_AT_ONCE)
            share_dot = _pixel_share(p_bars_dot, ACC, PRECISION)
        if p_bar_parts is not None:
            tl.store(p_bar + offsets, p_bars, mask)
        if p_bar_dot_parts is not None:
            tl.store(p_bar_dot + offsets, p_bars_dot, mask)
        for pixel in range(4):
            xs = load_patches(images, row + pixel // 2, column + pixel % 2, C, WP, TERMS)
            active = product(xs, w, ACC, PRECISION) > 0
            total += product(tl.trans(xs), tl.where(active, share, 0).to(xs.dtype), ACC, PRECISION)
            if p_bar_dot is not None:
                u_bar_dot = tl.where(active, share_dot, 0).to(xs.dtype)
                total_dot += product(tl.trans(xs), u_bar_dot, ACC, PRECISION)
    begin = (sample * parts + part) * (TERMS * K)
    tl.store(sums + begin + square, total)
    if p_bar_dot is not None:
        tl.store(sums_dot + begin + square, total_dot)


@triton.jit
def _precise_product(a: tl.tensor, b: tl.tensor, ACC: tl.constexpr, PRECISION: tl.constexpr) -> tl.tensor:
    """Return the product of factors that are not rounded, in float32 or float64.

    For tf32, fp16 and bf16, Tensor cores compute it, with each factor as a sum of two tf32 numbers (tf32x3).
    """
    precision: tl.constexpr = "ieee" if PRECISION == "fp32" or PRECISION == "fp64" else "tf32x3"
    return tl.dot(a, b, input_precision=precision, out_dtype=ACC)


@triton.jit
def finish(
    gram: tl.tensor,  # (B, gram_parts, 9 C + 1, 9 C + 1)
    gram_parts: tl.tensor,
    stats: tl.tensor,  # (B, 4, K): as `pool` stored them
    weight: tl.tensor,  # (K, C, 3, 3)
    weight_dot: tl.tensor | None,
    gamma: tl.tensor,  # (K,)
    gamma_dot: tl.tensor | None,
    sums: tl.tensor,  # (B, parts, TERMS, K)
    sums_dot: tl.tensor | None,
    parts: tl.tensor,  # number of parts in `sums`
    gradients: tl.tensor,  # (B, 9 C K + 2 K): to weight, γ, β, or their derivatives; the caller sums over B
    linear: tl.tensor | None,  # (B, BLOCKS, TERMS, TERMS): M, a summand for each block of filters
    C: tl.constexpr,
    K: tl.constexpr,
    HP: tl.constexpr,
    WP: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Store the gradients of the parameters. With a direction, store the derivatives of these, and M."""
    BLOCKS: tl.constexpr = K // BLOCK_C
    PIXELS: tl.constexpr = (HP - 2) * (WP - 2)
    program = tl.program_id(0)
    sample = (program // BLOCKS).to(tl.int64)
    c = program % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    term = tl.arange(0, TERMS)[:, None]
    one = term == 9 * C
    mean, covariance = moments(gram, sample, gram_parts, C, PIXELS, TERMS)
    mean, covariance = mean.to(ACC), covariance.to(ACC)
    offsets = sample * parts * (TERMS * K) + term * K + c[None, :]
    if weight_dot is None:
        (total,) = add_up_parts((sums + offsets,), None, parts, TERMS * K, ACC)
    else:
        total, total_dot = add_up_parts((sums + offsets, sums_dot + offsets), None, parts, TERMS * K, ACC)
    w = load_weights(weight, c, C, TERMS)
    stats += sample * (4 * K) + c
    mu, r = tl.load(stats), tl.load(stats + K)
    g = tl.load(gamma + c)
    if weight_dot is not None:
        w_dot = load_weights(weight_dot, c, C, TERMS)
        k1, k2 = tl.load(stats + 2 * K), tl.load(stats + 3 * K)
        g_dot = tl.load(gamma_dot + c)

    beta_bar = tl.sum(tl.where(one, total, 0), 0)  # Σ ū
    gamma_bar = r * (tl.sum(w * total, 0) - mu * beta_bar)  # Σ ūh
    covariance_w = _precise_product(covariance, w, ACC, PRECISION)
    # ȳ = c0 ū + c1 + c2 h, as in norm_three_passes.py
    scale = -r / PIXELS
    c0 = r * g
    c1 = scale * g * beta_bar
    c2 = scale * g * gamma_bar
    if weight_dot is None:
        weight_bar = c0[None, :] * total + (PIXELS * c1)[None, :] * mean
        weight_bar += (PIXELS * r * c2)[None, :] * covariance_w
    else:
        beta_bar_dot = tl.sum(tl.where(one, total_dot, 0), 0)
        u_bar_h_dot = tl.sum(w_dot * total, 0) - k1 * beta_bar - k2 * gamma_bar  # Σ ūḣ / r
        gamma_bar_dot = r * (tl.sum(w * total_dot, 0) - mu * beta_bar_dot + u_bar_h_dot)
        # ȳ̇ = c0 ū̇ + d0 ū + d1 + d2 h + c2 r (ẏ − k1)
        d0 = r * (g_dot - k2 * c0)
        d1 = scale * (g_dot * beta_bar + g * beta_bar_dot) - r * k2 * c1
        d2 = scale * (g_dot * gamma_bar + g * gamma_bar_dot) - 2 * r * k2 * c2
        covariance_w_dot = _precise_product(covariance, w_dot, ACC, PRECISION)
        weight_bar = c0[None, :] * total_dot + d0[None, :] * total + (PIXELS * d1)[None, :] * mean
        weight_bar += PIXELS * r * (d2[None, :] * covariance_w + c2[None, :] * covariance_w_dot)
        # the terms of Ẇᵀȳ + Wᵀȳ̇ without ū and ū̇, as a function of the patch: h = r (w·x̃ − mean), ẏ = ẇ·x̃
        by_weight = r * (c2[None, :] * w_dot + d2[None, :] * w)
        m = _precise_product(w, tl.trans(by_weight), ACC, PRECISION)
        m += _precise_product(w_dot, tl.trans(c2 * r * w), ACC, PRECISION)
        at_one = w_dot * (c1 - c2 * r * mu)[None, :]
        at_one += w * (d1 - d2 * r * mu - c2 * r * k1)[None, :]
        m += tl.where(one, tl.sum(at_one, 1)[None, :], 0)
        tl.store(linear + program.to(tl.int64) * (TERMS * TERMS) + term * TERMS + tl.arange(0, TERMS)[None, :], m)
        beta_bar, gamma_bar = beta_bar_dot, gamma_bar_dot
    gradients += sample * (9 * C * K + 2 * K)
    offsets, mask = weight_offsets(c, C, TERMS)
    tl.store(gradients + offsets, tl.trans(weight_bar), mask)
    tl.store(gradients + 9 * C * K + c, gamma_bar)
    tl.store(gradients + 9 * C * K + K + c, beta_bar)


@triton.jit
def _window_pixels(
    windows: tl.tensor,  # number of the first window
    tile: tl.constexpr,
    TOGETHER: tl.constexpr,
    ACROSS: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return rows and columns of the pixels (TOGETHER · WINDOWS,) in one of the 4 / TOGETHER tiles of WINDOWS windows."""
    index = tl.arange(0, TOGETHER * WINDOWS)
    window, inner = windows + index // TOGETHER, tile * TOGETHER + index % TOGETHER
    return window // ACROSS * 2 + inner // 2, window % ACROSS * 2 + inner % 2


@triton.jit
def spread(
    images: tl.tensor,  # (B, HP, WP, C)
    folded: tl.tensor,  # (B, TERMS, K)
    folded_dot: tl.tensor,
    p_bar: tl.tensor,  # (B, PH, PW, K)
    p_bar_dot: tl.tensor,
    linear: tl.tensor,  # (B, blocks, TERMS, TERMS)
    columns: tl.tensor,  # (B, H', W', TERMS)
    blocks: tl.tensor,
    C: tl.constexpr,
    K: tl.constexpr,
    HP: tl.constexpr,
    WP: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    WINDOWS: tl.constexpr,
    TOGETHER: tl.constexpr,  # 1 or 4
    BLOCK_C: tl.constexpr,
) -> None:
    """Store T, the patch of x̄̇ at each pixel.

    A program loops over blocks of filters, so that few values of ū and ū̇ are in registers at the same time. A tile has
    TOGETHER of the four pixels of each window. With 1, a program loads p̄ once for all four pixels. With 4, a warp has a
    quarter of the work of each window, so that few windows occupy more warps.
    """
    H: tl.constexpr = HP - 2
    W: tl.constexpr = WP - 2
    ACROSS: tl.constexpr = (W + 1) // 2  # incomplete windows have pixels too
    PARTS: tl.constexpr = ((H + 1) // 2 * ACROSS + WINDOWS - 1) // WINDOWS
    TILES: tl.constexpr = 4 // TOGETHER
    program = tl.program_id(0)
    sample = (program // PARTS).to(tl.int64)
    windows = program % PARTS * WINDOWS
    images += sample * (HP * WP * C)
    folded += sample * (TERMS * K)
    folded_dot += sample * (TERMS * K)
    term = tl.arange(0, TERMS)
    linear += sample * blocks * (TERMS * TERMS) + term[:, None] * TERMS + term[None, :]
    (m,) = add_up_parts((linear,), None, blocks, TERMS * TERMS, ACC)
    m = round_factor(m, PRECISION)
    xs: tl.tuple = ()
    t: tl.tuple = ()
    for tile in tl.static_range(TILES):
        row, column = _window_pixels(windows, tile, TOGETHER, ACROSS, WINDOWS)
        patches = load_patches(images, tl.minimum(row, H - 1), tl.minimum(column, W - 1), C, WP, TERMS)
        xs += (patches,)
        t += (product(patches, m, ACC, PRECISION),)

    row, column = _window_pixels(windows, 0, TOGETHER, ACROSS, WINDOWS)
    window_offsets = sample * ((H // 2) * (W // 2) * K) + (row // 2 * (W // 2) + column // 2)[:, None] * K
    whole = ((row < H // 2 * 2) & (column < W // 2 * 2))[:, None]
    for block in range(K // BLOCK_C):
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        offset = window_offsets + c[None, :]
        share = _pixel_share(tl.load(p_bar + offset, whole, 0), ACC, PRECISION)
        share_dot = _pixel_share(tl.load(p_bar_dot + offset, whole, 0), ACC, PRECISION)
        w = tl.load(folded + term[:, None] * K + c[None, :])
        transposed = term[None, :] * K + c[:, None]
        w_transposed, w_dot_transposed = tl.load(folded + transposed), tl.load(folded_dot + transposed)
        sums: tl.tuple = ()
        for tile in tl.static_range(TILES):
            active = product(xs[tile], w, ACC, PRECISION) > 0
            total = t[tile] + product(tl.where(active, share, 0).to(w.dtype), w_dot_transposed, ACC, PRECISION)
            total += product(tl.where(active, share_dot, 0).to(w.dtype), w_transposed, ACC, PRECISION)
            sums += (total,)
        t = sums
    for tile in tl.static_range(TILES):
        row, column = _window_pixels(windows, tile, TOGETHER, ACROSS, WINDOWS)
        offsets = sample * (H * W * TERMS) + (row * W + column)[:, None] * TERMS + term[None, :]
        tl.store(columns + offsets, t[tile], ((row < H) & (column < W))[:, None])


@triton.jit
def col2im(
    columns: tl.tensor,  # (B, H', W', TERMS)
    first_divisor: tl.tensor | None,
    second_divisor: tl.tensor | None,
    x_bar: tl.tensor,  # (B, C, H, W)
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PADDING: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """Store the sum of each image pixel's entries in all patches, divided by the divisors that are not None."""
    HO: tl.constexpr = H + 2 * PADDING - 2
    WO: tl.constexpr = W + 2 * PADDING - 2
    PARTS: tl.constexpr = (H * W + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    sample = (program // PARTS).to(tl.int64)
    term = tl.arange(0, TERMS)[None, :]
    pixel = (program % PARTS * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    row = pixel // W + PADDING - term // (3 * C)
    column = pixel % W + PADDING - term // C % 3
    mask = pixel < H * W
    inside = mask & (term < 9 * C) & (row >= 0) & (row < HO) & (column >= 0) & (column < WO)
    offsets = sample * (HO * WO * TERMS) + (row * WO + column) * TERMS + term
    t = tl.load(columns + offsets, inside, 0).to(x_bar.dtype.element_ty)
    for channel in tl.static_range(C):
        total = tl.sum(tl.where(term % C == channel, t, 0), 1, keep_dims=True)
        if first_divisor is not None:
            total *= inverse(tl.load(first_divisor))
        if second_divisor is not None:
            total *= inverse(tl.load(second_divisor))
        tl.store(x_bar + sample * (C * H * W) + channel * (H * W) + pixel, total, mask)
