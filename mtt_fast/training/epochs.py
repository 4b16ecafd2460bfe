"""Train experts and evaluated networks, in chunks of steps or in epochs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.augmentation.combined import CombinedAugment
from mtt_fast.augmentation.protocol import warp_of
from mtt_fast.augmentation.siamese import SiameseAugment
from mtt_fast.augmentation.texture import CanvasCrops
from mtt_fast.engine.draws import Apply, StepDraws, draw_steps
from mtt_fast.engine.students.batch import Batch, Inputs, gathered
from mtt_fast.engine.students.protocol import Student
from mtt_fast.networks.flat_module import Track
from mtt_fast.runtime.cuda_graphs import graphed
from mtt_fast.runtime.prefetch import upload
from mtt_fast.training.cutmix import draw_box, mixed
from mtt_fast.training.images import Images
from mtt_fast.training.optimizers import Optimizer
from mtt_fast.training.sharpness import SharpnessAware

# Steps in one CUDA graph. Launching a graph takes longer than a small step, and capturing it three times as long as its steps.
STEPS_AT_ONCE = 4


class Chunk(NamedTuple):
    """The state of a training after a few steps."""

    theta: Tensor  # (P,)
    velocity: Tensor  # (P,), or the state of `AdamW`
    losses: Tensor  # (steps,): the sum over the images of each step, before its update
    statistics: list[Tensor]  # running statistics (S,), or empty


class Epochs:
    """Train on images for some epochs, each in random order; the last batch of an epoch may be smaller.

    Order and augmentation of all epochs of a call are drawn before its first step. Nothing synchronises with the device, and on
    CUDA steps are replayed from a CUDA graph.
    """

    def __init__(
        self,
        student: Student | SharpnessAware,
        images: Images,
        optimizer: Optimizer,
        augment: SiameseAugment | None,
        track: Track | None = None,
        subset: Tensor | None = None,
        *,
        cutmix: bool = False,
    ) -> None:
        """Prepare to train on `images`, or only on those at `subset`, indices on the CPU.

        `track` (`mtt_fast.networks.flat_module.track_of`) updates the network's running statistics, if it has any. `cutmix` mixes
        the images of half the batches (mtt_fast/training/cutmix.py) and needs soft labels.
        """
        self._images, self._optimizer, self._cutmix = images, optimizer, cutmix
        self._augment = augment if images.canvas is None else images.canvas.crops(augment)
        self._indices = torch.arange(len(images)) if subset is None else subset
        self._length = images.num_crops * min(optimizer.batch_size, len(self._indices))
        run = partial(training_steps, student, images, optimizer, self._augment, track, self._length, cutmix=cutmix)
        self._steps = graphed(run, images.labels.device, kernels.compile_ahead)

    def __call__(
        self,
        theta: Tensor,
        velocity: Tensor,
        generator: torch.Generator,
        *statistics: Tensor,
        epochs: int = 1,
        factor: float = 1.0,
    ) -> tuple[Tensor, ...]:
        """Return parameters and velocity (P,) after `epochs` epochs, the mean loss of each epoch (epochs,), and the running statistics.

        The learning rate is `factor` times the optimizer's. For `AdamW` the velocity is the optimizer's state.
        """
        losses = []
        for chunk in self.chunks(theta, velocity, generator, *statistics, epochs=epochs, factor=factor):
            losses.append(chunk.losses)
        means = torch.cat(losses).view(epochs, -1).sum(1) / (self._images.num_crops * len(self._indices))
        return chunk.theta, chunk.velocity, means, *chunk.statistics

    def chunks(
        self,
        theta: Tensor,
        velocity: Tensor,
        generator: torch.Generator,
        *statistics: Tensor,
        epochs: int = 1,
        factor: float = 1.0,
        at_once: int = STEPS_AT_ONCE,
    ) -> Iterator[Chunk]:
        """Train as a call does, and yield the state after every `at_once` steps and after a smaller batch."""
        images, size, device = self._images, self._optimizer.batch_size, self._images.labels.device
        lr = theta.new_full((), self._optimizer.lr * factor)
        batches: Iterator[Tensor] = map(images.expand_crops, _batches(self._indices, size, generator, epochs))
        boxes: list[Tensor] = []
        if self._cutmix:
            batches = _with_boxes(batches, images.input_shape, generator, boxes)
        draws = _draws(images, self._augment, batches, generator)
        tensors = (*draws.tensors(), torch.cat(boxes)) if self._cutmix else draws.tensors()
        sizes = chunk_sizes(draws.lengths, self._length, at_once)
        for chunk in zip(*(upload(tensor, device).split(sizes) for tensor in tensors), strict=True):
            theta, velocity, losses, *after = self._steps(theta, velocity, lr, *statistics, *chunk)
            statistics = tuple(after)
            yield Chunk(theta, velocity, losses, after)


def _draws(
    images: Images,
    augment: SiameseAugment | CanvasCrops | None,
    batches: Iterable[Tensor],
    generator: torch.Generator,
) -> StepDraws:
    """Return the draws of the steps on `batches` of `images`. A `CombinedAugment` draws for real images in another way."""
    shape, dtype = images.pixels.shape[1:], images.pixels.dtype
    dtype = dtype if dtype.is_floating_point else torch.float32
    if not isinstance(augment, CombinedAugment) or images.real is None:
        draw = None if augment is None else augment.draw_parameters
        return draw_steps(batches, shape, dtype, draw, generator)
    draws = draw_steps(batches, shape, dtype, augment.draw_both, generator)
    assert draws.parameters is not None
    return draws._replace(parameters=augment.select(draws.parameters, images.real[draws.indices]))


def _batches(indices: Tensor, size: int, generator: torch.Generator, epochs: int) -> Iterator[Tensor]:
    """Yield the batches of `epochs` epochs, each a new permutation of `indices`, drawn when its first batch is taken."""
    for _ in range(epochs):
        yield from indices[torch.randperm(len(indices), generator=generator)].split(size)


def _with_boxes(
    batches: Iterable[Tensor], image_shape: torch.Size, generator: torch.Generator, boxes: list[Tensor]
) -> Iterator[Tensor]:
    """Yield `batches`, and add CutMix's draws for each, drawn after the batch, to `boxes`."""
    for index in batches:
        boxes.append(draw_box(len(index), image_shape, generator))
        yield index


def chunk_sizes(lengths: Sequence[int], full: int, at_once: int) -> list[int]:
    """Return the number of images in each chunk. A chunk is at most `at_once` batches, and ends after one smaller than `full`."""
    sizes, count = [0], 0
    for length in lengths:
        if count == at_once:
            sizes.append(0)
            count = 0
        sizes[-1] += length
        count = at_once if length < full else count + 1
    return sizes


def training_steps(
    student: Student | SharpnessAware,
    images: Images,
    optimizer: Optimizer,
    augment: Apply | None,
    track: Track | None,
    length: int,
    theta: Tensor,
    velocity: Tensor,
    lr: Tensor,
    *rest: Tensor,
    cutmix: bool = False,
) -> tuple[Tensor, ...]:
    """Return parameters and velocity (P,) after steps on `length` images each, and the sum of the losses in each step (steps,).

    `lr` () replaces `optimizer.lr`, so that one CUDA graph serves all learning rates. `rest` are the running statistics (S,) if
    `track` is given (they are also the last result), the indices (Σb,) of the images of all steps, the parameters (Σb, K) of
    `augment`, and with `cutmix` the draws (Σb, 5) of the boxes. The function is pure, and reads no tensor on the host.
    """
    statistics, (index, *parameters) = (rest[:1], rest[1:]) if track is not None else ((), rest)
    losses = []
    for step in zip(index.split(length), *(each.split(length) for each in parameters), strict=True):
        inputs, targets = _inputs(images, augment, *(step[:-1] if cutmix else step))
        if cutmix:
            inputs, targets = mixed(gathered(inputs), targets, step[-1])
        if track is not None:
            inputs = gathered(inputs)
            statistics = (track(theta, inputs, *statistics),)
        theta, velocity, loss = training_step(student, optimizer, theta, velocity, inputs, targets, lr)
        losses.append(loss * len(targets))
    return theta, velocity, torch.stack(losses), *statistics


def training_step(
    student: Student | SharpnessAware,
    optimizer: Optimizer,
    theta: Tensor,
    velocity: Tensor,
    inputs: Inputs,
    targets: Tensor,
    lr: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return parameters and velocity (P,) after a step with learning rate `lr` () on a batch, and the loss () before the step. A pure function."""
    loss, sums, _ = student.gradient(theta, inputs, targets)
    return *optimizer.step(theta, velocity, sums, lr), loss


def _inputs(
    images: Images, augment: Apply | None, index: Tensor, parameters: Tensor | None = None
) -> tuple[Inputs, Tensor]:
    """Return inputs and targets of the batch at `index` (b,). If possible, inputs are a `Batch`, which the student gathers."""
    if images.transform is None and images.pixels.is_contiguous():
        shape = torch.Size((len(index), *images.pixels.shape[1:]))
        warp = None if parameters is None else warp_of(augment, parameters, shape)
        if parameters is None or warp is not None:
            return Batch(images.pixels, index, warp), images.labels[index]
    inputs, targets = images.batch(index)
    return (inputs if augment is None or parameters is None else augment(inputs, parameters)), targets
