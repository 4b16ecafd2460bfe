"""Find the power of two that scales numbers into a range."""

from __future__ import annotations

import torch
from torch import Tensor

from .configurations import configuration
from .launch import architecture, launch, tl, triton


@triton.jit
def magnitude_bits(x: tl.tensor) -> tl.tensor:
    """Return the bits of |x| in float32, as int32. Their order is that of the magnitudes, then infinity, then NaN."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def power_of_two(bits: tl.tensor, LARGEST: tl.constexpr) -> tl.tensor:
    """Return the power of two, float32, that scales the magnitude with these bits into [LARGEST / 2, LARGEST).

    LARGEST is a power of two. Magnitudes that would take an exponent beyond ±60 are scaled only so far. For zero, infinity
    and NaN return 1.
    """
    exponent = tl.minimum(tl.maximum((bits >> 23) - 126, -60), 60)
    power = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where((bits > 0) & (bits < 0x7F800000), LARGEST * power, 1.0)


@triton.jit
def inverse(power: tl.tensor) -> tl.tensor:
    """Return 1 / `power`, a power of two, exactly; in float32 one of 2⁻¹²⁶ … 2¹²⁶, so no zero, infinity or NaN.

    In float32 `/` would be an approximation, and `tl.div_rn` takes a call.
    """
    if power.dtype == tl.float64:
        result = 1 / power
    else:  # the exponents of a power and of its inverse add up to twice the bias
        result = ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return result


@triton.jit
def _largest(vector: tl.tensor, partials: tl.tensor, size: tl.tensor, SIZE: tl.constexpr) -> None:
    """Store the bits of the largest magnitude among the elements of one program."""
    program, step = tl.program_id(0), tl.num_programs(0) * SIZE
    total = tl.zeros((SIZE,), tl.int32)
    for start in range(program * SIZE, size, step):
        offsets = start + tl.arange(0, SIZE)
        total = tl.maximum(total, magnitude_bits(tl.load(vector + offsets, offsets < size, 0)))
    tl.store(partials + program, tl.max(total, 0))


@triton.jit
def power_of_two_from_parts(partials: tl.tensor, LARGEST: tl.constexpr, PARTIALS: tl.constexpr) -> tl.tensor:
    """Return the power of two that scales the largest of all magnitudes as `power_of_two` does."""
    return power_of_two(tl.max(tl.load(partials + tl.arange(0, PARTIALS)), 0), LARGEST)


def largest_parts(vector: Tensor) -> Tensor:
    """Return the largest magnitude of each part of a vector, as bits of float32 in int32, (PARTIALS,)."""
    row = configuration("largest_parts", architecture(vector.device), "")
    count = row.pop("PARTIALS")
    partials = torch.empty(count, dtype=torch.int32, device=vector.device)
    launch(_largest, count, vector, partials, vector.numel(), **row)
    return partials
