"""The optimizers of experts and evaluated networks. Their steps are pure functions, which a CUDA graph can capture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.engine.optimizers import CapturableAdam
from mtt_fast.kernels import PartialSums

_BETAS = (0.9, 0.999)  # of AdamW


@dataclass(frozen=True)
class Sgd:
    """Hyper-parameters of plain SGD, as torch.optim.SGD names them."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 256

    def start(self, theta: Tensor) -> Tensor:
        """Return the velocity (P,) before the first step."""
        return torch.zeros_like(theta)

    def step(self, theta: Tensor, velocity: Tensor, sums: PartialSums, lr: Tensor) -> tuple[Tensor, Tensor]:
        """Return parameters and velocity (P,) after a step with the learning rate `lr` (). A pure function."""
        theta_out, velocity_out = torch.empty_like(theta), torch.empty_like(velocity) if self.momentum else None
        kernels.sgd_step(
            theta, sums, lr, out=theta_out, velocity=velocity if self.momentum else None, velocity_out=velocity_out,
            momentum=self.momentum, weight_decay=self.weight_decay,
        )  # fmt: skip
        return theta_out, velocity if velocity_out is None else velocity_out


@dataclass(frozen=True)
class AdamW:
    """Hyper-parameters of torch.optim.AdamW (Loshchilov & Hutter, ICLR 2019), with its default `betas` and `eps`."""

    lr: float
    weight_decay: float = 0.01
    batch_size: int = 256

    def start(self, theta: Tensor) -> Tensor:
        """Return the state (1 + 2 P,) before the first step: the number of steps, and both moments."""
        return theta.new_zeros(1 + 2 * len(theta))

    def step(self, theta: Tensor, state: Tensor, sums: PartialSums, lr: Tensor) -> tuple[Tensor, Tensor]:
        """Return the parameters (P,) and the state after a step with the learning rate `lr` (). A pure function."""
        count, moments = state[0] + 1, state[1:].view(2, -1)
        corrections = torch.stack([1 - beta ** count.double() for beta in _BETAS])
        theta_out, moments_out = torch.empty_like(theta), torch.empty_like(moments)
        decayed = theta * (1 - lr * self.weight_decay)
        adam = CapturableAdam(_BETAS, corrections=corrections[None])
        adam.step(0, decayed, sums, lr, moments, theta_out, moments_out)
        return theta_out, torch.cat([count[None], moments_out.view(-1)])


Optimizer = Sgd | AdamW
