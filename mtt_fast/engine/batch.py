"""The images of a step: rows of all synthetic images, augmented, and the way back for their gradient.

A student is given a `Batch`, which it may gather itself, or a tensor. An augmentation that is no warp goes through autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import mtt_fast.kernels as kernels


@dataclass(frozen=True)
class Batch:
    """Rows `index` of images with the parameters of their warps, not gathered yet. Its shape and slices are those of the result."""

    images: Tensor  # (n, C, H, W), contiguous, without a graph
    index: Tensor  # (b,) int64
    parameters: Tensor | None  # (b, 13), of `kernels.colour_warp_mask`; None leaves the images as they are

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, piece: slice) -> Batch:
        return Batch(self.images, self.index[piece], None if self.parameters is None else self.parameters[piece])

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
        """Return what a student is given: the batch itself."""
        return self

    def gathered(self) -> Tensor:
        """Return the batch as a tensor (b, C, H, W)."""
        rows = self.images[self.index]
        return rows if self.parameters is None else kernels.colour_warp_mask(rows, self.parameters)

    def gradient_to_add(self, out: Tensor, inputs_bar: Tensor) -> kernels.BatchGradient:
        """Return the gradient to the images, from that to the batch (b, C, H, W), in the form that `kernels.adjoint_step` takes.

        It is added there to `out` (n, C, H, W), times a scale.
        """
        return kernels.BatchGradient(out, self.index, inputs_bar.contiguous(), self.parameters)


Inputs = Tensor | Batch
"""The inputs of a step (b, C, H, W)."""


@dataclass(frozen=True)
class AugmentedBatch:
    """Rows `index` of images, and what an augmentation made of them under autograd."""

    rows: Tensor  # (b, C, H, W)
    augmented: Tensor  # (b, C', H', W')
    index: Tensor  # (b,)

    @classmethod
    def of(
        cls, images: Tensor, index: Tensor, augment: Callable[[Tensor], Tensor], dtype: torch.dtype, *, tracked: bool
    ) -> AugmentedBatch:
        """Return the batch with its augmented images, of `dtype`; `tracked` if their gradient will be needed."""
        with torch.set_grad_enabled(tracked):
            rows = images[index].detach().requires_grad_(tracked)
            return cls(rows, augment(rows).contiguous().to(dtype), index)

    @property
    def inputs(self) -> Tensor:
        """Return what a student is given, without a graph."""
        return self.augmented.detach()

    def add_gradient(self, out: Tensor, inputs_bar: Tensor, factor: Tensor) -> None:
        """Add `factor` () times the gradient to the images to `out` (n, …); `inputs_bar` is that to the batch (b, …)."""
        (rows_bar,) = torch.autograd.grad(self.augmented, self.rows, -factor * inputs_bar)
        # with an alpha of 1 torch takes a scatter that starts threads, and waits for them, for however few numbers
        kernels.index_add(out, self.index, rows_bar.contiguous(), alpha=-1)


def batch_images(images: Inputs, padding: int) -> kernels.BatchImages:
    """Return the images of a step for a first block of this padding that gathers and augments them itself."""
    if isinstance(images, Tensor):
        return kernels.BatchImages(images.contiguous(), padding)
    return kernels.BatchImages(images.images, padding, images.index, images.parameters)


def gathered(images: Inputs) -> Tensor:
    """Return the images of a step as a tensor."""
    return images.gathered() if isinstance(images, Batch) else images
