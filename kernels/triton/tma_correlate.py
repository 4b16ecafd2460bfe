"""Compute the weight gradient of a 3×3 convolution with operands that TMA loads (tma_descriptors.py).

The sum over pixels is split (split-K), and a later kernel adds up the partial sums. A tensor core accepts 16-bit factors in
either layout, but tf32 factors only if their pixels are adjacent in memory. For tf32, planes are therefore copied to that
layout: ȳ once, and x three times, each copy shifted by one more pixel, since a box cannot begin at the pixel of every tap.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..types import Precision
from .implicit_gemm import add_product, effective_precision
from .launch import item, launch, tl, triton
from .planes import Planes
from .tma_descriptors import BOX, box_of, box_origin, count_boxes, describe, describe_planes, tile_of

_COPY_BLOCK = 64  # pixels, and channels, that one program copies


@triton.jit
def _store_tap(
    parts: tl.tensor, total: tl.tensor, tap: tl.tensor, o: tl.tensor, c: tl.tensor, CI: tl.constexpr, CO: tl.constexpr
) -> None:
    """Store `total` (BLOCK_N, BLOCK_K), one tap of a tile of weights, in a part (CO, 9, CI)."""
    output = o + tl.arange(0, total.shape[0])[:, None]
    channel = c + tl.arange(0, total.shape[1])[None, :]
    tl.store(parts + (output * 9 + tap) * CI + channel, total, (output < CO) & (channel < CI))


@triton.jit
def _correlate(
    x: tl.tensor_descriptor,  # descriptors: (B, H, W, CI), as is x_dot
    x_dot: tl.tensor_descriptor | None,
    y_bar: tl.tensor_descriptor,  # (B·HO·WO, CO), as is y_bar_dot
    y_bar_dot: tl.tensor_descriptor,
    parts: tl.tensor,  # (PARTS, CO, 9, CI)
    boxes_per_part: tl.tensor,
    CI: tl.constexpr,
    CO: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
    TAPS: tl.constexpr,
    BOX_B: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Store BLOCK_N output × BLOCK_K input channels of TAPS taps, summed over a part of the pixels.

    TAPS is 1, or 3 for the taps of a row. The pixels of a box are consecutive in memory, so ȳ needs no reshape. As the first
    factor it then needs no registers: see `_add_product` in tma_convolve.py.
    """
    BLOCK_M: tl.constexpr = BOX_B * BOX_H * BOX_W
    OUTPUTS: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    INPUTS: tl.constexpr = (CI + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    o = program % OUTPUTS * BLOCK_N
    c = program // OUTPUTS % INPUTS * BLOCK_K
    tap = program // (OUTPUTS * INPUTS) % (9 // TAPS) * TAPS
    part = program // (OUTPUTS * INPUTS * (9 // TAPS))
    left = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    middle = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    right = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for pair in tl.static_range(2):
        xs, ys = (x, y_bar_dot) if pair == 0 else (x_dot, y_bar)
        if xs is not None:
            for step in range(boxes_per_part):  # boxes past the last one load as zeros
                box = part * boxes_per_part + step
                n, row, column = box_origin(box, HO, WO, BOX_B, BOX_H, BOX_W)
                down, across = row + tap // 3 - PADDING, column + tap % 3 - PADDING
                gs = tl.trans(ys.load([box * BLOCK_M, o]))
                left = add_product(gs, xs.load([n, down, across, c]).reshape(BLOCK_M, BLOCK_K), left, PRECISION)
                if TAPS == 3:
                    middle = add_product(
                        gs, xs.load([n, down, across + 1, c]).reshape(BLOCK_M, BLOCK_K), middle, PRECISION
                    )
                    right = add_product(
                        gs, xs.load([n, down, across + 2, c]).reshape(BLOCK_M, BLOCK_K), right, PRECISION
                    )
    parts += part.to(tl.int64) * (CO * 9 * CI)
    _store_tap(parts, left, tap, o, c, CI, CO)
    if TAPS == 3:
        _store_tap(parts, middle, tap + 1, o, c, CI, CO)
        _store_tap(parts, right, tap + 2, o, c, CI, CO)


@triton.jit
def _correlate_lines(
    x: tl.tensor_descriptor,  # descriptor: (3·CI, positions), three copies, each shifted by one more pixel
    y_bar: tl.tensor_descriptor,  # descriptor: (CO, positions)
    parts: tl.tensor,  # (PARTS, CO, 9, CI)
    steps_per_part: tl.tensor,
    CI: tl.constexpr,
    CO: tl.constexpr,
    PITCH: tl.constexpr,  # positions from one row to the next, a multiple of four
    PRECISION: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Store what `_correlate` does, from copies whose pixels are adjacent in memory.

    A tile may reach past the last channel of one copy of x into the next copy. `_store_tap` masks these channels.
    """
    OUTPUTS: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    INPUTS: tl.constexpr = (CI + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    o = program % OUTPUTS * BLOCK_N
    c = program // OUTPUTS % INPUTS * BLOCK_K
    tap = program // (OUTPUTS * INPUTS) % (9 // TAPS) * TAPS
    part = program // (OUTPUTS * INPUTS * (9 // TAPS))
    line = tap % 3 * CI + c
    left = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    middle = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    right = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for step in range(steps_per_part):
        position = (part * steps_per_part + step) * BLOCK_M
        source = position + tap // 3 * PITCH
        gs = y_bar.load([o, position])
        left = add_product(gs, tl.trans(x.load([line, source])), left, PRECISION)
        if TAPS == 3:
            middle = add_product(gs, tl.trans(x.load([line + CI, source])), middle, PRECISION)
            right = add_product(gs, tl.trans(x.load([line + 2 * CI, source])), right, PRECISION)
    parts += part.to(tl.int64) * (CO * 9 * CI)
    _store_tap(parts, left, tap, o, c, CI, CO)
    if TAPS == 3:
        _store_tap(parts, middle, tap + 1, o, c, CI, CO)
        _store_tap(parts, right, tap + 2, o, c, CI, CO)


@triton.jit
def _copy_block(
    planes: tl.tensor,  # (B, H, W, C)
    lines: tl.tensor,  # (COPIES, C, length), beginning at the first position of these planes
    block: tl.tensor,
    length: tl.tensor,
    positions: tl.tensor,  # number of these planes' positions
    COPIED: tl.constexpr,  # the `_Copied` of these planes
    ROWS: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Copy BLOCK_L positions × BLOCK_C channels of one of the planes to each of its lines."""
    C: tl.constexpr = COPIED.C
    COPIES: tl.constexpr = COPIED.copies
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = block % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    position = (block // BLOCKS).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    row = position // PITCH % ROWS - COPIED.padding
    sample = position // (PITCH * ROWS)
    mask = (position < positions) & (c < C)
    for copy in tl.static_range(COPIES):
        column = position % PITCH + (copy - COPIED.padding)
        inside = mask & (row >= 0) & (row < COPIED.H) & (column >= 0) & (column < COPIED.W)
        values = tl.load(planes + ((sample * COPIED.H + row) * COPIED.W + column) * C + c, inside, 0)
        offsets = (copy * C + c).to(tl.int64) * length + position
        tl.store(lines + tl.trans(offsets), tl.trans(values), tl.trans(mask))


@triton.jit
def _copy_lines(
    lines: tl.tuple,  # (3·CI, length) of x, each copy shifted one pixel further left, and (CO, length) of ȳ
    planes: tl.tuple,  # x, x_dot unless None, y_bar_dot, and y_bar if there is x_dot
    length: tl.tensor,
    positions: tl.tensor,  # of each of the planes: B · ROWS · PITCH
    COPIED: tl.constexpr,  # a `_Copied` for each of the planes
    ROWS: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Copy planes to lines, so that the pixels of a channel are adjacent in memory.

    A sample is ROWS rows of PITCH positions. Pixels are moved down and right by the padding. Positions outside the planes are
    zero.
    """
    program = tl.program_id(0)
    first = 0
    for number in tl.static_range(len(COPIED)):
        end = first + (positions + BLOCK_L - 1) // BLOCK_L * ((item(COPIED, number).C + BLOCK_C - 1) // BLOCK_C)
        if (program >= first) & (program < end):
            start = lines[item(COPIED, number).lines] + item(COPIED, number).order * positions
            _copy_block(
                planes[number], start, program - first, length, positions, item(COPIED, number), ROWS, PITCH, BLOCK_L, BLOCK_C
            )  # fmt: skip
        first = end


def correlate(
    operation: str,
    x: Tensor,
    x_dot: Tensor | None,
    y_bar: Tensor,
    y_bar_dot: Tensor,
    padding: int,
    precision: Precision,
) -> Tensor:
    """Return S partial sums of W̄̇ = ȳ̇ ⋆ x + ȳ ⋆ ẋ, (S, CO, CI, 3, 3), float32. Without `x_dot`, W̄̇ = ȳ̇ ⋆ x.

    Raises `ValueError` for planes that TMA cannot load.
    """
    inputs, outputs = Planes.from_tensors(x, x_dot), Planes.from_tensors(y_bar, y_bar_dot)
    tensors = [tensor for tensor in (x, x_dot, y_bar, y_bar_dot) if tensor is not None]
    tile = tile_of(operation, inputs, outputs, precision, tensors)
    programs, per_part, count = _split(inputs, outputs, tile, x, x_dot is not None)
    tile.pop("PROGRAMS")
    if x.element_size() == 2:
        kernel, factors, constants = _factors_in_place(x, x_dot, y_bar, y_bar_dot, padding, tile)
    else:
        kernel, factors, constants = _copy_factors(x, x_dot, y_bar, y_bar_dot, padding, tile)
    constants |= {"CI": inputs.channels, "CO": outputs.channels, "PRECISION": effective_precision(x.dtype, precision)}
    parts = torch.empty((count, outputs.channels, 3, 3, inputs.channels), dtype=torch.float32, device=x.device)
    launch(kernel, count * programs, *factors, parts, per_part, **constants)
    return parts.permute(0, 1, 4, 2, 3)


def count_summands(operation: str, inputs: Planes, outputs: Planes, precision: Precision, x: Tensor) -> int:
    """Return the number S of partial sums that `correlate` returns for planes of the dtype and device of `x`."""
    tile = tile_of(operation, inputs, outputs, precision, [x])
    return _split(inputs, outputs, tile, x, "dual" in operation)[2]


def copied_bytes(operation: str, inputs: Planes, outputs: Planes, x: Tensor) -> int:
    """Return the bytes of the copies that `correlate` makes of planes of the dtype of `x`: 0 for 16 bits."""
    if x.element_size() == 2:
        return 0
    positions = outputs.samples * _rows(outputs) * _pitch(outputs) * (2 if "dual" in operation else 1)
    return (3 * inputs.channels + outputs.channels) * positions * x.element_size()


def _split(inputs: Planes, outputs: Planes, tile: dict[str, int], x: Tensor, has_x_dot: bool) -> tuple[int, int, int]:
    """Return the programs for each part of the sum over pixels, the steps in one part, and the number of parts."""
    programs = triton.cdiv(outputs.channels, tile["BLOCK_N"]) * triton.cdiv(inputs.channels, tile["BLOCK_K"])
    programs *= 9 // tile["TAPS"]
    if x.element_size() == 2:
        steps = count_boxes(outputs, box_of(tile["BLOCK_M"], outputs, outputs.width))
    else:
        positions = outputs.samples * _rows(outputs) * _pitch(outputs)
        steps = triton.cdiv(2 * positions if has_x_dot else positions, tile["BLOCK_M"])
    per_part = triton.cdiv(steps, max(1, min(steps, tile["PROGRAMS"] // programs)))
    return programs, per_part, triton.cdiv(steps, per_part)


def _rows(planes: Planes) -> int:
    """Return the rows of a sample in the copies: those of the planes and two rows of zeros."""
    return planes.height + 2


def _pitch(planes: Planes) -> int:
    """Return the positions from one row to the next in the copies. A row begins at a multiple of 16 bytes."""
    pitch: int = triton.cdiv(planes.width, 4) * 4
    return pitch


Summands = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A kernel, its first arguments (the descriptors of its factors), and its constants."""


def _factors_in_place(
    x: Tensor, x_dot: Tensor | None, y_bar: Tensor, y_bar_dot: Tensor, padding: int, tile: dict[str, int]
) -> Summands:
    """Return the kernel for 16-bit factors, with descriptors of the planes themselves."""
    planes = Planes.from_tensors(y_bar_dot)
    sizes = {name: size for name, size in tile.items() if name != "BLOCK_M"}
    # the pixels of a box are consecutive in memory, as the sides of the planes are powers of two
    box = box_of(tile["BLOCK_M"], planes, planes.width)
    pixels, block = (planes.samples * planes.height * planes.width, planes.channels), (tile["BLOCK_M"], tile["BLOCK_N"])
    factors = (
        describe_planes(x, box, tile["BLOCK_K"]),
        None if x_dot is None else describe_planes(x_dot, box, tile["BLOCK_K"]),
        None if x_dot is None else describe(y_bar, pixels, block),
        describe(y_bar_dot, pixels, block),
    )
    constants = {"HO": planes.height, "WO": planes.width, "PADDING": padding, **dict(zip(BOX, box, strict=True))}
    return _correlate, factors, sizes | constants


class _Copied(NamedTuple):
    """Planes that are copied to lines."""

    lines: int  # index of the matrix of lines
    order: int  # of these planes within a line
    padding: int
    copies: int
    C: int
    H: int
    W: int


def _copy_factors(
    x: Tensor, x_dot: Tensor | None, y_bar: Tensor, y_bar_dot: Tensor, padding: int, tile: dict[str, int]
) -> Summands:
    """Copy the factors for tf32 to lines. Return the kernel that multiplies these, with descriptors of the copies."""
    outputs = Planes.from_tensors(y_bar_dot)
    left, right = ([x], [y_bar_dot]) if x_dot is None else ([x, x_dot], [y_bar_dot, y_bar])
    rows, pitch = _rows(outputs), _pitch(outputs)
    positions = outputs.samples * rows * pitch
    length = len(left) * positions
    xs, ys = x.new_empty(3 * x.shape[1], length), x.new_empty(outputs.channels, length)
    copied = [_Copied(0, order, padding, 3, *each.shape[1:]) for order, each in enumerate(left)]
    copied += [_Copied(1, order, 0, 1, *each.shape[1:]) for order, each in enumerate(right)]
    programs = sum(triton.cdiv(positions, _COPY_BLOCK) * triton.cdiv(each.C, _COPY_BLOCK) for each in copied)
    constants = {"COPIED": tuple(copied), "ROWS": rows, "PITCH": pitch, "BLOCK_L": _COPY_BLOCK, "BLOCK_C": _COPY_BLOCK}
    launch(_copy_lines, programs, (xs, ys), (*left, *right), length, positions, **constants, num_warps=8)
    factors = (
        describe(xs, tuple(xs.shape), (tile["BLOCK_K"], tile["BLOCK_M"])),
        describe(ys, tuple(ys.shape), (tile["BLOCK_N"], tile["BLOCK_M"])),
    )
    return _correlate_lines, factors, tile | {"PITCH": pitch}
