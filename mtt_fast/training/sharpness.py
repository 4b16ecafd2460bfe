"""Compute gradients that lead to flat minima (SAM), for experts whose trajectories a student follows more easily (FTD).

SAM (Foret et al., ICLR 2021) uses the gradient ĝ at a perturbed point,

    θ̂ = θ + ρ g / |g|,    g = ∇ℓ(θ),    ĝ = ∇ℓ(θ̂).

GSAM (Zhuang et al., ICLR 2022) uses ĝ − α g⊥, where g⊥ is the component of g orthogonal to ĝ. The term −α g⊥ raises ℓ(θ) and, to first
order, does not change ℓ(θ̂), so that the gap between them closes. ASAM (Kwon et al., ICML 2021) scales the perturbation by |θᵢ|:
θ̂ = θ + ρ θ² g / |θ g|, element by element. FTD (Du et al., CVPR 2023) trains its experts with all three.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtt_fast.engine.students.batch import Inputs
from mtt_fast.engine.students.protocol import StepGradient, Student, as_sums

_SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class SharpnessAware:
    """Compute SAM's gradient with the radius `rho`: GSAM's with `alpha` > 0, ASAM's if `adaptive`."""

    student: Student
    rho: float
    alpha: float = 0.0
    adaptive: bool = False

    def gradient(self, theta: Tensor, images: Inputs, labels: Tensor) -> StepGradient:
        """Return the loss () at `theta`, and the direction (P,) in place of its gradient. Both gradients are of the same images."""
        step = self.student.gradient(theta, images, labels)
        gradient = step.gradient
        scaled = theta * gradient if self.adaptive else gradient
        ascent = theta * scaled if self.adaptive else gradient
        perturbed = theta + ascent * (self.rho / (torch.linalg.vector_norm(scaled) + _SMALLEST_NORM))
        direction = self.student.gradient(perturbed, images, labels).gradient
        if self.alpha:
            projection = (gradient * direction).sum() / (direction.square().sum() + _SMALLEST_NORM**2)
            direction = direction - self.alpha * (gradient - projection * direction)
        return StepGradient(step.loss, as_sums(direction), None)


def sharpness_aware(student: Student, rho: float, alpha: float, *, adaptive: bool) -> Student | SharpnessAware:
    """Return the student that computes the gradient of a training step; `student` itself if `rho` is 0."""
    return SharpnessAware(student, rho, alpha, adaptive) if rho else student
