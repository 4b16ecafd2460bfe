"""Differentiable siamese augmentation (DSA: Zhao & Bilen, ICML 2021), with the draws kept apart from the operation.

An augmentation is two functions: `draw` makes the random numbers of one step, and calling it with those numbers is a
deterministic, differentiable function of the images. The backward sweep calls it again with the same numbers.

Every operation is one affine function of the pixels with other parameters (`mtt_fast.kernels.colour_warp_mask`):
`augment_parameters` makes the parameters from the draws, `augment_with` applies them. The computation does not depend on the
operation that was drawn, so a CUDA graph that holds `augment_with` can be replayed with the parameters of any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.checks import check_ordinary, device_of
from mtt_fast.errors import InputError

BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5
CROP_SHARE, CUTOUT_SHARE = 0.125, 0.5
LARGEST_SCALE, LARGEST_DEGREES = 1.2, 15.0


class Draws(NamedTuple):
    """One step's operation, `color` … `rotate`, and its per-sample random numbers (b,) in the order they were drawn."""

    operation: str
    numbers: tuple[Tensor, ...]


@dataclass(frozen=True)
class SiameseAugment:
    """One operation a step for the whole batch, chosen uniformly from `strategy`, with parameters drawn per sample.

    `strategy` joins operations by underscores, as the public code's --dsa_strategy does:
    color (brightness, saturation and contrast in turn), crop, cutout, flip, scale, rotate.
    Random numbers come from the generator given to `draw`, on its own device, so that a run repeats.
    Raises `InputError` for an unknown operation, and for a `strategy` that is no text.
    """

    strategy: str = "color_crop_cutout_flip_scale_rotate"

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, str):
            raise InputError(
                f"`strategy`: expected operations joined by underscores, found {type(self.strategy).__name__}; without "
                "augmentation leave `augment` out"
            )
        for name in self.operations:
            if name not in _OPERATIONS:
                raise InputError(
                    f"`strategy` {self.strategy}: expected operations among {', '.join(_OPERATIONS)} joined by "
                    f"underscores, found '{name}'"
                )

    @property
    def operations(self) -> list[str]:
        """Return the names of the operations to choose from."""
        return self.strategy.split("_")

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Draws:
        """Choose the operation for one step and draw its numbers for a batch like `images` (b, C, H, W)."""
        _check_images(images)
        operations = self.operations
        chosen = int(torch.randint(len(operations), (), generator=generator, device=device_of(generator)))
        return Draws(operations[chosen], _OPERATIONS[operations[chosen]].draw(images, generator))

    def draw_parameters(self, batches: Iterable[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Return the parameters (Σb, 13) of `augment_with` for the random numbers of `draw`, step by step.

        Each step has a batch like one of `batches` (b, C, H, W). The dtype is float64 for float64 images, else float32.
        """
        draws = []
        for images in batches:
            like = images
            draws.append(self.draw(images, generator))
        return parameters_of_steps(draws, like.shape).to(torch.promote_types(like.dtype, torch.float32))

    def warp_parameters(self, draws: Draws | Tensor, shape: torch.Size) -> Tensor:
        """Return the parameters (b, 13) of `augment_with` for images of `shape` (b, C, H, W). A tensor from `draw_parameters` is returned unchanged.

        Raises `InputError` for draws of another number of images.
        """
        _check_draws(draws, shape[0])
        return draws if isinstance(draws, Tensor) else augment_parameters(draws, shape)

    def __call__(self, images: Tensor, draws: Draws | Tensor) -> Tensor:
        """Apply the drawn operation, or what `draw_parameters` returned, to `images` (b, C, H, W)."""
        _check_images(images)
        return augment_with(images, self.warp_parameters(draws, images.shape))


def augment_by_strategy(strategy: str) -> SiameseAugment | None:
    """Return the augmentation of `strategy`, or None for "none"."""
    return None if strategy.lower() == "none" else SiameseAugment(strategy)


def _check_images(images: Any) -> None:
    """Raise `InputError` unless these are images that the operations are defined for."""
    if not isinstance(images, Tensor):
        found = type(images).__name__
    else:
        check_ordinary("SiameseAugment images", images)
        if images.dim() == 4 and images.is_floating_point() and images.shape[1:].numel():
            return
        found = f"{images.dtype} of shape {tuple(images.shape)}"
    raise InputError(f"SiameseAugment images: expected floating-point images (b, C, H, W), found {found}")


def _check_draws(draws: Any, count: int) -> None:
    """Raise `InputError` unless these are draws for `count` images."""
    if not isinstance(draws, Draws | Tensor):
        raise InputError(
            f"SiameseAugment draws: expected what draw returned for these images, found {type(draws).__name__}"
        )
    found = len(draws) if isinstance(draws, Tensor) else len(draws.numbers[0])
    if found != count:
        raise InputError(
            f"SiameseAugment draws: expected those of {count} images, found those of {found}; draw for each batch"
        )


# ------------------------------------------------------------------ from draws to parameters


def augment_parameters(draws: Draws, shape: torch.Size) -> Tensor:
    """Return the parameters of `augment_with` for `draws` and images of `shape` (b, C, H, W).

    The result is (b, 13), float64, on the device of the draws, with the columns `mtt_fast.kernels.WARP_PARAMETERS`.
    """
    return parameters_of_steps([draws], shape)


def parameters_of_steps(steps: Sequence[Draws], shape: torch.Size) -> Tensor:
    """Return the parameters (Σb, 13) of all `steps`, one after the other, for images of `shape` (any number, C, H, W).

    Those of all steps with one operation are computed together: an operation is a dozen calls, whatever the length.
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
        for name, values in _OPERATIONS[operation].parameters(shape, *numbers).items():
            parameters[rows, kernels.WARP_PARAMETERS.index(name)] = values.double()
    return parameters


_Parameters = dict[str, Tensor]  # the parameters that are not zero, by name, (b,) each


def _brightness(shape: torch.Size, u: Tensor) -> _Parameters:
    """Add (u − ½)·1.0 to each image; u (b,) in [0, 1)."""
    return {"brightness": (u - 0.5) * BRIGHTNESS}


def _saturation(shape: torch.Size, u: Tensor) -> _Parameters:
    """Scale each pixel's distance from its mean over channels by 2u; u (b,) in [0, 1)."""
    return {"saturation": u * SATURATION - 1}


def _contrast(shape: torch.Size, u: Tensor) -> _Parameters:
    """Scale each image's distance from its own mean by u + ½; u (b,) in [0, 1)."""
    return {"contrast": u + CONTRAST - 1}


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
    smallest = 1 / LARGEST_SCALE
    along_x, along_y = (number * (LARGEST_SCALE - smallest) + smallest for number in (u, w))
    return {"column_by_column": along_x - 1, "row_by_row": along_y - 1}


def _rotate(shape: torch.Size, u: Tensor) -> _Parameters:
    """Rotate the sampling grid by (u − ½)·30 degrees; u (b,) in [0, 1)."""
    angle = (u - 0.5) * 2 * LARGEST_DEGREES / 180 * torch.pi
    # as in the public code the grid is rotated as if the image were square, so an oblong image is sheared too
    height, width = (side - 1 for side in shape[2:])
    return {
        "row_by_row": angle.cos() - 1,
        "row_by_column": angle.sin() * (height / max(width, 1)),
        "column_by_row": -angle.sin() * (width / max(height, 1)),
        "column_by_column": angle.cos() - 1,
    }


# ------------------------------------------------------------------ draws


def _uniform(count: int) -> Callable[[Tensor, torch.Generator | None], tuple[Tensor, ...]]:
    def draw(images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        return tuple(
            torch.rand(len(images), generator=generator, device=device_of(generator), dtype=images.dtype)
            for _ in range(count)
        )

    return draw


def _draw_shift(images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, ...]:
    reach = [int(side * CROP_SHARE + 0.5) for side in images.shape[2:]]
    return tuple(_integers(-by, by + 1, images, generator) for by in reach)


def _draw_centre(images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, ...]:
    # an even-sized hole has one more possible centre than there are pixels
    ends = [side + (1 - _hole_size(side) % 2) for side in images.shape[2:]]
    return tuple(_integers(0, end, images, generator) for end in ends)


def _hole_size(side: int) -> int:
    return int(side * CUTOUT_SHARE + 0.5)


def _integers(low: int, high: int, images: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randint(low, high, (len(images),), generator=generator, device=device_of(generator))


class _Operation(NamedTuple):
    """An operation, `color` … `rotate`: its draws for images (b, C, H, W), and the parameters that follow from them."""

    draw: Callable[[Tensor, torch.Generator | None], tuple[Tensor, ...]]
    parameters: Callable[..., _Parameters]


_OPERATIONS = {
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


# ------------------------------------------------------------------ the operation


def augment_with(images: Tensor, parameters: Tensor) -> Tensor:
    """Return `images` (b, C, H, W) augmented by `parameters` (b, 13), as `augment_parameters` makes them.

    Differentiable in the images, forward and backward, any number of times, and under `torch.func`. For parameters in
    float32 (float64 for float64 images) on the images' device there is no copy and no synchronisation, so a CUDA graph can capture it.
    Raises `InputError` for parameters that require grad and for derivatives with is_grads_batched=True, and `ValueError` as
    `mtt_fast.kernels.colour_warp_mask` does.
    """
    if parameters.requires_grad:
        raise InputError("augment_with parameters: not differentiable, found parameters that require grad; detach them")
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    result: Tensor = _Affine.apply(images, parameters.to(images.device, dtype))
    return result


class _Affine(torch.autograd.Function):
    """y = A x + b, with A and b fixed by the parameters."""

    @staticmethod
    def forward(images: Tensor, parameters: Tensor) -> Tensor:
        y: Tensor = kernels.colour_warp_mask(_plain(images), parameters)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _save_parameters(ctx, inputs[1])

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor, None]:
        return _Transpose.apply(y_bar, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, images_dot: Tensor, _: None) -> Tensor:
        return _linear(images_dot, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *arguments: Tensor) -> tuple[Tensor, int]:
        return _over_samples(_Affine, info.batch_size, dims, arguments)


class _Transpose(torch.autograd.Function):
    """x̄ = Aᵀ ȳ."""

    @staticmethod
    def forward(y_bar: Tensor, parameters: Tensor) -> Tensor:
        x_bar: Tensor = kernels.colour_warp_mask_transpose(_plain(y_bar), parameters)
        return x_bar

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _save_parameters(ctx, inputs[1])

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor, None]:
        return _linear(x, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, y_bar_dot: Tensor, _: None) -> Tensor:
        return _Transpose.apply(y_bar_dot, *ctx.saved_tensors)  # type: ignore[no-any-return]

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *arguments: Tensor) -> tuple[Tensor, int]:
        return _over_samples(_Transpose, info.batch_size, dims, arguments)


def _plain(images: Tensor) -> Tensor:
    """Return `images` as the kernels take them. Raises `InputError` for several batches in one tensor of torch.autograd's own vmap."""
    if torch._C._functorch.is_legacy_batchedtensor(images):
        raise InputError(
            "SiameseAugment: expected a derivative along one vector, found several at once, as of is_grads_batched=True or "
            "vectorize=True; take one after the other, or torch.func.vmap"
        )
    return images.detach().contiguous()


def _save_parameters(ctx: Any, parameters: Tensor) -> None:
    ctx.save_for_backward(parameters)
    ctx.save_for_forward(parameters)


def _linear(images: Tensor, parameters: Tensor) -> Tensor:
    """Return A x: without the brightness, in column 0, nothing is added."""
    return _Affine.apply(images, F.pad(parameters[:, 1:], (1, 0)))  # type: ignore[no-any-return]


def _over_samples(
    function: Any, count: int, dims: tuple[int | None, ...], arguments: tuple[Tensor, ...]
) -> tuple[Tensor, int]:
    """Apply `function` to `count` batches at once, as one batch: samples are independent of each other."""
    batches = [
        argument.expand(count, *argument.shape) if dim is None else argument.movedim(dim, 0)
        for argument, dim in zip(arguments, dims, strict=True)
    ]
    result = function.apply(*(batch.flatten(0, 1) for batch in batches))
    return result.unflatten(0, batches[0].shape[:2]), 0
