"""Textures: canvases larger than the images that networks see, of which each step sees random crops.

A crop that runs over one border goes on at the opposite one, as on a torus, so what is learned tiles without seams
(Cazenavette et al., Wearable ImageNet, CVPR 2022 Workshops; `--texture` of the public code). The crop is one more
augmentation in front of the others, with its draws kept apart from the operation, and so the engine needs to know nothing
of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtt_fast.augmentation.siamese import SiameseAugment


@dataclass(frozen=True)
class Canvas:
    """How steps see canvases: as crops of H × W, where a canvas is `size`·H × `size`·W.

    Each step takes `samples` crops of every canvas in its batch, all with the canvas's label.
    """

    size: int = 2
    samples: int = 1

    def batch(self, index: Tensor) -> Tensor:
        """Return which canvases the crops of a step are taken from, for canvases `index` (b,): (`samples` · b,)."""
        return index.repeat(self.samples)

    def crops(self, then: SiameseAugment | None) -> CanvasCrops:
        """Return the augmentation that crops, and then does `then`."""
        return CanvasCrops(self.size, then)

    def image_shape(self, canvas_shape: torch.Size) -> torch.Size:
        """Return the shape (C, H, W) of a crop, from that of a canvas."""
        channels, height, width = canvas_shape
        return torch.Size((channels, height // self.size, width // self.size))


@dataclass(frozen=True)
class CanvasCrops:
    """A random crop of each canvas, and then the augmentation `then`, as one augmentation.

    It is used as `SiameseAugment` is, both by `mtt_fast.unroll` and with its draws as a tensor.
    """

    size: int
    then: SiameseAugment | None = None

    def draw_parameters(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw for a batch like the canvases `images` (b, C, H, W): the first row and column of each crop, then `then`'s.

        (b, 2) or (b, 2 + 13), in float64 for float64 canvases, else float32, which holds every row and column exactly.
        """
        device = torch.device("cpu") if generator is None else generator.device
        corners = [torch.randint(side, (len(images),), generator=generator, device=device) for side in images.shape[2:]]
        parameters = torch.stack(corners, dim=1).to(torch.promote_types(images.dtype, torch.float32))
        if self.then is None:
            return parameters
        height, width = self._sides(images)
        return torch.cat([parameters, self.then.draw_parameters(images[..., :height, :width], generator)], dim=1)

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Return the augmented crops of the canvases `images` (b, C, H, W) for `parameters` of `draw_parameters`.

        Differentiable in the canvases. For parameters on their device nothing is copied or awaited, as a CUDA graph
        needs it.
        """
        crops = crop(images, parameters[:, :2].to(images.device), *self._sides(images))
        return crops if self.then is None else self.then.apply(crops, parameters[:, 2:].contiguous())

    draw = draw_parameters

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Do as `apply` does."""
        return self.apply(images, draws)

    def _sides(self, images: Tensor) -> tuple[int, int]:
        return images.shape[2] // self.size, images.shape[3] // self.size


def crop(images: Tensor, corners: Tensor, height: int, width: int) -> Tensor:
    """Return `height` × `width` pixels of each of `images` (b, C, H, W) from the row and the column in `corners` (b, 2) on.

    After the last row comes the first, and likewise with columns: out[n, :, i, j] = images[n, :, (r + i) mod H, (c + j)
    mod W]. `corners` are whole numbers in any dtype, and `height` and `width` at most H and W. Differentiable in `images`;
    no tensor's value is asked for.
    """
    rows, columns = (
        (corners[:, side, None].long() + torch.arange(length, device=images.device)) % images.shape[2 + side]
        for side, length in enumerate((height, width))
    )
    places = rows[:, :, None] * images.shape[3] + columns[:, None, :]  # (b, height, width), into a plane
    chosen = places.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    crops: Tensor = images.flatten(2).gather(2, chosen).unflatten(2, (height, width))
    return crops


def tiled(images: Tensor, times: int = 2) -> Tensor:
    """Return each of `images` (n, C, H, W) side by side with itself, `times` × `times`: how a texture looks as a pattern."""
    return images.repeat(1, 1, times, times)


def canvases_of(images: Tensor, size: int) -> Tensor:
    """Return canvases (n, C, size·H, size·W) put together from n·size² `images` (C, H, W), row by row."""
    rows: Tensor = images.unflatten(0, (-1, size, size))  # (n, row, column, C, H, W)
    return rows.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).contiguous()
