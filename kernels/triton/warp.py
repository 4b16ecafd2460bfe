"""Colour, warp and mask images in one pass, and the transpose.

A program owns a block of pixels of one sample, with all their channels: it gathers what it needs, so nothing is added
to memory that others write. Colours are moved after the pixels and not before: a map that is linear in the channels
and one that samples the pixels commute, if a constant is scaled by the share of it that the image's border leaves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..types import WARP_PARAMETERS
from .configurations import configuration
from .launch import architecture, launch, tl, triton
from .planes import Planes

_COUNT = tl.constexpr(len(WARP_PARAMETERS))


@triton.jit
def _load_parameters(parameters: tl.tensor, sample: tl.tensor) -> tl.tuple:
    """Load the parameters of a sample: colour, displacement down, displacement right, mask."""
    place = parameters + sample * _COUNT
    colour = (tl.load(place), tl.load(place + 1), tl.load(place + 2))
    down = (tl.load(place + 3), tl.load(place + 4), tl.load(place + 5))
    right = (tl.load(place + 6), tl.load(place + 7), tl.load(place + 8))
    mask = (tl.load(place + 9), tl.load(place + 10), tl.load(place + 11), tl.load(place + 12))
    return colour, down, right, mask


@triton.jit
def _block(
    H: tl.constexpr, W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return the sample (int64), the channels (BLOCK_C, 1), rows and columns of the pixels (1, BLOCK_M)."""
    blocks: tl.constexpr = (H * W + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    pixel = (program % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    return (program // blocks).to(tl.int64), tl.arange(0, BLOCK_C)[:, None], pixel // W, pixel % W


@triton.jit
def _axis(
    along: tl.tuple,
    i: tl.tensor,
    j: tl.tensor,
    target: tl.tensor,
    SIZE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return, along one axis, the pixel before the source of target (i, j), its weight and that of the next, zero outside.

    `along` are the displacement's three parameters. The displacement's remainder is never added to a pixel's number, which
    would round the remainder.
    """
    displacement = along[0] * (i - (H - 1) * 0.5) + along[1] * (j - (W - 1) * 0.5) + along[2]
    whole = tl.floor(displacement)
    share = displacement - whole
    first = tl.minimum(tl.maximum(target + whole, -2), SIZE).to(tl.int32)
    before = tl.where((first >= 0) & (first < SIZE), 1 - share, 0)
    return first, before, tl.where((first >= -1) & (first < SIZE - 1), share, 0)


@triton.jit
def _visible(mask: tl.tuple, i: tl.tensor, j: tl.tensor, H: tl.constexpr, W: tl.constexpr) -> tl.tensor:
    """Return which pixels are in the image and not under the mask."""
    rows = (i >= mask[0]) & (i < mask[1])
    columns = (j >= mask[2]) & (j < mask[3])
    return (i < H) & (j < W) & ~(rows & columns)


@triton.jit
def _coloured(
    colour: tl.tuple,
    x: tl.tensor,
    average: tl.tensor,
    inside: tl.tensor,
    exists: tl.tensor,
    C: tl.constexpr,
) -> tl.tensor:
    """Saturate and contrast pixels (BLOCK_C, BLOCK_M); those of channels that are not there become zero."""
    grey = tl.sum(x, 0, keep_dims=True) / C
    x += colour[1] * (x - grey)
    return tl.where(exists, x + colour[2] * (x - average * inside), 0)


@triton.jit
def _mean(
    images: tl.tensor,  # (B, C, H, W)
    parameters: tl.tensor,  # (B, 13)
    means: tl.tensor,  # (B,)
    SIZE: tl.constexpr,
    ELEMENTS: tl.constexpr,
) -> None:
    ACC: tl.constexpr = parameters.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    images += sample * SIZE
    total = tl.zeros((ELEMENTS,), ACC)
    # only contrast asks for the mean
    for start in range(0, tl.where(tl.load(parameters + sample * _COUNT + 2) != 0, SIZE, 0), ELEMENTS):
        place = start + tl.arange(0, ELEMENTS)
        total += tl.load(images + place, place < SIZE, 0).to(ACC)
    tl.store(means + sample, tl.sum(total, 0) / SIZE)


@triton.jit
def _mean_transpose(
    y_bar: tl.tensor,  # (B, C, H, W)
    parameters: tl.tensor,  # (B, 13)
    means: tl.tensor,  # (B,)
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """Store the mean of the warp's transpose of ȳ: each ȳ counts as far as its source lies in the image."""
    ACC: tl.constexpr = parameters.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)[:, None]
    y_bar += sample * (C * H * W)
    colour, down, right, mask = _load_parameters(parameters, sample)
    total = tl.zeros((BLOCK_C, BLOCK_M), ACC)
    for start in range(0, tl.where(colour[2] != 0, H * W, 0), BLOCK_M):
        pixel = start + tl.arange(0, BLOCK_M)[None, :]
        i = pixel // W
        j = pixel % W
        _, upper, lower = _axis(down, i, j, i, H, H, W)
        _, before, behind = _axis(right, i, j, j, W, H, W)
        visible = _visible(mask, i, j, H, W) & (c < C)
        total += (upper + lower) * (before + behind) * tl.load(y_bar + c * (H * W) + pixel, visible, 0).to(ACC)
    tl.store(means + sample, tl.sum(tl.sum(total, 0), 0) / (C * H * W))


@triton.jit
def _forward(
    images: tl.tensor,  # (B, C, H, W)
    parameters: tl.tensor,  # (B, 13)
    means: tl.tensor,  # (B,)
    y: tl.tensor,  # (B, C, H, W)
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    ACC: tl.constexpr = parameters.dtype.element_ty
    sample, c, i, j = _block(H, W, BLOCK_C, BLOCK_M)
    colour, down, right, mask = _load_parameters(parameters, sample)
    images += sample * (C * H * W)
    exists = (c < C) & (i < H)
    row, upper, lower = _axis(down, i, j, i, H, H, W)
    column, before, behind = _axis(right, i, j, j, W, H, W)
    x = tl.zeros((BLOCK_C, BLOCK_M), ACC)
    for corner in tl.static_range(4):
        weight = (lower if corner >= 2 else upper) * (behind if corner % 2 else before)
        place = (row + corner // 2) * W + column + corner % 2
        x += weight * tl.load(images + c * (H * W) + place, exists & (weight != 0), 0).to(ACC)
    inside = (upper + lower) * (before + behind)
    x = tl.where(exists, x + colour[0] * inside, 0)
    x = _coloured(colour, x, tl.load(means + sample) + colour[0], inside, exists, C)
    place = c * (H * W) + i * W + j
    tl.store(y + sample * (C * H * W) + place, tl.where(_visible(mask, i, j, H, W), x, 0), exists)


@triton.jit
def _transpose(
    y_bar: tl.tensor,  # (B, C, H, W)
    parameters: tl.tensor,  # (B, 13)
    means: tl.tensor,  # (B,)
    x_bar: tl.tensor,  # (B, C, H, W)
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    ACC: tl.constexpr = parameters.dtype.element_ty
    sample, c, row, column = _block(H, W, BLOCK_C, BLOCK_M)
    colour, down, right, mask = _load_parameters(parameters, sample)
    y_bar += sample * (C * H * W)
    exists = (c < C) & (row < H)

    # The targets whose sources are less than a pixel away, on either axis, lie in a parallelogram around the target
    # that has its source here. Its bounding box is `reach` to each side: so many whole pixels, whatever the pixel.
    a = 1 + down[0]
    b = down[1]
    d = right[0]
    e = 1 + right[1]
    determinant = a * e - b * d
    below = row - ((H - 1) * 0.5 + down[2])
    beside = column - ((W - 1) * 0.5 + right[2])
    row_reach = (tl.abs(e) + tl.abs(b)) / tl.abs(determinant)
    column_reach = (tl.abs(a) + tl.abs(d)) / tl.abs(determinant)
    first_row = (H - 1) * 0.5 + (e * below - b * beside) / determinant - row_reach
    first_column = (W - 1) * 0.5 + (a * beside - d * below) / determinant - column_reach
    # targets outside the image need no look, which also bounds the loops
    top = tl.minimum(tl.maximum(tl.floor(first_row) + 1, 0), H).to(tl.int32)
    left = tl.minimum(tl.maximum(tl.floor(first_column) + 1, 0), W).to(tl.int32)
    rows = tl.minimum(tl.ceil(2 * row_reach), H).to(tl.int32)
    columns = tl.minimum(tl.ceil(2 * column_reach), W).to(tl.int32)

    x = tl.zeros((BLOCK_C, BLOCK_M), ACC)
    for row_step in range(rows):
        for column_step in range(columns):
            i = top + row_step
            j = left + column_step
            source_row, upper, lower = _axis(down, i, j, i, H, H, W)
            source_column, before, behind = _axis(right, i, j, j, W, H, W)
            weight = tl.where(source_row == row, upper, tl.where(source_row + 1 == row, lower, 0))
            weight *= tl.where(source_column == column, before, tl.where(source_column + 1 == column, behind, 0))
            weight = tl.where(_visible(mask, i, j, H, W), weight, 0)
            place = c * (H * W) + i * W + j
            x += weight * tl.load(y_bar + place, exists & (weight != 0), 0).to(ACC)
    x = _coloured(colour, x, tl.load(means + sample), tl.full((1, BLOCK_M), 1, ACC), exists, C)
    tl.store(x_bar + sample * (C * H * W) + c * (H * W) + row * W + column, x, exists)


def colour_warp_mask(images: Tensor, parameters: Tensor) -> Tensor:
    """See `mtt_fast.kernels.colour_warp_mask`."""
    planes, means, y = Planes.of(images), parameters.new_empty(len(images)), torch.empty_like(images)
    row = configuration("colour_warp_mask_mean", "", architecture(images.device))
    launch(_mean, planes.samples, images, parameters, means, SIZE=planes.sample_size, **row)
    _launch(_forward, "colour_warp_mask", planes, images, parameters, means, y)
    return y


def colour_warp_mask_transpose(y_bar: Tensor, parameters: Tensor) -> Tensor:
    """See `mtt_fast.kernels.colour_warp_mask_transpose`."""
    planes, means, x_bar = Planes.of(y_bar), parameters.new_empty(len(y_bar)), torch.empty_like(y_bar)
    _launch(_mean_transpose, "colour_warp_mask_transpose_mean", planes, y_bar, parameters, means)
    _launch(_transpose, "colour_warp_mask_transpose", planes, y_bar, parameters, means, x_bar)
    return x_bar


def _launch(kernel: Any, operation: str, planes: Planes, *arguments: Tensor) -> None:
    """Launch `kernel` over blocks of pixels; a mean's takes a whole sample."""
    row = dict(configuration(operation, "", architecture(arguments[0].device)))
    channels = triton.next_power_of_2(planes.channels)
    pixels = max(1, row.pop("ELEMENTS") // channels)
    blocks = 1 if kernel is _mean_transpose else triton.cdiv(planes.height * planes.width, pixels)
    sizes = {"C": planes.channels, "H": planes.height, "W": planes.width, "BLOCK_C": channels, "BLOCK_M": pixels}
    launch(kernel, planes.samples * blocks, *arguments, **sizes, **row)
