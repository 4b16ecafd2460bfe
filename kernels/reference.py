"""Every operation in plain torch: what it is, on any device and in any precision. Speed is the twins' business."""

from __future__ import annotations

from torch import Tensor


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ (a − b)² in float64. `a`, `b`: (P,). The arguments were checked by `mtt_fast.kernels`."""
    return (a.double() - b.double()).square().sum()
