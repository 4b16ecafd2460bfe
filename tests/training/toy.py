"""Offer few small images of three classes, and a network for them."""

from __future__ import annotations

import torch
from torch import Tensor

from mtt_fast import ConvNet
from mtt_fast.data import from_tensors
from mtt_fast.training.images import RealImages, real_images

NET = ConvNet(in_channels=1, num_classes=3, image_size=6, width=4, depth=1)


def toy_images() -> RealImages:
    """Return 30 training and 9 test images of random pixels."""

    def split(count: int) -> tuple[Tensor, Tensor]:
        return torch.randint(0, 256, (count, 1, 6, 6), dtype=torch.uint8), torch.arange(count) % 3

    return real_images(from_tensors(split(30), split(9)), zca=False, device=torch.device("cpu"))
