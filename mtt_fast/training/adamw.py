"""AdamW for trainings whose steps may be captured in a CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtt_fast.engine.optimizers import CapturableAdam
from mtt_fast.kernels import PartialSums

_BETAS = (0.9, 0.999)


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
