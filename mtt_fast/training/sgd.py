"""SGD on real or synthetic images: one epoch, and the accuracy afterwards. Experts and evaluation share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.augmentation.siamese import SiameseAugment
from mtt_fast.engine.draws import Apply, draw_steps
from mtt_fast.engine.student import StepGradient
from mtt_fast.networks.flat_module import Track
from mtt_fast.networks.protocol import Network
from mtt_fast.runtime.cuda_graphs import graphed
from mtt_fast.runtime.prefetch import upload
from mtt_fast.training.images import Images

_TEST_BATCH = 500


@dataclass(frozen=True)
class Sgd:
    """Hyper-parameters of plain SGD, as torch.optim.SGD names them."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 256


class Gradients(Protocol):
    """What a step asks for: of a student, or of one that looks for flat minima (mtt_fast/training/sharpness.py)."""

    def gradient(self, theta: Tensor, images: Tensor, labels: Tensor) -> StepGradient:
        """Return the loss () at `theta` and the direction (P,) to descend against."""
        ...


Epoch = Callable[..., tuple[Tensor, ...]]
"""From parameters and velocity (P,) and a source of random numbers to both after one epoch, and its mean loss ().

Behind them, if the network keeps running statistics, come those (S,) before the epoch, and after it.
"""


class Step(NamedTuple):
    """Where a training is after a step."""

    theta: Tensor  # (P,)
    velocity: Tensor  # (P,)
    loss: Tensor  # (), before the step
    images: int  # that the step saw
    statistics: list[Tensor]  # running ones, (S,), of a network that keeps some


Steps = Callable[..., Iterator[Step]]
"""From what an `Epoch` takes to where the training is after each of its steps."""


def epoch_on(
    student: Gradients, images: Images, sgd: Sgd, augment: SiameseAugment | None, track: Track | None = None
) -> Epoch:
    """Return what visits every image once in random order, in steps of plain SGD; the last batch may be short.

    Order and augmentation are drawn from the generator before the first step. Nothing waits for the device, and on
    CUDA a step is recorded once and replayed. `track` (`mtt_fast.networks.flat_module.track_of`) is of networks that keep running
    statistics.
    """
    steps = steps_on(student, images, sgd, augment, track)

    def epoch(theta: Tensor, velocity: Tensor, generator: torch.Generator, *statistics: Tensor) -> tuple[Tensor, ...]:
        total, seen = theta.new_zeros(()), 0
        for step in steps(theta, velocity, generator, *statistics):
            total += step.loss * step.images
            seen += step.images
        return step.theta, step.velocity, total / seen, *step.statistics

    return epoch


def steps_on(
    student: Gradients, images: Images, sgd: Sgd, augment: SiameseAugment | None, track: Track | None = None
) -> Steps:
    """Return what goes through an epoch of `epoch_on` step by step."""
    device, pixels = images.labels.device, images.pixels
    dtype = pixels.dtype if pixels.is_floating_point() else torch.float32
    seen = augment if images.canvas is None else images.canvas.crops(augment)
    apply = None if seen is None else seen.apply
    step = graphed(partial(training_step, student, images, sgd, apply), device)
    tracked = None if track is None else graphed(partial(_tracked, track, images, apply), device)

    def steps(theta: Tensor, velocity: Tensor, generator: torch.Generator, *statistics: Tensor) -> Iterator[Step]:
        order = torch.randperm(len(images), generator=generator)
        draw = None if seen is None else seen.draw_parameters
        batches = [images.seen_in(index) for index in order.split(sgd.batch_size)]
        lengths = [len(index) for index in batches]
        draws = draw_steps(batches, pixels.shape[1:], dtype, draw, generator)
        rows = zip(*(upload(rows, device).split(lengths) for rows in draws.tensors()), strict=True)
        for index, *parameters in rows:
            if tracked is not None:
                statistics = tracked(*statistics, theta, index, *parameters)
            theta, velocity, loss = step(theta, velocity, index, *parameters)
            yield Step(theta, velocity, loss, len(index), list(statistics))

    return steps


def training_step(
    student: Gradients,
    images: Images,
    sgd: Sgd,
    augment: Apply | None,
    theta: Tensor,
    velocity: Tensor,
    index: Tensor,
    parameters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return parameters and velocity (P,) after a step on the images at `index` (b,), and the loss () before it.

    A pure function of its tensors, of which it asks for no value. `parameters` (b, K) are those of `augment`.
    """
    seen, labels = _seen(images, augment, index, parameters)
    loss, gradient, _ = student.gradient(theta, seen, labels)
    after, moved = torch.empty_like(theta), torch.empty_like(velocity) if sgd.momentum else None
    kernels.sgd_step(
        theta,
        gradient.contiguous(),
        theta.new_full((), sgd.lr),
        out=after,
        velocity=velocity if sgd.momentum else None,
        velocity_out=moved,
        momentum=sgd.momentum,
        weight_decay=sgd.weight_decay,
    )
    return after, velocity if moved is None else moved, loss


def _seen(
    images: Images, augment: Apply | None, index: Tensor, parameters: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the batch at `index` (b,) as the network sees it, and its labels."""
    seen, labels = images.batch(index)
    return (seen if augment is None or parameters is None else augment(seen, parameters)), labels


def _tracked(
    track: Track,
    images: Images,
    augment: Apply | None,
    statistics: Tensor,
    theta: Tensor,
    index: Tensor,
    parameters: Tensor | None = None,
) -> tuple[Tensor]:
    """Return the running statistics (S,) after the step on the images at `index` (b,), from those before it."""
    return (track(theta, _seen(images, augment, index, parameters)[0], statistics),)


def accuracy(network: Network, theta: Tensor, images: Images) -> float:
    """Return the share of `images` whose class `network` gets right, in [0, 1]."""
    return int(count_right(network, theta, images)) / len(images)


@torch.no_grad()
def count_right(network: Network, theta: Tensor, images: Images) -> Tensor:
    """Return how many of `images` `network` puts into their class, () int64 on the device: nothing waits for it.

    Logits that are not finite put an image into no class.
    """
    right = torch.zeros((), dtype=torch.long, device=theta.device)
    for begin in range(0, len(images), _TEST_BATCH):
        seen, labels = images.batch(slice(begin, begin + _TEST_BATCH))
        logits = network(theta, seen)
        right += ((logits.argmax(dim=1) == labels) & logits.isfinite().all(dim=1)).sum()
    return right
