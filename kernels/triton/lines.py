"""Walk over channels_last planes in tiles of windows × channels: whole lines of channels, pooled within a thread.

The four pixels of 2×2 windows lie in four tiles of one layout, so the thread that adds them up holds them all. Quarters 0
and 1 of a window are its upper pixels, 2 and 3 the lower ones. A plane that fits in one tile stays in a program's
registers. A larger one is cut into parts of TILES tiles, a program each, and what is summed over a plane is summed over
its parts by a pass of its own, always in the same order. An odd last row or column makes windows that are not whole,
which have no pooled value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .configurations import Configuration, configuration
from .launch import architecture, launch, tl, triton
from .planes import Planes
from .windows import shape_class

COMBINED_C = 16
"""Channels of a program that combines parts: there are few numbers to read, so programs should be many."""
COMBINED_PARTS = 64
"""Parts that it reads at once."""


@triton.jit
def within(index: tl.tensor, LIMIT: tl.constexpr, ALWAYS: tl.constexpr) -> tl.tensor:
    """Return which indices are below LIMIT: where all are, a constant, which the compiler takes out of loads and stores."""
    return tl.full(index.shape, 1, tl.int1) if ALWAYS else index < LIMIT


@triton.jit
def program_part(
    PARTS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return the program's sample (int64), its part of the planes, its channels (1, BLOCK_C) and which of these exist."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c = program % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    part = program // BLOCKS
    return (part // PARTS).to(tl.int64), part % PARTS, c, within(c, C, C % BLOCK_C == 0)


@triton.jit
def quarter_pixels(
    window: tl.tensor,  # (WINDOWS, 1), as are the results
    QUARTER: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the pixels of a quarter of the windows, and which exist: with WHOLE, all windows do and are whole."""
    COLUMNS: tl.constexpr = (W + 1) // 2
    row, column = 2 * (window // COLUMNS), 2 * (window % COLUMNS)
    exists = within(row, H - QUARTER // 2, WHOLE) & within(column, W - QUARTER % 2, WHOLE)
    return row * W + column + (QUARTER // 2 * W + QUARTER % 2), exists


@triton.jit
def pooled_pixels(
    window: tl.tensor, H: tl.constexpr, W: tl.constexpr, WHOLE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the places of the windows' pooled values in their plane, and which exist: (WINDOWS, 1)."""
    COLUMNS: tl.constexpr = (W + 1) // 2
    row, column = window // COLUMNS, window % COLUMNS
    return row * (W // 2) + column, within(row, H // 2, WHOLE) & within(column, W // 2, WHOLE)


@triton.jit
def sum_two(a: tl.tensor, b: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Sum tiles (WINDOWS, BLOCK_C) over the windows, (1, BLOCK_C): together, since threads wait for each other in a sum."""
    return tl.split(tl.sum(tl.join(a, b), 0, keep_dims=True))  # type: ignore[no-any-return]


@triton.jit
def sum_four(
    a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Sum four tiles as `sum_two` does two."""
    first, second = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), 0, keep_dims=True))
    of_a, of_b = tl.split(first)
    of_c, of_d = tl.split(second)
    return of_a, of_b, of_c, of_d


def shape_classes(planes: Planes, partial: bool) -> tuple[str, ...]:
    """Name the shape in the table, where planes that are read in parts may have a row of their own."""
    loosely = shape_class(planes)
    return (f"{loosely}-partial", loosely) if partial else (loosely,)


def tile_of(operation: str, planes: Planes, y: Tensor, partial: bool = False) -> Configuration:
    """Return the row of `operation` in the table, with a tile no wider than the planes, and of float64 half as wide."""
    closest, *looser = shape_classes(planes, partial)
    row = configuration(operation, closest, architecture(y.device), *looser)
    widest = row["BLOCK_C"] if y.dtype != torch.float64 else max(1, row["BLOCK_C"] // 2)
    return row | {"BLOCK_C": min(widest, triton.next_power_of_2(planes.channels))}


def fits(planes: Planes, tile: Configuration) -> bool:
    """Return whether a plane is held by one tile."""
    return _windows(planes) <= tile["WINDOWS"]


def launch_held(
    kernel: Any, planes: Planes, tile: Configuration, y: Tensor, *rest: Tensor | int | None, **more: Any
) -> None:
    """Run `kernel` for each block of channels of each sample: a program holds their planes."""
    windows = _windows(planes)
    tile = {"WINDOWS": triton.next_power_of_2(windows), "BLOCK_C": tile["BLOCK_C"], "num_warps": tile["num_warps"]}
    _launch(kernel, planes, tile, 1, windows % tile["WINDOWS"] == 0, y, *rest, **more)


def launch_parts(
    kernel: Any, planes: Planes, tile: Configuration, parts: int, y: Tensor, *rest: Tensor | None, **more: Any
) -> None:
    """Run `kernel` for each block of channels of each of the parts of each sample's planes."""
    filled = _windows(planes) % (tile["WINDOWS"] * tile["TILES"]) == 0
    _launch(kernel, planes, tile, parts, filled, y, *rest, PARTS=parts, **more)


def combine_parts(
    kernel: Any, planes: Planes, results: int, parts: int, *arguments: Tensor | None, **more: int | float
) -> None:
    """Run `kernel`, which reads all parts, for each of the results of each block of channels of each sample."""
    programs = planes.samples * results * triton.cdiv(planes.channels, COMBINED_C)
    block_parts = min(COMBINED_PARTS, triton.next_power_of_2(parts))
    tile = {"BLOCK_C": COMBINED_C, "BLOCK_PARTS": block_parts, "num_warps": 4}
    launch(kernel, programs, *arguments, C=planes.channels, PARTS=parts, **tile, **more)


def parts_of_windows(planes: Planes, tile: Configuration) -> int:
    """Return the number of parts of a plane if a part has TILES tiles of windows."""
    parts: int = triton.cdiv(_windows(planes), tile["WINDOWS"] * tile["TILES"])
    return parts


def parts_of_pixels(planes: Planes, tile: Configuration) -> int:
    """Return the number of parts of a plane if a part has four times as many pixels, wherever they lie: none is empty."""
    parts: int = triton.cdiv(planes.height * planes.width, 4 * tile["WINDOWS"] * tile["TILES"])
    return parts


def _windows(planes: Planes) -> int:
    return ((planes.height + 1) // 2) * ((planes.width + 1) // 2)


def _launch(
    kernel: Any,
    planes: Planes,
    tile: Configuration,
    parts: int,
    filled: bool,
    *arguments: Tensor | int | None,
    **more: Any,
) -> None:
    """Run `kernel`, which may leave out the masks of windows where tiles are `filled` and sizes are even."""
    shape = {"C": planes.channels, "H": planes.height, "W": planes.width}
    whole = filled and planes.height % 2 == planes.width % 2 == 0
    programs = planes.samples * parts * triton.cdiv(planes.channels, tile["BLOCK_C"])
    launch(kernel, programs, *arguments, **shape, WHOLE=whole, **tile, **more)
