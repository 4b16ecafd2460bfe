"""The optimizers of a student: a step, and the adjoint of a step.

A step maps the parameters θ, the gradient g = ∇ℓ(θ) and the optimizer's state to θ − α u and a new state. The adjoint of a step
maps the gradients of the loss with respect to these results to its gradients with respect to g, α and the old state. From g the
student continues to θ and the images (docs/adjoint.md, Momentum and Adam).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.checks import check_count, check_number
from mtt_fast.errors import InputError
from mtt_fast.kernels import PartialSums


class GradientAdjoint(NamedTuple):
    """Gradients of the loss through a step of an optimizer with state."""

    nu: Tensor  # (P,): with respect to the step's gradient g
    negated_lr: Tensor  # () or (P,): with respect to −α, which is λ·u, or λ ∘ u if each parameter has a learning rate


class Optimizer(Protocol):
    """Take a step, and differentiate it in reverse. Vectors are (P,) on one device.

    `lr` is the learning rate α: (), or for an optimizer with state also (P,), one for each parameter.
    """

    @property
    def weight_decay(self) -> float:
        """Return ω: the step's gradient is g + ω θ."""
        ...

    @property
    def moments(self) -> int:
        """Return the number of vectors in the state: 0 for no state, 1 for a state (P,), else the state is (moments, P)."""
        ...

    def step(
        self,
        n: int,
        theta: Tensor,
        sums: PartialSums,
        lr: Tensor,
        before: Tensor | None,
        out: Tensor,
        after: Tensor | None,
    ) -> None:
        """Write the parameters after step `n`, counted from 0, to `out`, and the state to `after`.

        `before` and `after` are None for an optimizer without a state.
        """
        ...

    def adjoint(
        self, n: int, adjoint: Tensor, state_adjoint: Tensor, lr: Tensor, before: Tensor, after: Tensor
    ) -> GradientAdjoint:
        """Return the gradients with respect to the inputs of step `n`, from those with respect to its results. Needs an optimizer with state.

        `adjoint` is λ, the gradient with respect to the new parameters. `state_adjoint`, the gradient with respect to the state `after`,
        is overwritten by the gradient with respect to the state `before`.
        """
        ...


@dataclass(frozen=True)
class StudentSgd:
    """torch.optim.SGD: u = m' = μ m + g + ω θ. Without momentum there is no state, unless `has_velocity` asks for it."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    has_velocity: bool = False

    @property
    def moments(self) -> int:
        """See `Optimizer.moments`."""
        return int(self.has_velocity or self.momentum != 0)

    def step(
        self,
        n: int,
        theta: Tensor,
        sums: PartialSums,
        lr: Tensor,
        before: Tensor | None,
        out: Tensor,
        after: Tensor | None,
    ) -> None:
        """See `Optimizer.step`."""
        kernels.sgd_step(
            theta, sums, lr if lr.dim() == 0 else lr.new_ones(()), out=out, velocity=before, velocity_out=after,
            momentum=self.momentum, weight_decay=self.weight_decay,
        )  # fmt: skip
        if lr.dim():  # the kernel takes one learning rate: overwrite its θ − u
            assert after is not None
            torch.addcmul(theta, after, lr, value=-1, out=out)

    def adjoint(
        self, n: int, adjoint: Tensor, state_adjoint: Tensor, lr: Tensor, before: Tensor, after: Tensor
    ) -> GradientAdjoint:
        """See `Optimizer.adjoint`."""
        nu = torch.addcmul(state_adjoint, adjoint, lr, value=-1)
        torch.mul(nu, self.momentum, out=state_adjoint)
        return GradientAdjoint(nu, _gradient_of_negated_lr(adjoint, after, lr))


PLAIN_SGD = StudentSgd()


@dataclass(frozen=True)
class Adam:
    """torch.optim.Adam (Kingma & Ba, ICLR 2015), as `optimizer` of `unroll`, `plan` and `GraphedMatchingLoss`.

    With g' = g + ω θ the state (2, P) after t steps of the training is

        m' = β₁ m + (1 − β₁) g'          s' = β₂ s + (1 − β₂) g'²

    and u = m̂ / (√ŝ + ε), where m̂ = m' / (1 − β₁ᵗ) and ŝ = s' / (1 − β₂ᵗ). The derivative of √ŝ is taken as zero at ŝ = 0, where a
    parameter never had a gradient; autograd gives NaN there.

    A step divides by the size of the gradient, which amplifies the rounding errors of small gradients in the step and in its
    derivative. Use precision "fp32", and avoid parameters without an effect, such as a convolution's bias before a norm: by
    autograd their gradient consists of rounding errors. (In ConvNet's fused steps it is zero.)

    Args:
        betas: decay rates β₁ and β₂ of the averages of the gradient and of its square, each in [0, 1).
        eps: ε, above 0.
        weight_decay: ω.
        steps: number of steps taken before this `unroll`. The state after them is its argument `velocity`.

    Raises:
        InputError: a value is not in its range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        betas: Any = self.betas
        is_pair = isinstance(betas, Sequence) and len(betas) == 2
        if not is_pair or not all(isinstance(beta, Real) and 0 <= float(beta) < 1 for beta in betas):
            remedy = "; the learning rate is `lr` of `unroll`" if isinstance(betas, Real) else ""
            raise InputError(f"`betas`: expected two numbers in [0, 1), found {betas}{remedy}")
        object.__setattr__(self, "betas", (float(betas[0]), float(betas[1])))  # a list has no hash
        eps: Any = self.eps
        if not (isinstance(eps, Real) and 0 < float(eps) < math.inf):
            raise InputError(f"`eps`: expected a finite number above 0, found {eps!r}")
        check_number("weight_decay", self.weight_decay)
        check_count("steps", self.steps, least=0)

    @property
    def moments(self) -> int:
        """See `Optimizer.moments`: the averages of the gradient and of its square."""
        return 2

    def step(
        self,
        n: int,
        theta: Tensor,
        sums: PartialSums,
        lr: Tensor,
        before: Tensor | None,
        out: Tensor,
        after: Tensor | None,
    ) -> None:
        """See `Optimizer.step`."""
        assert before is not None
        assert after is not None
        gradient = kernels.add_up(sums)
        if self.weight_decay:
            gradient = gradient.add(theta, alpha=self.weight_decay)
        for old, new, beta, out_moment in zip(before, (gradient, gradient.square()), self.betas, after, strict=True):
            torch.lerp(old, new, 1 - beta, out=out_moment)
        torch.addcmul(theta, self._scaled(n, after).update, lr, value=-1, out=out)

    def adjoint(
        self, n: int, adjoint: Tensor, state_adjoint: Tensor, lr: Tensor, before: Tensor, after: Tensor
    ) -> GradientAdjoint:
        """See `Optimizer.adjoint`. The gradient g' is computed from the means m and m'."""
        (beta1, beta2), (correction1, correction2) = self.betas, self._corrections(n)
        update, root, denominator = self._scaled(n, after)
        to_mean, to_square = state_adjoint
        # the gradient of the loss with respect to m̂ is −pull, and with respect to ŝ pull · u / 2√ŝ
        pull = adjoint * lr / denominator
        to_mean.sub_(pull / correction1)
        to_square.add_((pull * update / root).masked_fill_(root == 0, 0).div_(2 * correction2))
        gradient = torch.sub(after[0], before[0], alpha=beta1) / (1 - beta1)
        nu = (to_mean * (1 - beta1)).addcmul_(gradient, to_square, value=2 * (1 - beta2))
        to_mean.mul_(beta1)
        to_square.mul_(beta2)
        return GradientAdjoint(nu, _gradient_of_negated_lr(adjoint, update, lr))

    def _scaled(self, n: int, state: Tensor) -> _Scaled:
        mean_correction, square_correction = self._corrections(n)
        root = (state[1] / square_correction).sqrt_()
        denominator = root + self.eps
        return _Scaled(state[0] / mean_correction / denominator, root, denominator)

    def _corrections(self, n: int) -> tuple[float | Tensor, float | Tensor]:
        """Return 1 − βᵗ for both moments, after step `n`."""
        first, second = (1 - beta ** (self.steps + n + 1) for beta in self.betas)
        return first, second


@dataclass(frozen=True, eq=False)
class CapturableAdam(Adam):
    """`Adam` that reads its corrections 1 − βᵗ from a tensor, so that one CUDA graph serves every number of earlier steps."""

    corrections: Tensor = field(kw_only=True)  # (steps, 2) float64, on the device of the parameters

    def _corrections(self, n: int) -> tuple[float | Tensor, float | Tensor]:
        first, second = self.corrections[n]
        return first, second


def _gradient_of_negated_lr(adjoint: Tensor, update: Tensor, lr: Tensor) -> Tensor:
    """Return the gradient with respect to −α in the shape of `lr`, () or (P,), from λ and u (P,)."""
    return adjoint * update if lr.dim() else torch.dot(adjoint, update)


class _Scaled(NamedTuple):
    """A step of Adam from its state."""

    update: Tensor  # u (P,)
    root: Tensor  # √ŝ (P,)
    denominator: Tensor  # √ŝ + ε (P,)
