"""Pool planes and spread gradients back, and reshape statistics and parameters so that they broadcast over planes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import accumulator, in_format_of


def pool(z: Tensor, y: Tensor) -> Tensor:
    """Return the 2×2 means of `z` (B, C, H, W), in the dtype and memory format of `y`."""
    return planes_like(y, F.avg_pool2d(z, 2))


def unpool(p_bar: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of planes like `y`, from `p_bar` (B, C, H//2, W//2), the gradient of their 2×2 means.

    An odd last row or column, which is not pooled, gets zeros.
    """
    height, width = p_bar.shape[2:]
    spread = torch.zeros_like(y, dtype=accumulator(y.dtype))
    spread[:, :, : 2 * height, : 2 * width] = widened(p_bar).repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    return spread


def plane_mean(planes: Tensor) -> Tensor:
    """Return the mean of each plane, (B, C, 1, 1)."""
    return planes.mean((2, 3), keepdim=True)


def per_plane(statistic: Tensor) -> Tensor:
    """Return `statistic` (B, C) as (B, C, 1, 1)."""
    return statistic[:, :, None, None]


def per_channel(parameter: Tensor) -> Tensor:
    """Return `parameter` (C,) as (C, 1, 1)."""
    return parameter[:, None, None]


def widened(planes: Tensor) -> Tensor:
    """Return `planes` in the dtype of their sums: float16 and bfloat16 become float32."""
    return planes.to(accumulator(planes.dtype))


def planes_like(like: Tensor, planes: Tensor) -> Tensor:
    """Return `planes` in the dtype and memory format of `like`."""
    return in_format_of(like, planes.to(like.dtype))
