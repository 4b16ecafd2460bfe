"""Trials of a caller's network, loss and augmentation on a few samples, before a student trains with them.

The backward sweep computes each step again, and may cut its batch. Both give the right gradient only where the same
inputs give the same numbers, and where the loss of a batch is the mean of its samples'. What breaks that has no other
symptom than a wrong gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtt_fast.augmentation.protocol import Augment
from mtt_fast.engine.student import GenericStudent, plain_attention
from mtt_fast.errors import InputError

SAMPLES = 8
"""The number of samples of a trial at most: a forward pass of so few takes less memory than a step of one."""

_ALIKE = 1e-3  # far above what rounding in another order does, and below what a random layer does
_ROUNDED = 1e-2  # in tf32 a batch and its samples may round to numbers that differ by a thousandth


def few_of(index: Tensor) -> Tensor:
    """Return the positions in `index` (b,) of at most `SAMPLES` samples from all over it."""
    count = min(SAMPLES, len(index))
    return torch.linspace(0, len(index) - 1, count, device=index.device).long()


def try_augmentation(augment: Augment, rows: Tensor, draws: Any) -> Tensor:
    """Return `rows` (b, C, H, W) augmented with `draws`. Raises `InputError` if a second time gives other images."""
    with torch.no_grad():
        first, second = (augment(rows.clone(), draws) for _ in range(2))
    if not _alike(first, second):
        raise InputError(
            f"unroll augment: expected the same images for the same draws, found others at the second call of {type(augment).__name__}; "
            "take all random numbers in its draw"
        )
    return first


def try_step(student: GenericStudent, theta: Tensor, inputs: Tensor, labels: Tensor, *, is_cut: bool) -> None:
    """Raise `InputError` unless the loss at `theta` (P,) of a few `inputs` and `labels` is one that unrolling is exact for.

    It has to be a differentiable scalar, of outputs that are the same each time. Where batches are cut it also has to be
    the mean of the samples' own losses, of outputs that each sample has alone.
    """
    with torch.enable_grad():
        leaf = theta.detach().requires_grad_()
        with plain_attention, _RefuseRandomNumbers():
            logits = student.network(leaf, inputs)
        loss = student.loss(logits, labels)
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        found = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(f"unroll loss: expected the mean over a batch, a floating-point tensor (), found {found}")
    if not loss.requires_grad:
        raise InputError(
            "unroll: expected a loss that depends on the parameters, found one without a graph; `net` or `loss` cuts the "
            "gradient off, as detach, item and torch.no_grad do"
        )
    with torch.no_grad():
        if not _alike(logits, student.network(theta, inputs)):
            raise InputError(
                "unroll net: expected the same outputs for the same parameters and images, found others at the second call; take out "
                "what changes from call to call, or call .eval() before wrapping"
            )
        if is_cut and len(inputs) > 1:
            singles = torch.cat([student.network(theta, image) for image in inputs.split(1)])
            _check_samples_are_apart(logits, singles)
            _check_mean(student, loss, singles, labels)


def _check_samples_are_apart(together: Tensor, singles: Tensor) -> None:
    if not _alike(together, singles, _ROUNDED):
        raise InputError(
            "unroll net: expected samples that do not depend on each other, since batches are cut, found other outputs for "
            "samples alone than in a batch; take a norm that is not over the batch, or leave `microbatch` and `memory_budget` out"
        )


def _check_mean(student: GenericStudent, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
    parts = [student.loss(*single) for single in zip(logits.split(1), labels.split(1), strict=True)]
    mean = torch.stack(parts).mean()
    if not torch.allclose(loss, mean, rtol=_ROUNDED, equal_nan=True):
        raise InputError(
            f"unroll loss: expected the mean of the samples' losses, since batches are cut, found {float(loss):.6g} for {len(parts)} "
            f"samples whose mean is {float(mean):.6g}; take one without weights of classes and with every label, or leave `microbatch` and "
            "`memory_budget` out"
        )


class _RefuseRandomNumbers(TorchDispatchMode):
    """Raise `InputError` at an operation that draws random numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise InputError(
                f"unroll net: expected no random numbers, since the backward sweep would not repeat those of the forward one, found "
                f"{func.__name__}; call .eval() before wrapping, or take the random layer out"
            )
        return func(*args, **(kwargs or {}))


def _alike(first: Tensor, second: Tensor, tolerance: float = _ALIKE) -> bool:
    scale = float(first.detach().abs().nan_to_num(0, 0, 0).max())
    return first.shape == second.shape and torch.allclose(
        first, second, rtol=tolerance, atol=tolerance * scale, equal_nan=True
    )
