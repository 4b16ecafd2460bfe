"""The student: a network's gradient, and the directional derivative of that gradient, for one step.

`GenericStudent` (generic.py) computes both by autograd, for any network and loss. `FusedConvNetStudent` (fused.py) computes them
by hand-written formulas. `InMicrobatches` (microbatches.py) wraps another student, and calls it on pieces of the batch; for a
loss that is not a mean over samples, `BatchLossStudent` (batch_loss.py) does this. `InProcesses` (processes.py) shares the pieces
among processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.engine.students.batch import Inputs
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
    gradient_jvp_saved: int  # of `gradient_jvp` with saved activations, without counting these
    saved: int  # saved activations of one step; 0 if the student saves nothing
    workspace: int  # memory for intermediate results that stays allocated between calls


class GradientTangent(NamedTuple):
    """Derivatives, at θ in direction v, of the loss and of its gradients (g is the gradient with respect to θ, H the Hessian)."""

    v_dot_g: Tensor  # ()
    sums: PartialSums  # of H v
    images: Tensor  # (b, C, H, W): ∂(v·g)/∂x
    labels: Tensor | None  # (b, classes): ∂(v·g)/∂y; None for class indices
    loss: Tensor | None = None  # (): the loss itself, to compare with the forward sweep's; None from the fused student

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

        `saved` are the activations that `gradient` saved for the same step. They are not computed again. The list is emptied.
        """
        ...

    @property
    def passes(self) -> tuple[int, int]:
        """Return the cost of one step in both sweeps, without and with saved activations, in forward passes."""
        ...

    def step_bytes(self, batch: int, image_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> StepBytes:
        """Return the peak memory of a step on `batch` samples (C, H, W) of `dtype`."""
        ...
