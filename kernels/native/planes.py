"""Allocate planes and their statistics, and convert planes to the format that the extension reads: channels-last.

Torch's own convolutions are fastest in that format, and neighbouring channels fill the lanes of the vector unit. A contiguous
tensor is copied to it, and the results are copied back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .extension import allocate


def channels_last(tensor: Tensor) -> Tensor:
    """Return `tensor` (B, C, H, W) as a contiguous (B, H, W, C)."""
    return tensor.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def output_buffer(y: Tensor, reuse: bool) -> Tensor:
    """Return memory for the gradient of `y`: with `reuse` that of `y`, if it is channels_last, and else new memory.

    Kernels may write over `y`: they read a pixel for the last time before they write its gradient.
    """
    if not (reuse and y.is_contiguous(memory_format=torch.channels_last)):
        return _empty(y, (y.shape[0], y.shape[1], y.shape[2], y.shape[3]))
    torch.autograd.graph.increment_version(y)
    return y


def empty_pooled(y: Tensor) -> Tensor:
    """Allocate pooled planes (B, C, H//2, W//2) of `y` (B, C, H, W)."""
    batch, channels, height, width = y.shape
    return _empty(y, (batch, channels, height // 2, width // 2))


def empty_grown(like: Tensor, channels: int, by: int) -> Tensor:
    """Allocate planes (B, channels, H + by, W + by) for `like` (B, C, H, W)."""
    batch, _, height, width = like.shape
    return _empty(like, (batch, channels, height + by, width + by))


def empty_stats(y: Tensor, count: int) -> list[Tensor]:
    """Allocate `count` statistics of the planes of `y`, (B, C) each."""
    return [torch.empty(y.shape[:2], dtype=y.dtype, device="cpu") for _ in range(count)]


def _empty(like: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Return an uninitialised channels_last tensor (B, C, H, W) of the dtype of `like`."""
    batch, channels, height, width = shape
    return allocate(like, (batch, height, width, channels)).permute(0, 3, 1, 2)
