"""Sum the weight gradient of a 3×3 convolution over boxes of pixels (boxes.py), cut into parts that a second pass adds up.

A tensor core takes 16-bit factors as they lie, but those of tf32 only with the pixels side by side. It is given copies:
of ȳ one, of x three, shifted by a pixel each, since the box of a tap could not begin at its pixel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..types import Precision
from .boxes import BOX, box_of, count_boxes, describe_planes, described, place_of, tile_of
from .implicit_gemm import effective_precision, product
from .launch import launch, tl, triton
from .planes import Planes, stacked

_ADDED = 512  # elements of a program that adds up parts
_COPIED = 64  # pixels, and channels, of a program that copies


@triton.jit
def _store_tap(
    parts: tl.tensor, total: tl.tensor, tap: tl.tensor, o: tl.tensor, c: tl.tensor, CI: tl.constexpr, CO: tl.constexpr
) -> None:
    """Store a tap of a tile (BLOCK_N, BLOCK_K) of weights into a part (CO, 9, CI)."""
    output = o + tl.arange(0, total.shape[0])[:, None]
    channel = c + tl.arange(0, total.shape[1])[None, :]
    tl.store(parts + (output * 9 + tap) * CI + channel, total, (output < CO) & (channel < CI))


@triton.jit
def _correlate(
    x: tl.tensor_descriptor,  # descriptors: (B, H, W, CI), as is x_dot
    x_dot: tl.tensor_descriptor | None,
    y_bar: tl.tensor_descriptor,  # (B, HO, WO, CO), as is y_bar_dot
    y_bar_dot: tl.tensor_descriptor,
    parts: tl.tensor,  # (PARTS, CO, 9, CI)
    share: tl.tensor,  # boxes of a part
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
    """Store BLOCK_N output × BLOCK_K input channels of one tap, or of the three of a row, summed over a part of the pixels."""
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
    for step in range(share):  # a box past the last one is zeros
        n, row, column = place_of(part * share + step, HO, WO, BOX_B, BOX_H, BOX_W)
        down, across = row + tap // 3 - PADDING, column + tap % 3 - PADDING
        gs = tl.trans(y_bar_dot.load([n, row, column, o]).reshape(BLOCK_M, BLOCK_N))
        left = product(gs, x.load([n, down, across, c]).reshape(BLOCK_M, BLOCK_K), left, PRECISION)
        if TAPS == 3:
            middle = product(gs, x.load([n, down, across + 1, c]).reshape(BLOCK_M, BLOCK_K), middle, PRECISION)
            right = product(gs, x.load([n, down, across + 2, c]).reshape(BLOCK_M, BLOCK_K), right, PRECISION)
    if x_dot is not None:  # y_bar is then a descriptor too
        for step in range(share):
            n, row, column = place_of(part * share + step, HO, WO, BOX_B, BOX_H, BOX_W)
            down, across = row + tap // 3 - PADDING, column + tap % 3 - PADDING
            gs = tl.trans(y_bar.load([n, row, column, o]).reshape(BLOCK_M, BLOCK_N))
            left = product(gs, x_dot.load([n, down, across, c]).reshape(BLOCK_M, BLOCK_K), left, PRECISION)
            if TAPS == 3:
                middle = product(gs, x_dot.load([n, down, across + 1, c]).reshape(BLOCK_M, BLOCK_K), middle, PRECISION)
                right = product(gs, x_dot.load([n, down, across + 2, c]).reshape(BLOCK_M, BLOCK_K), right, PRECISION)
    parts += part.to(tl.int64) * (CO * 9 * CI)
    _store_tap(parts, left, tap, o, c, CI, CO)
    if TAPS == 3:
        _store_tap(parts, middle, tap + 1, o, c, CI, CO)
        _store_tap(parts, right, tap + 2, o, c, CI, CO)


@triton.jit
def _correlate_lines(
    x: tl.tensor_descriptor,  # descriptor: (3·CI, positions): shifted by a pixel from one third to the next
    y_bar: tl.tensor_descriptor,  # descriptor: (CO, positions)
    parts: tl.tensor,  # (PARTS, CO, 9, CI)
    share: tl.tensor,  # steps of a part
    CI: tl.constexpr,
    CO: tl.constexpr,
    PITCH: tl.constexpr,  # positions from a row to the next, a multiple of four
    PRECISION: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Do as `_correlate`, on copies whose pixels lie side by side. A tile past the last channel of x has the next third's."""
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
    for step in range(share):
        position = (part * share + step) * BLOCK_M
        source = position + tap // 3 * PITCH
        gs = y_bar.load([o, position])
        left = product(gs, tl.trans(x.load([line, source])), left, PRECISION)
        if TAPS == 3:
            middle = product(gs, tl.trans(x.load([line + CI, source])), middle, PRECISION)
            right = product(gs, tl.trans(x.load([line + 2 * CI, source])), right, PRECISION)
    parts += part.to(tl.int64) * (CO * 9 * CI)
    _store_tap(parts, left, tap, o, c, CI, CO)
    if TAPS == 3:
        _store_tap(parts, middle, tap + 1, o, c, CI, CO)
        _store_tap(parts, right, tap + 2, o, c, CI, CO)


@triton.jit
def _copy_lines(
    planes: tl.tensor,  # (B, H, W, C)
    lines: tl.tensor,  # (COPIES, C, length), from the first position of these planes on
    length: tl.tensor,
    positions: tl.tensor,  # of these planes: B · ROWS · PITCH
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    PITCH: tl.constexpr,
    PADDING: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Copy so that pixels lie side by side, ROWS rows of PITCH pixels a sample, `PADDING` further down and right.

    Each copy is one pixel further left than the one before. What is outside the plane is zero.
    """
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c = program % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    position = (program // BLOCKS).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    row = position // PITCH % ROWS - PADDING
    sample = position // (PITCH * ROWS)
    exists = (position < positions) & (c < C)
    for copy in tl.static_range(COPIES):
        column = position % PITCH + (copy - PADDING)
        inside = exists & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        values = tl.load(planes + ((sample * H + row) * W + column) * C + c, inside, 0)
        place = (copy * C + c) * length + position
        tl.store(lines + tl.trans(place), tl.trans(values), tl.trans(exists))


@triton.jit
def _add_weights(
    parts: tl.tensor,  # (PARTS, CO, 9, CI)
    weight_bar: tl.tensor,  # (CO, CI, 9)
    count: tl.tensor,
    size: tl.tensor,
    CI: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = place < size
    source = (place // (9 * CI) * 9 + place % 9) * CI + place // 9 % CI
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(count):
        total += tl.load(parts + source, exists, 0)
        parts += size
    tl.store(weight_bar + place, total, exists)


def correlate(
    operation: str,
    x: Tensor,
    x_dot: Tensor | None,
    y_bar: Tensor,
    y_bar_dot: Tensor,
    padding: int,
    precision: Precision,
) -> Tensor:
    """Return W̄̇ (CO, CI, 3, 3), float32. Raises `ValueError` for tensors that no box fits."""
    inputs, outputs = Planes.of(x, x_dot), Planes.of(y_bar, y_bar_dot)
    tensors = [tensor for tensor in (x, x_dot, y_bar, y_bar_dot) if tensor is not None]
    tile = tile_of(operation, inputs, outputs, precision, tensors)
    target = tile.pop("PROGRAMS")
    programs = triton.cdiv(outputs.channels, tile["BLOCK_N"]) * triton.cdiv(inputs.channels, tile["BLOCK_K"])
    programs *= 9 // tile["TAPS"]
    if x.element_size() == 2:
        kernel, factors, steps, constants = _planes_as_they_lie(x, x_dot, y_bar, y_bar_dot, padding, tile)
    else:
        kernel, factors, steps, constants = _copied_lines(x, x_dot, y_bar, y_bar_dot, padding, tile)
    constants |= {"CI": inputs.channels, "CO": outputs.channels, "PRECISION": effective_precision(x.dtype, precision)}
    share = triton.cdiv(steps, max(1, min(steps, target // programs)))
    count = triton.cdiv(steps, share)
    parts = torch.empty((count, outputs.channels, 9, inputs.channels), dtype=torch.float32, device=x.device)
    launch(kernel, count * programs, *factors, parts, share, **constants)
    shape = (outputs.channels, inputs.channels, 3, 3)
    weight_bar = torch.empty(shape, dtype=torch.float32, device=x.device)
    size = weight_bar.numel()
    added = {"CI": inputs.channels, "BLOCK": _ADDED, "num_warps": 4}
    launch(_add_weights, triton.cdiv(size, _ADDED), parts, weight_bar, count, size, **added)
    return weight_bar


Summands = tuple[Any, tuple[Any, ...], int, dict[str, Any]]
"""A kernel, the descriptors that it multiplies, its steps over all pixels, and its constants."""


def _planes_as_they_lie(
    x: Tensor, x_dot: Tensor | None, y_bar: Tensor, y_bar_dot: Tensor, padding: int, tile: dict[str, int]
) -> Summands:
    planes = Planes.of(y_bar_dot)
    sizes = {name: size for name, size in tile.items() if name != "BLOCK_M"}
    box = box_of(tile["BLOCK_M"], planes)
    factors = (
        describe_planes(x, box, tile["BLOCK_K"]),
        None if x_dot is None else describe_planes(x_dot, box, tile["BLOCK_K"]),
        None if x_dot is None else describe_planes(y_bar, box, tile["BLOCK_N"]),
        describe_planes(y_bar_dot, box, tile["BLOCK_N"]),
    )
    constants = {"HO": planes.height, "WO": planes.width, "PADDING": padding, **dict(zip(BOX, box, strict=True))}
    return _correlate, factors, count_boxes(planes, box), sizes | constants


def _copied_lines(
    x: Tensor, x_dot: Tensor | None, y_bar: Tensor, y_bar_dot: Tensor, padding: int, tile: dict[str, int]
) -> Summands:
    planes = Planes.of(y_bar_dot)
    pitch = triton.cdiv(planes.width, 4) * 4  # a row begins at a multiple of 16 bytes
    left, right = ([x], [y_bar_dot]) if x_dot is None else (_batches(x, x_dot), _batches(y_bar_dot, y_bar))
    xs, ys = _lines(left, 3, padding, planes, pitch), _lines(right, 1, 0, planes, pitch)
    length = xs.shape[1]
    factors = (
        described(xs, tuple(xs.shape), (tile["BLOCK_K"], tile["BLOCK_M"])),
        described(ys, tuple(ys.shape), (tile["BLOCK_N"], tile["BLOCK_M"])),
    )
    return _correlate_lines, factors, triton.cdiv(length, tile["BLOCK_M"]), tile | {"PITCH": pitch}


def _batches(first: Tensor, second: Tensor) -> list[Tensor]:
    """Return both, as one if they lie so."""
    both = stacked(first, second)
    return [first, second] if both is None else [both]


def _lines(planes: list[Tensor], copies: int, padding: int, outputs: Planes, pitch: int) -> Tensor:
    """Return copies (copies · C, positions) of planes after each other, two zero rows longer than a result's."""
    _, channels, height, width = planes[0].shape
    rows = outputs.height + 2
    positions = len(planes[0]) * rows * pitch
    length = len(planes) * positions
    lines = planes[0].new_empty((copies * channels, length))
    for number, each in enumerate(planes):
        launch(
            _copy_lines,
            triton.cdiv(positions, _COPIED) * triton.cdiv(channels, _COPIED),
            each,
            lines[:, number * positions :],
            length,
            positions,
            C=channels,
            H=height,
            W=width,
            ROWS=rows,
            PITCH=pitch,
            PADDING=padding,
            COPIES=copies,
            BLOCK_L=_COPIED,
            BLOCK_C=_COPIED,
            num_warps=8,
        )
    return lines
