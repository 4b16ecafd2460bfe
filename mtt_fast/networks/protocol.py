"""What the engine and the commands ask of a network."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from mtt_fast.networks.layout import ParameterLayout


class Network(Protocol):
    """A pure function of flat parameters: ConvNet, FlatModule, or anything of the same shape."""

    @property
    def num_parameters(self) -> int:
        """P."""
        ...

    @property
    def mixes_samples(self) -> bool:
        """True where a sample's output depends on the others (batch statistics)."""
        ...

    def __call__(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return logits (b, classes) of `images` (b, C, H, W) under the parameters `theta` (P,)."""
        ...

    def __hash__(self) -> int:
        """By its identity, or by what it is: what is found out about it is found out once."""
        ...


class Trainable(Network, Protocol):
    """A network that the jobs can train from the start: `ConvNet`, `FlatModule`, or anything of the same shape."""

    @property
    def layout(self) -> ParameterLayout:
        """Names and shapes of the parameters, in flat order."""
        ...

    def init(self, generator: torch.Generator | None = None) -> Tensor:
        """Return parameters (P,) to start from, drawn from `generator` alone."""
        ...

    def embed(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return what the last linear layer sees of `images` (n, C, H, W), (n, F)."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what the network is, as a record."""
        ...
