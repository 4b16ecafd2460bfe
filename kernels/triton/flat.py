"""Compute the steps of SGD and of its adjoint on flat vectors of parameters, their squared distance, and index_add.

Each operation makes one pass over its vectors. A gradient may be partial sums, which the same pass adds up. The adjoint step also
adds the gradient of a batch to the gradient of all images, in additional programs of the same launch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..types import BatchGradient, PartialSums, accumulator
from .configurations import Configuration, configuration
from .launch import architecture, item, launch, tl, triton
from .planes import Planes
from .powers import inverse
from .warp import padded_batch, pixel_blocks, transpose_add


@triton.jit
def _sum_piece(
    source: tl.tensor, divisors: tl.tuple, PIECE: tl.constexpr, ACC: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return offsets in the vector (TAP_BLOCK, COLUMNS), their mask, and the sums: one program's tile of PIECE, a `_Piece`.

    Each of ROWS rows adds up every ROWS-th summand, in their order. Then a tree reduction adds up the rows. The order is the
    same in every run. A row reads a summand in the order of memory, so that loads are coalesced.
    """
    TAP_BLOCK: tl.constexpr = PIECE.tap_block
    ROWS: tl.constexpr = PIECE.rows
    COLUMNS: tl.constexpr = PIECE.columns
    BLOCKS: tl.constexpr = (PIECE.channels + COLUMNS - 1) // COLUMNS
    group = (tl.program_id(0) - PIECE.first) // BLOCKS
    tap = tl.arange(0, TAP_BLOCK)[:, None]
    channel = (tl.program_id(0) - PIECE.first) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (tap < PIECE.taps) & (channel < PIECE.channels)
    row = tl.arange(0, ROWS)[:, None, None]
    element = row.to(tl.int64) * PIECE.stride + ((group * PIECE.taps + tap) * PIECE.channels + channel)[None, :, :]
    total = tl.zeros((ROWS, TAP_BLOCK, COLUMNS), ACC)
    for start in range(0, PIECE.summands, ROWS):
        total += tl.load(source + element, mask[None, :, :] & (start + row < PIECE.summands), 0).to(ACC)
        source += ROWS * PIECE.stride
    numbers = tl.sum(total, 0)
    for number in tl.static_range(len(divisors)):
        numbers *= inverse(tl.load(divisors[number]).to(ACC))
    return PIECE.begin + (group * PIECE.channels + channel) * PIECE.taps + tap, mask, numbers


@triton.jit
def _owns_piece(PIECE: tl.constexpr) -> tl.tensor:
    """Return whether this program works on a tile of the piece."""
    return (tl.program_id(0) >= PIECE.first) & (tl.program_id(0) < PIECE.end)


@triton.jit
def _add_up(out: tl.tensor, pieces: tl.tuple, divisors: tl.tuple, PIECES: tl.constexpr, ACC: tl.constexpr) -> None:
    """Store the vector of the pieces' sums in `out`."""
    for piece in tl.static_range(len(PIECES)):
        if _owns_piece(item(PIECES, piece)):
            offsets, mask, total = _sum_piece(pieces[piece], divisors, item(PIECES, piece), ACC)
            tl.store(out + offsets, total, mask)


# `lr` may be an element of a vector, so it has any alignment
@triton.jit(do_not_specialize_on_alignment=["lr"])
def _sgd_step(
    theta: tl.tensor,
    pieces: tl.tuple,  # pointers to the first summand of each piece
    divisors: tl.tuple,  # pointers to scalars that divide the sums
    lr: tl.tensor,
    out: tl.tensor,
    velocity: tl.tensor,  # or None
    velocity_out: tl.tensor,  # or None
    PIECES: tl.constexpr,  # a `_Piece` for each piece
    MOMENTUM: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Store θ − rate · update in `out`, and the update in `velocity_out` unless that is None.

    The update is gradient + WEIGHT_DECAY · θ + MOMENTUM · velocity.
    """
    for piece in tl.static_range(len(PIECES)):
        if _owns_piece(item(PIECES, piece)):
            offsets, mask, gradient = _sum_piece(pieces[piece], divisors, item(PIECES, piece), ACC)
            value = tl.load(theta + offsets, mask, 0).to(ACC)
            update = gradient + WEIGHT_DECAY * value
            if velocity is not None:
                update += MOMENTUM * tl.load(velocity + offsets, mask, 0).to(ACC)
            if velocity_out is not None:
                tl.store(velocity_out + offsets, update, mask)
            tl.store(out + offsets, value - tl.load(lr).to(ACC) * update, mask)


# these arguments of a step have any alignment, and single loads read them
@triton.jit(do_not_specialize_on_alignment=["scale", "index", "parameters"])
def _adjoint_step(
    adjoint: tl.tensor,
    pieces: tl.tuple,  # pointers to the first summand of each piece
    divisors: tl.tuple,  # pointers to scalars that divide the sums
    direction: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    incoming: tl.tensor,  # or None
    images_bar: tl.tensor,  # or None; the next four arguments, too, are those of `transpose_add`
    index: tl.tensor,
    y_bar: tl.tensor,
    parameters: tl.tensor,
    batch: tl.tensor,
    PIECES: tl.constexpr,  # a `_Piece` for each piece
    WEIGHT_DECAY: tl.constexpr,
    ACC: tl.constexpr,
    IMAGES: tl.constexpr,  # an `_Images`, or None
) -> None:
    """Store adjoint + scale · (H v + WEIGHT_DECAY · direction), plus `incoming` unless it is None, in `out`.

    The first programs add a batch's gradient times the scale to `images_bar` unless that is None.
    """
    if IMAGES is not None:  # noqa: SIM102 - this is known when the kernel is compiled
        if tl.program_id(0) < IMAGES.programs:
            transpose_add(
                images_bar,
                index,
                y_bar,
                parameters,
                scale,
                batch,
                C=IMAGES.C,
                H=IMAGES.H,
                W=IMAGES.W,
                BLOCK_C=IMAGES.BLOCK_C,
                BLOCK_M=IMAGES.BLOCK_M,
                PADDED_BATCH=IMAGES.PADDED_BATCH,
            )
    for piece in tl.static_range(len(PIECES)):
        if _owns_piece(item(PIECES, piece)):
            offsets, mask, curvature = _sum_piece(pieces[piece], divisors, item(PIECES, piece), ACC)
            if WEIGHT_DECAY != 0:
                curvature += WEIGHT_DECAY * tl.load(direction + offsets, mask, 0).to(ACC)
            result = tl.load(adjoint + offsets, mask, 0).to(ACC) + tl.load(scale).to(ACC) * curvature
            if incoming is not None:
                result += tl.load(incoming + offsets, mask, 0).to(ACC)
            tl.store(out + offsets, result, mask)


@triton.jit
def _squared_distance(
    a: tl.tensor, b: tl.tensor, partials: tl.tensor, size: tl.tensor, PARTIALS: tl.constexpr, SIZE: tl.constexpr
) -> None:
    """Store each program's partial sum of (a − b)², in float64."""
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((SIZE,), tl.float64)
    for start in range(program * SIZE, size, PARTIALS * SIZE):
        offsets = start + tl.arange(0, SIZE)
        mask = offsets < size
        difference = tl.load(a + offsets, mask, 0).to(tl.float64) - tl.load(b + offsets, mask, 0).to(tl.float64)
        total += difference * difference
    tl.store(partials + program, tl.sum(total, 0))


@triton.jit
def _sum(partials: tl.tensor, result: tl.tensor, PARTIALS: tl.constexpr) -> None:
    """Store the sum of the PARTIALS partial sums."""
    tl.store(result, tl.sum(tl.load(partials + tl.arange(0, PARTIALS)), 0))


@triton.jit
def _index_add(
    out: tl.tensor,  # (n, WIDTH)
    index: tl.tensor,  # (b,)
    rows: tl.tensor,  # (b, WIDTH)
    batch: tl.tensor,
    WIDTH: tl.constexpr,
    ALPHA: tl.constexpr,
    PADDED_BATCH: tl.constexpr,  # b rounded up to a power of two
    SIZE: tl.constexpr,
) -> None:
    """Add SIZE elements of a row, and of all later rows with the same index, unless an earlier row has that index too."""
    BLOCKS: tl.constexpr = (WIDTH + SIZE - 1) // SIZE
    own, column = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS * SIZE + tl.arange(0, SIZE)
    samples, mask = tl.arange(0, PADDED_BATCH), column < WIDTH
    target = tl.load(index + own)
    same = tl.load(index + samples, samples < batch, -1) == target
    if tl.min(tl.where(same, samples, PADDED_BATCH), 0) == own:
        pointers = out + target * WIDTH + column
        total = tl.load(pointers, mask, 0)
        last = tl.max(tl.where(same, samples, 0), 0)
        source = rows + own.to(tl.int64) * WIDTH + column
        for row in range(own, last + 1):
            if tl.load(index + row) == target:
                total += ALPHA * tl.load(source, mask, 0)
            source += WIDTH
        tl.store(pointers, total, mask)


def add_up(sums: PartialSums) -> Tensor:
    """See `mtt_fast.kernels.add_up`."""
    first = sums.pieces[0]
    out = first.new_empty(sum(piece.shape[1:].numel() for piece in sums.pieces))
    _launch_step(_add_up, out, sums, **_row("add_up", out))
    return out


def sgd_step(
    theta: Tensor,
    gradient: Tensor | PartialSums,
    lr: Tensor,
    out: Tensor,
    velocity: Tensor | None,
    velocity_out: Tensor | None,
    momentum: float,
    weight_decay: float,
) -> Tensor:
    """See `mtt_fast.kernels.sgd_step`. The rate is read on the device, so nothing synchronises."""
    vectors = (lr, out, velocity, velocity_out)
    constants: dict[str, Any] = {"MOMENTUM": momentum, "WEIGHT_DECAY": weight_decay, **_row("sgd_step", theta)}
    _launch_step(_sgd_step, theta, gradient, *vectors, **constants)
    torch.autograd.graph.increment_version([out] if velocity_out is None else [out, velocity_out])
    return out


def adjoint_step(
    adjoint: Tensor,
    hessian_v: Tensor | PartialSums,
    direction: Tensor,
    scale: Tensor,
    out: Tensor,
    incoming: Tensor | None,
    weight_decay: float,
    batch: BatchGradient | None = None,
) -> Tensor:
    """See `mtt_fast.kernels.adjoint_step`. The scale is read on the device, so nothing synchronises."""
    row = _row("adjoint_step", adjoint)
    elements, programs, sizes = row.pop("ELEMENTS"), 0, None
    batch_arguments: tuple[Any, ...] = (None,) * 5
    if batch is not None:
        programs, pixel_sizes = pixel_blocks(Planes.from_tensors(batch.y_bar), elements)
        sizes = _Images(programs, PADDED_BATCH=padded_batch(len(batch.y_bar)), **pixel_sizes)
        batch_arguments = (*batch, len(batch.y_bar))
        torch.autograd.graph.increment_version(batch.out)
    vectors = (direction, scale, out, incoming, *batch_arguments)
    constants: dict[str, Any] = {"WEIGHT_DECAY": weight_decay, "IMAGES": sizes, **row}
    _launch_step(_adjoint_step, adjoint, hessian_v, *vectors, first_program=programs, **constants)
    torch.autograd.graph.increment_version(out)
    return out


def _row(operation: str, like: Tensor) -> Configuration:
    """Return a new copy of the configuration of `operation` on the device of a tensor."""
    return configuration(operation, architecture(like.device), "")


def _launch_step(
    kernel: Any,
    first: Tensor,
    gradient: Tensor | PartialSums,
    *rest: Any,
    SIZE: int,
    first_program: int = 0,
    **constants: Any,
) -> None:
    """Launch `kernel` with one program for each tile of SIZE summands of each piece of `gradient`, after `first_program` others.

    The kernel's arguments are `first`, the pieces and divisors of the gradient, and `rest`.
    """
    sums = PartialSums((gradient[None],)) if isinstance(gradient, Tensor) else gradient
    pieces, begin, programs = [], 0, first_program
    for piece in sums.pieces:
        pieces.append(_piece_of(piece, begin, programs, SIZE))
        begin += piece.shape[1:].numel()
        programs = pieces[-1].end
    acc = tl.float64 if accumulator(first.dtype) == torch.float64 else tl.float32
    launch(kernel, programs, first, sums.pieces, sums.divisors, *rest, PIECES=tuple(pieces), ACC=acc, **constants)


class _Images(NamedTuple):
    """The programs that work on images, and the sizes that `transpose_add` takes."""

    programs: int
    C: int
    H: int
    W: int
    BLOCK_C: int
    BLOCK_M: int
    PADDED_BATCH: int


class _Piece(NamedTuple):
    """Layout of a piece of partial sums in memory, (summands, groups, taps, channels), and the programs that add it up.

    In the vector the order is (groups, channels, taps). A piece that already has the vector's order is one group with one tap.
    """

    summands: int
    stride: int  # elements from a summand to the next
    channels: int
    taps: int
    begin: int  # offset in the vector
    first: int  # program that works on it
    end: int  # one after the last program
    tap_block: int  # sides of the tile, powers of two: tap_block, rows, columns
    rows: int
    columns: int


def _piece_of(piece: Tensor, begin: int, first: int, size: int) -> _Piece:
    """Return the layout of a piece (S, …) that begins at `begin` in the vector and at program `first`, in tiles of `size`.

    With more summands a tile has more rows, and there are more programs.
    """
    summands, numbers = len(piece), piece.shape[1:].numel()
    channels_last = piece.dim() == 5 and not piece[:1].is_contiguous()
    groups, channels, taps = (piece.shape[1], piece.shape[2], 9) if channels_last else (1, numbers, 1)
    # a row of the tile is at least a whole sector, or a cache line
    tap_block, least_columns = (16, 8) if channels_last else (1, 32)
    rows = min(triton.next_power_of_2(max(summands, 1)), size // (tap_block * least_columns))
    columns = size // (tap_block * max(rows, 4))  # few summands do not fill a tile; smaller tiles make more programs
    end = first + groups * triton.cdiv(channels, columns)
    return _Piece(summands, piece.stride(0), channels, taps, begin, first, end, tap_block, rows, columns)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """See `mtt_fast.kernels.squared_distance`. The order of the sum depends only on the size of the vectors."""
    row = _row("squared_distance", a)
    partials = torch.empty(row["PARTIALS"], dtype=torch.float64, device=a.device)
    result = torch.empty((), dtype=torch.float64, device=a.device)
    launch(_squared_distance, row["PARTIALS"], a, b, partials, a.numel(), **row)
    launch(_sum, 1, partials, result, PARTIALS=row["PARTIALS"])
    return result


def index_add(out: Tensor, index: Tensor, rows: Tensor, alpha: float) -> Tensor:
    """See `mtt_fast.kernels.index_add`. torch's deterministic version sorts the indices, which takes ten kernels."""
    row, batch, width = _row("index_add", out), len(rows), math.prod(out.shape[1:])
    programs = batch * triton.cdiv(width, row["SIZE"])
    constants = {"WIDTH": width, "ALPHA": alpha, "PADDED_BATCH": triton.next_power_of_2(max(batch, 1))}
    launch(_index_add, programs, out, index, rows, batch, **constants, **row)
    torch.autograd.graph.increment_version(out)
    return out
