"""Offer a small network with a layer of one's own, and the gradient of a matching loss through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mtt_fast import FlatModule, matching_loss, unroll
from mtt_fast.networks.protocol import Network

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
BATCHES = [torch.tensor([0, 1, 2, 3]), torch.tensor([5, 1, 4])]


class Layer(nn.Module):
    """A layer that is a function of the images and of the layer itself."""

    def __init__(self, function: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.function, self.calls = function, 0
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = self.function(images, self)
        return result


def with_layer(layer: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(layer, nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    return module.double()


def gradient(net: Network, start: Tensor, **options: Any) -> Tensor:
    images = torch.randn(6, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    path = unroll(net, start, images, LABELS, 0.3, BATCHES, **options)
    (result,) = torch.autograd.grad(matching_loss(path[-1], start, 1.1 * start), images)
    return result


def gradient_of_module(layer: nn.Module, **options: Any) -> Tensor:
    net = FlatModule(with_layer(layer))
    return gradient(net, net.init(), **options)
