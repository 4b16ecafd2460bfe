"""Train networks on the learned images by steps of Adam, with and without a path to differentiate.

Both functions of `AdamSteps` are pure, and read no tensor on the host, so that CUDA graphs can capture them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mtt_fast.augmentation.siamese import SiameseAugment
from mtt_fast.engine.draws import draw_steps
from mtt_fast.engine.optimizers import Adam, CapturableAdam
from mtt_fast.engine.students.protocol import Student, as_sums
from mtt_fast.engine.sweeps import StudentSteps, path_of
from mtt_fast.runtime.prefetch import upload


class Draws(NamedTuple):
    """The random numbers of some steps."""

    indices: Tensor  # (Σb,) int64, of the images
    parameters: Tensor  # (Σb, K), of the augmentation; K = 0 without one


def draw(
    batches: Iterable[Tensor],
    image_shape: Sequence[int],
    dtype: torch.dtype,
    augment: SiameseAugment | None,
    generator: torch.Generator,
    device: torch.device,
) -> Draws:
    """Return the draws of steps on `batches`, index vectors (b,), on `device`. They are drawn on the CPU.

    `image_shape` (C, H, W) and `dtype` are those of an image.
    """
    drawn = draw_steps(batches, image_shape, dtype, None if augment is None else augment.draw_parameters, generator)
    none = torch.empty(len(drawn.indices), 0)
    return Draws(
        *(upload(each, device) for each in (drawn.indices, none if drawn.parameters is None else drawn.parameters))
    )


def corrections(steps_before: int, steps: int, device: torch.device) -> Tensor:
    """Return Adam's corrections 1 − βᵗ of both moments in each of some steps, (steps, 2) float64, after `steps_before` earlier ones."""
    t = torch.arange(steps_before + 1, steps_before + steps + 1, dtype=torch.float64)[:, None]
    return upload(1 - t.new_tensor(Adam().betas) ** t, device)


@dataclass(frozen=True)
class AdamSteps:
    """Steps of Adam on learned images."""

    student: Student
    augment: SiameseAugment | None
    length: int
    """number of images in a step"""
    lr: Tensor  # ()

    def train(
        self, theta: Tensor, moments: Tensor, corrections: Tensor, images: Tensor, labels: Tensor, *draws: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return parameters (P,), moments (2, P) and the norm of each step's gradient (steps,) after some steps.

        `theta` and `moments` are the state before these steps. `corrections` are Adam's for these steps, and `draws` is a
        `Draws`.
        """
        steps = self._student_steps(corrections, *draws)
        targets, norms = steps.targets(labels, theta.dtype), []
        for n in range(len(steps.batches)):
            inputs = steps.batch(images, n, theta.dtype).inputs
            gradient = self.student.gradient(theta, inputs, targets(n)).gradient
            theta_after, moments_after = torch.empty_like(theta), torch.empty_like(moments)
            steps.optimizer.step(n, theta, as_sums(gradient), self.lr, moments, theta_after, moments_after)
            theta, moments = theta_after, moments_after
            norms.append(torch.linalg.vector_norm(gradient))
        return theta, moments, torch.stack(norms)

    def path(
        self, theta: Tensor, moments: Tensor, corrections: Tensor, images: Tensor, labels: Tensor, *draws: Tensor
    ) -> Tensor:
        """Return the parameters (steps + 1, P) before, between and after such steps, differentiable in images and floating labels."""
        path, _ = path_of(self._student_steps(corrections, *draws), theta, images, labels, self.lr, moments)
        return path

    def _student_steps(self, corrections: Tensor, indices: Tensor, parameters: Tensor) -> StudentSteps:
        return StudentSteps(
            student=self.student,
            batches=indices.split(self.length),
            saved_steps=0,
            path_on_host=False,
            augment=self.augment,
            draws=parameters.split(self.length),
            optimizer=CapturableAdam(corrections=corrections),
        )
