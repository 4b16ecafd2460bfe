"""Convolve 3×3 as an implicit matrix product (implicit GEMM). A kernel reads each operand once for a value and its derivative.

Forward and input gradient use one kernel, since the input gradient is the convolution of ȳ with the weights rotated by 180°.
Its results (pixel, output channel) are sums over terms: pairs of a tap and an input channel. The results of the weight
gradient (term, output channel) are sums over pixels. That sum is split (split-K), and the partial sums are added up at the
end of the step. Tiles are BLOCK_M pixels of one sample, BLOCK_N output channels and BLOCK_K terms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..types import HALF_PRECISIONS, Precision, accumulator, plane_dtype
from .configurations import BATCHES, Configuration, configuration, rounded_up
from .launch import INTERPRETED, architecture, launch, tl, triton
from .planes import Planes

NARROW = 16  # most channels of planes that count as images
SIZES = (64, 256, 1024, 4096, 16384)  # pixels that separate the classes of shapes; the last has larger planes too

_NUMPY = tl.constexpr(INTERPRETED)  # NumPy would multiply the bits of bfloat16 numbers as integers


@triton.constexpr_function
def count_steps(channels: int, block_k: int) -> int:
    """Return the number of steps that take all terms of `channels`, as `_step_terms` lays them out."""
    steps: int = triton.cdiv(9 * channels, block_k) if channels < block_k else 9 * triton.cdiv(channels, block_k)
    return steps


@triton.jit
def _step_terms(
    step: tl.tensor, CI: tl.constexpr, BLOCK_K: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return the terms of one step of the sum, (BLOCK_K,): their numbers, input channels, tap rows, tap columns, and mask.

    A step covers channels of one tap, so that a pixel has one address for all of them. Where there are fewer than BLOCK_K
    input channels, a step covers terms of several taps.
    """
    offsets = tl.arange(0, BLOCK_K)
    if CI < BLOCK_K:
        term = step * BLOCK_K + offsets
        tap, channel = term // CI, term % CI
        mask = term < 9 * CI
    else:
        blocks: tl.constexpr = (CI + BLOCK_K - 1) // BLOCK_K
        channel = step % blocks * BLOCK_K + offsets
        tap = tl.zeros((BLOCK_K,), tl.int32) + step // blocks
        term = tap * CI + channel
        mask = channel < CI
    return term, channel, tap // 3, tap % 3, mask


@triton.jit
def add_product(a: tl.tensor, b: tl.tensor, total: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Return `total` plus the matrix product a·b. For tf32 this rounds the factors; those of 16 bits are rounded already."""
    if _NUMPY:
        a, b = a.to(total.dtype), b.to(total.dtype)
    precision: tl.constexpr = "tf32" if PRECISION == "tf32" else "ieee"
    return tl.dot(a, b, total, input_precision=precision, out_dtype=total.dtype)


@triton.jit
def _convolve(
    x: tl.tensor,  # (B, CI, H, W)
    x_dot: tl.tensor | None,
    weight: tl.tensor,  # (CO, 3, 3, CI)
    weight_dot: tl.tensor,
    y: tl.tensor | None,  # (B, CO, HO, WO)
    y_dot: tl.tensor,
    CI: tl.constexpr,
    CO: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    PADDING: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Store a tile of ẏ and, unless `y` is None, of y: BLOCK_M pixels × BLOCK_N output channels."""
    # Neighbouring programs read the same pixels, then neighbouring pixels, so that these stay in the cache.
    BLOCKS: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = (HO * WO + BLOCK_M - 1) // BLOCK_M
    STEPS: tl.constexpr = count_steps(CI, BLOCK_K)
    PRIMAL: tl.constexpr = y is not None
    program = tl.program_id(0)
    output = program % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = program // BLOCKS % TILES
    sample = (program // (BLOCKS * TILES)).to(tl.int64)
    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    # The padding is subtracted here: ptxas loses a constant that is added to the remainder of a tap (docs/gpu.md, Faults).
    row, column = pixel // WO - PADDING, pixel % WO - PADDING
    x += sample * (CI * H * W)
    if x_dot is not None:
        x_dot += sample * (CI * H * W)

    total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    total_dot = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    total_x_dot = tl.zeros((BLOCK_M, BLOCK_N), ACC)  # its own accumulator: two products into one would wait
    for step in range(STEPS):
        term, channel, down, right, term_mask = _step_terms(step, CI, BLOCK_K)
        factors = output[None, :] * (9 * CI) + term[:, None]
        factors_mask = (output < CO)[None, :] & term_mask[:, None]
        ws = tl.load(weight + factors, factors_mask, 0)
        ws_dot = tl.load(weight_dot + factors, factors_mask, 0)

        source_row = row + down[None, :]
        source_column = column + right[None, :]
        inside = (source_row >= 0) & (source_row < H) & (source_column >= 0) & (source_column < W)
        channel = channel[None, :]
        source = source_row * W + source_column
        offsets = source * CI + channel if CHANNELS_LAST else channel * (H * W) + source
        mask = inside & term_mask[None, :]
        xs = tl.load(x + offsets, mask, 0)
        if x_dot is not None:
            xs_dot = tl.load(x_dot + offsets, mask, 0)
        if PRIMAL:
            total = add_product(xs, ws, total, PRECISION)
        total_dot = add_product(xs, ws_dot, total_dot, PRECISION)
        if x_dot is not None:
            total_x_dot = add_product(xs_dot, ws, total_x_dot, PRECISION)
    if x_dot is not None:
        total_dot += total_x_dot

    offsets = pixel * CO + output[None, :] if CHANNELS_LAST else output[None, :] * (HO * WO) + pixel
    mask = (pixel < HO * WO) & (output < CO)[None, :]
    begin = sample * (CO * HO * WO)
    tl.store(y_dot + begin + offsets, total_dot, mask)
    if PRIMAL:
        tl.store(y + begin + offsets, total, mask)


@triton.jit
def _correlate(
    x: tl.tensor,  # (B, CI, H, W)
    x_dot: tl.tensor | None,
    y_bar: tl.tensor,  # (B, CO, HO, WO)
    y_bar_dot: tl.tensor,
    parts: tl.tensor,  # (PARTS, CO, 3, 3, CI)
    tiles: tl.tensor,  # tiles of pixels in all samples
    tiles_per_part: tl.tensor,
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
    """Store BLOCK_K terms × BLOCK_N output channels of the weight gradient, summed over one part of the pixels."""
    ACC: tl.constexpr = parts.dtype.element_ty
    TILES: tl.constexpr = (HO * WO + BLOCK_M - 1) // BLOCK_M
    BLOCKS: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = count_steps(CI, BLOCK_K)
    program = tl.program_id(0)
    output = (program % BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    term, channel, down, right, term_mask = _step_terms(program // BLOCKS % STEPS, CI, BLOCK_K)
    term, channel, down, right = term[:, None], channel[:, None], down[:, None], right[:, None]
    term_mask = term_mask[:, None]
    part = (program // (BLOCKS * STEPS)).to(tl.int64)

    total = tl.zeros((BLOCK_K, BLOCK_N), ACC)
    total_x_dot = tl.zeros((BLOCK_K, BLOCK_N), ACC)
    for step in range(tl.minimum(tiles_per_part, tiles - part * tiles_per_part)):
        tile = part * tiles_per_part + step  # int64, as is the sample
        sample = tile // TILES
        pixel = (tile % TILES).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
        row, column = pixel // WO - PADDING, pixel % WO - PADDING
        source_row = row[None, :] + down
        source_column = column[None, :] + right
        source = source_row * W + source_column
        offsets = source * CI + channel if X_CHANNELS_LAST else channel * (H * W) + source
        inside = (source_row >= 0) & (source_row < H) & (source_column >= 0) & (source_column < W)
        mask = (pixel < HO * WO)[None, :] & inside & term_mask
        x_begin = sample * (CI * H * W)
        y_begin = sample * (CO * HO * WO)
        pixel = pixel[:, None]
        y_place = pixel * CO + output if Y_CHANNELS_LAST else output * (HO * WO) + pixel
        y_mask = (pixel < HO * WO) & (output < CO)
        gs_dot = tl.load(y_bar_dot + y_begin + y_place, y_mask, 0)
        if x_dot is not None:
            gs = tl.load(y_bar + y_begin + y_place, y_mask, 0)
        total = add_product(tl.load(x + x_begin + offsets, mask, 0), gs_dot, total, PRECISION)
        if x_dot is not None:
            total_x_dot = add_product(tl.load(x_dot + x_begin + offsets, mask, 0), gs, total_x_dot, PRECISION)
    if x_dot is not None:
        total += total_x_dot
    tl.store(parts + (part * CO + output) * (9 * CI) + term, total, term_mask & (output < CO))


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
) -> tuple[Tensor | None, Tensor]:
    """Write W∗x to `y`, unless that is None, and Ẇ∗x + W∗ẋ to `y_dot`. Return both.

    The weights are those of weights.py, (CO, 3, 3, CI). The configuration of `operation` sets the tile.
    """
    inputs, outputs = Planes.from_tensors(x, x_dot), Planes.from_tensors(y_dot, y)
    tile = tile_of(operation, inputs, outputs, precision, x)
    x, x_dot = _factors(precision, x, x_dot)
    tiles = triton.cdiv(outputs.height * outputs.width, tile["BLOCK_M"])
    launch(
        _convolve,
        outputs.samples * tiles * triton.cdiv(outputs.channels, tile["BLOCK_N"]),
        *(x, x_dot, weight, weight_dot, y, y_dot),
        CI=inputs.channels,
        CO=outputs.channels,
        H=inputs.height,
        W=inputs.width,
        HO=outputs.height,
        WO=outputs.width,
        PADDING=padding,
        CHANNELS_LAST=inputs.channels_last,
        PRECISION=effective_precision(x.dtype, precision),
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        **tile,
    )
    return y, y_dot


def correlate(
    operation: str,
    x: Tensor,
    x_dot: Tensor | None,
    y_bar: Tensor,
    y_bar_dot: Tensor,
    padding: int,
    precision: Precision,
) -> Tensor:
    """Return S partial sums of W̄̇ = ȳ̇ ⋆ x + ȳ ⋆ ẋ, (S, K, C, 3, 3), float64 for float64 planes and else float32.

    Without `x_dot`, W̄̇ = ȳ̇ ⋆ x. The configuration of `operation` sets the tile and S.
    """
    inputs, outputs = Planes.from_tensors(x, x_dot), Planes.from_tensors(y_bar, y_bar_dot)
    tile, programs, tiles, tiles_per_part = _split(operation, inputs, outputs, precision, x)
    channels, count = inputs.channels, triton.cdiv(tiles, tiles_per_part)
    x, x_dot, y_bar, y_bar_dot = _factors(precision, x, x_dot, y_bar, y_bar_dot)
    parts = torch.empty((count, outputs.channels, 3, 3, channels), dtype=accumulator(x.dtype), device=x.device)
    launch(
        _correlate,
        count * programs,
        *(x, x_dot, y_bar, y_bar_dot, parts, tiles, tiles_per_part),
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
        **tile,
    )
    return parts.permute(0, 1, 4, 2, 3)


def count_summands(operation: str, inputs: Planes, outputs: Planes, precision: Precision, x: Tensor) -> int:
    """Return the number S of partial sums that `correlate` returns for planes of the dtype and device of `x`."""
    _, _, tiles, tiles_per_part = _split(operation, inputs, outputs, precision, x)
    count: int = triton.cdiv(tiles, tiles_per_part)
    return count


def _split(
    operation: str, inputs: Planes, outputs: Planes, precision: Precision, x: Tensor
) -> tuple[Configuration, int, int, int]:
    """Return the tile, the programs for each part, the tiles of pixels in all parts, and the tiles in one part."""
    tile = tile_of(operation, inputs, outputs, precision, x)
    target = tile.pop("PROGRAMS")
    tile["BLOCK_K"] = min(tile["BLOCK_K"], max(16, triton.next_power_of_2(9 * inputs.channels)))
    tiles = outputs.samples * triton.cdiv(outputs.height * outputs.width, tile["BLOCK_M"])
    programs = count_steps(inputs.channels, tile["BLOCK_K"]) * triton.cdiv(outputs.channels, tile["BLOCK_N"])
    return tile, programs, tiles, triton.cdiv(tiles, max(1, min(tiles, target // programs)))


def _factors(precision: Precision, *planes: Tensor | None) -> list[Any]:
    """Return planes in the dtype in which they are multiplied, None where they are None.

    Rounding in the kernel would load them into registers, which Triton 3.6 and 3.7 do not guard (docs/gpu.md, Faults).
    """
    return [None if each is None else each.to(plane_dtype(each.dtype, precision)) for each in planes]


def effective_precision(dtype: torch.dtype, precision: Precision) -> str:
    """Return the precision of products: `precision` for float32 planes, else the format of `dtype`."""
    halves = {dtype: name for name, dtype in HALF_PRECISIONS.items()}
    return "fp64" if dtype == torch.float64 else halves.get(dtype, precision)


def shape_classes(inputs: Planes, outputs: Planes, precision: str) -> tuple[str, str, str]:
    """Return the shapes' three classes in the table, the closest first.

    All name the precision and whether one side is images (`narrow`). The first two name the size of the result too, and the
    first the batch size. fp16 shares the classes of bf16, since both take as many bytes and as much time.
    """
    precision = "bf16" if precision == "fp16" else precision
    width = "narrow" if min(inputs.channels, outputs.channels) <= NARROW else "wide"
    loosely = f"{precision}-{width}"
    closely = f"{loosely}-{rounded_up(outputs.height * outputs.width, SIZES)}"
    return f"{closely}-{rounded_up(outputs.samples, BATCHES)}", closely, loosely


def tile_of(operation: str, inputs: Planes, outputs: Planes, precision: Precision, x: Tensor) -> Configuration:
    """Return the configuration of `operation`, with BLOCK_M limited to the pixels of a plane, and BLOCK_N to the channels."""
    classes = shape_classes(inputs, outputs, effective_precision(x.dtype, precision))
    tile = configuration(operation, architecture(x.device), *classes)
    tile["BLOCK_M"] = min(tile["BLOCK_M"], max(16, triton.next_power_of_2(outputs.height * outputs.width)))
    tile["BLOCK_N"] = min(tile["BLOCK_N"], max(16, triton.next_power_of_2(outputs.channels)))
    return tile
