"""The protocols that networks implement for the engine and for the commands."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from mtt_fast.networks.layout import ParameterLayout


class Network(Protocol):
    """A pure function of flat parameters: ConvNet, FlatModule, or any object with these methods."""

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters P."""
        ...

    @property
    def mixes_samples(self) -> bool:
        """Return whether a sample's output depends on the others (batch statistics)."""
        ...

    def __call__(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return logits (b, classes) of `images` (b, C, H, W) under the parameters `theta` (P,)."""
        ...

    def __hash__(self) -> int:
        """Return a hash, by identity or by value; measurements of the network are cached under it."""
        ...


class Trainable(Network, Protocol):
    """A network that the commands can train from the start: `ConvNet`, `FlatModule`, or any object with these methods."""

    @property
    def layout(self) -> ParameterLayout:
        """Return the names and shapes of the parameters, in flat order."""
        ...

    def init(self, generator: torch.Generator | None = None) -> Tensor:
        """Return initial parameters (P,), drawn only from `generator`."""
        ...

    def embed(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return the inputs (n, F) of the last linear layer for `images` (n, C, H, W)."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return the description of the network, as a record."""
        ...
