"""Call the native kernels of `colour_warp_mask` and its transpose (cpp/warp.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import BatchGradient
from .extension import allocate, extension

# Images have few channels, so these kernels take them as they lie: contiguous.


def colour_warp_mask(images: Tensor, parameters: Tensor) -> Tensor:
    """See `mtt_fast.kernels.colour_warp_mask`."""
    y = allocate(images, images.shape)
    extension().colour_warp_mask(images, parameters, y, torch.get_num_threads())
    return y


def colour_warp_mask_transpose(y_bar: Tensor, parameters: Tensor) -> Tensor:
    """See `mtt_fast.kernels.colour_warp_mask_transpose`."""
    x_bar = allocate(y_bar, y_bar.shape)
    extension().colour_warp_mask_transpose(y_bar, parameters, x_bar, torch.get_num_threads())
    return x_bar


def add_batch_gradient(batch: BatchGradient, scale: Tensor) -> None:
    """Add `scale` · Aᵀ ȳ of each sample of the batch to its row of the gradient of all images, in place."""
    rows = -scale * batch.y_bar
    if batch.warp is not None:
        rows = colour_warp_mask_transpose(rows, batch.warp)
    # with an alpha of 1 torch takes a scatter that starts threads, and waits for them, for however few numbers
    batch.out.index_add_(0, batch.indices, rows, alpha=-1)
