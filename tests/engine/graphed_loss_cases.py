"""Offer networks, batches and tensors for a graphed loss, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mtt_fast import (
    Augmentation,
    ConvNet,
    FlatModule,
)
from mtt_fast.networks.protocol import Network

NET = ConvNet(in_channels=2, num_classes=3, image_size=8, width=4, depth=2)
MODULE = FlatModule(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(144, 3)).double())
BATCHES = [torch.tensor([5]), torch.tensor([0, 1, 2, 3]), torch.tensor([2, 3, 4, 5])]
FLIP = Augmentation(
    draw=lambda images, generator: torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5,
    apply=lambda images, mirrored: torch.where(mirrored.to(images.device), images.flip(3), images),
)
Loss = Callable[..., Tensor]


def tensors(net: Network = NET, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Any]:
    """Return start, target, and what is learned: images, soft labels and a rate for each step."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    start = 0.3 * randn(net.num_parameters)
    learned = {"images": randn(6, 2, 8, 8), "labels": randn(6, 3), "lr": randn(3).abs()}
    return {
        "start": start, "target": start + 0.1 * randn(len(start)),
        **{name: value.requires_grad_() for name, value in learned.items()},
    }  # fmt: skip


def gradients(loss: Tensor, given: dict[str, Any]) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, [given[name] for name in ("images", "labels", "lr")])


def linear_after(change: Callable[[Tensor], Tensor]) -> FlatModule:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(128, 3).double()

        def forward(self, images: Tensor) -> Tensor:
            outputs: Tensor = self.linear(change(images).flatten(1))
            return outputs

    return FlatModule(Linear())
