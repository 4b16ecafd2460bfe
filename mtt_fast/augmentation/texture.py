"""Textures: canvases larger than an image, from which each step takes random crops.

A crop that crosses one border continues at the opposite one, as on a torus, so the learned textures tile without seams
(Cazenavette et al., Wearable ImageNet, CVPR 2022 Workshops; `--texture` of the public code). The crop is one more
augmentation before the others. The engine knows only its `footprint`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtt_fast.augmentation.protocol import Footprint
from mtt_fast.augmentation.siamese import SiameseAugment
from mtt_fast.checks import check_count, device_of
from mtt_fast.errors import InputError

_COPIES = 2  # of a batch of canvases, at most: the batch, and its gradient
_INDICES = 2  # of a crop's pixels in its canvas, as long integers


@dataclass(frozen=True)
class Canvas:
    """Crops of H × W from canvases of `size`·H × `size`·W.

    A step takes `samples` crops of every canvas in its batch, all with the canvas's label.
    """

    size: int = 2
    samples: int = 1

    def batch(self, index: Tensor) -> Tensor:
        """Return the canvas of each crop of a step on the canvases `index` (b,), as indices (`samples` · b,)."""
        return index.repeat(self.samples)

    def crops(self, augment: SiameseAugment | None) -> CanvasCrops:
        """Return the augmentation that crops, and then applies `augment` if it is not None."""
        return CanvasCrops(self.size, augment)

    def image_shape(self, canvas_shape: torch.Size) -> torch.Size:
        """Return the shape (C, H, W) of a crop, from that of a canvas. Raises `InputError` for a canvas that cannot be cut."""
        if len(canvas_shape) != 3 or min(canvas_shape[1:]) < self.size:
            raise InputError(
                f"`images`: expected canvases (C, H, W) of at least {self.size} pixels a side, found shape {tuple(canvas_shape)}"
            )
        channels, height, width = canvas_shape
        return torch.Size((channels, height // self.size, width // self.size))


@dataclass(frozen=True)
class CanvasCrops:
    """A random crop of each canvas, followed by `augment`, as one augmentation.

    It is used like `SiameseAugment`, both by `mtt_fast.unroll` and with its draws as a tensor. Raises `InputError` for a `size` that
    is not a whole number of at least 1, and for another kind of augmentation.
    """

    size: int
    augment: SiameseAugment | None = None

    def __post_init__(self) -> None:
        check_count("size", self.size)
        augment: Any = self.augment
        is_class = isinstance(augment, type)
        if augment is not None and (is_class or not hasattr(augment, "draw_parameters")):
            found = f"the class {augment.__name__}" if is_class else type(augment).__name__
            raise InputError(
                f"`augment`: expected a SiameseAugment or None, found {found}; an Augmentation of your own may call crop"
            )

    def draw_parameters(self, batches: Iterable[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Draw, step by step, for batches like the canvases `batches` (b, C, H, W): the corner of each crop, then `augment`'s.

        A corner is the first row and column. The result is (Σb, 2) or (Σb, 2 + 13), float64 for float64 canvases, else float32,
        which holds every row and column exactly.
        """
        device = device_of(generator)
        corners = []

        def crops() -> Iterator[Tensor]:
            for images in batches:
                sides, (height, width) = images.shape[2:], self._sides(images)
                places = [torch.randint(side, (len(images),), generator=generator, device=device) for side in sides]
                corners.append(torch.stack(places, dim=1).to(torch.promote_types(images.dtype, torch.float32)))
                yield images[..., :height, :width]

        crops_of_batches = crops()
        augment_parameters = [] if self.augment is None else [self.augment.draw_parameters(crops_of_batches, generator)]
        deque(crops_of_batches, maxlen=0)
        return torch.cat([torch.cat(corners), *augment_parameters], dim=1)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return the augmented crops of the canvases `images` (b, C, H, W) for what `draw_parameters` returned.

        The result is differentiable in the canvases. For draws on the canvases' device there is no copy and no
        synchronisation, so a CUDA graph can capture the call.
        """
        if not isinstance(draws, Tensor) or len(draws) != len(images):
            found = f"those of {len(draws)}" if isinstance(draws, Tensor) else type(draws).__name__
            raise InputError(
                f"CanvasCrops draws: expected what draw returned for these {len(images)} images, found {found}"
            )
        crops = crop(images, draws[:, :2].to(images.device), *self._sides(images))
        return crops if self.augment is None else self.augment(crops, draws[:, 2:].contiguous())

    def footprint(self, image_shape: torch.Size, dtype: torch.dtype) -> Footprint:
        """Return the shape of a crop of a canvas of `image_shape` (C, H, W), and the memory that cropping takes."""
        crop_shape = Canvas(self.size).image_shape(image_shape)
        indices = crop_shape[1:].numel() * torch.long.itemsize
        return Footprint(crop_shape, _COPIES * image_shape.numel() * dtype.itemsize + _INDICES * indices)

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw for one step, as `draw_parameters` does."""
        return self.draw_parameters([images], generator)

    def _sides(self, images: Tensor) -> tuple[int, int]:
        _, height, width = Canvas(self.size).image_shape(images.shape[1:])
        return height, width


def crop(images: Tensor, corners: Tensor, height: int, width: int) -> Tensor:
    """Return `height` × `width` pixels of each of `images` (b, C, H, W) from the row and the column in `corners` (b, 2) on.

    After the last row comes the first, and likewise with columns: out[n, :, i, j] = images[n, :, (r + i) mod H, (c + j)
    mod W]. `corners` are whole numbers in any dtype, and `height` and `width` at most H and W. The result is
    differentiable in `images`, and computed without a synchronisation.
    """
    rows, columns = (
        (corners[:, side, None].long() + torch.arange(length, device=images.device)) % images.shape[2 + side]
        for side, length in enumerate((height, width))
    )
    pixels = rows[:, :, None] * images.shape[3] + columns[:, None, :]  # (b, height, width), into a plane
    index = pixels.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    crops: Tensor = images.flatten(2).gather(2, index).unflatten(2, (height, width))
    return crops


def tiled(images: Tensor, times: int = 2) -> Tensor:
    """Return each of `images` (n, C, H, W) side by side with itself, `times` × `times`: a texture as a pattern."""
    return images.repeat(1, 1, times, times)


def canvases_of(images: Tensor, size: int) -> Tensor:
    """Return canvases (n, C, size·H, size·W) put together from n·size² `images` (C, H, W), row by row."""
    rows: Tensor = images.unflatten(0, (-1, size, size))  # (n, row, column, C, H, W)
    return rows.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).contiguous()
