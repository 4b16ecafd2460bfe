"""Train by SGD on real or synthetic images, an epoch at a time, and measure accuracy, for experts and evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.augmentation.protocol import warp_of
from mtt_fast.augmentation.siamese import SiameseAugment
from mtt_fast.engine.batch import Batch, Inputs, gathered
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
    """An object that gives a step's gradient: a student, or SAM's variant of one (mtt_fast/training/sharpness.py)."""

    def gradient(self, theta: Tensor, images: Inputs, labels: Tensor) -> StepGradient:
        """Return the loss () at `theta` and the direction (P,) to descend against."""
        ...


Epoch = Callable[..., tuple[Tensor, ...]]
"""A function from parameters and velocity (P,) and a generator to both after one epoch, and the epoch's mean loss ().

If the network keeps running statistics (S,), the last argument is the statistics before the epoch, and the last result those
after the epoch.
"""


class Step(NamedTuple):
    """The state of a training after a step."""

    theta: Tensor  # (P,)
    velocity: Tensor  # (P,)
    loss: Tensor  # (), before the step
    images: int  # in the step
    statistics: list[Tensor]  # running statistics (S,) if the network keeps some, else empty


Steps = Callable[..., Iterator[Step]]
"""A function from the arguments of an `Epoch` to the state of the training after each step of the epoch."""


def epoch_on(
    student: Gradients, images: Images, sgd: Sgd, augment: SiameseAugment | None, track: Track | None = None
) -> Epoch:
    """Return a function that visits every image once in random order, in steps of plain SGD; the last batch may be short.

    Order and augmentation are drawn from the generator before the first step. Nothing waits for the device, and on
    CUDA a step is recorded once and replayed. `track` (`mtt_fast.networks.flat_module.track_of`) is for networks that keep
    running statistics.
    """
    steps = steps_on(student, images, sgd, augment, track)

    def epoch(theta: Tensor, velocity: Tensor, generator: torch.Generator, *statistics: Tensor) -> tuple[Tensor, ...]:
        total, count = theta.new_zeros(()), 0
        for step in steps(theta, velocity, generator, *statistics):
            total += step.loss * step.images
            count += step.images
        return step.theta, step.velocity, total / count, *step.statistics

    return epoch


def steps_on(
    student: Gradients, images: Images, sgd: Sgd, augment: SiameseAugment | None, track: Track | None = None
) -> Steps:
    """Return a function that does an epoch of `epoch_on` and yields after each step."""
    device, pixels = images.labels.device, images.pixels
    dtype = pixels.dtype if pixels.is_floating_point() else torch.float32
    augmentation = augment if images.canvas is None else images.canvas.crops(augment)
    step = graphed(partial(training_step, student, images, sgd, augmentation), device, kernels.compile_ahead)
    tracked = None if track is None else graphed(partial(_tracked, track, images, augmentation), device)

    def steps(theta: Tensor, velocity: Tensor, generator: torch.Generator, *statistics: Tensor) -> Iterator[Step]:
        order = torch.randperm(len(images), generator=generator)
        draw = None if augmentation is None else augmentation.draw_parameters
        batches = [images.expand_crops(index) for index in order.split(sgd.batch_size)]
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
    """Return parameters and velocity (P,) after a step on the images at `index` (b,), and the loss () before the step.

    A pure function of its tensors, none of whose values is read on the host. `parameters` (b, K) are those of `augment`.
    """
    inputs, targets = _inputs(images, augment, index, parameters)
    loss, gradient, _ = student.gradient(theta, inputs, targets)
    theta_out, velocity_out = torch.empty_like(theta), torch.empty_like(velocity) if sgd.momentum else None
    kernels.sgd_step(
        theta,
        gradient.contiguous(),
        theta.new_full((), sgd.lr),
        out=theta_out,
        velocity=velocity if sgd.momentum else None,
        velocity_out=velocity_out,
        momentum=sgd.momentum,
        weight_decay=sgd.weight_decay,
    )
    return theta_out, velocity if velocity_out is None else velocity_out, loss


def _inputs(
    images: Images, augment: Apply | None, index: Tensor, parameters: Tensor | None = None
) -> tuple[Inputs, Tensor]:
    """Return the network's inputs and targets of the batch at `index` (b,); the student gathers what is neither scaled nor cropped."""
    if images.transform is None and images.pixels.is_contiguous():
        shape = torch.Size((len(index), *images.pixels.shape[1:]))
        warp = None if parameters is None else warp_of(augment, parameters, shape)
        if parameters is None or warp is not None:
            return Batch(images.pixels, index, warp), images.labels[index]
    inputs, targets = images.batch(index)
    return (inputs if augment is None or parameters is None else augment(inputs, parameters)), targets


def _tracked(
    track: Track,
    images: Images,
    augment: Apply | None,
    statistics: Tensor,
    theta: Tensor,
    index: Tensor,
    parameters: Tensor | None = None,
) -> tuple[Tensor]:
    """Return the running statistics (S,) after a step on the images at `index` (b,), from the `statistics` before the step."""
    inputs, _ = _inputs(images, augment, index, parameters)
    return (track(theta, gathered(inputs), statistics),)


def accuracy(network: Network, theta: Tensor, images: Images) -> float:
    """Return the share of `images` whose class `network` gets right, in [0, 1]."""
    return int(count_right(network, theta, images)) / len(images)


@torch.no_grad()
def count_right(network: Network, theta: Tensor, images: Images) -> Tensor:
    """Return the number of `images` whose class `network` gets right, () int64 on the device, without a wait.

    An image with logits that are not finite counts as wrong.
    """
    right = torch.zeros((), dtype=torch.long, device=theta.device)
    for start in range(0, len(images), _TEST_BATCH):
        inputs, targets = images.batch(slice(start, start + _TEST_BATCH))
        logits = network(theta, inputs)
        right += ((logits.argmax(dim=1) == targets) & logits.isfinite().all(dim=1)).sum()
    return right
