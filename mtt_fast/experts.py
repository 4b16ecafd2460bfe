"""Train experts on real images and record their parameters after every epoch: `python -m mtt_fast.experts`.

The first half of the method ("buffer.py" in the public code): plain SGD with augmentation, constant learning rate.
Expert i depends only on (seed, i), and is written as soon as it is trained, so a stopped run continues where it was.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mtt_fast.augmentation.siamese import augment_by_strategy
from mtt_fast.commands import cli, parsing
from mtt_fast.commands.option_fields import Group, Needs, Role
from mtt_fast.commands.options import (
    Count,
    CountFromZero,
    Networks,
    PositiveShare,
    Rate,
    RateOrZero,
    RateOrZeroOrNone,
    Share,
    StoreDtype,
    TrainingOptions,
    TrueOrFalse,
    buffer_folder,
)
from mtt_fast.engine.student_choice import describe_numerics, precision_on, student_for
from mtt_fast.errors import InputError
from mtt_fast.interop.order import check_order, read_order
from mtt_fast.kernels import Precision
from mtt_fast.networks.flat_module import in_evaluation, statistics_of, track_of
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.interrupts import Stopped, StopRequest, stop_request
from mtt_fast.runtime.memory_info import AUTO
from mtt_fast.runtime.numerics import numerics
from mtt_fast.runtime.prefetch import download
from mtt_fast.runtime.provenance import choose_device, versions
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.storage.expert_checks import check_belongs, check_same_training
from mtt_fast.storage.identity import DatasetIdentity
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.run_folder import only_writer_of_experts
from mtt_fast.storage.trajectories import ExpertMetadata, TrajectoryStore, experts_in, write_expert
from mtt_fast.training.concurrency import Job, concurrency_for, result_of, run_concurrently
from mtt_fast.training.curriculum import EVERY, Curriculum
from mtt_fast.training.images import RealImages, real_images
from mtt_fast.training.sgd import Epoch, Sgd, accuracy, chunks_on, count_right, epoch_on
from mtt_fast.training.sharpness import sharpness_aware

log = logging.getLogger(__name__)

STORE_DTYPES: dict[StoreDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    """the images of each epoch; None for all"""

    def record(self) -> dict[str, Any]:
        """Return the hyperparameters as the metadata of an expert hold them."""
        record = {name: value for name, value in vars(self).items() if name != "curriculum"}
        return record | (self.curriculum.record() if self.curriculum else {})


@dataclass(frozen=True)
class ExpertTrainingOptions(TrainingOptions):
    """Options of the experts' training in every command that trains experts."""

    GROUP: ClassVar[Group] = Group.EXPERTS

    IGNORED: ClassVar[dict[str, str]] = {
        "load_all": "trajectories are memory-mapped; nothing is loaded whole",
        "max_files": "there is one file an expert; limit them with --max_experts",
        "save_interval": "every expert is saved as soon as it is trained",
        "force_save": "every evaluation is saved",
        "lr_init": "nothing reads it in the public code; the learned rate starts at --lr_teacher, here as there",
    }
    """Flags of the public code that do nothing here, with the reasons: accepted, and named in the log."""

    train_epochs: Annotated[Count, Role.EXTENT] = 50
    """epochs of each expert"""
    mom: Share = 0.0
    """momentum of the experts"""
    l2: RateOrZero = 0.0
    """weight decay of the experts"""
    decay: bool = False
    """divide the experts' learning rate by ten after half of the epochs"""
    rho_max: RateOrZero = 0.0
    """radius of SAM for the experts at the full learning rate; 0: plain SGD. FTD and DATM use 0.01"""
    rho_min: Annotated[RateOrZeroOrNone, Needs("rho_max")] = None
    """radius of SAM after --decay has divided the learning rate; if not given, --rho_max"""
    alpha: Annotated[RateOrZero, Needs("rho_max")] = 0.0
    """weight of GSAM: subtract this much of the experts' plain gradient, orthogonal to SAM's gradient. FTD uses 0.3 or 1"""
    adaptive: Annotated[TrueOrFalse, Needs("rho_max")] = True
    """scale SAM's radius by the size of each parameter (ASAM), as FTD's code does"""

    def training_at(self, lr: float, batch_size: int) -> ExpertTraining:
        """Return the hyperparameters of an expert's training. Raises `InputError` for values that do not go together."""
        return checked(
            ExpertTraining(
                train_epochs=self.train_epochs,
                lr=lr,
                mom=self.mom,
                l2=self.l2,
                decay=self.decay,
                batch_size=batch_size,
                augment=self.strategy,
                rho_max=self.rho_max,
                rho_min=self.rho_max if self.rho_min is None else self.rho_min,
                alpha=self.alpha,
                adaptive=self.adaptive,
            )
        )


@dataclass(frozen=True)
class ExpertOptions(ExpertTrainingOptions):
    """Train experts and record their trajectories."""

    IGNORED: ClassVar[dict[str, str]] = ExpertTrainingOptions.IGNORED | {
        "batch_real": "it changes no expert in the public code either; --batch_train is the batch size of their training",
    }

    num_experts: Annotated[Networks, Role.EXTENT] = 100
    """number of experts; missing ones are trained"""
    lr_teacher: Rate = 0.01
    """learning rate of the experts"""
    batch_train: Count = 256
    """batch size of the experts' training"""
    buffer_path: Annotated[str, Role.LOCATION, Group.OUTPUT] = "buffers"
    """folder for the trajectories: PATH/DATASET/MODEL/expert_NNNN.safetensors"""
    store_dtype: Annotated[StoreDtype, Group.OUTPUT] = "float32"
    """number format of the recorded parameters; bfloat16 takes half the disk space"""

    sort_method: Annotated[str | None, Role.LOCATION] = None
    """file with the training images of each class in the order of their difficulty, for PAD's curriculum: the indices, the easiest
    first, as in PAD's data_indices/CIFAR10_GraNd.pt"""
    init_ratio: Annotated[PositiveShare, Needs("sort_method")] = 0.75
    """share of each class's images, the easiest, in the first epoch"""
    add_end_epoch: Annotated[CountFromZero, Needs("sort_method")] = 20
    """first epoch with all images; the share rises until then. Epochs count from 0"""
    rm_epoch_first: Annotated[CountFromZero, Needs("sort_method")] = 40
    """last epoch with all images"""
    rm_epoch_second: Annotated[CountFromZero, Needs("sort_method")] = 60
    """last epoch that leaves out --rm_easy_ratio_first"""
    rm_easy_ratio_first: Annotated[Share, Needs("sort_method")] = 0.1
    """share of each class's images, the easiest, that epochs after --rm_epoch_first leave out"""
    rm_easy_ratio_second: Annotated[Share, Needs("sort_method")] = 0.2
    """likewise, after --rm_epoch_second"""

    def training(self) -> ExpertTraining:
        """Return the hyperparameters of an expert's training, with the curriculum's file read.

        Raises `InputError` for values that do not go together, and a file that is broken.
        """
        plain = self.training_at(self.lr_teacher, self.batch_train)
        if self.sort_method is None:
            return plain
        if not Path(self.sort_method).is_file():
            raise InputError(
                f"--sort_method {self.sort_method}: expected a file such as data_indices/CIFAR10_GraNd.pt of PAD's code, found none; "
                "mend the path"
            )
        curriculum = Curriculum(
            read_order(self.sort_method),
            init_ratio=self.init_ratio,
            add_end_epoch=self.add_end_epoch,
            rm_epoch_first=self.rm_epoch_first,
            rm_epoch_second=self.rm_epoch_second,
            rm_easy_ratio_first=self.rm_easy_ratio_first,
            rm_easy_ratio_second=self.rm_easy_ratio_second,
        )
        return replace(plain, curriculum=curriculum)


def checked(training: ExpertTraining) -> ExpertTraining:
    """Return `training` with `adaptive` off where there is no radius; raise `InputError` for values that do not go together."""
    if training.rho_min > training.rho_max or (training.rho_min != training.rho_max and not training.decay):
        raise InputError(
            f"--rho_max {training.rho_max}, --rho_min {training.rho_min}: expected the same value twice, or --decay and a "
            "smaller --rho_min; the radius falls as the learning rate does"
        )
    if not training.rho_max and training.alpha:
        raise InputError(f"--alpha {training.alpha}: expected --rho_max above 0 with it")
    return training if training.rho_max else replace(training, adaptive=False)


def train_missing_experts(
    folder: Path,
    count: int,
    images: RealImages,
    network: Trainable,
    training: ExpertTraining,
    *,
    seed: int,
    dtype: torch.dtype | None = None,
    precision: Precision = "fp32",
    at_once: int | None = None,
    memory_budget: str = AUTO,
) -> TrajectoryStore:
    """Train those of experts 0 … `count` − 1 that `folder` lacks; return the store of all experts in `folder`.

    They are stored as `dtype`; with None as the experts already in `folder`, else as float32. Several are trained at the
    same time where one does not fill the device, to the same result (mtt_fast/training/concurrency.py).
    Raises `InputError` if an expert in `folder` is of another network or other images or was trained otherwise, or if another
    process trains experts there; `Stopped` on Ctrl-C or SIGTERM.
    """
    request = _Request(count, images, network, training, seed, dtype, precision)
    if not _missing(folder, request):
        return TrajectoryStore(folder)
    with only_writer_of_experts(folder):
        missing = _missing(folder, request)  # another process may have been faster
        log.info("%d experts to train, %d there: %s", len(missing), count - len(missing), folder)
        _train(folder, missing, request, at_once, memory_budget)
    return TrajectoryStore(folder)


class _Request(NamedTuple):
    """The experts that a folder is to hold."""

    experts: int
    images: RealImages
    network: Trainable
    training: ExpertTraining
    seed: int
    dtype: torch.dtype | None
    precision: Precision


def _missing(folder: Path, request: _Request) -> list[int]:
    """Return the numbers of the experts that `folder` lacks. Raises `InputError` if one in `folder` is not as requested."""
    present = experts_in(folder)
    missing = _numbers_missing(present, request.experts)
    if present:
        check_trained_alike(
            present, request.network, request.images.identity, request.training, request.seed,
            request.dtype or present.dtype(0), request.precision, more=bool(missing),
        )  # fmt: skip
    return missing


def _numbers_missing(present: TrajectoryStore | None, count: int) -> list[int]:
    """Return those of the numbers 0 … `count` − 1 of which there is no expert `present`."""
    return [index for index in range(count) if present is None or index not in present.indices]


def check_room_for_missing(folder: Path, count: int) -> None:
    """Raise `InputError` if `folder` lacks some of experts 0 … `count` − 1 and they cannot be written there."""
    if _numbers_missing(experts_in(folder), count):
        check_output_folder(folder, "choose another `buffer_path`")


def check_trained_alike(
    present: TrajectoryStore,
    network: Trainable,
    identity: DatasetIdentity,
    training: ExpertTraining,
    seed: int,
    dtype: torch.dtype,
    precision: str,
    *,
    more: bool = True,
) -> None:
    """Check that all `present` experts are of `network` and the images of `identity`, and were trained by these settings.

    Raises `InputError` that names the first that is not, and where `more` are to be added to compressed experts.
    """
    if more and present.course(0) is not None:
        raise InputError(
            f"{present.folder}: holds {len(present)} compressed experts, to which none can be added; give --num_experts "
            f"{len(present)} or less, or the --buffer_path of whole experts"
        )
    for expert in range(len(present)):
        check_belongs(present, expert, network, identity)
        check_same_training(present, expert, training.record(), seed, dtype, precision)


def _train(folder: Path, missing: list[int], request: _Request, at_once: int | None, memory_budget: str) -> None:
    """Train the experts with the numbers `missing` and write each as soon as it is trained."""
    images, network, training, precision = request.images, request.network, request.training, request.precision
    present = TrajectoryStore(folder)
    dtype = request.dtype or (present.dtype(0) if len(present) else torch.float32)
    device, training_images = images.train.labels.device, images.train
    concurrency = concurrency_for(
        network, student_for(network, device, precision=precision), training_images.pixels.shape[1:], device,
        batch=min(training.batch_size, len(training_images)), jobs=max(1, len(missing)), at_once=at_once,
        memory_budget=memory_budget,
    )  # fmt: skip
    with (
        stop_request() as stop,
        tqdm(total=len(missing) * training.train_epochs, unit="epoch", disable=not missing) as bar,
    ):

        def job(index: int) -> Job[tuple[Tensor, list[float]]]:
            return _training(images, network, training, precision, seed=request.seed, index=index, bar=bar, stop=stop)

        for position, (parameters, accuracies) in run_concurrently(map(job, missing), concurrency, device):
            metadata = ExpertMetadata.of(
                images.identity,
                network=network.describe(),
                layout=network.layout.describe(),
                hyperparameters=training.record(),
                seed=request.seed,
                accuracy=accuracies,
                versions=versions(),
                precision=precision,
            )
            write_expert(folder, missing[position], parameters, metadata, dtype)


def train_expert(
    images: RealImages,
    network: Trainable,
    training: ExpertTraining,
    *,
    seed: int,
    index: int,
    precision: Precision = "fp32",
) -> tuple[Tensor, list[float]]:
    """Return one expert's parameters (train_epochs + 1, P), float32, CPU, and its test accuracy at each of them."""
    return result_of(_training(images, network, training, precision, seed=seed, index=index))


def _training(
    images: RealImages,
    network: Trainable,
    training: ExpertTraining,
    precision: Precision,
    *,
    seed: int,
    index: int,
    bar: tqdm | None = None,
    stop: StopRequest | None = None,
) -> Job[tuple[Tensor, list[float]]]:
    """Train an expert as `train_expert` does, an epoch at a time."""
    generator = generator_for(seed, "expert", index)
    theta = network.init(generator).to(images.train.labels.device)
    student = student_for(network, theta.device, precision=precision)
    augment = augment_by_strategy(training.augment)
    parameters = torch.empty(training.train_epochs + 1, network.num_parameters)
    parameters[0] = theta
    statistics = [tensor.to(theta.device) for tensor in statistics_of(network)]
    accuracies = [accuracy(in_evaluation(network, *statistics), theta, images.test)]

    def epoch_in(stage: _Stage) -> Epoch:
        sgd = Sgd(stage.lr, training.mom, training.l2, training.batch_size)
        direction = sharpness_aware(student, stage.rho, training.alpha, adaptive=training.adaptive)
        return epoch_on(direction, images.train, sgd, augment, track_of(network), _visited(stage, training))

    def read(epoch: int, results: Callable[[], tuple[Tensor, ...]]) -> None:
        trained, right, loss = results()
        parameters[epoch + 1] = trained
        accuracies.append(int(right) / len(images.test))
        if bar is not None:
            with bar.get_lock():  # several threads count on it
                bar.set_postfix(
                    expert=index, loss=f"{float(loss):.3f}", accuracy=f"{accuracies[-1]:.3f}", refresh=False
                )
                bar.update()

    unread: list[Callable[[], None]] = []
    last: _Stage | None = None
    for epoch in range(training.train_epochs):
        stage = _stage_of(epoch, training)
        if last is None or stage.lr != last.lr:
            velocity = torch.zeros_like(theta)  # of a new optimiser
        if stage != last:
            run_epoch, last = epoch_in(stage), stage
        if stop:
            raise Stopped(
                f"stopped in expert {index}; those that were finished are saved; the same command continues",
                stop.signum,
            )
        theta, velocity, loss, *statistics = run_epoch(theta, velocity, generator, *statistics)
        right = count_right(in_evaluation(network, *statistics), theta, images.test)
        for read_last in unread:  # of the epoch before, only now that a GPU has this one to work on
            read_last()
        unread = [partial(read, epoch, download(theta, right, loss))]
        yield
    for read_last in unread:
        read_last()
    return parameters, accuracies


class _Stage(NamedTuple):
    """The settings that may change from one epoch to the next."""

    lr: float
    rho: float  # SAM's radius
    shares: tuple[float, float]  # of the images, see `Curriculum.shares`


def _stage_of(epoch: int, training: ExpertTraining) -> _Stage:
    """Return the stage of a training in an `epoch`, from 0."""
    shares = EVERY if training.curriculum is None else training.curriculum.shares(epoch)
    if training.decay and epoch >= training.train_epochs // 2 + 2:  # as in the public code
        return _Stage(training.lr * 0.1, training.rho_min, shares)
    return _Stage(training.lr, training.rho_max, shares)


def _visited(stage: _Stage, training: ExpertTraining) -> Tensor | None:
    """Return the indices of the images that an epoch visits; None for all."""
    if training.curriculum is None or stage.shares == EVERY:
        return None
    return training.curriculum.between(*stage.shares)


def expert_steps(
    images: RealImages,
    network: Trainable,
    training: ExpertTraining,
    *,
    seed: int,
    index: int,
    precision: Precision = "fp32",
) -> Iterator[Tensor]:
    """Yield the parameters (P,), on the device, before and after each step of expert `index`'s training, without an end.

    After the steps of an epoch the parameters are the row that `train_expert` records.
    """
    generator = generator_for(seed, "expert", index)
    theta = network.init(generator).to(images.train.labels.device)
    student = student_for(network, theta.device, precision=precision)
    augment = augment_by_strategy(training.augment)
    yield theta
    last: _Stage | None = None
    for epoch in itertools.count():
        stage = _stage_of(epoch, training)
        if last is None or stage.lr != last.lr:
            velocity = torch.zeros_like(theta)  # of a new optimiser
        if stage != last:
            sgd = Sgd(stage.lr, training.mom, training.l2, training.batch_size)
            direction = sharpness_aware(student, stage.rho, training.alpha, adaptive=training.adaptive)
            visited, last = _visited(stage, training), stage
            steps = chunks_on(direction, images.train, sgd, augment, visited=visited, at_once=1)
        for step in steps(theta, velocity, generator):
            theta, velocity = step.theta, step.velocity
            yield theta


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    options = parsing.parse(ExpertOptions, argv, "python -m mtt_fast.experts")
    training = options.training()
    device = choose_device(options.device)
    with numerics(device, options.precision):
        _run(options, training, device)


def _run(options: ExpertOptions, training: ExpertTraining, device: torch.device) -> None:
    data = options.load_data()
    if training.curriculum is not None:
        check_order(training.curriculum.order, data.train.labels, options.sort_method)
    network = options.network(data)
    folder = buffer_folder(options.buffer_path, data, options.model, zca=options.zca)
    check_room_for_missing(folder, options.num_experts)
    log.info("%s: %s", options.model, describe_numerics(device, network, options.precision))
    images = real_images(data, device, zca=options.zca)
    store = train_missing_experts(
        folder,
        options.num_experts,
        images,
        network,
        training,
        seed=options.seed,
        dtype=STORE_DTYPES[options.store_dtype],
        precision=precision_on(device, network, options.precision),
        at_once=options.networks_at_once,
    )
    final = torch.tensor([store.metadata(expert).accuracy[-1] for expert in range(len(store))])
    spread = f" ± {final.std():.4f}" if len(final) > 1 else ""
    log.info("%d experts in %s, test accuracy %.4f%s", len(store), folder, final.mean(), spread)


if __name__ == "__main__":
    sys.exit(cli.run(main))
