"""The student that cuts each batch into pieces, and calls another student on each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mtt_fast.engine.students.batch import Inputs
from mtt_fast.engine.students.protocol import (
    GradientTangent,
    SavedActivations,
    StepBytes,
    StepGradient,
    Student,
    as_sums,
)


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
        for piece, weight in self.pieces(len(images)):
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
        to_images = theta.new_zeros(images.shape)
        to_labels = torch.zeros_like(labels) if labels.is_floating_point() else None
        for piece, weight in self.pieces(len(images)):
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

    def pieces(self, batch: int) -> Iterator[tuple[slice, float]]:
        """Yield the slices of a batch to compute, each with its weight."""
        return pieces_of(batch, self.size)

    @property
    def passes(self) -> tuple[int, int]:
        """See `Student.passes`."""
        return self.student.passes

    def step_bytes(self, batch: int, image_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> StepBytes:
        """See `Student.step_bytes`: the memory of the largest piece, and the saved activations of all pieces."""
        whole, rest = divmod(batch, self.size)
        counts = {size: count for size, count in ((self.size, whole), (rest, 1)) if size and count}
        steps = {size: self.student.step_bytes(size, image_shape, dtype, device) for size in counts}
        largest, saved = steps[max(steps)], sum(steps[size].saved * count for size, count in counts.items())
        return largest._replace(saved=saved, gradient_saving=saved - largest.saved + largest.gradient_saving)


def pieces_of(batch: int, size: int) -> Iterator[tuple[slice, float]]:
    """Yield slices of at most `size` samples that cover a batch, each with its share of the samples."""
    for start in range(0, batch, size):
        stop = min(start + size, batch)
        yield slice(start, stop), (stop - start) / batch
