"""One iteration of the distillation as a function of tensors alone: student out, student back, gradients.

Nothing in it depends on the value of a tensor or draws a random number, so that it can be recorded once and replayed
(mtt_fast/replay.py). What is random comes in as tensors, which the host makes beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtt_fast.matching import relative_distance
from mtt_fast.student import Student
from mtt_fast.unroll import Steps, path_of

Iteration = Callable[..., tuple[Tensor, ...]]
"""`iterate` with its first three arguments given: from start, target, images, labels, lr and `StepDraws.tensors`."""


Apply = Callable[[Tensor, Tensor], Tensor]
"""From a step's images (b, C, H, W) and parameters (b, K) to the augmented images, whatever operation they stand for."""

Draw = Callable[[Tensor, torch.Generator], Tensor]
"""From images of a step's shape and dtype, without a value, to the parameters (b, K) that `Apply` takes."""


class StepDraws(NamedTuple):
    """What is random in the N steps of an iteration, the rows of all steps one after the other."""

    indices: Tensor  # (ΣB,) int64, into the synthetic images
    parameters: Tensor | None  # (ΣB, K), of the augmentation; None without one

    def tensors(self) -> tuple[Tensor, ...]:
        """Return those that there are."""
        return (self.indices,) if self.parameters is None else (self.indices, self.parameters)


def iterate(
    student: Student,
    augment: Apply | None,
    lengths: tuple[int, ...],
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    indices: Tensor,
    parameters: Tensor | None = None,
    *,
    kept_steps: int = 0,
    path_on_host: bool = False,
) -> tuple[Tensor, ...]:
    """Return the matching loss () in float64 and its gradients to images, lr and, if they are soft, labels.

    The steps see `lengths` images each, through `augment`, and `student` answers for them.

    A pure function of its tensors, all on one device: those of `matching_loss` and `unroll`, where `images` are all
    synthetic images (n, C, H, W), and those of `StepDraws`, ΣB = Σ `lengths`. Nothing is checked: indices were drawn in
    range, and `augment` takes the rows of a step. A gradient that is not finite is returned as it is.
    """
    draws = (None,) * len(lengths) if parameters is None else parameters.split(lengths)
    kept_from = max(0, len(lengths) - kept_steps)
    steps = Steps(student, indices.split(lengths), kept_from, path_on_host, augment, draws)
    wanted = [images, lr, *([labels] if labels.is_floating_point() else [])]
    with torch.enable_grad():
        images, lr, *soft = (tensor.detach().requires_grad_() for tensor in wanted)
        path = path_of(steps, start, images, soft[0] if soft else labels, lr)
        loss = relative_distance(path[-1], start, target)
        return loss.detach(), *torch.autograd.grad(loss, (images, lr, *soft))


def draw_steps(images: Tensor, batches: Sequence[Tensor], draw: Draw | None, generator: torch.Generator) -> StepDraws:
    """Draw what is random in the steps that see `images[index]` for each index in `batches`, on the CPU.

    Step by step, as `unroll` draws for the same batches. Of `images` (n, C, H, W) only shape and dtype are looked at.
    """
    indices = torch.cat(list(batches))
    if draw is None:
        return StepDraws(indices, None)
    like = torch.empty((), dtype=images.dtype)
    parameters = [draw(like.expand(len(index), *images.shape[1:]), generator) for index in batches]
    return StepDraws(indices, torch.cat(parameters))
