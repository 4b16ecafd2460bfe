"""Iterate over channels_last planes in tiles (WINDOWS, BLOCK_C) of 2×2 windows and channels, which are adjacent in memory.

The four pixels of a window lie in four tiles of the same layout, so that one thread holds them all and adds them up.
Quarters 0 and 1 are the upper pixels of a window, 2 and 3 the lower ones. A plane that fits in one tile stays in the
registers of one program (`launch_whole_planes`). A larger plane is cut into parts of TILES tiles, one for each program
(`launch_parts`), and another kernel adds up the parts' sums in a fixed order (`combine_parts`). An odd last row or column
makes incomplete windows, which have no pooled value. Contiguous planes are copied to channels_last (`by_channels_last`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..types import PartialPlanes, memory_format, planes_of
from .configurations import Configuration, configuration, rounded_up
from .launch import architecture, launch, tl, triton
from .partial_planes import add_planes
from .planes import Planes

Operation = TypeVar("Operation", bound=Callable[..., Any])

COMBINED_C = 16
"""Channels of a program that combines parts: few, so that there are many programs."""
COMBINED_PARTS = 64
"""Most parts that a program of `combine_parts` reads at once."""


@triton.jit
def within(index: tl.tensor, LIMIT: tl.constexpr, ALWAYS: tl.constexpr) -> tl.tensor:
    """Return the mask of indices below LIMIT. With ALWAYS it is a constant, which the compiler removes from memory accesses."""
    return tl.full(index.shape, 1, tl.int1) if ALWAYS else index < LIMIT


@triton.jit
def program_part(
    PARTS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return the program's sample (int64), its part of the planes, its channels (1, BLOCK_C), and their mask."""
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
    """Return the pixel of each window at QUARTER (0 to 3), and the mask. With WHOLE, all windows exist and are complete."""
    COLUMNS: tl.constexpr = (W + 1) // 2
    row, column = 2 * (window // COLUMNS), 2 * (window % COLUMNS)
    mask = within(row, H - QUARTER // 2, WHOLE) & within(column, W - QUARTER % 2, WHOLE)
    return row * W + column + (QUARTER // 2 * W + QUARTER % 2), mask


@triton.jit
def pooled_pixels(
    window: tl.tensor, H: tl.constexpr, W: tl.constexpr, WHOLE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the pixels of the windows' pooled values in the pooled plane, and the mask: (WINDOWS, 1)."""
    COLUMNS: tl.constexpr = (W + 1) // 2
    row, column = window // COLUMNS, window % COLUMNS
    return row * (W // 2) + column, within(row, H // 2, WHOLE) & within(column, W // 2, WHOLE)


@triton.jit
def sum_two(a: tl.tensor, b: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return the sums of two tiles (WINDOWS, BLOCK_C) over the windows, (1, BLOCK_C) each.

    Both are reduced together, since the threads of a program wait for each other in every reduction.
    """
    return tl.split(tl.sum(tl.join(a, b), 0, keep_dims=True))  # type: ignore[no-any-return]


@triton.jit
def sum_four(
    a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return the sums of four tiles, reduced together as by `sum_two`."""
    first, second = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), 0, keep_dims=True))
    a_sum, b_sum = tl.split(first)
    c_sum, d_sum = tl.split(second)
    return a_sum, b_sum, c_sum, d_sum


def by_channels_last(operation: Operation) -> Operation:
    """Return `operation`, whose kernels read channels_last planes, as one that computes on copies of contiguous planes.

    Its results are then contiguous too. Partial sums are added up before they are copied.
    """

    @wraps(operation)
    def run(*arguments: Any, **named: Any) -> Any:
        if memory_format(planes_of(arguments[0])) == torch.channels_last:
            return operation(*arguments, **named)
        results = operation(*_in_format(arguments, torch.channels_last), **named)
        return _in_format(results, torch.contiguous_format)

    return cast(Operation, run)


def _in_format(value: Any, form: torch.memory_format) -> Any:
    """Return planes, or those in a tuple, in this memory format, and anything else as it is."""
    if type(value) is tuple:
        return tuple(_in_format(each, form) for each in value)
    if isinstance(value, PartialPlanes):
        (value,) = add_planes(value)
    return value.contiguous(memory_format=form) if isinstance(value, Tensor) and value.dim() == 4 else value


def shape_classes(planes: Planes, dtype: torch.dtype, partial: bool) -> tuple[str, ...]:
    """Return the shape's classes in the table, the closest first.

    A class is the number of windows, rounded up to a power of four; the largest has all larger planes too. Planes read as
    partial sums may have a row of their own, and so may planes of 16 bits.
    """
    windows = str(rounded_up(planes.windows, (16, 64, 256, 1024, 4096)))
    own = ["partial"] * partial + ["half"] * (dtype.itemsize == 2)
    return (*(f"{windows}-{kind}" for kind in own), windows)


def tile_of(operation: str, planes: Planes, y: Tensor, partial: bool = False) -> Configuration:
    """Return the configuration of `operation`, with BLOCK_C limited to the channels, and half as large for float64."""
    row = configuration(operation, architecture(y.device), *shape_classes(planes, y.dtype, partial))
    widest = row["BLOCK_C"] if y.dtype != torch.float64 else max(1, row["BLOCK_C"] // 2)
    return row | {"BLOCK_C": min(widest, triton.next_power_of_2(planes.channels))}


def fits(planes: Planes, tile: Configuration) -> bool:
    """Return whether one tile holds a whole plane."""
    return planes.windows <= tile["WINDOWS"]


def launch_whole_planes(
    kernel: Any, planes: Planes, tile: Configuration, y: Tensor, *rest: Tensor | int | None, **more: Any
) -> None:
    """Run `kernel` for each block of channels of each sample. A program holds whole planes in registers."""
    width = triton.next_power_of_2(planes.windows)
    tile = {"WINDOWS": width, "BLOCK_C": tile["BLOCK_C"], "num_warps": tile["num_warps"]}
    _launch(kernel, planes, tile, 1, planes.windows % tile["WINDOWS"] == 0, y, *rest, **more)


def launch_parts(
    kernel: Any, planes: Planes, tile: Configuration, parts: int, y: Tensor, *rest: Tensor | None, **more: Any
) -> None:
    """Run `kernel` for each block of channels of each part of each sample's planes."""
    filled = planes.windows % (tile["WINDOWS"] * tile["TILES"]) == 0
    _launch(kernel, planes, tile, parts, filled, y, *rest, PARTS=parts, **more)


def combine_parts(
    kernel: Any, planes: Planes, results: int, parts: int, *arguments: Tensor | None, **more: int | float
) -> None:
    """Run `kernel`, which reads all parts of a plane, for each of the `results` of each block of channels of each sample."""
    programs = planes.samples * results * triton.cdiv(planes.channels, COMBINED_C)
    block_parts = min(COMBINED_PARTS, triton.next_power_of_2(parts))
    tile = {"BLOCK_C": COMBINED_C, "BLOCK_PARTS": block_parts, "num_warps": 4}
    launch(kernel, programs, *arguments, C=planes.channels, PARTS=parts, **tile, **more)


def parts_of_windows(planes: Planes, tile: Configuration) -> int:
    """Return the number of parts of a plane if a part is TILES tiles of windows."""
    parts: int = triton.cdiv(planes.windows, tile["WINDOWS"] * tile["TILES"])
    return parts


def parts_of_pixels(planes: Planes, tile: Configuration) -> int:
    """Return the number of parts of a plane if a part is as many pixels as TILES tiles have, in the order of memory.

    No part is then empty, since no pixels are counted for incomplete windows.
    """
    parts: int = triton.cdiv(planes.height * planes.width, 4 * tile["WINDOWS"] * tile["TILES"])
    return parts


def _launch(
    kernel: Any,
    planes: Planes,
    tile: Configuration,
    parts: int,
    filled: bool,
    *arguments: Tensor | int | None,
    **more: Any,
) -> None:
    """Run `kernel`. It needs no masks of windows if all tiles are `filled` and height and width are even."""
    shape = {"C": planes.channels, "H": planes.height, "W": planes.width}
    whole = filled and planes.height % 2 == planes.width % 2 == 0
    programs = planes.samples * parts * triton.cdiv(planes.channels, tile["BLOCK_C"])
    launch(kernel, programs, *arguments, **shape, WHOLE=whole, **tile, **more)
