"""One pass over flat vectors: the step of gradient descent, and the squared distance of two points."""

from __future__ import annotations

import torch
from torch import Tensor

from .configurations import configuration
from .entry import architecture, launch, tl, triton
from .planes import accumulator


@triton.jit
def _descend(
    vector: tl.tensor,
    direction: tl.tensor,
    rate: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    ACC: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = place < size
    step = tl.load(rate).to(ACC) * tl.load(direction + place, mask, 0).to(ACC)
    tl.store(out + place, tl.load(vector + place, mask, 0).to(ACC) - step, mask)


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


def descend(vector: Tensor, direction: Tensor, rate: Tensor, out: Tensor | None = None) -> Tensor:
    """Return `vector` − `rate` · `direction` (P,): a student's step, and the recursion of its adjoint.

    `rate` is a scalar on the device, so that nothing waits for its value; `out` (P,) may be `vector` itself.
    """
    out = torch.empty_like(vector) if out is None else out
    row = configuration("descend", "", architecture(vector.device))
    size = vector.numel()
    acc = tl.float64 if accumulator(vector.dtype) == torch.float64 else tl.float32
    launch(_descend, triton.cdiv(size, row["SIZE"]), vector, direction, rate, out, size, ACC=acc, **row)
    return out


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """See `mtt_fast.kernels.squared_distance`. The order of the sum depends on the size of the vectors alone."""
    row = configuration("squared_distance", "", architecture(a.device))
    partials = torch.empty(row["PARTIALS"], dtype=torch.float64, device=a.device)
    result = torch.empty((), dtype=torch.float64, device=a.device)
    launch(_squared_distance, row["PARTIALS"], a, b, partials, a.numel(), **row)
    launch(_sum, 1, partials, result, PARTIALS=row["PARTIALS"])
    return result
