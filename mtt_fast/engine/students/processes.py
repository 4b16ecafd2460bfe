"""The student that shares each batch among processes: each computes some of the samples, and one all-reduce adds up the results.

The gradients of images and labels have one row per sample. Each process computes the rows of its own samples, and `add_up`
all-reduces them at the end of the backward sweep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mtt_fast.engine.students.batch import Inputs
from mtt_fast.engine.students.microbatches import InMicrobatches
from mtt_fast.engine.students.protocol import GradientTangent, SavedActivations, StepGradient, as_sums


@dataclass(frozen=True)
class InProcesses(InMicrobatches):
    """Compute this process's share of each batch, in pieces of at most `size` samples; add up the results of all processes.

    All processes of `group` make the same calls. Each call does one all-reduce, for any number of pieces. Losses and derivatives
    with respect to θ are then the same in all processes, bit for bit. Gradients of images and labels are zero for the samples of
    other processes.
    """

    group: dist.ProcessGroup

    def gradient(self, theta: Tensor, images: Inputs, labels: Tensor, save: bool = False) -> StepGradient:
        """See `Student.gradient`."""
        own = super().gradient(theta, images, labels, save)
        gradient, loss = self._totals(own.gradient, own.loss)
        return StepGradient(loss, as_sums(gradient), own.saved)

    def gradient_jvp(
        self, theta: Tensor, images: Inputs, labels: Tensor, v: Tensor, saved: SavedActivations | None = None
    ) -> GradientTangent:
        """See `Student.gradient_jvp`."""
        own = super().gradient_jvp(theta, images, labels, v, saved)
        hessian_v, v_dot_g, *loss = self._totals(own.hessian_v, own.v_dot_g, *([] if own.loss is None else [own.loss]))
        return GradientTangent(v_dot_g, as_sums(hessian_v), own.images, own.labels, *loss)

    def pieces(self, batch: int) -> Iterator[tuple[slice, float]]:
        """See `InMicrobatches.pieces`. An empty share becomes the first sample with weight zero.

        So each process computes at least one piece, and all processes have the same kinds of results.
        """
        first, last = _share(batch, self.group.rank(), self.group)
        if first == last:
            yield slice(1), 0.0
        for start in range(first, last, self.size):
            stop = min(start + self.size, last)
            yield slice(start, stop), (stop - start) / batch

    def _totals(self, vector: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
        """Return the sums over all processes of a vector (P,) and of numbers ()."""
        totals = torch.cat([vector, torch.stack(numbers)])
        dist.all_reduce(totals, group=self.group)
        # clone the scalars, since the sweeps keep those of all steps and a view would keep the whole vector
        return totals[: len(vector)], *totals[len(vector) :].clone()


def _share(batch: int, rank: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """Return where the share of the process `rank` in a batch starts and stops."""
    return batch * rank // group.size(), batch * (rank + 1) // group.size()


def gathered_shares(group: dist.ProcessGroup, rows: Tensor, batch: int, most: int) -> list[Tensor]:
    """Return at most `most` rows of each process's share of a batch, from the `rows` (r, …) of this process. Empty shares are left out."""
    counts = [min(stop - start, most) for start, stop in (_share(batch, rank, group) for rank in range(group.size()))]
    own = rows.new_zeros(max(counts), *rows.shape[1:])
    own[: counts[group.rank()]] = rows[: counts[group.rank()]]
    every = [torch.empty_like(own) for _ in counts]
    # as bytes, since back ends do not send all dtypes
    dist.all_gather([each.view(-1).view(torch.uint8) for each in every], own.view(-1).view(torch.uint8), group=group)
    return [each[:count] for each, count in zip(every, counts, strict=True) if count]


def add_up(group: dist.ProcessGroup, *gradients: Tensor | None) -> None:
    """Replace each of the `gradients` by its sum over the processes of `group`; the same ones must be None in all of them."""
    for gradient in gradients:
        if gradient is not None:
            dist.all_reduce(gradient, group=group)


def averaged(group: dist.ProcessGroup | None, numbers: Tensor) -> Tensor:
    """Return the mean of `numbers` over the processes of `group`, so that all take the same decision; without a group, `numbers`."""
    if group is None:
        return numbers
    mean = numbers / group.size()
    dist.all_reduce(mean, group=group)
    return mean
