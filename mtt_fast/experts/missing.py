"""Train the experts that a folder lacks, together with other processes. mtt_fast/training/experts.py trains one."""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mtt_fast.commands.options import TrainingOptions
from mtt_fast.engine.students.choice import precision_on, student_for
from mtt_fast.errors import InputError
from mtt_fast.kernels import Precision
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.interrupts import StopRequest, raise_if_stopped, stop_request
from mtt_fast.runtime.memory_info import AUTO
from mtt_fast.storage.expert_checks import CommonTraining
from mtt_fast.storage.expert_locks import ExpertClaim, claim_expert
from mtt_fast.storage.expert_metadata import ExpertMetadata
from mtt_fast.storage.trajectories import TrajectoryStore, experts_in, write_expert
from mtt_fast.training.concurrency import Job, concurrency_for, run_concurrently
from mtt_fast.training.experts import ExpertTraining, expert_job
from mtt_fast.training.images import RealImages

log = logging.getLogger(__name__)

_LOOK_AGAIN = 5.0  # seconds, until the experts that other processes train are looked for again


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

    They are stored as `dtype`; with None like the experts already in `folder`, or as float32 if there are none. If one does not
    fill the device, several are trained at the same time, with the same result (mtt_fast/training/concurrency.py). Other
    processes may train experts in `folder` at the same time, if all settings are the same: this process trains the experts that
    no other has claimed, and waits for the rest. Raises `InputError` if an expert in `folder` is of another network or other
    images or was trained otherwise, or if another process trains such experts or writes others there; `Stopped` on Ctrl-C or
    SIGTERM.
    """
    present = experts_in(folder)
    dtype = dtype or (present.dtype(0) if present else torch.float32)
    common = CommonTraining(network, images.identity, training.record(), seed, dtype, precision)
    request = _Request(count, images, training, precision, common)
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
    training: ExpertTraining
    precision: Precision
    common: CommonTraining


def _missing(folder: Path, request: _Request, checked: set[int]) -> list[int]:
    """Return the numbers of the experts that `folder` lacks. Raises `InputError` if one in `folder` is not as requested.

    Only the files of experts whose numbers are not in `checked` are read; afterwards it has the numbers of all in `folder`.
    """
    present = experts_in(folder)
    missing = numbers_missing(present, request.num_experts)
    checked.intersection_update(present.indices if present else ())  # a deleted expert may be written again
    if present:
        check_trained_alike(present, request.common, more=bool(missing), checked=checked)
        checked.update(present.indices)
    return missing


def numbers_missing(present: TrajectoryStore | None, count: int) -> list[int]:
    """Return the numbers 0 … `count` − 1 without those in `present`."""
    numbers = set(present.indices if present else ())
    return [index for index in range(count) if index not in numbers]


def check_trained_alike(
    present: TrajectoryStore, common: CommonTraining, *, more: bool = True, checked: Container[int] = ()
) -> None:
    """Raise `InputError` unless all `present` experts have what is to be `common` to the experts of the folder.

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
            common.check(present, expert)


def _train(folder: Path, missing: list[int], request: _Request, at_once: int | None, memory_budget: str) -> None:
    """Train the `missing` experts that no other process trains, write each when it is trained, and wait for the other processes."""
    images, training, precision, common = request.images, request.training, request.precision, request.common
    network, device = common.network, images.train.labels.device
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
        while claim := claim_expert(folder, unclaimed, common.digest()):
            claims.append(claim)
            bar.set_description(refresh=False)  # of waiting
            yield expert_job(
                images, network, training, seed=common.seed, index=claim.index, precision=precision, bar=bar, stop=stop
            )

    with stop_request() as stop, tqdm(total=len(missing) * training.train_epochs, unit="epoch") as bar:
        try:
            while missing:
                first = len(claims)
                for position, (parameters, accuracies) in run_concurrently(jobs(), concurrency, device):
                    claim = claims[first + position]
                    write_expert(folder, claim.index, parameters, _metadata(common, accuracies), common.dtype)
                    claim.release()
                if len(claims) == first:
                    _wait_for_others(len(missing), stop, bar)
                missing = _missing(folder, request, checked)
        finally:
            for claim in claims:
                claim.release()


def _metadata(common: CommonTraining, accuracies: list[float]) -> ExpertMetadata:
    """Return the record of an expert with these `accuracies` after its epochs."""
    return ExpertMetadata.of(
        common.network,
        common.identity,
        hyperparameters=common.hyperparameters,
        seed=common.seed,
        accuracy=accuracies,
        precision=common.precision,
    )


def _wait_for_others(count: int, stop: StopRequest, bar: tqdm) -> None:
    """Wait a moment for the `count` experts that other processes train."""
    raise_if_stopped(stop, "stopped while other processes train the last experts; the same command continues")
    bar.set_description(f"waiting for other processes, which train the last {count}")
    time.sleep(_LOOK_AGAIN)
