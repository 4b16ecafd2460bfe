"""Check whether a user's loss is a mean over the samples, so that the losses of the pieces of a batch add up.

`is_mean` compares the losses of a few samples before the first step. `WatchedLoss` compares those of all pieces of a batch with the
batch's, in each step of the forward sweep.
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
from mtt_fast.engine.students.processes import InProcesses, gathered_shares
from mtt_fast.engine.students.protocol import Loss, Student
from mtt_fast.errors import InputError

_FEW = 7  # samples whose losses are compared at once; odd, so that two classes have different numbers of them
_MAX_LABELS = 1000
_MAX_VALUES = 2**18  # of a batch's outputs that are compared at once: a MiB in float32

FAILURES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError)
"""Errors that networks and losses raise for too few samples. Others are not caught: torch.utils.checkpoint stops by its own exception."""


def is_mean(loss: Loss, outputs: Tensor, targets: Tensor, labels: Tensor) -> bool:
    """Return whether the `loss` of a batch is the mean of its samples' losses. False for a loss of pairs, and for one that raises an error.

    `targets` (b, …) belong to `outputs` (b, …). A captured iteration gets other batches later, so a few of all `labels` (n, …)
    are tried too, with the same outputs.
    """
    # so few that some of the samples below have the same output: a loss of near pairs then finds a pair
    outputs = outputs[: _FEW - 2]
    if bool((outputs == outputs[:1]).all()):
        return False  # with equal samples a loss of differences between samples looks like a mean
    # each target but the first is there twice, with two outputs: a loss may compare the samples of a class, or count them
    targets = torch.cat([labels[_different_labels(labels)].to(targets.dtype), targets.repeat_interleave(2, 0)[1:]])
    rows = outputs.split(1)
    samples = [(rows[n % len(rows)], target) for n, target in enumerate(targets.split(1))]
    # overlapping groups: the last sample of a group is the first of the next
    few = [samples[first : first + _FEW] for first in range(0, len(samples) - 1, _FEW - 1)]
    return all(bool(_adds_up(loss, part)) for part in few)


class WatchedLoss:
    """Compute the loss of each piece of a batch, and check in the forward sweep whether the losses of the pieces add up to the batch's.

    `is_mean` saw only a few samples, and a loss may take the hardest of a batch, or skip samples once they are learned. Outputs of
    more than `_MAX_VALUES` are compared part by part, each with the half of a piece before it, so that the check takes no more memory
    than a piece. The processes of a `group` also gather their shares of the outputs, or the first samples of these, and compare them.
    """

    def __init__(self, loss: Loss, batches: Sequence[tuple[int, int]], group: dist.ProcessGroup | None) -> None:
        """`batches` are the steps' batch sizes, each with the number of samples that are computed here."""
        self._loss, self._group = loss, group
        self._batches = iter(batches)
        self._batch = self._remaining = 0  # samples of the batch, and those still to come here
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._share: list[tuple[Tensor, Tensor]] = []  # to gather
        self._found: list[Tensor] | None = []

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a piece."""
        if self._found is not None:
            if not self._remaining:
                (self._batch, self._remaining), self._parts, self._share = next(self._batches), [], []
            # of copies, since the loss may write into its arguments
            for half in zip(outputs.detach().clone().chunk(2), targets.detach().clone().chunk(2), strict=True):
                self._parts.append(half)
                self._remaining -= len(half[0])
                is_large = sum(part.numel() for part, _ in self._parts) > _MAX_VALUES
                if len(self._parts) > 1 and (is_large or not self._remaining):
                    self._found.append(_adds_up(self._loss, self._parts))
                    self._parts = [half]
            if self._group is not None:
                self._compare_shares(self._group, self._found, outputs.detach(), targets.detach())
        return self._loss(outputs, targets)

    def _compare_shares(self, group: dist.ProcessGroup, found: list[Tensor], outputs: Tensor, targets: Tensor) -> None:
        """Take the first samples of a piece; after the last piece of a batch, compare the shares of all processes."""
        most = max(1, _MAX_VALUES // (group.size() * outputs[0].numel()))
        rest = most - sum(len(each) for each, _ in self._share)
        self._share.append((outputs[:rest].clone(), targets[:rest].clone()))
        if not self._remaining:
            rows = (torch.cat(each) for each in zip(*self._share, strict=True))
            shares = list(zip(*(gathered_shares(group, each, self._batch, most) for each in rows), strict=True))
            if len(shares) > 1:
                found.append(_adds_up(self._loss, shares))

    def adds_up(self, group: dist.ProcessGroup | None) -> bool:
        """Return whether all pieces so far added up, in all processes of the `group`, and stop watching. Synchronises with a GPU."""
        result = self.result()
        if group is not None:
            result = result.to(self._parts[0][0].device, torch.int32)
            dist.all_reduce(result, op=dist.ReduceOp.MIN, group=group)
        return bool(result)

    def result(self) -> Tensor:
        """Return whether all pieces so far added up, as a boolean tensor (), and stop watching."""
        found, self._found = self._found, None
        return torch.stack(found).all() if found else torch.ones((), dtype=torch.bool, device="cpu")


def watched_student(student: Student, loss: Loss | None, lengths: Sequence[int]) -> tuple[Student, WatchedLoss | None]:
    """Return `student` and None, or, if it cuts batches and assumes that a user's `loss` is a mean, the student with a `WatchedLoss`, and that.

    `lengths` are the batch sizes of the steps.
    """
    if loss is None or not isinstance(student, InMicrobatches):
        return student, None
    computed = [sum(len(range(*piece.indices(length))) for piece, _ in student.pieces(length)) for length in lengths]
    group = student.group if isinstance(student, InProcesses) else None
    watched = WatchedLoss(loss, list(zip(lengths, computed, strict=True)), group)
    return replace(student, student=replace(cast("Any", student.student), loss=watched)), watched


def _adds_up(loss: Loss, parts: Sequence[tuple[Tensor, Tensor]], *, to_targets: bool = True) -> Tensor:
    """Return whether the `loss` of a batch is the mean of those of its `parts`, weighted by their sizes, as a boolean tensor ().

    Each part is outputs and targets (b, …). A loss that raises an error is not a mean. Gradients are compared too: at random
    parameters all samples may have about the same loss, so that any weighted mean gives it, and learned weights among the targets
    may be equal at first. Gradients with respect to the targets (`to_targets`) are left out if the loss fails with them: it may
    use the targets under no_grad.
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
        # the targets' gradient may consist of rounding errors relative to the outputs'
        adds_up &= _are_same(added, gradient, torch.cat([each.flatten() for each in gradients[: n + 1]]))
    return adds_up


def _are_same(first: Tensor, second: Tensor, like: Tensor) -> Tensor:
    """Return whether two tensors are equal up to the rounding of a sum, relative to the largest magnitude in `like`, as a tensor ()."""
    rounding = 1e-9 if first.dtype == torch.float64 else 1e-5
    error, scale = (first - second).abs(), like.abs().nan_to_num(0, 0, 0).max()
    not_numbers = first.isnan() & second.isnan()
    return ((error <= rounding * scale) | (first == second) | not_numbers).all()


def _different_labels(labels: Tensor) -> Tensor:
    """Return positions (k,) of labels that a loss may weight differently, from all `labels` (n, …).

    They cover each class, or the smallest and the largest value of each floating column. At most `_MAX_LABELS` are returned,
    evenly spread.
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
