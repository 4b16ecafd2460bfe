"""Call the native kernels of the steps along flat vectors and of their distance (cpp/flat.cpp, flat_distance.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import BatchGradient, PartialSums, vector_of
from .extension import extension
from .warp import add_batch_gradient


def sgd_step(
    theta: Tensor,
    gradient: Tensor | PartialSums,
    lr: Tensor,
    out: Tensor,
    velocity: Tensor | None,
    velocity_out: Tensor | None,
    momentum: float,
    weight_decay: float,
) -> Tensor:
    """See `mtt_fast.kernels.sgd_step`."""
    factors = (momentum, weight_decay, torch.get_num_threads())
    extension().sgd_step(theta, vector_of(gradient), lr.item(), out, velocity, velocity_out, *factors)
    torch.autograd.graph.increment_version([out] if velocity_out is None else [out, velocity_out])
    return out


def adjoint_step(
    adjoint: Tensor,
    hessian_v: Tensor | PartialSums,
    direction: Tensor,
    scale: Tensor,
    out: Tensor,
    incoming: Tensor | None,
    weight_decay: float,
    batch: BatchGradient | None = None,
) -> Tensor:
    """See `mtt_fast.kernels.adjoint_step`."""
    if batch is not None:
        add_batch_gradient(batch, scale)
    decayed = direction if weight_decay else None  # a vector that plays no part is not read
    arguments = (adjoint, vector_of(hessian_v), decayed, scale.item(), out, incoming, weight_decay)
    extension().adjoint_step(*arguments, torch.get_num_threads())
    torch.autograd.graph.increment_version(out)
    return out


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """See `mtt_fast.kernels.squared_distance`."""
    return torch.tensor(extension().squared_distance(a, b, torch.get_num_threads()), dtype=torch.float64, device="cpu")
