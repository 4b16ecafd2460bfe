"""Adapt other augmentations to the engine: two functions, or a module of kornia."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtt_fast.checks import device_of
from mtt_fast.errors import InputError


@dataclass(frozen=True)
class Augmentation:
    """An augmentation made of two functions: one draws random numbers, one applies them.

    `unroll` calls `draw` once a step, in order, and `apply` in both sweeps, so that both see the same images.

    Args:
        draw: maps the images of a step (b, C, H, W) and a random generator to the `draws` that `apply` gets.
        apply: maps images and draws to the augmented images (b, C, H', W'); deterministic, differentiable in the images, on the
            images' device.

    Example:
        ```python
        flip = mtt_fast.Augmentation(
            draw=lambda images, generator: torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5,
            apply=lambda images, mirrored: torch.where(mirrored.to(images.device), images.flip(3), images),
        )
        ```
    """

    draw: Callable[[Tensor, torch.Generator | None], Any]
    apply: Callable[[Tensor, Any], Tensor]

    def __post_init__(self) -> None:
        for name, function in vars(self).items():
            if not callable(function):
                raise InputError(f"Augmentation {name}: expected a function, found {type(function).__name__}")

    def __call__(self, images: Tensor, draws: Any) -> Tensor:
        """Return the augmented images. Raises `InputError` if they are not a differentiable batch of the same size."""
        return _checked("Augmentation apply", self.apply(images, draws), images)


@dataclass(frozen=True)
class KorniaAugment:
    """An augmentation of kornia: one of `kornia.augmentation`'s, or an `AugmentationSequential` of several.

    Its parameters are drawn once a step, by `forward_parameters`, and given to it again in the backward sweep. kornia draws from
    torch's default CPU generator. For each draw this is seeded from the generator passed to `draw`, and then restored, so that
    runs are reproducible. Labels stay unchanged, so operations that mix images (mixup, CutMix) do not work. Most of kornia's
    operations expect images in [0, 1]; distilled images are normalised, so operations that move pixels fit best.

    Args:
        module: the augmentation of kornia. Its state of the last call is overwritten.

    Raises:
        InputError: a module without `forward_parameters`, as `nn.Sequential` is.
    """

    module: nn.Module

    def __post_init__(self) -> None:
        if not callable(getattr(self.module, "forward_parameters", None)):
            raise InputError(
                f"KorniaAugment: expected a module of kornia.augmentation, found {type(self.module).__name__}, which cannot "
                "repeat its draws; put several into an AugmentationSequential, or write an mtt_fast.Augmentation"
            )

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Any:
        """Return kornia's parameters for a batch like `images` (b, C, H, W)."""
        device = device_of(generator)
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.module.forward_parameters(images.shape)  # type: ignore[operator]

    def __call__(self, images: Tensor, draws: Any) -> Tensor:
        """Apply the module with the parameters `draws`. Raises `InputError` if the result is not a differentiable image batch."""
        return _checked(f"KorniaAugment {type(self.module).__name__}", self.module(images, params=draws), images)


def _checked(name: str, augmented: Any, images: Tensor) -> Tensor:
    if not isinstance(augmented, Tensor) or augmented.shape[:1] != images.shape[:1]:
        kind = tuple(augmented.shape) if isinstance(augmented, Tensor) else type(augmented).__name__
        raise InputError(f"{name}: expected a tensor of {len(images)} images, found {kind}")
    if augmented.device != images.device:
        raise InputError(f"{name}: expected images on the device {images.device}, found them on {augmented.device}")
    if images.requires_grad and not augmented.requires_grad:
        raise InputError(
            f"{name}: expected a differentiable function of the images, found one that cuts the gradient off"
        )
    return augmented
