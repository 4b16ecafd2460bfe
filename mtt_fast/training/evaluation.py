"""Train networks on a small set by an evaluation protocol (mtt_fast/training/protocols.py), and test them."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm import tqdm

from mtt_fast.augmentation.combined import CombinedAugment
from mtt_fast.augmentation.flip_and_color import FlipAndColorAugment
from mtt_fast.augmentation.siamese import SiameseAugment, augment_by_strategy
from mtt_fast.engine.arguments import kind_of
from mtt_fast.engine.students.choice import student_for
from mtt_fast.engine.students.protocol import Student
from mtt_fast.kernels import Precision
from mtt_fast.networks.flat_module import in_evaluation, statistics_of, track_of
from mtt_fast.networks.protocol import Network, Trainable
from mtt_fast.runtime.interrupts import StopRequest, raise_if_stopped
from mtt_fast.runtime.memory_info import AUTO
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.accuracy import count_correct
from mtt_fast.training.concurrency import Job, concurrency_for, run_concurrently
from mtt_fast.training.epochs import Epochs
from mtt_fast.training.images import Images
from mtt_fast.training.optimizers import AdamW, Optimizer, Sgd
from mtt_fast.training.protocols import EvaluationProtocol

log = logging.getLogger(__name__)

_STEPS_DRAWN_AT_ONCE = 24
_BEYOND_GUESSING = 100.0  # the loss of random guessing among a million classes is 14


@dataclass(frozen=True)
class Accuracy:
    """Test accuracies of networks that differ only in their random numbers."""

    values: tuple[float, ...]
    best_epoch: bool = False
    """whether each value is the accuracy after the best epoch, chosen on the test images, and not after the last"""
    diverged: int = 0
    """number of networks that diverged; their accuracies count as 0"""

    @property
    def mean(self) -> float:
        """Return the mean, in [0, 1]."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Return the standard deviation over the networks (n − 1); 0 for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def record(self) -> dict[str, Any]:
        """Return mean, std, n and the values, with "epoch": "best" for best epochs, and "diverged" if networks diverged."""
        label = {"epoch": "best"} if self.best_epoch else {}
        diverged = {"diverged": self.diverged} if self.diverged else {}
        numbers = {"mean": self.mean, "std": self.std, "n": len(self.values), "values": list(self.values)}
        return numbers | label | diverged

    def __str__(self) -> str:
        label = (", best epoch" if self.best_epoch else "") + (f", {self.diverged} diverged" if self.diverged else "")
        return f"{100 * self.mean:.2f} % ± {100 * self.std:.2f} (n = {len(self.values)}{label})"


def training_job(
    network: Network,
    theta: Tensor,
    images: Images,
    lr: float,
    protocol: EvaluationProtocol,
    generator: torch.Generator,
    *,
    precision: Precision = "fp32",
    stop: StopRequest | None = None,
    test: Callable[[Network, Tensor, Tensor], None] = lambda *_: None,
) -> Job[Tensor]:
    """Return a job that trains from `theta` (P,) on `images` by the protocol, with the initial learning rate `lr`.

    The job returns the final parameters (P,). After each epoch that is tested it calls `test` with the network in evaluation
    mode, its parameters (P,), and whether it has diverged, a bool tensor () on the device.
    """
    soft, ipc = images.labels.is_floating_point(), 0
    if protocol.cutmix:  # as in NCFM, the only protocol whose tests depend on the images per class
        images = images if soft else _with_soft_labels(network, theta, images)
        ipc = len(images) // images.labels.shape[1]
    test_interval = protocol.test_interval(soft=soft, ipc=ipc)
    student, optimizer = _student(network, images, precision), _optimizer(protocol, lr)
    velocity = optimizer.start(theta)
    run = Epochs(student, images, optimizer, _augment(protocol), track_of(network), cutmix=protocol.cutmix)
    statistics = [tensor.to(theta.device) for tensor in statistics_of(network)]
    losses: list[Tensor] = []
    most, epoch = _epochs_at_once(images, protocol.batch_size), 0
    while epoch < protocol.total_epochs:
        raise_if_stopped(stop, "stopped during an evaluation; its networks are not kept")
        epochs = _epochs_without_a_pause(protocol, epoch, most, test_interval)
        theta, velocity, means, *statistics = run(
            theta, velocity, generator, *statistics, epochs=epochs, factor=protocol.lr_factor(epoch)
        )
        losses.append(means)
        epoch += epochs
        if protocol.is_tested(epoch, test_interval):
            test(in_evaluation(network, *statistics), theta, has_diverged(torch.cat(losses), theta, *statistics))
        if epoch == protocol.epochs_before_drop and protocol.loop == "public":
            velocity = torch.zeros_like(theta)
        yield
    return theta


def _with_soft_labels(network: Network, theta: Tensor, images: Images) -> Images:
    """Return `images` with probabilities as labels, as CutMix needs them: its targets are means of two labels.

    The number of classes is taken from the network's outputs, since a class may have no image.
    """
    with torch.no_grad():
        classes = network(theta, theta.new_zeros(2, *images.input_shape)).shape[1]
    return dataclasses.replace(images, labels=one_hot(images.labels, classes).to(theta.dtype))


def _optimizer(protocol: EvaluationProtocol, lr: float) -> Optimizer:
    if protocol.optimizer == "adamw":
        return AdamW(lr, protocol.weight_decay, protocol.batch_size)
    return Sgd(lr, protocol.momentum, protocol.weight_decay, protocol.batch_size)


def _augment(protocol: EvaluationProtocol) -> SiameseAugment | None:
    augment = augment_by_strategy(protocol.augment)
    if augment is None or not (protocol.combined or protocol.cutmix):
        return augment
    return (CombinedAugment if protocol.combined else FlipAndColorAugment)(augment.strategy)


def _epochs_at_once(images: Images, batch_size: int) -> int:
    """Return how many epochs to draw together.

    Stop requests are checked between two draws. On CUDA these epochs have about two dozen steps, since drawing augmentations
    together is faster. On a CPU the steps take longer than the draws.
    """
    steps = math.ceil(len(images) / batch_size)
    return max(1, _STEPS_DRAWN_AT_ONCE // steps) if images.labels.is_cuda else 1


def _epochs_without_a_pause(protocol: EvaluationProtocol, epoch: int, most: int, test_interval: int) -> int:
    """Return the number of epochs after `epoch`, at most `most`, until the next test, a change of the learning rate, or the end."""
    for following in range(epoch + 1, min(epoch + most, protocol.total_epochs)):
        if protocol.is_tested(following, test_interval) or protocol.lr_factor(following) != protocol.lr_factor(epoch):
            return following - epoch
    return min(most, protocol.total_epochs - epoch)


def has_diverged(losses: Tensor, *state: Tensor) -> Tensor:
    """Return whether a training has diverged, () bool on the device, without a synchronisation.

    It has if `losses` (epochs,) or `state` are not finite, or if a loss was far above that of random guessing and the last loss
    is above the first. (A network with norms may stay finite at any learning rate.)
    """
    finite = torch.stack([tensor.isfinite().all() for tensor in (losses, *state)]).all()
    return ~finite | ((losses.max() > _BEYOND_GUESSING) & (losses[-1] > losses[0]))


def _student(network: Network, images: Images, precision: Precision) -> Student:
    return student_for(network, images.labels.device, kind_of(images.labels, None), precision=precision)


class _Start(NamedTuple):
    """The start of a network's training."""

    theta: Tensor  # (P,)
    images: Images
    generator: torch.Generator  # of all later random numbers


def evaluate(
    network: Trainable,
    train: Callable[[torch.Generator], Images],
    test: Images,
    lr: float,
    protocol: EvaluationProtocol,
    *,
    num_networks: int,
    seed: int,
    indices: Sequence[int] = (),
    name: str = "evaluation",
    stop: StopRequest | None = None,
    precision: Precision = "fp32",
    at_once: int | None = None,
    memory_budget: str = AUTO,
) -> Accuracy:
    """Train `num_networks` new networks, each on the images `train(generator)`, and return their accuracies on `test`.

    The random numbers of network k depend only on (`seed`, "evaluation", *`indices`, k), and its result does not depend on the
    number of networks trained `at_once` (mtt_fast/training/concurrency.py). A network that diverges before its first test has
    accuracy 0; the result and a warning give the number of such networks. With `best_epoch`, one that diverges later keeps its best
    accuracy. Raises `Stopped` between two epochs after a stop request.
    """

    def start(k: int) -> _Start:
        generator = generator_for(seed, "evaluation", *indices, k)
        return _Start(network.init(generator).to(test.labels.device), train(generator), generator)

    first = start(0)

    def job(k: int) -> Job[tuple[float, bool]]:
        theta, images, generator = first if k == 0 else start(k)
        num_correct: list[Tensor] = []
        diverged: list[Tensor] = []

        def test_network(trained: Network, theta: Tensor, has_diverged: Tensor) -> None:
            num_correct.append(count_correct(trained, theta, test).masked_fill(has_diverged, 0))
            diverged.append(has_diverged)

        yield from training_job(
            network, theta, images, lr, protocol, generator, precision=precision, stop=stop, test=test_network
        )
        yield
        return int(torch.stack(num_correct).max()) / len(test), bool(torch.stack(diverged).all())

    device, images = test.labels.device, first.images
    concurrency = concurrency_for(
        network, _student(network, images, precision), images.input_shape, device,
        batch=images.num_crops * min(protocol.batch_size, len(images)), num_jobs=num_networks, at_once=at_once,
        memory_budget=memory_budget,
    )  # fmt: skip
    values, num_diverged = [0.0] * num_networks, 0
    with tqdm(total=num_networks, desc=name, unit="network", leave=False) as bar:
        for k, (value, diverged) in run_concurrently((job(k) for k in range(num_networks)), concurrency, device):
            values[k] = value
            num_diverged += diverged
            bar.update()
    if num_diverged:
        log.warning(
            "%s: %d of %d networks diverged at the learning rate %.3g and count as 0 %%; a smaller one may do",
            name, num_diverged, num_networks, lr,
        )  # fmt: skip
    return Accuracy(tuple(values), protocol.best_epoch, num_diverged)
