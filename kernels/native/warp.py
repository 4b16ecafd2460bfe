"""Call the native kernels of `colour_warp_mask` and its transpose (cpp/warp.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

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
