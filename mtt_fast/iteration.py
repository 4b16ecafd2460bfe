"""One iteration of the distillation as a function of tensors alone: student out, student back, gradients.

Nothing in it depends on the value of a tensor or draws a random number, so that it can be recorded once and replayed
(mtt_fast/replay.py). What is random comes in as tensors, which the host makes beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mtt_fast.augment import Augment
from mtt_fast.matching import relative_distance
from mtt_fast.student import Student
from mtt_fast.unroll import Steps, path_of

Iteration = Callable[..., tuple[Tensor, ...]]
"""From start, target, images, labels, lr and what `draw_steps` returns to the loss and its gradients (`iterate`)."""


class StepDraws(NamedTuple):
    """What is random in the N steps of an iteration, the rows of all steps one after the other."""

    indices: Tensor  # (ΣB,) int64, into the synthetic images
    parameters: Tensor | None  # (ΣB, K), of the augmentation; None without one

    def tensors(self) -> tuple[Tensor, ...]:
        """Return those that there are."""
        return (self.indices,) if self.parameters is None else (self.indices, self.parameters)


def iteration(student: Student, augment: Augment | None, lengths: Sequence[int]) -> Iteration:
    """Return the iteration for steps that see `lengths` images each: `iterate` with its first three arguments given."""
    return partial(iterate, student, augment, tuple(lengths))


def iterate(
    student: Student,
    augment: Augment | None,
    lengths: tuple[int, ...],
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    indices: Tensor,
    parameters: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the matching loss () in float64 and its gradients to images, lr and, if they are soft, labels.

    A pure function of its tensors, all on one device: those of `matching_loss` and `unroll`, where `images` are all
    synthetic images (n, C, H, W), and those of `StepDraws`, ΣB = Σ `lengths`. Nothing is checked: indices were drawn in
    range. A gradient that is not finite is returned as it is.
    """
    draws = (None,) * len(lengths) if parameters is None else parameters.split(lengths)
    steps = Steps(student, indices.split(lengths), augment, draws)
    wanted = [images, lr, *([labels] if labels.is_floating_point() else [])]
    with torch.enable_grad():
        images, lr, *soft = (tensor.detach().requires_grad_() for tensor in wanted)
        path = path_of(steps, start, images, soft[0] if soft else labels, lr)
        loss = relative_distance(path[-1], start, target)
        return loss.detach(), *torch.autograd.grad(loss, (images, lr, *soft))


def draw_steps(
    images: Tensor, batches: Sequence[Tensor], augment: Augment | None, generator: torch.Generator
) -> StepDraws:
    """Draw what is random in the steps that see `images[index]` for each index in `batches`, on the CPU.

    The numbers are those that `unroll` draws from `generator` for the same batches.
    """
    indices = torch.cat(list(batches))
    if augment is None:
        return StepDraws(indices, None)
    # drawing looks at shape and dtype alone
    like = torch.empty((), dtype=images.dtype)
    drawn = [augment.draw(like.expand(len(index), *images.shape[1:]), generator) for index in batches]
    return StepDraws(indices, torch.cat(drawn))
