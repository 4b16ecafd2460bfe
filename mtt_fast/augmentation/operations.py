"""The operations of DSA: the random numbers of each, and the parameters of the warp that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.checks import device_of

_BRIGHTNESS, _SATURATION, _CONTRAST = 1.0, 2.0, 0.5
_CROP_SHARE, _CUTOUT_SHARE = 0.125, 0.5
_LARGEST_SCALE, _LARGEST_DEGREES = 1.2, 15.0


class Draws(NamedTuple):
    """One step's operation, `color` … `rotate`, and its per-sample random numbers (b,) in the order they were drawn."""

    operation: str
    numbers: tuple[Tensor, ...]


def parameters_of_steps(steps: Sequence[Draws], shape: torch.Size) -> Tensor:
    """Return the parameters (Σb, 13) of all `steps`, one after the other, for images of `shape` (any number, C, H, W).

    The result is float64, on the device of the draws, with the columns `mtt_fast.kernels.WARP_PARAMETERS`. Steps with the same operation
    are computed together: an operation is a dozen calls, whatever the length.
    """
    first, lengths = steps[0].numbers[0], [len(draws.numbers[0]) for draws in steps]
    places = torch.arange(sum(lengths), device=first.device).split(lengths)
    parameters = first.new_zeros(sum(lengths), len(kernels.WARP_PARAMETERS), dtype=torch.float64)
    for operation in dict.fromkeys(draws.operation for draws in steps):
        chosen = [
            (place, draws.numbers) for place, draws in zip(places, steps, strict=True) if draws.operation == operation
        ]
        rows = torch.cat([place for place, _ in chosen])
        numbers = [torch.cat(each).double() for each in zip(*(numbers for _, numbers in chosen), strict=True)]
        for name, values in OPERATIONS[operation].parameters(shape, *numbers).items():
            parameters[rows, kernels.WARP_PARAMETERS.index(name)] = values.double()
    return parameters


_Parameters = dict[str, Tensor]  # the parameters that are not zero, by name, (b,) each


def _brightness(shape: torch.Size, u: Tensor) -> _Parameters:
    """Add (u − ½)·1.0 to each image; u (b,) in [0, 1)."""
    return {"brightness": (u - 0.5) * _BRIGHTNESS}


def _saturation(shape: torch.Size, u: Tensor) -> _Parameters:
    """Scale each pixel's distance from its mean over channels by 2u; u (b,) in [0, 1)."""
    return {"saturation": u * _SATURATION - 1}


def _contrast(shape: torch.Size, u: Tensor) -> _Parameters:
    """Scale each image's distance from its own mean by u + ½; u (b,) in [0, 1)."""
    return {"contrast": u + _CONTRAST - 1}


def _color(shape: torch.Size, u: Tensor, v: Tensor, w: Tensor) -> _Parameters:
    return _brightness(shape, u) | _saturation(shape, v) | _contrast(shape, w)


def _crop(shape: torch.Size, down: Tensor, right: Tensor) -> _Parameters:
    """Shift each image by integers, pixel (i, j) from (i + down, j + right), with zeros from outside; (b,) each."""
    return {"row_shift": down, "column_shift": right}


def _cutout(shape: torch.Size, row: Tensor, column: Tensor) -> _Parameters:
    """Set a square of half the size, centred at (row, column), to zero, clipped at the border; (b,) each."""
    top, bottom = _hole(row, shape[2])
    left, right = _hole(column, shape[3])
    return {"top": top, "bottom": bottom, "left": left, "right": right}


def _hole(centre: Tensor, side: int) -> tuple[Tensor, Tensor]:
    size = _hole_size(side)
    first = centre - size // 2
    # the public code clamps indices into the image instead of dropping them, so a hole beyond the border still
    # zeroes the border's own row
    return first.clamp(0, side - 1), (first + size - 1).clamp(0, side - 1) + 1


def _flip(shape: torch.Size, u: Tensor) -> _Parameters:
    """Mirror left and right the images with u < ½; u (b,) in [0, 1)."""
    return {"column_by_column": torch.where(u < 0.5, -2.0, 0.0)}


def _scale(shape: torch.Size, u: Tensor, w: Tensor) -> _Parameters:
    """Sample each image on a grid scaled by 1/1.2 … 1.2 along each axis, u along x; u, w (b,) in [0, 1)."""
    smallest = 1 / _LARGEST_SCALE
    along_x, along_y = (number * (_LARGEST_SCALE - smallest) + smallest for number in (u, w))
    return {"column_by_column": along_x - 1, "row_by_row": along_y - 1}


def _rotate(shape: torch.Size, u: Tensor) -> _Parameters:
    """Rotate the sampling grid by (u − ½)·30 degrees; u (b,) in [0, 1)."""
    angle = (u - 0.5) * 2 * _LARGEST_DEGREES / 180 * torch.pi
    # as in the public code the grid is rotated as if the image were square, so an oblong image is sheared too
    height, width = (side - 1 for side in shape[2:])
    return {
        "row_by_row": angle.cos() - 1,
        "row_by_column": angle.sin() * (height / max(width, 1)),
        "column_by_row": -angle.sin() * (width / max(height, 1)),
        "column_by_column": angle.cos() - 1,
    }


def _uniform(count: int) -> Callable[[Tensor, torch.Generator | None], tuple[Tensor, ...]]:
    def draw(images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        return tuple(
            torch.rand(len(images), generator=generator, device=device_of(generator), dtype=images.dtype)
            for _ in range(count)
        )

    return draw


def _draw_shift(images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, ...]:
    reach = [int(side * _CROP_SHARE + 0.5) for side in images.shape[2:]]
    return tuple(_integers(-by, by + 1, images, generator) for by in reach)


def _draw_centre(images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, ...]:
    # an even-sized hole has one more possible centre than there are pixels
    ends = [side + (1 - _hole_size(side) % 2) for side in images.shape[2:]]
    return tuple(_integers(0, end, images, generator) for end in ends)


def _hole_size(side: int) -> int:
    return int(side * _CUTOUT_SHARE + 0.5)


def _integers(low: int, high: int, images: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randint(low, high, (len(images),), generator=generator, device=device_of(generator))


class _Operation(NamedTuple):
    """An operation, `color` … `rotate`: its draws for images (b, C, H, W), and the parameters that follow from them."""

    draw: Callable[[Tensor, torch.Generator | None], tuple[Tensor, ...]]
    parameters: Callable[..., _Parameters]


OPERATIONS = {
    "color": _Operation(_uniform(3), _color),
    "brightness": _Operation(_uniform(1), _brightness),
    "saturation": _Operation(_uniform(1), _saturation),
    "contrast": _Operation(_uniform(1), _contrast),
    "crop": _Operation(_draw_shift, _crop),
    "cutout": _Operation(_draw_centre, _cutout),
    "flip": _Operation(_uniform(1), _flip),
    "scale": _Operation(_uniform(2), _scale),
    "rotate": _Operation(_uniform(1), _rotate),
}
