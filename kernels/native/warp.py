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


def colour_warp_mask_transpose_add(
    out: Tensor, index: Tensor, y_bar: Tensor, parameters: Tensor | None, factor: Tensor
) -> Tensor:
    """See `mtt_fast.kernels.colour_warp_mask_transpose_add`."""
    rows = -factor * y_bar
    if parameters is not None:
        rows = colour_warp_mask_transpose(rows, parameters)
    # with an alpha of 1 torch takes a scatter that starts threads, and waits for them, for however few numbers
    return out.index_add_(0, index, rows, alpha=-1)
