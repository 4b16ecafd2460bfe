"""Iterate over contiguous planes in 2×2 windows: compute offsets and masks, load windows, and launch kernels that do so.

A program handles a block of channels of one sample. It loops over their planes, WINDOWS windows at a time, in a layout
where a thread holds the pixels that it pools. An odd last row or column makes incomplete windows, which have no pooled
value.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .configurations import configuration
from .launch import architecture, launch, tl, triton
from .planes import Planes


@triton.jit
def program_block(C: tl.constexpr, BLOCK_C: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the program's sample (int64), its channels (BLOCK_C, 1, 1), and the mask of channels below C."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None, None]
    return (program // blocks).to(tl.int64), c, c < C


@triton.jit
def row_offsets(
    c: tl.tensor,
    start: tl.tensor,
    ROW: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return offsets within a sample, and the mask, of row ROW (0 or 1) of the windows: (BLOCK_C, WINDOWS, 2)."""
    window = start + tl.arange(0, WINDOWS)[None, :, None]
    columns: tl.constexpr = (W + 1) // 2
    row = 2 * (window // columns) + ROW
    column = 2 * (window % columns) + tl.arange(0, 2)[None, None, :]
    pixel = row * W + column
    offset = c * (H * W) + pixel
    return offset, (c < C) & (row < H) & (column < W)


@triton.jit
def pooled_offsets(
    c: tl.tensor,
    start: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return offsets within a sample, and the mask, of the pooled values of the windows: (BLOCK_C, WINDOWS, 1)."""
    window = start + tl.arange(0, WINDOWS)[None, :, None]
    columns: tl.constexpr = (W + 1) // 2
    row = window // columns
    column = window % columns
    pixel = row * (W // 2) + column
    offset = c * ((H // 2) * (W // 2)) + pixel
    return offset, (c < C) & (row < H // 2) & (column < W // 2)


@triton.jit
def load_windows(
    pointer: tl.tensor,
    ACC: tl.constexpr,
    c: tl.tensor,
    start: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    WINDOWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Load both rows of the windows (BLOCK_C, WINDOWS, 2), converted to ACC.

    Both are loaded before the caller stores anything. Otherwise the compiler could not merge the loads of two loops.
    """
    upper, upper_mask = row_offsets(c, start, 0, C, H, W, WINDOWS)
    lower, lower_mask = row_offsets(c, start, 1, C, H, W, WINDOWS)
    return tl.load(pointer + upper, upper_mask, 0).to(ACC), tl.load(pointer + lower, lower_mask, 0).to(ACC)


@triton.jit
def plane_sum(tile: tl.tensor) -> tl.tensor:
    """Return the sum of `tile` (BLOCK_C, WINDOWS, 2) over its pixels, (BLOCK_C, 1, 1)."""
    return tl.sum(tl.sum(tile, 2, keep_dims=True), 1, keep_dims=True)


def launch_windows(
    kernel: Any, operation: str, planes: Planes, y: Tensor, *rest: Tensor | None, **constants: Any
) -> None:
    """Run `kernel` for each block of channels of each sample, with the configuration of `operation`."""
    row = configuration(operation, architecture(y.device), planes.shape_class)
    launch(
        kernel,
        planes.samples * triton.cdiv(planes.channels, row["BLOCK_C"]),
        y,
        *rest,
        **constants,
        C=planes.channels,
        H=planes.height,
        W=planes.width,
        **row,
    )
