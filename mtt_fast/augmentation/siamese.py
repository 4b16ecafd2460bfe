"""Differentiable siamese augmentation (DSA: Zhao & Bilen, ICML 2021), with random draws separate from the operation.

An augmentation is two functions: `draw` makes the random numbers of one step, and calling it with those numbers is a
deterministic, differentiable function of the images. The backward sweep calls it again with the same numbers.

Every operation is a warp with certain parameters: operations.py computes them from the draws, warp.py applies them. The
computation does not depend on the operation that was drawn, so a CUDA graph can be replayed with the parameters of any.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtt_fast.augmentation.operations import OPERATIONS, Draws, parameters_of_steps
from mtt_fast.augmentation.warp import augment_with
from mtt_fast.checks import check_ordinary, device_of
from mtt_fast.errors import InputError


@dataclass(frozen=True)
class SiameseAugment:
    """One operation a step for the whole batch, chosen uniformly from `strategy`, with parameters drawn per sample.

    `strategy` joins operations by underscores, as the public code's --dsa_strategy does: color (brightness, saturation and
    contrast in turn), crop, cutout, flip, scale, rotate. Random numbers come from the generator given to `draw`, on the
    generator's device, so runs are reproducible. Raises `InputError` for an unknown operation, and for a `strategy` that is not a
    string.
    """

    strategy: str = "color_crop_cutout_flip_scale_rotate"

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, str):
            raise InputError(
                f"`strategy`: expected operations joined by underscores, found {type(self.strategy).__name__}; without "
                "augmentation leave `augment` out"
            )
        for name in self.operations:
            if name not in OPERATIONS:
                raise InputError(
                    f"`strategy` {self.strategy}: expected operations among {', '.join(OPERATIONS)} joined by "
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
        return Draws(operations[chosen], OPERATIONS[operations[chosen]].draw(images, generator))

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
        return draws if isinstance(draws, Tensor) else parameters_of_steps([draws], shape)

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
