"""Losses between a student's path and an expert's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtt_fast.errors import InputError
from mtt_fast.kernels import squared_distance


class _SquaredDistance(torch.autograd.Function):
    """|a − b|² accumulated in float64: in float32 a sum over 10⁶ parameters loses three digits."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        distance: Tensor = squared_distance(a.detach().contiguous(), b.detach().contiguous())
        return distance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        a, b = ctx.saved_tensors
        return 2 * grad.to(a.dtype) * (a - b), None


def matching_loss(end: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """Return |θ_N − θ*|² / |θ_0 − θ*|², the paper's equation 2, as a float64 scalar.

    Computed in the dtype and on the device of `end`, and accumulated in float64.

    `end` is the student's θ_N (P,); `start` and `target` are the expert's epochs θ_0 and θ* (P,), constants: the
    gradient flows to `end` alone, as in the public code. Raises `InputError` if the expert did not move.
    """
    if not end.shape == start.shape == target.shape:
        raise InputError(
            f"matching_loss: expected three vectors of one shape, found end {tuple(end.shape)}, start {tuple(start.shape)}, "
            f"target {tuple(target.shape)}"
        )
    loss = relative_distance(end, start, target)
    if not loss.isfinite() and start.to(end).equal(target.to(end)):
        raise InputError("matching_loss: start and target are equal, so the expert did not move between the two epochs")
    return loss


def relative_distance(end: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """Return `matching_loss` of vectors that are known to fit: it asks no tensor for its values.

    Not finite where the expert did not move.
    """
    start, target = start.detach().to(end), target.detach().to(end)
    moved = squared_distance(start.contiguous(), target.contiguous())
    return _SquaredDistance.apply(end, target) / moved  # type: ignore[no-any-return]
