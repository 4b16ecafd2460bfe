"""The images of a step, selected from all synthetic images and augmented, and the transpose for their gradient.

A student gets a `Batch`, which it may gather itself, or a tensor. Augmentations that are not warps are differentiated by
autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.errors import InputError


@dataclass(frozen=True)
class Batch:
    """A batch that is not gathered yet: images, indices into them, and a warp.

    Shape, length and slices are those of the gathered batch.
    """

    images: Tensor  # (n, C, H, W), contiguous, without a graph
    index: Tensor  # (b,) int64
    warp: Tensor | None  # (b, 13), the parameters of `kernels.colour_warp_mask`; None leaves the images as they are

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, piece: slice) -> Batch:
        return Batch(self.images, self.index[piece], None if self.warp is None else self.warp[piece])

    @property
    def shape(self) -> torch.Size:
        """Return (b, C, H, W)."""
        return torch.Size((len(self), *self.images.shape[1:]))

    @property
    def device(self) -> torch.device:
        """Return the device of the images."""
        return self.images.device

    @property
    def inputs(self) -> Batch:
        """Return the argument for a student: the batch itself."""
        return self

    def gathered(self) -> Tensor:
        """Return the batch as a tensor (b, C, H, W)."""
        selected = self.images[self.index]
        return selected if self.warp is None else kernels.colour_warp_mask(selected, self.warp)

    def gradient_to_add(self, out: Tensor, inputs_bar: Tensor) -> kernels.BatchGradient:
        """Return the argument with which `kernels.adjoint_step` adds the gradient of the images to `out` (n, C, H, W).

        `inputs_bar` is the gradient of the gathered batch (b, C, H, W).
        """
        return kernels.BatchGradient(out, self.index, inputs_bar.contiguous(), self.warp)


Inputs = Tensor | Batch
"""The inputs of a step (b, C, H, W)."""


@dataclass(frozen=True)
class AugmentedBatch:
    """A gathered batch, and the augmented batch with its autograd graph."""

    selected: Tensor  # (b, C, H, W)
    augmented: Tensor  # (b, C', H', W')
    index: Tensor  # (b,)

    @classmethod
    def from_images(
        cls, images: Tensor, index: Tensor, augment: Callable[[Tensor], Tensor], dtype: torch.dtype, *, tracked: bool
    ) -> AugmentedBatch:
        """Return the batch with its augmented images, in `dtype`; `tracked` says whether the images' gradient will be needed.

        Raises `InputError` if the gradient is needed and `augment` cuts it off.
        """
        with torch.set_grad_enabled(tracked):
            selected = images[index].detach().requires_grad_(tracked)
            augmented = augment(selected).contiguous().to(dtype)
        if tracked and not augmented.requires_grad:
            raise InputError(
                "`augment`: expected a differentiable function of the images, found one that cuts the gradient off; if images "
                "have no effect in a step, multiply them by zero"
            )
        return cls(selected, augmented, index)

    @property
    def inputs(self) -> Tensor:
        """Return the argument for a student: the augmented images, detached."""
        return self.augmented.detach()

    def add_gradient(self, out: Tensor, inputs_bar: Tensor, factor: Tensor) -> None:
        """Add the gradient of the images, times `factor` (), to `out` (n, …).

        `inputs_bar` is the gradient of the augmented images (b, …).
        """
        (selected_bar,) = torch.autograd.grad(self.augmented, self.selected, -factor * inputs_bar)
        # with alpha=1 torch uses a scatter that starts threads and waits for them, even for few values
        kernels.index_add(out, self.index, selected_bar.contiguous(), alpha=-1)


def batch_images(images: Inputs, padding: int) -> kernels.BatchImages:
    """Return the images of a step for a first block with this padding that gathers and augments them itself."""
    if isinstance(images, Tensor):
        return kernels.BatchImages(images.contiguous(), padding)
    return kernels.BatchImages(images.images, padding, images.index, images.warp)


def gathered(images: Inputs) -> Tensor:
    """Return the images of a step as a tensor."""
    return images.gathered() if isinstance(images, Batch) else images
