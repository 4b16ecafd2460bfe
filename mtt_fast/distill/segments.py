"""Draw the segments that iterations match.

Segments are numbered 0, 1, 2, …, and each iteration matches the next k (--num_trajectories). The random numbers of a segment depend
only on the seed and on its number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtt_fast.augmentation.siamese import SiameseAugment, augment_by_strategy
from mtt_fast.augmentation.texture import CanvasCrops
from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.run import DistillRun
from mtt_fast.engine.draws import draw_steps
from mtt_fast.errors import InputError
from mtt_fast.runtime.seeding import generator_for

Send = Callable[[tuple[Tensor, ...]], Callable[[], tuple[Tensor, ...]]]
"""A function that starts to copy tensors to the device and returns one that waits for them (mtt_fast/runtime/prefetch.py)."""


def augmentation(options: DistillOptions) -> SiameseAugment | CanvasCrops | None:
    """Return the augmentation of the student's steps, or None. For textures it begins with a crop of the canvas."""
    siamese = None if options.no_aug else augment_by_strategy(options.strategy)
    return siamese if options.canvas is None else options.canvas.crops(siamese)


class Segment(NamedTuple):
    """A piece of an expert's trajectory that an iteration matches, with the random numbers of the iteration."""

    expert: int
    epoch: float
    tensors: Callable[[], tuple[Tensor, ...]]  # start, target (P,) and those of `StepDraws`, on the device


def segment_numbers(options: DistillOptions, iterations: range) -> range:
    """Return the numbers of the segments that `iterations` match: k for each iteration, in order."""
    return range(iterations.start * options.num_trajectories, iterations.stop * options.num_trajectories)


def read_segment(run: DistillRun, send: Send, images: Tensor, number: int) -> Segment:
    """Return segment `number`, read and drawn in the calling thread. Of `images` only shape and dtype are used."""
    options = run.options
    generator = generator_for(options.seed, "iteration", number)
    expert = _expert_of(options.seed, len(run.experts), number)
    epoch = _start_epoch(options, start_epochs(options, number // options.num_trajectories), generator)
    start, target = (run.experts.read(expert, row) for row in (epoch, epoch + options.expert_epochs))
    if start.equal(target):
        raise InputError(
            f"{run.experts.folder}: expert {expert} did not move between epochs {epoch} and "
            f"{epoch + options.expert_epochs}; train it again with a larger learning rate, or leave it out"
        )
    if options.noise_start:
        start = start * (1 + options.noise_start * torch.randn(start.shape, generator=generator))
    batches = step_indices(options, len(images), generator)
    augment = augmentation(options)
    draws = draw_steps(
        batches, images.shape[1:], images.dtype, None if augment is None else augment.draw_parameters, generator
    )
    return Segment(expert, epoch, send((start, target, *draws.tensors())))


def _start_epoch(options: DistillOptions, epochs: range, generator: torch.Generator) -> float:
    """Draw the epoch at which the student starts, uniformly from `epochs`; with --continuous_start it may be fractional."""
    if options.continuous_start:
        return epochs.start + len(epochs) * float(torch.rand((), dtype=torch.float64, generator=generator))
    return int(torch.randint(epochs.start, epochs.stop, (), generator=generator))


def start_epochs(options: DistillOptions, iteration: int) -> range:
    """Return the expert epochs from T- to T - 1, from which the start of the student is drawn in `iteration` (counted from 0).

    T- is `min_start_epoch` and T+ is `max_start_epoch`. T grows linearly, rounded down, from `current_max_start_epoch` to T+, which it
    reaches in iteration `expansion_end_epoch` (DATM). Without `current_max_start_epoch`, T is always T+, as in the paper.
    """
    upper = options.max_start_epoch
    if options.current_max_start_epoch is not None and iteration < options.expansion_end_epoch:
        growth = (upper - options.current_max_start_epoch) * iteration // options.expansion_end_epoch
        upper = options.current_max_start_epoch + growth
    return range(options.min_start_epoch, upper)


def log_fields(segments: Sequence[Segment]) -> dict[str, float]:
    """Return the start epochs and experts of `segments` for the log: start_epoch, expert, start_epoch_2, expert_2, …"""
    named: dict[str, float] = {}
    for number, segment in enumerate(segments, 1):
        suffix = f"_{number}" if number > 1 else ""
        named |= {f"start_epoch{suffix}": segment.epoch, f"expert{suffix}": segment.expert}
    return named


def _expert_of(seed: int, count: int, number: int) -> int:
    """Return the expert of segment `number`: all `count` experts are used once, in random order, before any is repeated."""
    order = torch.randperm(count, generator=generator_for(seed, "expert order", number // count))
    return int(order[number % count])


def step_indices(options: DistillOptions, count: int, generator: torch.Generator) -> list[Tensor]:
    """Return, for each student step, indices into `count` images. A canvas has one index for each of its crops."""
    batches = student_batches(count, options.batch_syn, options.syn_steps, generator)
    return batches if options.canvas is None else [options.canvas.batch(index) for index in batches]


def student_batches(count: int, batch: int | None, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Return the indices of each student step, drawn as in the public code.

    A random permutation of all `count` images is cut into chunks of `batch` (all if None). The chunks are used from the last,
    which may be shorter, to the first. Then a new permutation is drawn.
    """
    batches: list[Tensor] = []
    while len(batches) < steps:
        batches += reversed(torch.randperm(count, generator=generator).split(batch or count))
    return batches[:steps]
