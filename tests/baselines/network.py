"""Make the toy network of the methods' tests, its parameters, and the same network of torch.nn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mtt_fast import ConvNet
from mtt_fast.testing import module_function, reference_convnet

SHAPE = (1, 10, 8, 4, 1)  # channels, classes, size, width, depth
NET = ConvNet(*SHAPE)
F64 = torch.float64


def plain() -> Callable[[Tensor, Tensor], Tensor]:
    """Return the network as f(theta, images), built of torch.nn."""
    return module_function(reference_convnet(*SHAPE).double())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_theta() -> Tensor:
    return NET.init(seeded(0)).double()
