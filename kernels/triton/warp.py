"""Change the colours of images, warp and mask them in one kernel; apply the transpose, and add it to the gradient of all images.

A program computes a block of pixels of one image, with all their channels. It gathers the pixels that it needs, so that no two
programs write to the same memory. Colours are changed after the warp, not before. Both orders give the same result, since colour
changes are linear in the channels and the warp samples pixels; only constants must be scaled by the share of a sampled pixel that
lies inside the image. Only a change of contrast needs the mean of an image. Each program of the image then computes it, since a
separate launch would cost time in every step.
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
_PROGRAMS = 64  # most programs for one sample
_MEAN = tl.constexpr(2048)  # numbers of a sample that are added at a time for its mean


@triton.jit
def load_parameters(parameters: tl.tensor, sample: tl.tensor) -> tl.tuple:
    """Return the parameters of a sample as four tuples: colour, displacement down, displacement right, mask."""
    pointer = parameters + sample * _COUNT
    colour = (tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2))
    down = (tl.load(pointer + 3), tl.load(pointer + 4), tl.load(pointer + 5))
    right = (tl.load(pointer + 6), tl.load(pointer + 7), tl.load(pointer + 8))
    mask = (tl.load(pointer + 9), tl.load(pointer + 10), tl.load(pointer + 11), tl.load(pointer + 12))
    return colour, down, right, mask


@triton.jit
def _pixel_block(
    H: tl.constexpr, W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return the program's sample (int64), the channels (BLOCK_C, 1), and rows and columns of its pixels (1, BLOCK_M)."""
    blocks: tl.constexpr = (H * W + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    pixel = (program % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    return (program // blocks).to(tl.int64), tl.arange(0, BLOCK_C)[:, None], pixel // W, pixel % W


@triton.jit
def _axis_weights(
    along: tl.tuple,
    i: tl.tensor,
    j: tl.tensor,
    target: tl.tensor,
    SIZE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return, along one axis, the pixel at or before the source of target (i, j), its weight, and the next pixel's weight.

    Weights of pixels outside of the image are zero. `along` has the three parameters of the displacement, and `target` is i or j.
    The fraction of the displacement is never added to a pixel index, since that would round it.
    """
    displacement = along[0] * (i - (H - 1) * 0.5) + along[1] * (j - (W - 1) * 0.5) + along[2]
    whole = tl.floor(displacement)
    fraction = displacement - whole
    first = tl.minimum(tl.maximum(target + whole, -2), SIZE).to(tl.int32)
    before = tl.where((first >= 0) & (first < SIZE), 1 - fraction, 0)
    return first, before, tl.where((first >= -1) & (first < SIZE - 1), fraction, 0)


@triton.jit
def _visible_pixels(mask: tl.tuple, i: tl.tensor, j: tl.tensor, H: tl.constexpr, W: tl.constexpr) -> tl.tensor:
    """Return whether pixels (i, j) are in the image and not under the mask rectangle."""
    rows = (i >= mask[0]) & (i < mask[1])
    columns = (j >= mask[2]) & (j < mask[3])
    return (i < H) & (j < W) & ~(rows & columns)


@triton.jit
def _change_colours(
    colour: tl.tuple,
    x: tl.tensor,
    average: tl.tensor,
    inside: tl.tensor,
    valid: tl.tensor,
    C: tl.constexpr,
) -> tl.tensor:
    """Return pixels x (BLOCK_C, BLOCK_M) with saturation and contrast changed, and zero where `valid` is false."""
    grey = tl.sum(x, 0, keep_dims=True) / C
    x += colour[1] * (x - grey)
    return tl.where(valid, x + colour[2] * (x - average * inside), 0)


@triton.jit
def mean_for_contrast(contrast: tl.tensor, image: tl.tensor, SIZE: tl.constexpr, ACC: tl.constexpr) -> tl.tensor:
    """Return the mean of an image (C, H, W), or zero if `contrast` is zero and the mean is not needed."""
    total = tl.zeros((_MEAN,), ACC)
    for start in range(0, tl.where(contrast != 0, SIZE, 0), _MEAN):
        offsets = start + tl.arange(0, _MEAN)
        total += tl.load(image + offsets, offsets < SIZE, 0).to(ACC)
    return tl.sum(total, 0) / SIZE


@triton.jit
def warp_pixels(
    image: tl.tensor,  # (C, H, W)
    colour: tl.tuple,
    down: tl.tuple,
    right: tl.tuple,
    mask: tl.tuple,
    mean: tl.tensor,
    c: tl.tensor,  # (BLOCK_C, 1)
    i: tl.tensor,  # (1, BLOCK_M)
    j: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    ACC: tl.constexpr,
) -> tl.tensor:
    """Return pixels (i, j) of the image after colour change, warp and mask, (BLOCK_C, BLOCK_M). Outside they are zero."""
    valid = (c < C) & (i >= 0) & (i < H) & (j >= 0) & (j < W)
    row, upper, lower = _axis_weights(down, i, j, i, H, H, W)
    column, before, after = _axis_weights(right, i, j, j, W, H, W)
    x = tl.zeros((c.shape[0], i.shape[1]), ACC)
    for corner in tl.static_range(4):
        weight = (lower if corner >= 2 else upper) * (after if corner % 2 else before)
        offsets = (row + corner // 2) * W + column + corner % 2
        x += weight * tl.load(image + c * (H * W) + offsets, valid & (weight != 0), 0).to(ACC)
    inside = (upper + lower) * (before + after)
    x = tl.where(valid, x + colour[0] * inside, 0)
    x = _change_colours(colour, x, mean + colour[0], inside, valid, C)
    return tl.where(_visible_pixels(mask, i, j, H, W), x, 0)


@triton.jit
def _mean_of_transpose(
    y_bar: tl.tensor,  # (C, H, W)
    colour: tl.tuple,
    down: tl.tuple,
    right: tl.tuple,
    mask: tl.tuple,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
) -> tl.tensor:
    """Return the mean of the warp's transpose of ȳ, or zero without a change of contrast.

    Each value of ȳ counts with the share of its source that lies inside the image.
    """
    PIXELS: tl.constexpr = _MEAN // (4 if BLOCK_C < 4 else BLOCK_C)
    c = tl.arange(0, BLOCK_C)[:, None]
    total = tl.zeros((BLOCK_C, PIXELS), ACC)
    for start in range(0, tl.where(colour[2] != 0, H * W, 0), PIXELS):
        pixel = start + tl.arange(0, PIXELS)[None, :]
        i = pixel // W
        j = pixel % W
        _, upper, lower = _axis_weights(down, i, j, i, H, H, W)
        _, before, after = _axis_weights(right, i, j, j, W, H, W)
        visible = _visible_pixels(mask, i, j, H, W) & (c < C)
        total += (upper + lower) * (before + after) * tl.load(y_bar + c * (H * W) + pixel, visible, 0).to(ACC)
    return tl.sum(tl.sum(total, 0), 0) / (C * H * W)


@triton.jit
def _transpose_pixels(
    y_bar: tl.tensor,  # of the sample: (C, H, W)
    parameters: tl.tensor,  # (B, 13)
    sample: tl.tensor,
    c: tl.tensor,  # (BLOCK_C, 1)
    row: tl.tensor,  # (1, BLOCK_M)
    column: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
) -> tl.tensor:
    """Return pixels (row, column) of x̄ = Aᵀ ȳ, (BLOCK_C, BLOCK_M)."""
    colour, down, right, mask = load_parameters(parameters, sample)
    mean = _mean_of_transpose(y_bar, colour, down, right, mask, C, H, W, BLOCK_C, ACC)
    valid = (c < C) & (row < H)

    # Targets whose sources are less than a pixel away, on both axes, lie in a parallelogram. Its centre is the target
    # whose source is this pixel. Its bounding box extends by `reach` to each side, which is the same for all pixels.
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
    # targets outside of the image have no effect; leaving them out also bounds the loops
    top = tl.minimum(tl.maximum(tl.floor(first_row) + 1, 0), H).to(tl.int32)
    left = tl.minimum(tl.maximum(tl.floor(first_column) + 1, 0), W).to(tl.int32)
    rows = tl.minimum(tl.ceil(2 * row_reach), H).to(tl.int32)
    columns = tl.minimum(tl.ceil(2 * column_reach), W).to(tl.int32)

    x = tl.zeros((BLOCK_C, row.shape[1]), ACC)
    for row_step in range(rows):
        for column_step in range(columns):
            i = top + row_step
            j = left + column_step
            source_row, upper, lower = _axis_weights(down, i, j, i, H, H, W)
            source_column, before, after = _axis_weights(right, i, j, j, W, H, W)
            weight = tl.where(source_row == row, upper, tl.where(source_row + 1 == row, lower, 0))
            weight *= tl.where(source_column == column, before, tl.where(source_column + 1 == column, after, 0))
            weight = tl.where(_visible_pixels(mask, i, j, H, W), weight, 0)
            offsets = c * (H * W) + i * W + j
            x += weight * tl.load(y_bar + offsets, valid & (weight != 0), 0).to(ACC)
    return _change_colours(colour, x, mean, tl.full((1, row.shape[1]), 1, ACC), valid, C)


@triton.jit
def _forward(
    images: tl.tensor,  # (B, C, H, W)
    parameters: tl.tensor,  # (B, 13)
    y: tl.tensor,  # (B, C, H, W)
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """Store one block of pixels of y."""
    ACC: tl.constexpr = parameters.dtype.element_ty
    sample, c, i, j = _pixel_block(H, W, BLOCK_C, BLOCK_M)
    colour, down, right, mask = load_parameters(parameters, sample)
    images += sample * (C * H * W)
    mean = mean_for_contrast(colour[2], images, C * H * W, ACC)
    x = warp_pixels(images, colour, down, right, mask, mean, c, i, j, C, H, W, ACC)
    tl.store(y + sample * (C * H * W) + c * (H * W) + i * W + j, x, (c < C) & (i < H))


@triton.jit
def _transpose(
    y_bar: tl.tensor,  # (B, C, H, W)
    parameters: tl.tensor,  # (B, 13)
    x_bar: tl.tensor,  # (B, C, H, W)
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """Store one block of pixels of x̄."""
    ACC: tl.constexpr = parameters.dtype.element_ty
    sample, c, row, column = _pixel_block(H, W, BLOCK_C, BLOCK_M)
    begin = sample * (C * H * W)
    x = _transpose_pixels(y_bar + begin, parameters, sample, c, row, column, C, H, W, BLOCK_C, ACC)
    tl.store(x_bar + begin + c * (H * W) + row * W + column, x, (c < C) & (row < H))


@triton.jit
def transpose_add(
    out: tl.tensor,  # (n, C, H, W)
    index: tl.tensor,  # (B,)
    y_bar: tl.tensor,  # (B, C, H, W)
    parameters: tl.tensor | None,  # (B, 13)
    factor: tl.tensor,
    batch: tl.tensor,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PADDED_BATCH: tl.constexpr,  # B rounded up to a power of two
) -> None:
    """Add pixels of a sample, and of all later samples with the same index, unless an earlier sample has that index too.

    The first programs of the grid do, each for a block of pixels.
    """
    dtype: tl.constexpr = out.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    own, c, row, column = _pixel_block(H, W, BLOCK_C, BLOCK_M)
    samples, valid = tl.arange(0, PADDED_BATCH), (c < C) & (row < H)
    target = tl.load(index + own)
    same = tl.load(index + samples, samples < batch, -1) == target
    if tl.min(tl.where(same, samples, PADDED_BATCH), 0) == own:
        pixel = c * (H * W) + row * W + column
        pointers = out + target * (C * H * W) + pixel
        total = tl.load(pointers, valid, 0).to(ACC)
        scale = tl.load(factor).to(ACC)
        for sample in range(own, tl.max(tl.where(same, samples, 0), 0) + 1):
            if tl.load(index + sample) == target:
                source = y_bar + sample * (C * H * W)
                if parameters is None:
                    x = tl.load(source + pixel, valid, 0).to(ACC)
                else:
                    x = _transpose_pixels(source, parameters, sample, c, row, column, C, H, W, BLOCK_C, ACC)
                total += scale * x
        tl.store(pointers, total, valid)


def colour_warp_mask(images: Tensor, parameters: Tensor) -> Tensor:
    """See `mtt_fast.kernels.colour_warp_mask`."""
    y = torch.empty_like(images)
    _launch(_forward, "colour_warp_mask", Planes.from_tensors(images), images, parameters, y)
    return y


def colour_warp_mask_transpose(y_bar: Tensor, parameters: Tensor) -> Tensor:
    """See `mtt_fast.kernels.colour_warp_mask_transpose`."""
    x_bar = torch.empty_like(y_bar)
    _launch(_transpose, "colour_warp_mask_transpose", Planes.from_tensors(y_bar), y_bar, parameters, x_bar)
    return x_bar


def padded_batch(batch: int) -> int:
    """Return PADDED_BATCH, the batch size rounded up to a power of two."""
    padded: int = triton.next_power_of_2(max(1, batch))
    return padded


def _launch(kernel: Any, operation: str, planes: Planes, *arguments: Tensor) -> None:
    """Launch `kernel` for each block of pixels of each sample, with the configuration of `operation`."""
    row = configuration(operation, architecture(arguments[0].device), "")
    programs, sizes = pixel_blocks(planes, row.pop("ELEMENTS"))
    launch(kernel, programs, *arguments, **sizes, **row)


def pixel_blocks(planes: Planes, elements: int) -> tuple[int, dict[str, int]]:
    """Return the number of programs of about so many `elements` each, and the sizes that a kernel takes."""
    channels = triton.next_power_of_2(planes.channels)
    whole = triton.next_power_of_2(planes.height * planes.width)
    # each program may compute the mean of its whole sample, so a sample has at most _PROGRAMS of them
    pixels = min(max(1, elements // channels, whole // _PROGRAMS), whole)
    programs = planes.samples * triton.cdiv(planes.height * planes.width, pixels)
    sizes = {"C": planes.channels, "H": planes.height, "W": planes.width, "BLOCK_C": channels, "BLOCK_M": pixels}
    return programs, sizes
