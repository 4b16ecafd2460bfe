"""Pass once over flat vectors (a step of SGD, the adjoint of that step, the squared distance of two points), and add rows to rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..types import accumulator
from .configurations import configuration
from .launch import architecture, launch, tl, triton
from .powers import magnitude_bits, power_of


@triton.jit
def _sgd_step(
    theta: tl.tensor,
    gradient: tl.tensor,
    rate: tl.tensor,
    out: tl.tensor,
    velocity: tl.tensor,  # or None
    velocity_out: tl.tensor,  # or None
    size: tl.tensor,
    MOMENTUM: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    ACC: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = place < size
    at = tl.load(theta + place, mask, 0).to(ACC)
    update = tl.load(gradient + place, mask, 0).to(ACC) + WEIGHT_DECAY * at
    if velocity is not None:
        update += MOMENTUM * tl.load(velocity + place, mask, 0).to(ACC)
    if velocity_out is not None:
        tl.store(velocity_out + place, update, mask)
    tl.store(out + place, at - tl.load(rate).to(ACC) * update, mask)


@triton.jit
def _adjoint_step(
    adjoint: tl.tensor,
    hessian_v: tl.tensor,
    direction: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    incoming: tl.tensor,  # or None
    size: tl.tensor,
    WEIGHT_DECAY: tl.constexpr,
    ACC: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = place < size
    curvature = tl.load(hessian_v + place, mask, 0).to(ACC)
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
def _power(partials: tl.tensor, factor: tl.tensor, LARGEST: tl.constexpr, PARTIALS: tl.constexpr) -> None:
    tl.store(factor, power_of(tl.max(tl.load(partials + tl.arange(0, PARTIALS)), 0), LARGEST))


def sgd_step(
    theta: Tensor,
    gradient: Tensor,
    rate: Tensor,
    out: Tensor,
    velocity: Tensor | None,
    velocity_out: Tensor | None,
    momentum: float,
    weight_decay: float,
) -> Tensor:
    """See `mtt_fast.kernels.sgd_step`. The rate is read on the device, so nothing waits for its value."""
    vectors = (theta, gradient, rate, out, velocity, velocity_out)
    _launch_step(_sgd_step, "sgd_step", *vectors, MOMENTUM=momentum, WEIGHT_DECAY=weight_decay)
    torch.autograd.graph.increment_version([out] if velocity_out is None else [out, velocity_out])
    return out


def adjoint_step(
    adjoint: Tensor,
    hessian_v: Tensor,
    direction: Tensor,
    scale: Tensor,
    out: Tensor,
    incoming: Tensor | None,
    weight_decay: float,
) -> Tensor:
    """See `mtt_fast.kernels.adjoint_step`. The scale is read on the device, so nothing waits for its value."""
    vectors = (adjoint, hessian_v, direction, scale, out, incoming)
    _launch_step(_adjoint_step, "adjoint_step", *vectors, WEIGHT_DECAY=weight_decay)
    torch.autograd.graph.increment_version(out)
    return out


def _launch_step(kernel: Any, operation: str, first: Tensor, *rest: Tensor | None, **factors: float) -> None:
    row = configuration(operation, "", architecture(first.device))
    size = first.numel()
    acc = tl.float64 if accumulator(first.dtype) == torch.float64 else tl.float32
    launch(kernel, triton.cdiv(size, row["SIZE"]), first, *rest, size, **factors, ACC=acc, **row)


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
    row = configuration("power_of_two", "", architecture(a.device))
    count = row.pop("PARTIALS")
    partials, factor = torch.empty(count, dtype=torch.int32, device=a.device), a.new_empty(())
    launch(_largest, count, a, b, partials, a.numel(), 0 if b is None else b.numel(), **row)
    launch(_power, 1, partials, factor, LARGEST=largest, PARTIALS=count)
    return factor
