"""Train experts on real images and save their parameters after every epoch: `python -m mtt_fast.experts`.

The first half of the method ("buffer.py" in the public code). Expert i depends only on (seed, i), and is written as soon as it
is trained, so a stopped run continues where it was, and several processes can share the work. mtt_fast/training/experts.py trains
one.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mtt_fast.commands import cli, parsing
from mtt_fast.commands.option_fields import Group, Needs, Role
from mtt_fast.commands.options import (
    Count,
    CountFromZero,
    Networks,
    NonNegative,
    Positive,
    PositiveShare,
    Share,
    StoreDtype,
    TrainingOptions,
    TrueOrFalse,
    buffer_folder,
)
from mtt_fast.engine.students.choice import describe_numerics, precision_on, student_for
from mtt_fast.errors import InputError
from mtt_fast.interop.order import check_order, read_order
from mtt_fast.kernels import Precision
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.interrupts import StopRequest, raise_if_stopped, stop_request
from mtt_fast.runtime.memory_info import AUTO
from mtt_fast.runtime.numerics import numerics
from mtt_fast.runtime.provenance import choose_device, versions
from mtt_fast.storage.expert_checks import check_belongs, check_same_training, training_digest
from mtt_fast.storage.expert_locks import ExpertClaim, claim_expert
from mtt_fast.storage.expert_metadata import ExpertMetadata
from mtt_fast.storage.identity import DatasetIdentity
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.trajectories import TrajectoryStore, experts_in, write_expert
from mtt_fast.training.concurrency import Job, concurrency_for, run_concurrently
from mtt_fast.training.curriculum import Curriculum
from mtt_fast.training.experts import ExpertTraining, expert_job
from mtt_fast.training.images import RealImages, real_images

log = logging.getLogger(__name__)

_LOOK_AGAIN = 5.0  # seconds, until the experts that other processes train are looked for again

STORE_DTYPES: dict[StoreDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExpertTrainingOptions(TrainingOptions):
    """Options of the experts' training in every command that trains experts."""

    GROUP: ClassVar[Group] = Group.EXPERTS

    IGNORED: ClassVar[dict[str, str]] = {
        "load_all": "trajectories are memory-mapped; nothing is loaded whole",
        "max_files": "there is one file an expert; limit them with --max_experts",
        "save_interval": "every expert is saved as soon as it is trained",
        "force_save": "pictures are always drawn",
        "lr_init": "the public code does not use it either; the learned learning rate starts at --lr_teacher in both (SelMatch's code starts "
        "it at --lr_init: give that value as --lr_teacher)",
    }
    """Flags of the public code that do nothing here, with the reasons: accepted, and named in the log."""

    train_epochs: Annotated[Count, Role.EXTENT] = 50
    """epochs of each expert"""
    mom: Share = 0.0
    """momentum of the experts"""
    l2: NonNegative = 0.0
    """weight decay of the experts"""
    decay: bool = False
    """divide the experts' learning rate by ten after --train_epochs / 2 + 2 epochs, as the public code does"""
    rho_max: NonNegative = 0.0
    """radius of SAM for the experts at the full learning rate; 0: plain SGD. FTD and DATM use 0.01"""
    rho_min: Annotated[NonNegative | None, Needs("rho_max")] = None
    """radius of SAM after --decay has divided the learning rate; if not given, --rho_max"""
    alpha: Annotated[NonNegative, Needs("rho_max")] = 0.0
    """weight of GSAM: subtract this much of the experts' plain gradient, orthogonal to SAM's gradient. FTD uses 0.3 or 1"""
    adaptive: Annotated[TrueOrFalse, Needs("rho_max")] = True
    """scale SAM's radius by the size of each parameter (ASAM), as FTD's code does"""

    def remarks(self, given: Container[str]) -> list[str]:
        """See `CommonOptions.remarks`."""
        remarks = super().remarks(given)
        if "dsa" in given and not self.dsa:
            remarks.append(
                "--dsa False leaves images as they are; the public code's buffer.py then crops, scales or rotates them"
            )
        return remarks

    def training_at(self, lr: float, batch_size: int) -> ExpertTraining:
        """Return the hyperparameters of an expert's training. Raises `InputError` for values that do not go together."""
        rho_min = self.rho_max if self.rho_min is None else self.rho_min
        if rho_min > self.rho_max or (rho_min != self.rho_max and not self.decay):
            raise InputError(
                f"--rho_max {self.rho_max}, --rho_min {rho_min}: expected the same value for both, or --decay with a smaller "
                "--rho_min, since the radius falls when the learning rate does"
            )
        if not self.rho_max and self.alpha:
            raise InputError(f"--alpha {self.alpha}: expected --rho_max above 0 with it")
        return ExpertTraining(
            train_epochs=self.train_epochs,
            lr=lr,
            mom=self.mom,
            l2=self.l2,
            decay=self.decay,
            batch_size=batch_size,
            augment=self.strategy,
            rho_max=self.rho_max,
            rho_min=rho_min,
            alpha=self.alpha,
            adaptive=self.adaptive and self.rho_max > 0,
        )


@dataclass(frozen=True)
class ExpertOptions(ExpertTrainingOptions):
    """Train experts, networks on the real images, and save their trajectories: the parameters after every epoch."""

    IGNORED: ClassVar[dict[str, str]] = ExpertTrainingOptions.IGNORED | {
        "batch_real": "it changes no expert in the public code either; --batch_train is the batch size of their training",
    }

    num_experts: Annotated[Networks, Role.EXTENT] = 100
    """number of experts; missing ones are trained"""
    lr_teacher: Positive = 0.01
    """learning rate of the experts"""
    batch_train: Count = 256
    """batch size of the experts' training"""
    buffer_path: Annotated[str, Role.LOCATION, Group.OUTPUT] = "buffers"
    """folder for the trajectories: PATH/DATASET/MODEL/expert_NNNN.safetensors"""
    store_dtype: Annotated[StoreDtype, Group.OUTPUT] = "float32"
    """number format of the saved parameters; bfloat16 takes half the disk space"""

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
    """share of each class's images, the easiest, that epochs after --rm_epoch_second leave out"""

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
                "check the path"
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
    """Train the experts of 0 … `count` − 1 that are missing in `folder`; return the store of all experts in `folder`.

    They are stored as `dtype`; with None as the experts already in `folder`, else as float32. Several are trained at the
    same time where one does not fill the device, to the same result (mtt_fast/training/concurrency.py). Other processes may train
    experts in `folder` at the same time, if all settings are the same: this one trains those that no other one has claimed, and
    waits for the rest.
    Raises `InputError` if an expert in `folder` is of another network or other images or was trained otherwise, or if another
    process trains such experts or writes others there; `Stopped` on Ctrl-C or SIGTERM.
    """
    request = _Request(count, images, network, training, seed, dtype, precision)
    if missing := _missing(folder, request, set()):
        log.info("%d experts to train, %d there: %s", len(missing), count - len(missing), folder)
        _train(folder, missing, request, at_once, memory_budget)
    return TrajectoryStore(folder)


def first_expert(
    folder: Path, images: RealImages, network: Trainable, training: ExpertTraining, options: TrainingOptions
) -> TrajectoryStore:
    """Return the store of the experts in `folder`; if there are none, one is trained now with the seed and precision of `options`.

    Existing experts are not checked. For what is raised in training see `train_missing_experts`.
    """
    precision = precision_on(images.train.labels.device, network, options.precision)
    return experts_in(folder) or train_missing_experts(
        folder, 1, images, network, training, seed=options.seed, precision=precision
    )


class _Request(NamedTuple):
    """The experts that a folder is to hold."""

    num_experts: int
    images: RealImages
    network: Trainable
    training: ExpertTraining
    seed: int
    dtype: torch.dtype | None
    precision: Precision


def _missing(folder: Path, request: _Request, checked: set[int]) -> list[int]:
    """Return the numbers of the experts that `folder` lacks. Raises `InputError` if one in `folder` is not as requested.

    Only the files of experts whose numbers are not in `checked` are read; afterwards it has the numbers of all in `folder`.
    """
    present = experts_in(folder)
    missing = _numbers_missing(present, request.num_experts)
    checked.intersection_update(present.indices if present else ())  # a deleted expert may be written again
    if present:
        check_trained_alike(
            present, request.network, request.images.identity, request.training, request.seed,
            request.dtype or present.dtype(0), request.precision, more=bool(missing), checked=checked,
        )  # fmt: skip
        checked.update(present.indices)
    return missing


def _numbers_missing(present: TrajectoryStore | None, count: int) -> list[int]:
    """Return the numbers 0 … `count` − 1 without those in `present`."""
    numbers = set(present.indices if present else ())
    return [index for index in range(count) if index not in numbers]


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
    checked: Container[int] = (),
) -> None:
    """Raise `InputError` unless all `present` experts are of `network` and the images of `identity`, and were trained with these settings.

    The message names the first one that was not. If `more` experts are to be trained, compressed ones are refused too.
    Experts whose numbers are in `checked` are passed over.
    """
    if more and present.course(0) is not None:
        raise InputError(
            f"{present.folder}: holds {len(present)} compressed experts, to which none can be added; give --num_experts "
            f"{len(present)} or less, or the --buffer_path of uncompressed experts"
        )
    for expert, number in enumerate(present.indices):
        if number not in checked:
            check_belongs(present, expert, network, identity)
            check_same_training(present, expert, training.record(), seed, dtype, precision)


def _train(folder: Path, missing: list[int], request: _Request, at_once: int | None, memory_budget: str) -> None:
    """Train the `missing` experts that no other process trains, write each when it is trained, and wait for the other processes."""
    images, network, training, precision = request.images, request.network, request.training, request.precision
    dtype, device = _stored_dtype(folder, request), images.train.labels.device
    digest = training_digest(network, images.identity, training.record(), request.seed, dtype, precision)
    concurrency = concurrency_for(
        network, student_for(network, device, precision=precision), images.train.pixels.shape[1:], device,
        batch=min(training.batch_size, len(images.train)), num_jobs=len(missing), at_once=at_once,
        memory_budget=memory_budget,
    )  # fmt: skip
    claims: list[ExpertClaim] = []  # in the order of the jobs
    checked: set[int] = set()  # numbers of the experts in the folder that are as requested

    def unclaimed() -> list[int]:
        """Return the numbers of the experts that are neither in the folder nor being trained by this process."""
        others = sorted(
            set(_missing(folder, request, checked)) - {claim.index for claim in claims if claim.lock.is_locked}
        )
        bar.total = training.train_epochs * (len(claims) + len(others))
        return others

    def jobs() -> Iterator[Job[tuple[Tensor, list[float]]]]:
        while claim := claim_expert(folder, unclaimed, digest):
            claims.append(claim)
            bar.set_description(refresh=False)  # of waiting
            yield expert_job(
                images, network, training, seed=request.seed, index=claim.index, precision=precision, bar=bar, stop=stop
            )

    with stop_request() as stop, tqdm(total=len(missing) * training.train_epochs, unit="epoch") as bar:
        try:
            while missing:
                first = len(claims)
                for position, (parameters, accuracies) in run_concurrently(jobs(), concurrency, device):
                    claim = claims[first + position]
                    metadata = ExpertMetadata.from_identity(
                        images.identity,
                        network=network.describe(),
                        layout=network.layout.describe(),
                        hyperparameters=training.record(),
                        seed=request.seed,
                        accuracy=accuracies,
                        versions=versions(),
                        precision=precision,
                    )
                    write_expert(folder, claim.index, parameters, metadata, dtype)
                    claim.release()
                if len(claims) == first:
                    _wait_for_others(len(missing), stop, bar)
                missing = _missing(folder, request, checked)
        finally:
            for claim in claims:
                claim.release()


def _stored_dtype(folder: Path, request: _Request) -> torch.dtype:
    """Return the dtype in which experts are stored: the requested one, or that of the experts in `folder`, or float32."""
    present = experts_in(folder)
    return request.dtype or (torch.float32 if present is None else present.dtype(0))


def _wait_for_others(count: int, stop: StopRequest, bar: tqdm) -> None:
    """Wait a moment for the `count` experts that other processes train."""
    raise_if_stopped(stop, "stopped while other processes train the last experts; the same command continues")
    bar.set_description(f"waiting for other processes, which train the last {count}")
    time.sleep(_LOOK_AGAIN)


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
    if _numbers_missing(experts_in(folder), options.num_experts):
        check_output_folder(folder, "choose another `buffer_path`")
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
