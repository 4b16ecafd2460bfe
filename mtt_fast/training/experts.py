"""Train an expert by SGD or SAM on real images, and return its parameters after every epoch.

This is the first half of the method ("buffer.py" in the public code). Expert i depends only on (seed, i).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mtt_fast.augmentation.siamese import augment_by_strategy
from mtt_fast.engine.students.choice import student_for
from mtt_fast.engine.students.protocol import Student
from mtt_fast.kernels import Precision
from mtt_fast.networks.flat_module import in_evaluation, statistics_of, track_of
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.interrupts import StopRequest, raise_if_stopped
from mtt_fast.runtime.prefetch import download
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.accuracy import accuracy, count_correct
from mtt_fast.training.concurrency import Job
from mtt_fast.training.curriculum import EVERY, Curriculum
from mtt_fast.training.epochs import Epochs
from mtt_fast.training.images import RealImages
from mtt_fast.training.optimizers import Sgd
from mtt_fast.training.sharpness import SharpnessAware, sharpness_aware


@dataclass(frozen=True)
class ExpertTraining:
    """Hyperparameters of the experts' training, the same for all experts of a folder."""

    train_epochs: int = 50
    lr: float = 0.01
    mom: float = 0.0
    l2: float = 0.0
    decay: bool = False
    batch_size: int = 256
    augment: str = "color_crop_cutout_flip_scale_rotate"
    rho_max: float = 0.0
    rho_min: float = 0.0
    alpha: float = 0.0
    adaptive: bool = False
    curriculum: Curriculum | None = None
    """chooses the images of each epoch; None for all"""

    def record(self) -> dict[str, Any]:
        """Return the hyperparameters for the metadata of an expert."""
        record = {name: value for name, value in vars(self).items() if name != "curriculum"}
        return record | (self.curriculum.record() if self.curriculum else {})


def expert_job(
    images: RealImages,
    network: Trainable,
    training: ExpertTraining,
    *,
    seed: int,
    index: int,
    precision: Precision = "fp32",
    bar: tqdm | None = None,
    stop: StopRequest | None = None,
) -> Job[tuple[Tensor, list[float]]]:
    """Return the training of expert `index` as a job that yields after every epoch.

    The job returns the parameters (train_epochs + 1, P), float32 on the CPU, and the test accuracy of each row.
    """
    generator = generator_for(seed, "expert", index)
    theta = network.init(generator).to(images.train.labels.device)
    student = student_for(network, theta.device, precision=precision)
    augment = augment_by_strategy(training.augment)
    parameters = torch.empty(training.train_epochs + 1, network.num_parameters)
    parameters[0] = theta
    statistics = [tensor.to(theta.device) for tensor in statistics_of(network)]
    accuracies = [accuracy(in_evaluation(network, *statistics), theta, images.test)]

    def read(epoch: int, results: Callable[[], tuple[Tensor, ...]]) -> None:
        """Wait for the results of an epoch, and store them."""
        trained, num_correct, loss = results()
        parameters[epoch + 1] = trained
        accuracies.append(int(num_correct) / len(images.test))
        if bar is not None:
            with bar.get_lock():  # several threads update it
                bar.set_postfix(
                    expert=index, loss=f"{float(loss):.3f}", accuracy=f"{accuracies[-1]:.3f}", refresh=False
                )
                bar.update()

    unread: list[Callable[[], None]] = []
    for stage in _stages(range(training.train_epochs), training, student):
        if stage.new_optimizer:
            velocity = torch.zeros_like(theta)
        run_epochs = Epochs(stage.student, images.train, stage.optimizer, augment, track_of(network), stage.subset)
        for epoch in stage.epochs:
            raise_if_stopped(
                stop, f"stopped in expert {index}; those that were finished are saved; the same command continues"
            )
            theta, velocity, loss, *statistics = run_epochs(theta, velocity, generator, *statistics)
            num_correct = count_correct(in_evaluation(network, *statistics), theta, images.test)
            for read_last in unread:  # read the previous epoch's results while a GPU computes this one
                read_last()
            unread = [partial(read, epoch, download(theta, num_correct, loss))]
            yield
    for read_last in unread:
        read_last()
    return parameters, accuracies


class _Stage(NamedTuple):
    """Successive epochs with the same settings."""

    epochs: Iterator[int]
    student: Student | SharpnessAware
    optimizer: Sgd
    new_optimizer: bool
    subset: Tensor | None  # indices of the images of an epoch; None for all


def _stages(epochs: Iterable[int], training: ExpertTraining, student: Student) -> Iterator[_Stage]:
    """Yield the stages of the `epochs` of a training. Take the epochs of a stage before you take the next stage."""
    curriculum, last_lr = training.curriculum, None
    for (lr, rho, shares), epochs_of_stage in itertools.groupby(epochs, partial(_settings, training)):
        yield _Stage(
            epochs_of_stage,
            sharpness_aware(student, rho, training.alpha, adaptive=training.adaptive),
            Sgd(lr, training.mom, training.l2, training.batch_size),
            lr != last_lr,
            None if curriculum is None or shares == EVERY else curriculum.between(*shares),
        )
        last_lr = lr


def _settings(training: ExpertTraining, epoch: int) -> tuple[float, float, tuple[float, float]]:
    """Return learning rate, radius of SAM and `Curriculum.shares` of the images in `epoch`, counted from 0."""
    shares = EVERY if training.curriculum is None else training.curriculum.shares(epoch)
    if training.decay and epoch >= training.train_epochs // 2 + 2:  # as in the public code
        return training.lr * 0.1, training.rho_min, shares
    return training.lr, training.rho_max, shares


def expert_steps(
    images: RealImages,
    network: Trainable,
    training: ExpertTraining,
    *,
    seed: int,
    index: int,
    precision: Precision = "fp32",
) -> Iterator[Tensor]:
    """Yield the parameters (P,), on the device, before the first and after each step of expert `index`, without end.

    After the last step of an epoch they equal the row that `expert_job` returns.
    """
    generator = generator_for(seed, "expert", index)
    theta = network.init(generator).to(images.train.labels.device)
    student = student_for(network, theta.device, precision=precision)
    augment = augment_by_strategy(training.augment)
    yield theta
    for stage in _stages(itertools.count(), training, student):
        if stage.new_optimizer:
            velocity = torch.zeros_like(theta)
        run_epochs = Epochs(stage.student, images.train, stage.optimizer, augment, subset=stage.subset)
        for _ in stage.epochs:
            for step in run_epochs.chunks(theta, velocity, generator, at_once=1):
                theta, velocity = step.theta, step.velocity
                yield theta
