"""Find the power of two that scales numbers into a range."""

from __future__ import annotations

from .launch import tl, triton


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
