"""Differentiable siamese augmentation (DSA: Zhao & Bilen, ICML 2021), with the draws kept apart from the operation.

An augmentation is two functions: `draw` makes the random numbers of one step, and calling it with those numbers is a
deterministic, differentiable function of the images. The backward sweep calls it again with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast.errors import InputError

BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
CROP_SHARE, CUTOUT_SHARE = 0.125, 0.5
LARGEST_SCALE, LARGEST_DEGREES = 1.2, 15.0


class Augment(Protocol):
    """Any random, differentiable function of images, as the engine uses it."""

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Any:
        """Return the random numbers for one step on a batch like `images` (b, C, H, W)."""
        ...

    def __call__(self, images: Tensor, draws: Any) -> Tensor:
        """Return the augmented images, a deterministic differentiable function of `images` for given `draws`."""
        ...


class Draws(NamedTuple):
    """One step's operation, `color` … `rotate`, and its per-sample random numbers in the order they were drawn."""

    operation: str
    numbers: tuple[Tensor, ...]


def brightness(images: Tensor, u: Tensor) -> Tensor:
    """Add (u − ½)·1.0 to each image; u (b,) in [0, 1)."""
    return images + (_per_sample(u, images) - 0.5) * BRIGHTNESS


def saturation(images: Tensor, u: Tensor) -> Tensor:
    """Scale each pixel's distance from its mean over channels by 2u; u (b,) in [0, 1)."""
    mean = images.mean(dim=1, keepdim=True)
    return (images - mean) * (_per_sample(u, images) * SATURATION) + mean


def contrast(images: Tensor, u: Tensor) -> Tensor:
    """Scale each image's distance from its own mean by u + ½; u (b,) in [0, 1)."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (_per_sample(u, images) + CONTRAST) + mean


def crop(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Shift each image by integers, pixel (i, j) from (i + down, j + right), with zeros from outside; (b,) each."""
    rows = _grid(images, dim=2) + down.view(-1, 1)
    columns = _grid(images, dim=3) + right.view(-1, 1)
    height, width = images.shape[2:]
    inside = _outer((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))
    samples = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    moved = images.permute(0, 2, 3, 1)[
        samples, rows.clamp(0, height - 1).unsqueeze(2), columns.clamp(0, width - 1).unsqueeze(1)
    ]
    return moved.permute(0, 3, 1, 2) * inside.unsqueeze(1)


def cutout(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Set a square of half the size, centred at (row, column), to zero, clipped at the border; (b,) each."""
    height, width = images.shape[2:]
    rows = _hole(_grid(images, dim=2), row, int(height * CUTOUT_SHARE + 0.5), height)
    columns = _hole(_grid(images, dim=3), column, int(width * CUTOUT_SHARE + 0.5), width)
    return images * ~_outer(rows, columns).unsqueeze(1)


def flip(images: Tensor, u: Tensor) -> Tensor:
    """Mirror left and right the images with u < ½; u (b,) in [0, 1)."""
    return torch.where(_per_sample(u, images) < 0.5, images.flip(3), images)


def scale(images: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """Sample each image on a grid scaled by 1/1.2 … 1.2 along each axis (first number: along x); u, w (b,) in [0, 1)."""
    smallest = 1 / LARGEST_SCALE
    along_x = u * (LARGEST_SCALE - smallest) + smallest
    along_y = w * (LARGEST_SCALE - smallest) + smallest
    zero = torch.zeros_like(u)
    return _warp(images, [[along_x, zero, zero], [zero, along_y, zero]])


def rotate(images: Tensor, u: Tensor) -> Tensor:
    """Rotate the sampling grid by (u − ½)·30 degrees; u (b,) in [0, 1)."""
    angle = (u - 0.5) * 2 * LARGEST_DEGREES / 180 * torch.pi
    zero = torch.zeros_like(u)
    return _warp(images, [[angle.cos(), -angle.sin(), zero], [angle.sin(), angle.cos(), zero]])


def _color(images: Tensor, u: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return contrast(saturation(brightness(images, u), v), w)


def _uniform(count: int) -> Callable[[Tensor, torch.Generator | None], tuple[Tensor, ...]]:
    def draw(images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        return tuple(
            torch.rand(len(images), generator=generator, device=_device(generator), dtype=images.dtype).to(
                images.device
            )
            for _ in range(count)
        )

    return draw


def _draw_shift(images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, ...]:
    reach = [int(side * CROP_SHARE + 0.5) for side in images.shape[2:]]
    return tuple(_integers(-by, by + 1, images, generator) for by in reach)


def _draw_centre(images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, ...]:
    # an even-sized hole has one more possible centre than there are pixels
    sizes = [(side, int(side * CUTOUT_SHARE + 0.5)) for side in images.shape[2:]]
    return tuple(_integers(0, side + (1 - hole % 2), images, generator) for side, hole in sizes)


def _integers(low: int, high: int, images: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randint(low, high, (len(images),), generator=generator, device=_device(generator)).to(images.device)


_OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, torch.Generator | None], tuple[Tensor, ...]]]] = {
    "color": (_color, _uniform(3)),
    "brightness": (brightness, _uniform(1)),
    "saturation": (saturation, _uniform(1)),
    "contrast": (contrast, _uniform(1)),
    "crop": (crop, _draw_shift),
    "cutout": (cutout, _draw_centre),
    "flip": (flip, _uniform(1)),
    "scale": (scale, _uniform(2)),
    "rotate": (rotate, _uniform(1)),
}


@dataclass(frozen=True)
class SiameseAugment:
    """One operation a step for the whole batch, chosen uniformly from `strategy`, with parameters drawn per sample.

    `strategy` joins operations by underscores, as the public code's --dsa_strategy does:
    color (brightness, saturation and contrast in turn), crop, cutout, flip, scale, rotate.
    Random numbers come from the generator given to `draw`, on its own device, so that a run repeats.
    Raises `InputError` for an unknown operation.
    """

    strategy: str = "color_crop_cutout_flip_scale_rotate"

    def __post_init__(self) -> None:
        for name in self.operations:
            if name not in _OPERATIONS:
                raise InputError(
                    f"--dsa_strategy {self.strategy}: expected operations among {', '.join(_OPERATIONS)} joined by "
                    f"underscores, found '{name}'"
                )

    @property
    def operations(self) -> list[str]:
        """The operations to choose from."""
        return self.strategy.split("_")

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Draws:
        """Choose the operation for one step and draw its numbers for a batch like `images` (b, C, H, W)."""
        operations = self.operations
        chosen = int(torch.randint(len(operations), (), generator=generator, device=_device(generator)))
        return Draws(operations[chosen], _OPERATIONS[operations[chosen]][1](images, generator))

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Apply the drawn operation to `images` (b, C, H, W)."""
        return _OPERATIONS[draws.operation][0](images, *draws.numbers)


def augment_by_strategy(strategy: str) -> SiameseAugment | None:
    """Return the augmentation of `strategy`, or None for "none"."""
    return None if strategy.lower() == "none" else SiameseAugment(strategy)


def _device(generator: torch.Generator | None) -> torch.device:
    return generator.device if generator is not None else torch.device("cpu")


def _per_sample(u: Tensor, images: Tensor) -> Tensor:
    return u.to(images.dtype).view(-1, 1, 1, 1)


def _grid(images: Tensor, dim: int) -> Tensor:
    return torch.arange(images.shape[dim], device=images.device)


def _hole(grid: Tensor, centre: Tensor, size: int, side: int) -> Tensor:
    """Mask (b, side) of the clipped indices centre − size//2 … centre − size//2 + size − 1."""
    first = centre.view(-1, 1) - size // 2
    # the reference clamps indices into the image instead of dropping them, so a hole beyond the border still
    # zeroes the border's own row
    low, high = first.clamp(0, side - 1), (first + size - 1).clamp(0, side - 1)
    return (grid >= low) & (grid <= high)


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.unsqueeze(2) & columns.unsqueeze(1)


def _warp(images: Tensor, matrix: list[list[Tensor]]) -> Tensor:
    affine = torch.stack([torch.stack(row, dim=1) for row in matrix], dim=1).to(images.dtype)
    grid = F.affine_grid(affine, list(images.shape), align_corners=True)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
