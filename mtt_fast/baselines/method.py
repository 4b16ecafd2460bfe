"""Define a method: a function from options, real images and a network to a set that is chosen, or one to be learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mtt_fast.baselines.options import BaselineOptions
from mtt_fast.networks.protocol import Trainable
from mtt_fast.training.images import Images, RealImages


@dataclass(frozen=True)
class LearnedSet:
    """A set that is being learned. An iteration changes its tensors in place, so they can be saved and loaded."""

    images: Tensor  # (n, C, H, W), class-major, as networks see them
    labels: Tensor  # indices (n,), or soft labels (n, classes) of label_kind
    optimizer: torch.optim.Optimizer
    step: Callable[[int], float]
    """run iteration i, counted from 0, and return its loss; its random numbers depend only on the seed and i"""
    lr: Callable[[], Tensor]
    """learning rate () of networks that train on the set as it is now"""
    label_kind: str = "indices"
    """see `SyntheticDataset`"""
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    """the other tensors that iterations carry over"""
    own_training: Callable[[torch.Generator], Tensor] | None = None
    """parameters (P,) of a fresh network after the method's own steps on the set; None for a method without such steps"""


@dataclass(frozen=True)
class Method:
    """A method, with its title and its paper."""

    title: str
    paper: str
    options: type[BaselineOptions]
    make: Callable[[Any, RealImages, Trainable], Images | LearnedSet]
    """a function from options of this class, real images and a network to a chosen set, or one to be learned"""
