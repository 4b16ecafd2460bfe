"""Pass once over flat vectors (a step of SGD, the adjoint of that step, the squared distance of two points), and add rows to rows.

The gradients that a step has left as partial sums are added up in the pass that steps along them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..types import PartialSums, accumulator
from .configurations import configuration
from .launch import architecture, launch, tl, triton
from .powers import magnitude_bits, power_of


@triton.jit
def _sum_of_pieces(
    pieces: tl.tuple,  # of pointers
    factors: tl.tuple,  # of pointers to numbers
    PIECES: tl.constexpr,  # of each piece: summands, numbers, elements from a summand to the next, channels if they lie last
    ACC: tl.constexpr,
    SIZE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return SIZE places of the vector, of one piece, which of them exist, and the numbers there."""
    program = tl.program_id(0)
    place = tl.arange(0, SIZE)
    exists = place < 0
    total = tl.zeros((SIZE,), ACC)
    first = 0
    begin = 0
    for piece in tl.static_range(len(PIECES)):
        summands, numbers, stride, channels = PIECES[piece]
        end = first + (numbers + SIZE - 1) // SIZE
        if (program >= first) & (program < end):
            element = (program - first) * SIZE + tl.arange(0, SIZE)
            exists = element < numbers
            place = begin + element
            if channels:
                element = (element // (9 * channels) * 9 + element % 9) * channels + element // 9 % channels
            source = pieces[piece]
            for _ in range(summands):
                total += tl.load(source + element, exists, 0).to(ACC)
                source += stride
        first = end
        begin += numbers
    for factor in tl.static_range(len(factors)):
        total /= tl.load(factors[factor]).to(ACC)
    return place, exists, total


@triton.jit
def _add_up(
    out: tl.tensor, pieces: tl.tuple, factors: tl.tuple, PIECES: tl.constexpr, ACC: tl.constexpr, SIZE: tl.constexpr
) -> None:
    place, exists, total = _sum_of_pieces(pieces, factors, PIECES, ACC, SIZE)
    tl.store(out + place, total, exists)


@triton.jit(do_not_specialize_on_alignment=["rate"])  # one of a step lies anywhere
def _sgd_step(
    theta: tl.tensor,
    pieces: tl.tuple,
    factors: tl.tuple,
    rate: tl.tensor,
    out: tl.tensor,
    velocity: tl.tensor,  # or None
    velocity_out: tl.tensor,  # or None
    PIECES: tl.constexpr,
    MOMENTUM: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    ACC: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    place, mask, gradient = _sum_of_pieces(pieces, factors, PIECES, ACC, SIZE)
    at = tl.load(theta + place, mask, 0).to(ACC)
    update = gradient + WEIGHT_DECAY * at
    if velocity is not None:
        update += MOMENTUM * tl.load(velocity + place, mask, 0).to(ACC)
    if velocity_out is not None:
        tl.store(velocity_out + place, update, mask)
    tl.store(out + place, at - tl.load(rate).to(ACC) * update, mask)


@triton.jit(do_not_specialize_on_alignment=["scale"])  # one of a step lies anywhere
def _adjoint_step(
    adjoint: tl.tensor,
    pieces: tl.tuple,
    factors: tl.tuple,
    direction: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    incoming: tl.tensor,  # or None
    PIECES: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    ACC: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    place, mask, curvature = _sum_of_pieces(pieces, factors, PIECES, ACC, SIZE)
    if WEIGHT_DECAY != 0:
        curvature += WEIGHT_DECAY * tl.load(direction + place, mask, 0).to(ACC)
    result = tl.load(adjoint + place, mask, 0).to(ACC) + tl.load(scale).to(ACC) * curvature
    if incoming is not None:
        result += tl.load(incoming + place, mask, 0).to(ACC)
    tl.store(out + place, result, mask)


@triton.jit
def _squared_distance(
    a: tl.tensor, b: tl.tensor, partials: tl.tensor, size: tl.tensor, PARTIALS: tl.constexpr, SIZE: tl.constexpr
) -> None:
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((SIZE,), tl.float64)
    for start in range(program * SIZE, size, PARTIALS * SIZE):
        place = start + tl.arange(0, SIZE)
        mask = place < size
        difference = tl.load(a + place, mask, 0).to(tl.float64) - tl.load(b + place, mask, 0).to(tl.float64)
        total += difference * difference
    tl.store(partials + program, tl.sum(total, 0))


@triton.jit
def _sum(partials: tl.tensor, result: tl.tensor, PARTIALS: tl.constexpr) -> None:
    tl.store(result, tl.sum(tl.load(partials + tl.arange(0, PARTIALS)), 0))


@triton.jit
def _index_add(
    out: tl.tensor,  # (n, WIDTH)
    index: tl.tensor,  # (b,)
    rows: tl.tensor,  # (b, WIDTH)
    batch: tl.tensor,
    WIDTH: tl.constexpr,
    ALPHA: tl.constexpr,
    EVERY: tl.constexpr,  # at least b
    SIZE: tl.constexpr,
) -> None:
    """Add a row's SIZE elements, and those of all later rows of the same index, if no earlier row has that index."""
    BLOCKS: tl.constexpr = (WIDTH + SIZE - 1) // SIZE
    own, column = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS * SIZE + tl.arange(0, SIZE)
    every, exists = tl.arange(0, EVERY), column < WIDTH
    target = tl.load(index + own)
    same = tl.load(index + every, every < batch, -1) == target
    if tl.min(tl.where(same, every, EVERY), 0) == own:
        place = out + target * WIDTH + column
        total = tl.load(place, exists, 0)
        last = tl.max(tl.where(same, every, 0), 0)
        source = rows + own.to(tl.int64) * WIDTH + column
        for row in range(own, last + 1):
            if tl.load(index + row) == target:
                total += ALPHA * tl.load(source, exists, 0)
            source += WIDTH
        tl.store(place, total, exists)


@triton.jit
def _largest(
    a: tl.tensor, b: tl.tensor | None, partials: tl.tensor, size_a: tl.tensor, size_b: tl.tensor, SIZE: tl.constexpr
) -> None:
    """Store the bits of the largest magnitude of a program's share."""
    program, step = tl.program_id(0), tl.num_programs(0) * SIZE
    total = tl.zeros((SIZE,), tl.int32)
    for start in range(program * SIZE, size_a, step):
        place = start + tl.arange(0, SIZE)
        total = tl.maximum(total, magnitude_bits(tl.load(a + place, place < size_a, 0)))
    if b is not None:
        for start in range(program * SIZE, size_b, step):
            place = start + tl.arange(0, SIZE)
            total = tl.maximum(total, magnitude_bits(tl.load(b + place, place < size_b, 0)))
    tl.store(partials + program, tl.max(total, 0))


@triton.jit
def power_of_parts(partials: tl.tensor, LARGEST: tl.constexpr, PARTIALS: tl.constexpr) -> tl.tensor:
    """Return the power of two that brings the largest of the magnitudes just below LARGEST, or 1."""
    return power_of(tl.max(tl.load(partials + tl.arange(0, PARTIALS)), 0), LARGEST)


@triton.jit
def _power(partials: tl.tensor, factor: tl.tensor, LARGEST: tl.constexpr, PARTIALS: tl.constexpr) -> None:
    tl.store(factor, power_of_parts(partials, LARGEST, PARTIALS))


def add_up(sums: PartialSums) -> Tensor:
    """See `mtt_fast.kernels.add_up`."""
    first = sums.pieces[0]
    out = first.new_empty(sum(piece.shape[1:].numel() for piece in sums.pieces))
    _launch_step(_add_up, "add_up", out, sums)
    return out


def sgd_step(
    theta: Tensor,
    gradient: Tensor | PartialSums,
    rate: Tensor,
    out: Tensor,
    velocity: Tensor | None,
    velocity_out: Tensor | None,
    momentum: float,
    weight_decay: float,
) -> Tensor:
    """See `mtt_fast.kernels.sgd_step`. The rate is read on the device, so nothing waits for its value."""
    vectors = (rate, out, velocity, velocity_out)
    _launch_step(_sgd_step, "sgd_step", theta, gradient, *vectors, MOMENTUM=momentum, WEIGHT_DECAY=weight_decay)
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
) -> Tensor:
    """See `mtt_fast.kernels.adjoint_step`. The scale is read on the device, so nothing waits for its value."""
    vectors = (direction, scale, out, incoming)
    _launch_step(_adjoint_step, "adjoint_step", adjoint, hessian_v, *vectors, WEIGHT_DECAY=weight_decay)
    torch.autograd.graph.increment_version(out)
    return out


def _launch_step(
    kernel: Any, operation: str, first: Tensor, gradient: Tensor | PartialSums, *rest: Tensor | None, **constants: float
) -> None:
    """Launch a program for each SIZE numbers of each piece of a `gradient`; it comes second of the tensors."""
    row = configuration(operation, "", architecture(first.device))
    sums = PartialSums((gradient[None],)) if isinstance(gradient, Tensor) else gradient
    shapes = tuple(_shape_of(piece) for piece in sums.pieces)
    programs = sum(triton.cdiv(numbers, row["SIZE"]) for _, numbers, _, _ in shapes)
    acc = tl.float64 if accumulator(first.dtype) == torch.float64 else tl.float32
    launch(kernel, programs, first, sums.pieces, sums.factors, *rest, PIECES=shapes, **constants, ACC=acc, **row)


def _shape_of(piece: Tensor) -> tuple[int, int, int, int]:
    """Return the number of summands, their numbers, the elements from one to the next, and channels that lie last, else 0."""
    lie_last = piece.dim() == 5 and not piece[:1].is_contiguous()
    return len(piece), piece.shape[1:].numel(), piece.stride(0), piece.shape[2] if lie_last else 0


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """See `mtt_fast.kernels.squared_distance`. The order of the sum depends on the size of the vectors alone."""
    row = configuration("squared_distance", "", architecture(a.device))
    partials = torch.empty(row["PARTIALS"], dtype=torch.float64, device=a.device)
    result = torch.empty((), dtype=torch.float64, device=a.device)
    launch(_squared_distance, row["PARTIALS"], a, b, partials, a.numel(), **row)
    launch(_sum, 1, partials, result, PARTIALS=row["PARTIALS"])
    return result


def index_add(out: Tensor, index: Tensor, rows: Tensor, alpha: float) -> Tensor:
    """See `mtt_fast.kernels.index_add`. torch's own, where it is deterministic, sorts the indices in ten kernels."""
    row, batch, width = configuration("index_add", "", architecture(out.device)), len(rows), math.prod(out.shape[1:])
    programs = batch * triton.cdiv(width, row["SIZE"])
    constants = {"WIDTH": width, "ALPHA": alpha, "EVERY": triton.next_power_of_2(max(batch, 1))}
    launch(_index_add, programs, out, index, rows, batch, **constants, **row)
    torch.autograd.graph.increment_version(out)
    return out


def power_of_two(largest: float, a: Tensor, b: Tensor | None) -> Tensor:
    """See `mtt_fast.kernels.power_of_two`."""
    partials, factor = largest_parts(a, b), a.new_empty(())
    launch(_power, 1, partials, factor, LARGEST=largest, PARTIALS=len(partials))
    return factor


def largest_parts(a: Tensor, b: Tensor | None) -> Tensor:
    """Return the largest magnitudes of parts of `a` and `b`, as the bits of float32 numbers."""
    row = configuration("power_of_two", "", architecture(a.device))
    count = row.pop("PARTIALS")
    partials = torch.empty(count, dtype=torch.int32, device=a.device)
    launch(_largest, count, a, b, partials, a.numel(), 0 if b is None else b.numel(), **row)
    return partials
