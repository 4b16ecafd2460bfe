"""Powers of two that keep float16 planes in range: what they multiply is linear in them, so they are taken out exactly.

float16 has the mantissa of tf32, 10 bits, but only numbers of magnitude 6e-8 to 65,504. The tangents of a step are linear
in its direction v, and its cotangents in the loss's gradient to the features: each gets a factor of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MOST = 60  # of the exponent, so that a product of two factors is a float32


def power_of_two(largest: float, *tensors: Tensor) -> Tensor:
    """Return the power of two () by which the largest magnitude in `tensors` becomes at most `largest`, and over half of it.

    `largest` is a power of two, the tensors float32; nothing waits for their device. Where all are zero, or a number is not
    finite, the factor is 1.
    """
    magnitude = torch.stack([tensor.detach().abs().amax() for tensor in tensors]).amax()
    _, exponent = torch.frexp(magnitude)  # magnitude in [2^(exponent − 1), 2^exponent)
    usable = magnitude.isfinite() & (magnitude > 0)
    factor = torch.ldexp(torch.full_like(magnitude, largest), -exponent.clamp(-_MOST, _MOST))
    return torch.where(usable, factor, 1)
