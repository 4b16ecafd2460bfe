"""Compute gradients that lead to flat minima (SAM), for experts whose trajectories a student follows more easily (FTD).

SAM (Foret et al., ICLR 2021) descends by the gradient at a worse place nearby,

    θ̂ = θ + ρ g / |g|,    g = ∇ℓ(θ),    ĝ = ∇ℓ(θ̂),

GSAM (Zhuang et al., ICLR 2022) by ĝ − α g⊥, where g⊥ is the part of g across ĝ: the step against it raises ℓ(θ) and, to
first order, leaves ℓ(θ̂) alone, so the gap between them closes. ASAM (Kwon et al., ICML 2021) takes |θᵢ| as the unit of θᵢ:
θ̂ = θ + ρ θ² g / |θ g|, element by element. FTD (Du et al., CVPR 2023) trains its experts with all three.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtt_fast.engine.batch import Inputs
from mtt_fast.engine.student import StepGradient, Student, as_sums

_SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class SharpnessAware:
    """A student whose gradient is SAM's within the radius `rho`: GSAM's with `alpha` > 0, ASAM's if `adaptive`."""

    student: Student
    rho: float
    alpha: float = 0.0
    adaptive: bool = False

    def gradient(self, theta: Tensor, images: Inputs, labels: Tensor) -> StepGradient:
        """Return the loss () at `theta`, and the direction (P,) in place of the loss's gradient.

        A pure function of its tensors: both gradients are of the same images.
        """
        step = self.student.gradient(theta, images, labels)
        gradient = step.theta
        scaled = theta * gradient if self.adaptive else gradient
        uphill = theta * scaled if self.adaptive else gradient
        worse = theta + uphill * (self.rho / (torch.linalg.vector_norm(scaled) + _SMALLEST_NORM))
        direction = self.student.gradient(worse, images, labels).theta
        if self.alpha:
            along = (gradient * direction).sum() / (direction.square().sum() + _SMALLEST_NORM**2)
            direction = direction - self.alpha * (gradient - along * direction)
        return StepGradient(step.loss, as_sums(direction), None)


def sharpness_aware(student: Student, rho: float, alpha: float, *, adaptive: bool) -> Student | SharpnessAware:
    """Return the student that computes the gradient of a training step; `student` itself if `rho` is 0."""
    return SharpnessAware(student, rho, alpha, adaptive) if rho else student
