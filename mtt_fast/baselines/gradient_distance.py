"""Compute the distances between two gradients of a network that gradient matching uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mtt_fast.networks.layout import ParameterLayout

Metric = Literal["ours", "mse", "cos"]

_EPS = 1e-6  # the public code's: where a gradient vanishes, the distance is that of right angles


def layerwise_distance(gradient: Tensor, real: Tensor, layout: ParameterLayout) -> Tensor:
    """Return Σ over layers and outputs of 1 − cos of the two gradients (P,) to that output's weights, ().

    Equation 10 of DC (Zhao et al., ICLR 2021), for convolutions and linear layers; as in the public code, biases and
    the parameters of norms do not count.
    """
    total = gradient.new_zeros(())
    for own, target in zip(layout.split(gradient), layout.split(real), strict=True):
        if own.dim() > 1:
            total = total + (1 - _cosine(own.flatten(1), target.flatten(1))).sum()
    return total


def squared_difference(gradient: Tensor, real: Tensor, layout: ParameterLayout) -> Tensor:
    """Return |gradient − real|², ()."""
    return (gradient - real).square().sum()


def cosine_distance(gradient: Tensor, real: Tensor, layout: ParameterLayout) -> Tensor:
    """Return 1 − cos of the whole gradients (P,), ()."""
    return 1 - _cosine(gradient, real)


DISTANCES: dict[Metric, Callable[..., Tensor]] = {
    "ours": layerwise_distance,
    "mse": squared_difference,
    "cos": cosine_distance,
}
"""The distances by the names of the public code's --dis_metric."""


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    cosine: Tensor = (a * b).sum(dim=-1) / (norms + _EPS)
    return cosine
