"""Evaluate a small set by the protocols of the field: train networks on it, and test them.

Accuracies can only be compared under the same protocol, so the log describes it (`EvaluationProtocol.describe`).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm import tqdm

from mtt_fast.augmentation.combined import CombinedAugment
from mtt_fast.augmentation.flip_and_color import FlipAndColorAugment
from mtt_fast.augmentation.siamese import SiameseAugment, augment_by_strategy
from mtt_fast.engine.arguments import kind_of
from mtt_fast.engine.student import Student
from mtt_fast.engine.student_choice import student_for
from mtt_fast.errors import InputError
from mtt_fast.kernels import Precision
from mtt_fast.networks.flat_module import in_evaluation, statistics_of, track_of
from mtt_fast.networks.protocol import Network, Trainable
from mtt_fast.runtime.interrupts import StopRequest, raise_if_stopped
from mtt_fast.runtime.memory_info import AUTO
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.adamw import AdamW
from mtt_fast.training.concurrency import Job, concurrency_for, run_concurrently
from mtt_fast.training.images import Images
from mtt_fast.training.sgd import Sgd, count_correct, epochs_on

log = logging.getLogger(__name__)

_STEPS_DRAWN_AT_ONCE = 24
_TEST_INTERVAL, _TEST_INTERVAL_OF_SOFT = 10, 20  # epochs between tests for the best epoch, as in DD-Ranking
# The same in NCFM's code for 2000 epochs, and for as many with 50 and more images per class
_TEST_INTERVAL_IN_NCFM, _TEST_INTERVAL_OF_MANY, _MANY_IMAGES = 100, 2, 50
_FEWEST_TESTS = 8  # of fewer epochs; in NCFM's configurations they are 6 in 300 epochs, and 8 in 40
# The last learning rate of the loop "cosine", as a share of the first, as in SelMatch's code
_MIN_LR_FACTOR = 0.01


@dataclass(frozen=True)
class EvaluationProtocol:
    """A protocol to train a network on a small set and to test it. The defaults are MTT's (its `evaluate_synset`).

    Unless `lr`, `loop` and `optimizer` say otherwise, training is SGD at the set's learning rate, and at a tenth of it after half of
    the epochs.
    """

    epochs: int = 1000
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 256
    augment: str = "color_crop_cutout_flip_scale_rotate"
    name: str = "mtt"
    loop: Literal["public", "scheduler", "cosine", "fifths"] = "public"
    """public: `epochs` + 1 epochs; after `epochs` // 2 + 2 of them a new optimizer at a tenth of the rate.
    scheduler: `epochs` epochs; after `epochs` // 2 of them a tenth of the rate in the same optimizer.
    cosine: `epochs` + 1 epochs; the rate falls to a hundredth along half a period of the cosine.
    fifths: `epochs` epochs; half the rate after each fifth of them"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """adamw: torch.optim.AdamW, which has no `momentum`"""
    lr: float | None = None
    """learning rate in place of the set's, see `initial_lr`"""
    combined: bool = False
    """augment each distilled image by an operation of its own, and real images in the set by a crop and a flip
    (mtt_fast/augmentation/combined.py)"""
    cutmix: bool = False
    """mix the images of half the batches by CutMix, and augment each image by a flip, colors and another operation
    (mtt_fast/augmentation/flip_and_color.py)"""
    best_epoch: bool = False
    """report the highest accuracy of all tests (`test_interval`), not the accuracy after the last epoch"""

    @property
    def total_epochs(self) -> int:
        """Return the number of epochs of a training."""
        return self.epochs + (self.loop in ("public", "cosine"))

    @property
    def epochs_before_drop(self) -> int:
        """Return the number of epochs before the learning rate is divided by ten. With the loop "cosine" this never happens."""
        return self.epochs // 2 + (2 if self.loop == "public" else 0)

    def initial_lr(self, set_lr: float) -> float:
        """Return the learning rate of the first epoch: the protocol's, or else the set's, `set_lr`."""
        return set_lr if self.lr is None else self.lr

    def lr_factor(self, epoch: int) -> float:
        """Return the learning rate in `epoch`, counted from 0, as a multiple of the first epoch's."""
        if self.loop == "cosine":
            return _MIN_LR_FACTOR + (1 - _MIN_LR_FACTOR) * (1 + math.cos(math.pi * epoch / max(self.epochs, 1))) / 2
        if self.loop == "fifths":
            return 0.5 ** sum(epoch >= fifth * self.epochs // 5 for fifth in range(1, 5))
        return 1.0 if epoch < self.epochs_before_drop else 0.1

    def test_interval(self, *, soft: bool, ipc: int) -> int:
        """Return the number of epochs between tests for the best epoch, with `soft` labels or class indices and `ipc` images per class."""
        if self.loop != "fifths":
            return _TEST_INTERVAL_OF_SOFT if soft else _TEST_INTERVAL
        if self.epochs < _FEWEST_TESTS * _TEST_INTERVAL_IN_NCFM:
            return max(1, self.epochs // _FEWEST_TESTS)
        return _TEST_INTERVAL_IN_NCFM if ipc < _MANY_IMAGES else _TEST_INTERVAL_OF_MANY

    def is_tested(self, epoch: int, *, soft: bool, ipc: int) -> bool:
        """Return whether the network is tested after `epoch` (counted from 1); see `test_interval`."""
        return epoch == self.total_epochs or (self.best_epoch and epoch % self.test_interval(soft=soft, ipc=ipc) == 0)

    def describe(self) -> str:
        """Return the protocol in words, on one line."""
        sgd = f"SGD with momentum {self.momentum:g} and"
        optimizer = f"{sgd if self.optimizer == 'sgd' else 'AdamW with'} weight decay {self.weight_decay:g}"
        drop = {
            "public": f"a tenth of it after {self.epochs_before_drop} epochs in a new optimizer",
            "scheduler": f"a tenth of it after {self.epochs_before_drop} epochs in the same optimizer",
            "cosine": f"which falls to {_MIN_LR_FACTOR:g} of it along a cosine",
            "fifths": "half of it after each fifth of the epochs",
        }[self.loop]
        lr = "the set's learning rate" if self.lr is None else f"learning rate {self.lr:g}"
        return (
            f"protocol {self.name}: {self.total_epochs} epochs in batches of {self.batch_size}, {optimizer}, {lr}, "
            f"{drop}, augmentation {self.augment}{self._describe_augmentation()}; {self._describe_reported_epoch()}"
        )

    def _describe_augmentation(self) -> str:
        """Return how the operations of `augment` are used, as the end of a phrase."""
        how = ""
        if augment_by_strategy(self.augment) is not None:
            if self.combined:
                how = ", an operation of its own for each image, for real images in a distilled set a crop and a flip"
            elif self.cutmix:
                how = " (flip and colors of all images, one of the others in each step, no cutout)"
        return f"{how}, CutMix in half the steps" if self.cutmix else how

    def _describe_reported_epoch(self) -> str:
        if not self.best_epoch:
            return "the last epoch is reported"
        every, of_many = (self.test_interval(soft=False, ipc=ipc) for ipc in (1, _MANY_IMAGES))
        tests = f"of every {every}th epoch ({_TEST_INTERVAL_OF_SOFT}th with soft labels)"
        if self.loop == "fifths":
            many = f" ({of_many} with {_MANY_IMAGES} and more images per class)" if of_many < every else ""
            tests = f"after every {every} epochs{many}"
        return f"the BEST {tests} and the last is reported, chosen on the test images"

    def record(self) -> dict[str, Any]:
        """Return the settings, and their description, as a record."""
        return dataclasses.asdict(self) | {"text": self.describe()}


PROTOCOLS = {
    "mtt": EvaluationProtocol(),
    "datm": EvaluationProtocol(name="datm", batch_size=128),
    "ddranking": EvaluationProtocol(name="ddranking", loop="scheduler", best_epoch=True),
    "selmatch": EvaluationProtocol(name="selmatch", batch_size=128, loop="cosine", lr=0.1, combined=True),
    "ncfm": EvaluationProtocol(
        name="ncfm", epochs=2000, batch_size=128, loop="fifths", optimizer="adamw", lr=1e-3, weight_decay=0.01,
        cutmix=True, best_epoch=True,
    ),
}  # fmt: skip
"""Protocols by name.

mtt: the public MTT code, and FTD, TESLA and ATT, which share it.
datm: the same loop in batches of 128, as DATM's configurations say (soft labels come with the set).
    Its authors' numbers are of the set with the highest accuracy on the test images: `best.safetensors` of a run.
ddranking: DD-Ranking 0.2, which reports the best epoch. For a set without a learning rate it tries five and keeps the one
    that is best on the test images; here the caller gives the rate.
selmatch: SelMatch's code, for its sets of hundreds of images per class, on ResNet18BN. Its authors' numbers are of the set with
    the highest accuracy on the test images, as DATM's.
ncfm: NCFM's code with its configurations, whose weight decay does not reach the optimizer: it is torch.optim.AdamW's own.
"""


def published_protocol(name: str) -> EvaluationProtocol:
    """Return the protocol called `name`, with its published settings. Raises `InputError` for another name."""
    protocol = PROTOCOLS.get(name)
    if protocol is None:
        raise InputError(f"`protocol` {name}: expected {', '.join(PROTOCOLS)}")
    return protocol


def protocol_by_name(
    name: str, *, epochs: int | None, batch_size: int | None, augment: str, best_epoch: bool
) -> EvaluationProtocol:
    """Return the protocol called `name` with this augmentation and, if given, these `epochs` and this batch size.

    `best_epoch` reports the best epoch even if the protocol reports the last. Raises `InputError` for an unknown name.
    """
    published = published_protocol(name)
    protocol = dataclasses.replace(
        published,
        epochs=published.epochs if epochs is None else epochs,
        batch_size=published.batch_size if batch_size is None else batch_size,
        augment=augment,
        best_epoch=best_epoch or published.best_epoch,
    )
    if protocol.total_epochs < 1:
        raise InputError(f"`epoch_eval_train` {epochs}: expected at least 1 with `protocol` {name}")
    return protocol


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
        return {
            "mean": self.mean,
            "std": self.std,
            "n": len(self.values),
            "values": list(self.values),
            **label,
            **diverged,
        }

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

    The job returns the final parameters (P,), and calls `test` after each epoch to test, with the network in evaluation mode, its
    parameters (P,), and whether it has diverged (), bool, on the device.
    """
    soft, classes = images.labels.is_floating_point(), _num_classes(network, theta, images)
    ipc = len(images) // classes
    if protocol.cutmix and not soft:  # CutMix needs soft labels, as its targets are means of two labels
        images = dataclasses.replace(images, labels=one_hot(images.labels, classes).to(theta.dtype))
    student, optimizer = _student(network, images, precision), _optimizer(protocol, lr)
    velocity = optimizer.start(theta)
    run = epochs_on(student, images, optimizer, _augment(protocol), track_of(network), cutmix=protocol.cutmix)
    statistics = [tensor.to(theta.device) for tensor in statistics_of(network)]
    losses: list[Tensor] = []
    most, epoch = _epochs_at_once(images, protocol.batch_size), 0
    while epoch < protocol.total_epochs:
        raise_if_stopped(stop, "stopped during an evaluation; its networks are not kept")
        epochs = _epochs_without_a_pause(protocol, epoch, most, soft=soft, ipc=ipc)
        theta, velocity, means, *statistics = run(
            theta, velocity, generator, *statistics, epochs=epochs, factor=protocol.lr_factor(epoch)
        )
        losses.append(means)
        epoch += epochs
        if protocol.is_tested(epoch, soft=soft, ipc=ipc):
            test(in_evaluation(network, *statistics), theta, has_diverged(torch.cat(losses), theta, *statistics))
        if epoch == protocol.epochs_before_drop and protocol.loop == "public":
            velocity = torch.zeros_like(theta)
        yield
    return theta


def _num_classes(network: Network, theta: Tensor, images: Images) -> int:
    """Return the number of outputs of `network`; labels do not tell the number of classes, as a class may have no image."""
    with torch.no_grad():
        return network(theta, theta.new_zeros(2, *images.input_shape)).shape[1]


def _optimizer(protocol: EvaluationProtocol, lr: float) -> Sgd | AdamW:
    if protocol.optimizer == "adamw":
        return AdamW(lr, protocol.weight_decay, protocol.batch_size)
    return Sgd(lr, protocol.momentum, protocol.weight_decay, protocol.batch_size)


def _augment(protocol: EvaluationProtocol) -> SiameseAugment | None:
    augment = augment_by_strategy(protocol.augment)
    if augment is None or not (protocol.combined or protocol.cutmix):
        return augment
    return (CombinedAugment if protocol.combined else FlipAndColorAugment)(augment.strategy)


def _epochs_at_once(images: Images, batch_size: int) -> int:
    """Return how many epochs to draw together. A stop request is noticed between two draws.

    On CUDA they have about two dozen steps, since augmentations are drawn faster together. On a CPU the steps take longer than the
    draws.
    """
    steps = math.ceil(len(images) / batch_size)
    return max(1, _STEPS_DRAWN_AT_ONCE // steps) if images.labels.is_cuda else 1


def _epochs_without_a_pause(protocol: EvaluationProtocol, epoch: int, most: int, *, soft: bool, ipc: int) -> int:
    """Return the number of epochs after `epoch`, at most `most`, until the next test, a change of the learning rate, or the end."""
    for following in range(epoch + 1, min(epoch + most, protocol.total_epochs)):
        is_tested = protocol.is_tested(following, soft=soft, ipc=ipc)
        if is_tested or protocol.lr_factor(following) != protocol.lr_factor(epoch):
            return following - epoch
    return min(most, protocol.total_epochs - epoch)


def has_diverged(losses: Tensor, *state: Tensor) -> Tensor:
    """Return whether a training has diverged, () bool, without waiting for the device.

    It has if `losses` (epochs,) or `state` are not finite, or if a loss was far above that of guessing and the last loss is above the
    first. (A normalised network may stay finite at any learning rate.)
    """
    finite = torch.stack([tensor.isfinite().all() for tensor in (losses, *state)]).all()
    return ~finite | ((losses.max() > _BEYOND_GUESSING) & (losses[-1] > losses[0]))


_BEYOND_GUESSING = 100.0  # the loss of guessing among a million classes is 14


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
