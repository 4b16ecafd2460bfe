"""The student: a network's gradient, and the directional derivative of that gradient, for one step.

`GenericStudent` (generic_student.py) computes both by autograd, for any network and loss. `FusedConvNetStudent` (fused.py) computes
them by hand-written formulas. `InMicrobatches` wraps another student, and calls it on pieces of the batch; for a loss that is not a
mean over samples `BatchLossStudent` (batch_loss_student.py) takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.engine.batch import Inputs
from mtt_fast.kernels import PartialSums

Loss = Callable[[Tensor, Tensor], Tensor]
"""Loss () of a batch from the network's output (b, …) and labels (b, …)."""


SavedActivations = list[Any]
"""Activations of one step, in the private format of the student that saved them."""


class StepGradient(NamedTuple):
    """The loss, its gradient with respect to θ, and the saved activations."""

    loss: Tensor  # ()
    sums: PartialSums  # of the gradient
    saved: SavedActivations | None

    @property
    def gradient(self) -> Tensor:
        """Return the gradient (P,)."""
        gradient: Tensor = kernels.add_up(self.sums)
        return gradient


class StepBytes(NamedTuple):
    """Peak memory in bytes of one step, beyond its arguments and the saved activations of earlier steps."""

    gradient: int
    gradient_saving: int  # of `gradient` with save=True, the saved activations included
    gradient_jvp: int
    gradient_jvp_saved: int  # of `gradient_jvp` with saved activations, beyond these
    saved: int  # saved activations of one step; 0 if the student saves nothing
    workspace: int  # memory for intermediate results, which stays allocated between calls


class GradientTangent(NamedTuple):
    """Derivatives, at θ in direction v, of the loss and of its gradients (g is the gradient with respect to θ, H the Hessian)."""

    v_dot_g: Tensor  # ()
    sums: PartialSums  # of H v
    images: Tensor  # (b, C, H, W): ∂(v·g)/∂x
    labels: Tensor | None  # (b, classes): ∂(v·g)/∂y; None for class indices
    loss: Tensor | None = None  # (): the loss itself, which the sweeps compare; None from the fused student

    @property
    def hessian_v(self) -> Tensor:
        """Return H v (P,)."""
        hessian_v: Tensor = kernels.add_up(self.sums)
        return hessian_v


def as_sums(vector: Tensor) -> PartialSums:
    """Return a vector (P,) as the only summand of its partial sums."""
    return PartialSums((vector.contiguous()[None],))


class Student(Protocol):
    """Compute one step's gradient, and its derivative in a direction. The loss is a mean over the samples of the batch.

    `images` (b, C, H, W) are a tensor, or a `Batch` that the student gathers and augments itself.
    """

    def gradient(self, theta: Tensor, images: Inputs, labels: Tensor, save: bool = False) -> StepGradient:
        """Return the loss () and its gradient at `theta` (P,); with `save` also the activations for `gradient_jvp`."""
        ...

    def gradient_jvp(
        self, theta: Tensor, images: Inputs, labels: Tensor, v: Tensor, saved: SavedActivations | None = None
    ) -> GradientTangent:
        """Return the derivatives of the gradients (with respect to θ, images, labels) at `theta` in the direction `v` (P,).

        `saved` are the activations that `gradient` saved for the same step. They are not computed again, and are consumed.
        """
        ...

    @property
    def passes(self) -> tuple[int, int]:
        """Return the cost of one step in both sweeps, without and with saved activations, in forward passes."""
        ...

    def step_bytes(self, batch: int, image_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> StepBytes:
        """Return the peak memory of a step on `batch` samples (C, H, W) of `dtype`."""
        ...


@dataclass(frozen=True)
class InMicrobatches:
    """Cut each batch into pieces of at most `size` samples, and call `student` on each.

    The result is exact: the loss is a mean over samples, so the loss and its gradients are weighted sums over the pieces.
    """

    student: Student
    size: int

    def gradient(self, theta: Tensor, images: Inputs, labels: Tensor, save: bool = False) -> StepGradient:
        """See `Student.gradient`."""
        total_loss, total, saved = theta.new_zeros(()), torch.zeros_like(theta), []
        for piece, weight in pieces_of(len(images), self.size):
            part = self.student.gradient(theta, images[piece], labels[piece], save)
            total_loss.add_(part.loss, alpha=weight)
            total.add_(part.gradient, alpha=weight)
            saved.append(part.saved)
        return StepGradient(total_loss, as_sums(total), saved if save else None)

    def gradient_jvp(
        self, theta: Tensor, images: Inputs, labels: Tensor, v: Tensor, saved: SavedActivations | None = None
    ) -> GradientTangent:
        """See `Student.gradient_jvp`."""
        v_dot_g, hessian_v, loss = theta.new_zeros(()), torch.zeros_like(theta), None
        to_images = theta.new_empty(images.shape)
        to_labels = torch.empty_like(labels) if labels.is_floating_point() else None
        for piece, weight in pieces_of(len(images), self.size):
            piece_saved = saved.pop(0) if saved else None
            part = self.student.gradient_jvp(theta, images[piece], labels[piece], v, piece_saved)
            v_dot_g.add_(part.v_dot_g, alpha=weight)
            hessian_v.add_(part.hessian_v, alpha=weight)
            torch.mul(part.images, weight, out=to_images[piece])
            if to_labels is not None and part.labels is not None:
                torch.mul(part.labels, weight, out=to_labels[piece])
            if part.loss is not None:
                loss = torch.add(theta.new_zeros(()) if loss is None else loss, part.loss, alpha=weight)
        return GradientTangent(v_dot_g, as_sums(hessian_v), to_images, to_labels, loss)

    @property
    def passes(self) -> tuple[int, int]:
        """See `Student.passes`."""
        return self.student.passes

    def step_bytes(self, batch: int, image_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> StepBytes:
        """See `Student.step_bytes`: the memory of the largest piece, and the saved activations of all pieces."""
        sizes = [piece.stop - piece.start for piece, _ in pieces_of(batch, self.size)]
        steps = {size: self.student.step_bytes(size, image_shape, dtype, device) for size in set(sizes)}
        largest, saved = steps[sizes[0]], sum(steps[size].saved for size in sizes)
        return largest._replace(saved=saved, gradient_saving=saved - largest.saved + largest.gradient_saving)


def pieces_of(batch: int, size: int) -> Iterator[tuple[slice, float]]:
    """Yield the pieces of at most `size` samples of a batch, each with its share of the batch."""
    for start in range(0, batch, size):
        stop = min(start + size, batch)
        yield slice(start, stop), (stop - start) / batch
