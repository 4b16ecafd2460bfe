"""Find out whether a loss of the caller's own is a mean over the samples, so that the losses of the pieces of a batch add up.

`is_mean` compares the losses of a few samples before the first step, and `WatchedLoss` those of all pieces in the forward sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mtt_fast.engine.students.microbatches import InMicrobatches
from mtt_fast.engine.students.protocol import Loss, Student
from mtt_fast.errors import InputError

_FEW = 8  # samples whose losses are compared at once
_MAX_LABELS = 1000

FAILURES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError)
"""What networks and losses raise for fewer samples than they take. All else passes: torch.utils.checkpoint stops by its own exception."""


def is_mean(loss: Loss, outputs: Tensor, targets: Tensor, labels: Tensor) -> bool:
    """Return whether the `loss` of a batch is the mean of the losses of its samples. A loss of pairs is not, nor is one that fails.

    `targets` are those of `outputs` (b, …). A captured iteration gets other batches later, so a few of all `labels` (n, …) are tried
    too, with the same outputs again.
    """
    if bool((outputs == outputs[:1]).all()):
        return False  # one sample, or equal ones: a loss of differences between samples cannot be told from a mean
    targets = torch.cat([labels[_different_labels(labels)].to(targets.dtype), targets])
    rows = outputs.split(1)
    samples = [(rows[n % len(rows)], target) for n, target in enumerate(targets.split(1))]
    # a few at once; the last of them is the first of the next few
    few = [samples[first : first + _FEW] for first in range(0, len(samples) - 1, _FEW - 1)]
    return all(bool(_adds_up(loss, part)) for part in few)


class WatchedLoss:
    """Compute a loss of pieces of batches, and find out in the forward sweep whether the losses of the pieces add up.

    `is_mean` saw only the first outputs, and a loss may leave out samples once they are learned. Each half of a piece is compared with
    the half before it, so that this takes no more memory than a piece.
    """

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self._before: tuple[Tensor, Tensor] | None = None
        self._found: list[Tensor] | None = []

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a piece."""
        if self._found is not None:
            # of copies, since the loss may write into its arguments
            for half in zip(outputs.detach().clone().chunk(2), targets.detach().clone().chunk(2), strict=True):
                if self._before is not None:
                    self._found.append(_adds_up(self._loss, [self._before, half]))
                self._before = half
        return self._loss(outputs, targets)

    def adds_up(self, group: dist.ProcessGroup | None) -> bool:
        """Return whether the pieces so far added up, in all processes of the `group`, and watch no more. A GPU is waited for."""
        result = self.result()
        if group is not None:
            assert self._before is not None
            result = result.to(self._before[0].device, torch.int32)
            dist.all_reduce(result, op=dist.ReduceOp.MIN, group=group)
        return bool(result)

    def result(self) -> Tensor:
        """Return whether the pieces so far added up, as a boolean tensor (), and watch no more."""
        found, self._found = self._found, None
        return torch.stack(found).all() if found else torch.ones((), dtype=torch.bool, device="cpu")


def watched_student(student: Student, loss: Loss | None) -> tuple[Student, WatchedLoss | None]:
    """Return `student`, and None; if it takes the caller's own `loss` for a mean over the samples, a student with a `WatchedLoss`, and this."""
    if loss is None or not isinstance(student, InMicrobatches):
        return student, None
    watched = WatchedLoss(loss)
    return replace(student, student=replace(cast("Any", student.student), loss=watched)), watched


def _adds_up(loss: Loss, parts: Sequence[tuple[Tensor, Tensor]], *, to_targets: bool = True) -> Tensor:
    """Return whether the `loss` of a batch is the mean of those of its `parts`, weighted by their sizes, as a boolean tensor ().

    Each part is outputs and targets (b, …). A loss that fails, as one of whole batches may, is no mean. Gradients are compared too:
    at random parameters all samples may have about the same loss, which any weighted mean then gives, and learned weights among the
    targets may be equal at first. Gradients with respect to the targets (`to_targets`) are left out if the loss fails with them: it
    may train under no_grad.
    """
    soft = to_targets and parts[0][1].is_floating_point()

    def loss_and_gradients(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the loss and its gradients with respect to the outputs, and to floating targets."""
        arguments = [outputs.detach().requires_grad_(), targets.detach().requires_grad_(soft)]
        with torch.enable_grad():
            value = loss(*(argument.clone() for argument in arguments))
        leaves = arguments[: 1 + soft]
        if not value.requires_grad:  # the loss leaves these outputs out
            return value.detach(), [torch.zeros_like(leaf) for leaf in leaves]
        return value.detach(), torch.autograd.grad(value, leaves, materialize_grads=True)

    outputs, targets = (torch.cat(each) for each in zip(*parts, strict=True))
    try:
        value, gradients = loss_and_gradients(outputs, targets)
        of_parts = [loss_and_gradients(*part) for part in parts]
    except InputError:
        raise
    except FAILURES:
        if soft:
            return _adds_up(loss, parts, to_targets=False)
        return torch.zeros((), dtype=torch.bool, device=outputs.device)
    shares = [len(part[0]) / len(outputs) for part in parts]
    values = torch.stack([share * value for share, (value, _) in zip(shares, of_parts, strict=True)])
    adds_up = _are_same(values.sum(), value, values.abs().sum())
    for n, gradient in enumerate(gradients):
        added = torch.cat([share * part[n] for share, (_, part) in zip(shares, of_parts, strict=True)])
        # that of targets may be rounding errors alone, beside that of the outputs
        adds_up &= _are_same(added, gradient, torch.cat([each.flatten() for each in gradients[: n + 1]]))
    return adds_up


def _are_same(first: Tensor, second: Tensor, like: Tensor) -> Tensor:
    """Return whether two tensors are equal up to the rounding of a sum, relative to the largest magnitude in `like`, as a tensor ()."""
    rounding = 1e-9 if first.dtype == torch.float64 else 1e-5
    error, scale = (first - second).abs(), like.abs().nan_to_num(0, 0, 0).max()
    not_numbers = first.isnan() & second.isnan()
    return ((error <= rounding * scale) | (first == second) | not_numbers).all()


def _different_labels(labels: Tensor) -> Tensor:
    """Return the positions of a few of all `labels` (n, …), to which a loss may give other weights, or none.

    These have each class, or of numbers the smallest and the largest at each place. If there are too many, they are spread over all.
    """
    if labels.is_complex():
        labels = torch.view_as_real(labels.resolve_conj())
    if labels.is_floating_point():
        numbers = labels.reshape(len(labels), -1)
        rows = torch.cat([numbers.argmin(0), numbers.argmax(0)]).unique()
    else:
        _, first = np.unique(labels.cpu().numpy(), return_index=True)
        rows = torch.as_tensor(first // max(labels[0].numel(), 1), device=labels.device).unique()
    few = torch.linspace(0, len(rows) - 1, min(len(rows), _MAX_LABELS), device="cpu").round().long()
    chosen: Tensor = rows[few]
    return chosen
