"""Convolve 3×3 as an implicit matrix product: a value and its tangent in one pass over the operands.

Forward and input gradient are one kernel, since the latter is the convolution of ȳ with the weights rotated by 180°:
results (pixel, output channel) are sums over terms (tap, input channel). The weight gradient is the product the other
way: results (term, output channel) are sums over pixels, cut into parts that are added up by a second pass. Tiles are
BLOCK_M pixels, BLOCK_N output channels, BLOCK_K terms.

Two things are done on the way where they are asked for (block.py): the forward's epilogue takes the statistics of its
tile, and both gradients make ȳ and ȳ̇ from y, ẏ, p̄, p̄̇ as they load them. A tile's pixels are of one sample, so that
a plane's values are a row of the tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import Precision, accumulator
from .configurations import Configuration, configuration
from .launch import INTERPRETED, architecture, launch, tl, triton
from .planes import Planes

COEFFICIENTS = tl.constexpr(12)  # of a plane, from which ȳ and ȳ̇ follow: see block.py
MOMENTS = tl.constexpr(4)  # of a tile's part of a plane
NARROW = 16  # channels up to which planes count as images
SIZES = (64, 256, 1024, 4096, 16384)  # pixels of a plane, by which shapes are told apart; the last is for all larger
BATCHES = (16, 64, 256, 1024)  # samples, likewise

_NUMPY = tl.constexpr(INTERPRETED)  # NumPy multiplies the bits of bfloat16 numbers as if they were integers


@triton.jit
def _terms(
    step: tl.tensor, CI: tl.constexpr, PADDING: tl.constexpr, BLOCK_K: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return the terms of one step of the sum, (BLOCK_K,): number, input channel, steps down and right to the pixel, existence.

    A step is of one tap, whose pixels are then one address each, unless the channels are so few that they share it.
    """
    place = tl.arange(0, BLOCK_K)
    if CI < BLOCK_K:
        term = step * BLOCK_K + place
        tap, channel = term // CI, term % CI
        exists = term < 9 * CI
    else:
        blocks: tl.constexpr = (CI + BLOCK_K - 1) // BLOCK_K
        channel = step % blocks * BLOCK_K + place
        tap = tl.zeros((BLOCK_K,), tl.int32) + step // blocks
        term = tap * CI + channel
        exists = channel < CI
    return term, channel, tap // 3 - PADDING, tap % 3 - PADDING, exists


@triton.jit
def _rounded(tile: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    return tile.to(tl.bfloat16) if PRECISION == "bf16" else tile


@triton.jit
def product(a: tl.tensor, b: tl.tensor, total: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Add a·b to `total`, of factors rounded as PRECISION says."""
    a, b = _rounded(a, PRECISION), _rounded(b, PRECISION)
    if _NUMPY:
        a, b = a.to(total.dtype), b.to(total.dtype)
    precision: tl.constexpr = "tf32" if PRECISION == "tf32" else "ieee"
    return tl.dot(a, b, total, input_precision=precision, out_dtype=total.dtype)


@triton.jit
def _gradients_before_norm(
    y: tl.tensor,  # of the sample: (C, H, W)
    y_dot: tl.tensor,
    p_bar: tl.tensor,  # (C, H//2, W//2)
    p_bar_dot: tl.tensor,
    coefficients: tl.tensor,  # (COEFFICIENTS, C)
    row: tl.tensor,  # (N, 1), as are column and inside
    column: tl.tensor,
    inside: tl.tensor,
    channel: tl.tensor,  # (1, M)
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return ȳ and ȳ̇ (N, M) at the pixels and channels given; zero where a pixel or a channel does not exist."""
    exists = channel < C
    coefficients += channel
    mean = tl.load(coefficients, exists, 0)
    rstd = tl.load(coefficients + C, exists, 0)
    k1 = tl.load(coefficients + 2 * C, exists, 0)
    gamma = tl.load(coefficients + 3 * C, exists, 0)
    beta = tl.load(coefficients + 4 * C, exists, 0)
    of_u = tl.load(coefficients + 5 * C, exists, 0)
    constant = tl.load(coefficients + 6 * C, exists, 0)
    of_h = tl.load(coefficients + 7 * C, exists, 0)
    dot_of_u = tl.load(coefficients + 8 * C, exists, 0)
    dot_constant = tl.load(coefficients + 9 * C, exists, 0)
    dot_of_h = tl.load(coefficients + 10 * C, exists, 0)
    dot_of_y_dot = tl.load(coefficients + 11 * C, exists, 0)

    mask = inside & exists
    pixel = row * W + column
    place = pixel * C + channel if CHANNELS_LAST else channel * (H * W) + pixel
    ys = tl.load(y + place, mask, 0).to(ACC)
    ys_dot = tl.load(y_dot + place, mask, 0).to(ACC)
    pooled = row // 2 * (W // 2) + column // 2
    pooled_mask = mask & (row // 2 < H // 2) & (column // 2 < W // 2)
    place = pooled * C + channel if CHANNELS_LAST else channel * ((H // 2) * (W // 2)) + pooled
    share = tl.load(p_bar + place, pooled_mask, 0).to(ACC) * 0.25
    share_dot = tl.load(p_bar_dot + place, pooled_mask, 0).to(ACC) * 0.25

    h = (ys - mean) * rstd
    active = gamma * h + beta > 0
    u_bar = tl.where(active, share, 0)
    u_bar_dot = tl.where(active, share_dot, 0)
    y_bar = of_u * u_bar + (of_h * h + constant)
    y_bar_dot = of_u * u_bar_dot + dot_of_u * u_bar + dot_of_y_dot * (ys_dot - k1) + (dot_of_h * h + dot_constant)
    return tl.where(mask, y_bar, 0), tl.where(mask, y_bar_dot, 0)


@triton.jit
def _store_moments(
    moments: tl.tensor,  # of the tile: (MOMENTS, C)
    ys: tl.tensor,  # (BLOCK_M, BLOCK_N)
    ys_dot: tl.tensor,
    count: tl.tensor,  # of the tile's pixels that exist, which are the first
    output: tl.tensor,  # (BLOCK_N,)
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """Store the tile's means of y and ẏ, and its sums of (y − mean)² and (y − mean) (ẏ − mean of ẏ): two passes over it."""
    exists = (tl.arange(0, BLOCK_M) < count)[:, None]
    mean = tl.sum(tl.where(exists, ys, 0), 0) / count
    mean_dot = tl.sum(tl.where(exists, ys_dot, 0), 0) / count
    deviation = tl.where(exists, ys - mean[None, :], 0)
    moments += output
    tl.store(moments, mean, output < C)
    tl.store(moments + C, mean_dot, output < C)
    tl.store(moments + 2 * C, tl.sum(deviation * deviation, 0), output < C)
    tl.store(moments + 3 * C, tl.sum(deviation * (ys_dot - mean_dot[None, :]), 0), output < C)


@triton.jit
def _convolve(
    x: tl.tensor,  # (B, CI, H, W)
    x_dot: tl.tensor | None,
    p_bar: tl.tensor | None,  # (B, CI, H//2, W//2); with it x and x_dot are y and ẏ, and their gradients are convolved
    p_bar_dot: tl.tensor | None,
    coefficients: tl.tensor | None,  # (B, COEFFICIENTS, CI)
    weight: tl.tensor,  # (CO, 3, 3, CI)
    weight_dot: tl.tensor,
    y: tl.tensor | None,  # (B, CO, HO, WO)
    y_dot: tl.tensor,
    moments: tl.tensor | None,  # (B, TILES, MOMENTS, CO)
    CI: tl.constexpr,
    CO: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    PADDING: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    KNOWN: tl.constexpr,  # y is given, and only its moments are asked for
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    # Programs side by side read the same pixels, then their neighbours, which stay in the cache.
    BLOCKS: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = (HO * WO + BLOCK_M - 1) // BLOCK_M
    STEPS: tl.constexpr = (9 * CI + BLOCK_K - 1) // BLOCK_K if CI < BLOCK_K else 9 * ((CI + BLOCK_K - 1) // BLOCK_K)
    PRIMAL: tl.constexpr = y is not None and not KNOWN
    program = tl.program_id(0)
    output = program % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = program // BLOCKS % TILES
    sample = (program // (BLOCKS * TILES)).to(tl.int64)
    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    row, column = pixel // WO, pixel % WO
    x += sample * (CI * H * W)
    if x_dot is not None:
        x_dot += sample * (CI * H * W)
    if p_bar is not None:
        p_bar += sample * (CI * (H // 2) * (W // 2))
        p_bar_dot += sample * (CI * (H // 2) * (W // 2))
        coefficients += sample * (COEFFICIENTS * CI)

    total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    total_dot = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    of_x_dot = tl.zeros((BLOCK_M, BLOCK_N), ACC)  # two products of a step into one sum would wait for each other
    for step in range(STEPS):
        term, channel, down, right, exists = _terms(step, CI, PADDING, BLOCK_K)
        factors = output[None, :] * (9 * CI) + term[:, None]
        factors_mask = (output < CO)[None, :] & exists[:, None]
        ws = tl.load(weight + factors, factors_mask, 0)
        ws_dot = tl.load(weight_dot + factors, factors_mask, 0)

        source_row = row + down[None, :]
        source_column = column + right[None, :]
        inside = (source_row >= 0) & (source_row < H) & (source_column >= 0) & (source_column < W)
        channel = channel[None, :]
        if p_bar is not None:
            xs, xs_dot = _gradients_before_norm(
                x, x_dot, p_bar, p_bar_dot, coefficients,
                source_row, source_column, inside, channel, CI, H, W, CHANNELS_LAST, ACC,
            )  # fmt: skip
        else:
            source = source_row * W + source_column
            place = source * CI + channel if CHANNELS_LAST else channel * (H * W) + source
            mask = inside & exists[None, :]
            xs = tl.load(x + place, mask, 0)
            if x_dot is not None:
                xs_dot = tl.load(x_dot + place, mask, 0)
        if PRIMAL:
            total = product(xs, ws, total, PRECISION)
        total_dot = product(xs, ws_dot, total_dot, PRECISION)
        if x_dot is not None:
            of_x_dot = product(xs_dot, ws, of_x_dot, PRECISION)
    if x_dot is not None:
        total_dot += of_x_dot

    place = pixel * CO + output[None, :] if CHANNELS_LAST else output[None, :] * (HO * WO) + pixel
    mask = (pixel < HO * WO) & (output < CO)[None, :]
    begin = sample * (CO * HO * WO)
    results_dot = total_dot.to(y_dot.dtype.element_ty)
    tl.store(y_dot + begin + place, results_dot, mask)
    if PRIMAL:
        results = total.to(y_dot.dtype.element_ty)
        tl.store(y + begin + place, results, mask)
    if moments is not None:
        if KNOWN:
            results = tl.load(y + begin + place, mask, 0)
        moments += (sample * TILES + tile) * (MOMENTS * CO)
        count = tl.minimum(HO * WO - tile * BLOCK_M, BLOCK_M)
        _store_moments(moments, results.to(ACC), results_dot.to(ACC), count, output, CO, BLOCK_M)


@triton.jit
def _correlate(
    x: tl.tensor,  # (B, CI, H, W)
    x_dot: tl.tensor | None,
    y_bar: tl.tensor,  # (B, CO, HO, WO)
    y_bar_dot: tl.tensor,
    p_bar: tl.tensor | None,  # (B, CO, HO//2, WO//2); with it y_bar and y_bar_dot are y and ẏ, as in _convolve
    p_bar_dot: tl.tensor | None,
    coefficients: tl.tensor | None,  # (B, COEFFICIENTS, CO)
    parts: tl.tensor,  # (PARTS, CO, 3, 3, CI)
    tiles: tl.tensor,  # of all samples
    share: tl.tensor,  # tiles of a part
    CI: tl.constexpr,
    CO: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    PADDING: tl.constexpr,
    X_CHANNELS_LAST: tl.constexpr,
    Y_CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    ACC: tl.constexpr = parts.dtype.element_ty
    TILES: tl.constexpr = (HO * WO + BLOCK_M - 1) // BLOCK_M
    BLOCKS: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (9 * CI + BLOCK_K - 1) // BLOCK_K if CI < BLOCK_K else 9 * ((CI + BLOCK_K - 1) // BLOCK_K)
    program = tl.program_id(0)
    output = (program % BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    term, channel, down, right, exists = _terms(program // BLOCKS % STEPS, CI, PADDING, BLOCK_K)
    term, channel, down, right = term[:, None], channel[:, None], down[:, None], right[:, None]
    exists = exists[:, None]
    part = (program // (BLOCKS * STEPS)).to(tl.int64)

    total = tl.zeros((BLOCK_K, BLOCK_N), ACC)
    of_x_dot = tl.zeros((BLOCK_K, BLOCK_N), ACC)
    for step in range(tl.minimum(share, tiles - part * share)):
        tile = part * share + step  # int64, as is the sample
        sample = tile // TILES
        pixel = (tile % TILES).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
        row, column = pixel // WO, pixel % WO
        source_row = row[None, :] + down
        source_column = column[None, :] + right
        source = source_row * W + source_column
        place = source * CI + channel if X_CHANNELS_LAST else channel * (H * W) + source
        inside = (source_row >= 0) & (source_row < H) & (source_column >= 0) & (source_column < W)
        mask = (pixel < HO * WO)[None, :] & inside & exists
        x_begin = sample * (CI * H * W)
        y_begin = sample * (CO * HO * WO)
        pixel = pixel[:, None]
        if p_bar is not None:
            p_begin = sample * (CO * (HO // 2) * (WO // 2))
            gs, gs_dot = _gradients_before_norm(
                y_bar + y_begin, y_bar_dot + y_begin, p_bar + p_begin, p_bar_dot + p_begin,
                coefficients + sample * (COEFFICIENTS * CO), row[:, None], column[:, None], pixel < HO * WO, output,
                CO, HO, WO, Y_CHANNELS_LAST, ACC,
            )  # fmt: skip
        else:
            y_place = pixel * CO + output if Y_CHANNELS_LAST else output * (HO * WO) + pixel
            y_mask = (pixel < HO * WO) & (output < CO)
            gs_dot = tl.load(y_bar_dot + y_begin + y_place, y_mask, 0)
            if x_dot is not None:
                gs = tl.load(y_bar + y_begin + y_place, y_mask, 0)
        total = product(tl.load(x + x_begin + place, mask, 0), gs_dot, total, PRECISION)
        if x_dot is not None:
            of_x_dot = product(tl.load(x_dot + x_begin + place, mask, 0), gs, of_x_dot, PRECISION)
    if x_dot is not None:
        total += of_x_dot
    tl.store(parts + (part * CO + output) * (9 * CI) + term, total, exists & (output < CO))


class Moments(NamedTuple):
    """Moments of the planes that the forward's epilogue takes, tile by tile."""

    values: Tensor  # (B, tiles, MOMENTS, C)
    block_m: int  # pixels of a tile


def convolve(
    operation: str,
    x: Tensor,
    x_dot: Tensor | None,
    weight: Tensor,
    weight_dot: Tensor,
    y: Tensor | None,
    y_dot: Tensor,
    padding: int,
    precision: Precision,
    bars: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    known: bool = False,
    moments: bool = False,
) -> Moments | None:
    """Fill `y` and `y_dot`, or with `known` `y_dot` alone. Return the moments if asked for.

    The row of `operation` in the table gives the tile. `bars` are p̄, p̄̇ and the coefficients of block.py: `x` and `x_dot`
    are then y and ẏ of an earlier convolution, and ȳ and ȳ̇ take their place.
    """
    inputs, outputs = Planes.of(x, x_dot, *(bars[:2] if bars else ())), Planes.of(y_dot, y)
    row = tile_of(operation, inputs, outputs, precision, x)
    effective = effective_precision(x.dtype, precision)
    if effective == "bf16":  # once here, not in every program
        weight, weight_dot = weight.bfloat16(), weight_dot.bfloat16()
    tiles = triton.cdiv(outputs.height * outputs.width, row["BLOCK_M"])
    places = (outputs.samples, tiles, MOMENTS.value, outputs.channels)
    values = torch.empty(places, dtype=accumulator(x.dtype), device=x.device) if moments else None
    launch(
        _convolve,
        outputs.samples * tiles * triton.cdiv(outputs.channels, row["BLOCK_N"]),
        *(x, x_dot, *(bars or (None, None, None)), weight, weight_dot, y, y_dot, values),
        CI=inputs.channels,
        CO=outputs.channels,
        H=inputs.height,
        W=inputs.width,
        HO=outputs.height,
        WO=outputs.width,
        PADDING=padding,
        CHANNELS_LAST=inputs.channels_last,
        PRECISION=effective,
        KNOWN=known,
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        **row,
    )
    return None if values is None else Moments(values, row["BLOCK_M"])


def correlate(
    operation: str,
    x: Tensor,
    x_dot: Tensor | None,
    y_bar: Tensor,
    y_bar_dot: Tensor,
    padding: int,
    precision: Precision,
    bars: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Return W̄̇ (K, C, 3, 3). `operation`, `bars`: as in `convolve`, here with y and ẏ for `y_bar` and `y_bar_dot`."""
    inputs, outputs = Planes.of(x, x_dot), Planes.of(y_bar, y_bar_dot, *(bars[:2] if bars else ()))
    row = tile_of(operation, inputs, outputs, precision, x)
    target = row.pop("PROGRAMS")
    row["BLOCK_K"] = min(row["BLOCK_K"], max(16, triton.next_power_of_2(9 * inputs.channels)))
    tiles = outputs.samples * triton.cdiv(outputs.height * outputs.width, row["BLOCK_M"])
    channels, terms = inputs.channels, row["BLOCK_K"]
    steps = triton.cdiv(9 * channels, terms) if channels < terms else 9 * triton.cdiv(channels, terms)
    programs = steps * triton.cdiv(outputs.channels, row["BLOCK_N"])
    share = triton.cdiv(tiles, max(1, min(tiles, target // programs)))
    shape = (triton.cdiv(tiles, share), outputs.channels, 3, 3, channels)
    parts = torch.empty(shape, dtype=accumulator(x.dtype), device=x.device)
    launch(
        _correlate,
        shape[0] * programs,
        *(x, x_dot, y_bar, y_bar_dot, *(bars or (None, None, None)), parts, tiles, share),
        CI=channels,
        CO=outputs.channels,
        H=inputs.height,
        W=inputs.width,
        HO=outputs.height,
        WO=outputs.width,
        PADDING=padding,
        X_CHANNELS_LAST=inputs.channels_last,
        Y_CHANNELS_LAST=outputs.channels_last,
        PRECISION=effective_precision(x.dtype, precision),
        **row,
    )
    return parts.sum(0).permute(0, 3, 1, 2).contiguous()


def effective_precision(dtype: torch.dtype, precision: Precision) -> str:
    """Return `precision` for float32, which alone leaves a choice, else the format of `dtype`."""
    return {torch.float64: "fp64", torch.bfloat16: "bf16"}.get(dtype, str(precision))


def shape_classes(inputs: Planes, outputs: Planes, precision: str) -> tuple[str, str, str]:
    """Name the shapes in the table, ever more loosely.

    Images make a class, and so do the size of the result and, most closely, the number of samples.
    """
    width = "narrow" if min(inputs.channels, outputs.channels) <= NARROW else "wide"
    loosely = f"{precision}-{width}"
    closely = f"{loosely}-{_rounded_up(outputs.height * outputs.width, SIZES)}"
    return f"{closely}-{_rounded_up(outputs.samples, BATCHES)}", closely, loosely


def _rounded_up(number: int, sizes: tuple[int, ...]) -> int:
    return next(size for size in sizes if number <= size or size == sizes[-1])


def tile_of(operation: str, inputs: Planes, outputs: Planes, precision: Precision, x: Tensor) -> Configuration:
    """Return the table's tile, no larger than the planes and the channels ask for."""
    classes = shape_classes(inputs, outputs, effective_precision(x.dtype, precision))
    row = dict(configuration(operation, classes[0], architecture(x.device), *classes[1:]))
    row["BLOCK_M"] = min(row["BLOCK_M"], max(16, triton.next_power_of_2(outputs.height * outputs.width)))
    row["BLOCK_N"] = min(row["BLOCK_N"], max(16, triton.next_power_of_2(outputs.channels)))
    return row
