"""Compute steps along flat vectors, their distance, weights in them, and sums of rows, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import (
    HALF_PRECISIONS,
    BatchGradient,
    BatchImages,
    PackedParameters,
    PartialSums,
    Precision,
    WeightPlace,
    vector_of,
)
from .block import image_patches
from .warp import add_batch_gradient


def add_up(sums: PartialSums) -> Tensor:
    """Return the vector (P,)."""
    return sums.vector()


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
    """Write u = μ velocity + g + ω θ to `velocity_out` and θ − `lr` u to `out`. All (P,), `lr` ()."""
    update = vector_of(gradient) + weight_decay * theta
    if velocity is not None:
        update = update + momentum * velocity
    if velocity_out is not None:
        velocity_out.copy_(update)
    return out.copy_(theta - lr * update)


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
    """Write λ + `scale` (H v + ω v) + `incoming` to `out`. All (P,), `scale` (). Add a batch's gradient times `scale`."""
    if batch is not None:
        add_batch_gradient(batch, scale)
    stepped = adjoint + scale * (vector_of(hessian_v) + weight_decay * direction)
    return out.copy_(stepped if incoming is None else stepped + incoming)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ (a − b)² in float64. `a`, `b`: (P,)."""
    return (a.double() - b.double()).square().sum()


def index_add(out: Tensor, index: Tensor, rows: Tensor, alpha: float) -> Tensor:
    """Add `alpha` · `rows` (b, …) to the rows `index` (b,) of `out` (n, …), in place."""
    return out.index_add_(0, index, rows, alpha=alpha)


def power_of_two(largest: float, a: Tensor, b: Tensor | None = None) -> Tensor:
    """Return the power of two () that brings the largest magnitude in `a` and `b` just below `largest`."""
    magnitude = torch.stack([each.abs().amax() for each in (a, b) if each is not None]).amax()
    _, exponent = torch.frexp(magnitude.float())  # magnitude in [2^(exponent − 1), 2^exponent)
    factor = torch.ldexp(torch.full_like(magnitude, largest), -exponent.clamp(-60, 60))
    return torch.where(magnitude.float().isfinite() & (magnitude > 0), factor, 1)


def pack_parameters(
    theta: Tensor,
    direction: Tensor | None,
    places: Sequence[WeightPlace],
    precision: Precision,
    largest: float,
    batch: BatchImages | None = None,
) -> PackedParameters:
    """Return views of the weights (K, C, 3, 3) in `theta` (P,) and in the direction, which is scaled for fp16.

    Return also the patches of a batch.
    """
    scale = None
    if direction is not None and HALF_PRECISIONS.get(precision) == torch.float16 and theta.dtype == torch.float32:
        scale = power_of_two(largest, direction)
        direction = direction * scale
    weights_dot = () if direction is None else weights_at(direction, places)
    patches = None
    if batch is not None:
        patches = image_patches(batch.x, batch.padding, precision, batch.indices, batch.warp)
    return PackedParameters(weights_at(theta, places), weights_dot, direction, scale, patches)


def weights_at(vector: Tensor, places: Sequence[WeightPlace]) -> tuple[Tensor, ...]:
    """Return views (K, C, 3, 3) of the weights at `places` of a flat vector."""
    shapes = [(place.filters, place.channels, 3, 3) for place in places]
    return tuple(
        vector.narrow(0, place.offset, math.prod(shape)).view(shape)
        for place, shape in zip(places, shapes, strict=True)
    )
