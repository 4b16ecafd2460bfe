"""Compute `colour_warp_mask` and its transpose in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..types import WARP_PARAMETERS, BatchGradient

# One affine function of the pixels of each image, y = A x + b. All its parameters are differences from the identity, so that
# small ones keep their precision, and zeros change nothing. The position at which a target pixel is sampled is kept as an
# integer and a remainder, since their sum would round the remainder, the more the larger the image.


def colour_warp_mask(images: Tensor, parameters: Tensor) -> Tensor:
    """Return A x + b (B, C, H, W). `images`: (B, C, H, W); `parameters`: (B, 13)."""
    parameter = _by_name(parameters)
    x = images.to(parameters.dtype)
    x = x + parameter["brightness"]
    x = x + parameter["saturation"] * (x - x.mean(1, keepdim=True))
    x = x + parameter["contrast"] * (x - x.mean((1, 2, 3), keepdim=True))
    pixels, y = x.flatten(2), torch.zeros_like(x).flatten(2)
    for place, weight in _corners(parameter, x):
        y += weight * pixels.gather(2, place)
    return (y.view(x.shape) * _visible(parameter, x)).to(images.dtype)


def colour_warp_mask_transpose(y_bar: Tensor, parameters: Tensor) -> Tensor:
    """Return x̄ = Aᵀ ȳ (B, C, H, W). `y_bar`: (B, C, H, W); `parameters`: (B, 13)."""
    parameter = _by_name(parameters)
    y = y_bar.to(parameters.dtype) * _visible(parameter, y_bar)
    pixels, x = y.flatten(2), torch.zeros_like(y).flatten(2)
    for place, weight in _corners(parameter, y):
        x.scatter_add_(2, place, weight * pixels)
    x = x.view(y.shape)
    # each adds a multiple of a symmetric projection, so it is its own transpose
    x = x + parameter["contrast"] * (x - x.mean((1, 2, 3), keepdim=True))
    x = x + parameter["saturation"] * (x - x.mean(1, keepdim=True))
    return x.to(y_bar.dtype)


def add_batch_gradient(batch: BatchGradient, scale: Tensor) -> None:
    """Add `scale` · Aᵀ ȳ of each sample of the batch to its row of the gradient of all images, in place."""
    rows = -scale * batch.y_bar
    if batch.warp is not None:
        rows = colour_warp_mask_transpose(rows, batch.warp)
    # with alpha=1 torch uses a scatter that starts threads and waits for them, even for few values
    batch.out.index_add_(0, batch.indices, rows, alpha=-1)


def _by_name(parameters: Tensor) -> dict[str, Tensor]:
    return dict(zip(WARP_PARAMETERS, parameters[:, :, None, None, None].unbind(1), strict=True))  # (B, 1, 1, 1) each


def _corners(parameter: dict[str, Tensor], like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the four pixels around each target's source: their flat positions (B, C, H·W) and weights (B, 1, H·W)."""
    batch, channels, height, width = like.shape
    i, j = _grid(parameter, height, width)
    below, beside = i - (height - 1) / 2, j - (width - 1) / 2  # the centre of the image
    down = parameter["row_by_row"] * below + parameter["row_by_column"] * beside + parameter["row_shift"]
    right = parameter["column_by_row"] * below + parameter["column_by_column"] * beside + parameter["column_shift"]
    for row, row_weight in _neighbours(i, down, height):
        for column, column_weight in _neighbours(j, right, width):
            place = (row * width + column).view(batch, 1, height * width).expand(-1, channels, -1)
            yield place, (row_weight * column_weight).view(batch, 1, height * width)


def _neighbours(target: Tensor, displacement: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, along one axis, the pixels before and after the source with their weights, zero outside the image."""
    whole = displacement.floor()
    share = displacement - whole
    for pixel, weight in ((target + whole, 1 - share), (target + whole + 1, share)):
        yield pixel.clamp(0, size - 1).long(), weight * ((pixel >= 0) & (pixel < size))


def _visible(parameter: dict[str, Tensor], like: Tensor) -> Tensor:
    i, j = _grid(parameter, *like.shape[2:])
    rows = (i >= parameter["top"]) & (i < parameter["bottom"])
    return ~(rows & (j >= parameter["left"]) & (j < parameter["right"]))


def _grid(parameter: dict[str, Tensor], height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the rows (H, 1) and the columns (W,) of the pixels."""
    like = parameter["top"]
    i, j = (torch.arange(size, dtype=like.dtype, device=like.device) for size in (height, width))
    return i[:, None], j
