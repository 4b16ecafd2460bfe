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

_MOST = 8  # samples of a trial
_AT_ONCE = 2  # of them: their gradient takes less memory than a step of one, and little time


def few_of(batch: Tensor) -> Tensor:
    """Return the positions in `batch` (b, …) of a few samples from all over it."""
    return torch.linspace(0, len(batch) - 1, min(len(batch), _MOST), device=batch.device).long()


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


def try_step(
    student: GenericStudent, theta: Tensor, inputs: Tensor, labels: Tensor, *, is_cut: bool, wants_images: bool
) -> None:
    """Raise `InputError` unless unrolling is exact for the loss at `theta` (P,) of a few `inputs` and `labels`.

    The outputs have to be the same each time, and the loss a scalar that depends on the parameters, and on the images if it
    `wants_images`. Where a batch `is_cut`, each sample also has to have the same outputs alone, and the loss to be the mean of
    the samples' losses.
    """
    together = inputs[:_AT_ONCE]
    logits = _try_gradient(student, theta, together, labels[:_AT_ONCE], wants_images=wants_images)
    with torch.no_grad():
        if not _alike(logits, student.network(theta, together)):
            raise InputError(
                "unroll net: expected the same outputs for the same parameters and images, found others at the second call; take out "
                "what changes from call to call, or call .eval() before wrapping"
            )
        if is_cut:
            singles = torch.cat([student.network(theta, image) for image in inputs.split(1)])
            _check_samples_are_apart(logits, singles[:_AT_ONCE])
            _check_mean(student, singles, labels)


def _try_gradient(
    student: GenericStudent, theta: Tensor, inputs: Tensor, labels: Tensor, *, wants_images: bool
) -> Tensor:
    """Return the logits of `inputs`. Raises `InputError` for random numbers, and where the loss has no gradient."""
    with torch.enable_grad():
        leaves = [theta.detach().requires_grad_(), inputs.detach().requires_grad_(wants_images)]
        before = _generators_state(theta.device)
        with plain_attention, _RandomOperations() as operations:
            logits = student.network(*leaves)
        if not all(map(torch.equal, before, _generators_state(theta.device))):
            raise InputError(
                "unroll net: expected no random numbers, since the backward sweep would not repeat those of the forward one, found "
                f"{', '.join(operations.names) or 'that torch.manual_seed was called'}; call .eval() before wrapping, or take the random layer out"
            )
        loss = student.loss(logits, labels)
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        found = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(f"unroll loss: expected the mean over a batch, a floating-point tensor (), found {found}")
    names = ["parameters", "images"] if wants_images else ["parameters"]
    gradients = torch.autograd.grad(loss, leaves[: len(names)], allow_unused=True) if loss.requires_grad else [None]
    for name, gradient in zip(names, gradients, strict=False):
        if gradient is None:
            raise InputError(
                f"unroll: expected a loss that depends on the {name}, found none of their gradients; `net` or `loss` cuts them off, as "
                "detach, item and torch.no_grad do"
            )
    return logits.detach()


def _check_samples_are_apart(together: Tensor, singles: Tensor) -> None:
    if not _alike(together, singles):
        raise InputError(
            "unroll net: expected samples that do not depend on each other, since batches are cut, found other outputs for "
            "samples alone than in a batch; take a norm that is not over the batch, or leave `microbatch` and `memory_budget` out"
        )


def _check_mean(student: GenericStudent, logits: Tensor, labels: Tensor) -> None:
    loss = student.loss(logits, labels)
    parts = [student.loss(*single) for single in zip(logits.split(1), labels.split(1), strict=True)]
    mean = torch.stack(parts).mean()
    if not torch.allclose(loss, mean, rtol=_rounding(loss), equal_nan=True):
        raise InputError(
            f"unroll loss: expected the mean of the samples' losses, since batches are cut, found {float(loss):.6g} for {len(parts)} "
            f"samples whose mean is {float(mean):.6g}; take one without weights of classes and with every label, or leave `microbatch` and "
            "`memory_budget` out"
        )


class _RandomOperations(TorchDispatchMode):
    """Note the names of operations that may draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _generators_state(device: torch.device) -> tuple[Tensor, ...]:
    """Return the states of torch's generators that a network on `device` may draw from."""
    state = torch.get_rng_state()
    return (state, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (state,)


def _alike(first: Tensor, second: Tensor) -> bool:
    scale = float(first.detach().abs().nan_to_num(0, 0, 0).max())
    return first.shape == second.shape and torch.allclose(
        first, second, rtol=0, atol=_rounding(first) * scale, equal_nan=True
    )


def _rounding(like: Tensor) -> float:
    """Return what another order of sums may do to numbers, in parts of the largest: products may have been in half precision."""
    return 1e-4 if like.dtype == torch.float64 else 1e-2
