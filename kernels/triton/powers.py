"""Find the power of two that brings numbers into a range, for the kernels that scale by it."""

from __future__ import annotations

from .launch import tl, triton


@triton.jit
def magnitude_bits(x: tl.tensor) -> tl.tensor:
    """Return the magnitudes' bits as integers: those of NaN are above infinity's, and these above all numbers'."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def power_of_two(bits: tl.tensor, LARGEST: tl.constexpr) -> tl.tensor:
    """Return the power of two, float32, that brings the magnitude with these bits just below LARGEST; 1 if there is none."""
    exponent = tl.minimum(tl.maximum((bits >> 23) - 126, -60), 60)
    power = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where((bits > 0) & (bits < 0x7F800000), LARGEST * power, 1.0)
