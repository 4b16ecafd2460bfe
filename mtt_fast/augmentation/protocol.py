"""The protocol that augmentations implement for the engine."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor


class Augment(Protocol):
    """Any random, differentiable function of images, as the engine uses it.

    `SiameseAugment` is one, `Augmentation` makes one of two functions, and `KorniaAugment` of a module of kornia. An augmentation
    that changes the images' shape, or takes more memory than one more batch, also implements `HasFootprint`. One that is an
    affine warp of colours and pixels may implement `Warp`.
    """

    def draw(self, images: Tensor, generator: torch.Generator | None, /) -> Any:
        """Return the random numbers for one step on a batch like `images` (b, C, H, W)."""
        ...

    def __call__(self, images: Tensor, draws: Any) -> Tensor:
        """Return the augmented images, a deterministic differentiable function of `images` for given `draws`."""
        ...


class Footprint(NamedTuple):
    """The shape of one augmented image, and the bytes that augmenting it takes, for the memory plan."""

    input_shape: torch.Size
    """(C, H, W) of the network's inputs"""
    extra_bytes: int = 0
    """beyond the augmented image and its gradient"""


@runtime_checkable
class HasFootprint(Protocol):
    """An augmentation that knows its footprint."""

    def footprint(self, image_shape: torch.Size, dtype: torch.dtype) -> Footprint:
        """Return the footprint for an image of `image_shape` (C, H, W) and `dtype`."""
        ...


@runtime_checkable
class Warp(Protocol):
    """An augmentation that is computed by `kernels.colour_warp_mask`, which a student can apply while it gathers a batch."""

    def warp_parameters(self, draws: Any, shape: torch.Size) -> Tensor:
        """Return the parameters (b, 13) of the operation for `draws` on images of `shape` (b, C, H, W)."""
        ...


def footprint_of(augment: object, image_shape: torch.Size, dtype: torch.dtype) -> Footprint:
    """Return the footprint of `augment` for an image of `image_shape` (C, H, W): that of the image itself by default."""
    return augment.footprint(image_shape, dtype) if isinstance(augment, HasFootprint) else Footprint(image_shape)


def is_warp(augment: object) -> TypeGuard[Warp]:
    """Return whether `augment` is a `Warp`; a subclass that overrides `__call__` does not count as one."""
    # the `None` check comes first, since a protocol check is slow compared with a small network's step
    return augment is not None and isinstance(augment, Warp) and is_equivalent(augment, "warp_parameters", "__call__")


def warp_of(augment: object, draws: Any, shape: torch.Size) -> Tensor | None:
    """Return the parameters (b, 13) of `augment` with `draws` on images of `shape` (b, C, H, W), or None if it is no `Warp`."""
    return augment.warp_parameters(draws, shape) if is_warp(augment) else None


def is_equivalent(augment: object, method: str, other: str) -> bool:
    """Return whether `method`, a faster equivalent of the method `other` of `augment`, still computes the same as `other`.

    It does not if a subclass overrides only `other`, or if a wrapper forwards `method` by `__getattr__`.
    """

    def depth(name: str) -> int:
        classes = type(augment).__mro__
        return next((number for number, each in enumerate(classes) if name in vars(each)), len(classes))

    return depth(method) <= depth(other)
