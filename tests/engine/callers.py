"""Learned tensors as other people's code holds them, and a matching loss of them by `unroll`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtt_fast import (
    ConvNet,
    matching_loss,
    unroll,
)
from mtt_fast.testing import reference_convnet

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
BATCHES = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5], [5, 1, 0, 4]])
NETWORK = ConvNet(in_channels=2, num_classes=3, image_size=8, width=4, depth=2)
MODULE = reference_convnet(2, 3, 8, 4, 2).double()
START = 0.5 * torch.randn(NETWORK.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGET = START + 0.1 * torch.randn(len(START), dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class Distilled(nn.Module):
    """A module of the learned tensors: an optimizer sees its parameters and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.images = nn.Parameter(torch.randn(6, 2, 8, 8, dtype=torch.float64, generator=generator))
        self.labels = nn.Parameter(2 * F.one_hot(LABELS).double())
        self.lr = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def groups(self) -> list[dict[str, Any]]:
        """Return parameter groups with three learning rates."""
        return [
            {"params": [self.images], "lr": 0.3},
            {"params": [self.labels], "lr": 0.1, "momentum": 0.9},
            {"params": [self.lr], "lr": 1e-3},
        ]


def loss_of_unroll(distilled: Distilled) -> Tensor:
    rows = unroll(NETWORK, START, distilled.images, distilled.labels, distilled.lr, BATCHES, label_kind="logits")
    return matching_loss(rows[-1], START, TARGET)
