"""Test the training of the experts that a folder lacks, beside other processes that train in it."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtt_fast import TrajectoryStore
from mtt_fast.errors import InputError
from mtt_fast.experts.missing import train_missing_experts
from mtt_fast.runtime.interrupts import Stopped
from mtt_fast.storage.expert_checks import CommonTraining
from mtt_fast.storage.expert_locks import claim_expert
from mtt_fast.storage.tensor_files import read_header
from mtt_fast.training.experts import ExpertTraining, expert_job
from mtt_fast.training.images import RealImages
from tests.training.toy import NET, toy_images


@pytest.fixture
def images() -> RealImages:
    return toy_images()


def test_experts_are_stored_as_those_that_they_are_added_to(images: RealImages, tmp_path: Path) -> None:
    training = ExpertTraining(train_epochs=1, batch_size=8, augment="flip")
    train_missing_experts(tmp_path, 1, images, NET, training, seed=0, dtype=torch.bfloat16)
    store = train_missing_experts(tmp_path, 2, images, NET, training, seed=0)
    assert [store.dtype(expert) for expert in range(2)] == [torch.bfloat16] * 2


def test_experts_that_another_process_trains_are_left_to_it(
    images: RealImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the other process, which trains expert 1, end without having written it."""
    training = ExpertTraining(train_epochs=1, batch_size=8, augment="flip")
    digest = CommonTraining(NET, images.identity, training.record(), 0, torch.float32, "fp32").digest()
    tmp_path.joinpath(".expert_0000.abc.lock").touch()  # as a killed process of another training leaves it
    other = claim_expert(tmp_path, lambda: [1], digest)
    assert other is not None
    trained, waits = [], []

    def job(*arguments: Any, index: int, **others: Any) -> Any:
        trained.append(index)
        return expert_job(*arguments, index=index, **others)

    def sleep(seconds: float) -> None:
        waits.append(TrajectoryStore(tmp_path).indices)
        if len(waits) == 2:
            other.release()

    monkeypatch.setattr("mtt_fast.experts.missing.expert_job", job)
    monkeypatch.setattr("mtt_fast.experts.missing.time.sleep", sleep)
    store = train_missing_experts(tmp_path, 3, images, NET, training, seed=0)
    assert (trained, waits) == ([0, 2, 1], [(0, 2), (0, 2)])
    assert [path.name for path in sorted(tmp_path.iterdir())] == [store.path(expert).name for expert in range(3)]
    alone = train_missing_experts(tmp_path / "alone", 3, images, NET, training, seed=0)
    assert all(torch.equal(store.read(expert, 1), alone.read(expert, 1)) for expert in range(3))


@pytest.mark.usefixtures("default_signals")
def test_who_waits_for_other_processes_can_be_stopped(
    images: RealImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = ExpertTraining(train_epochs=1)
    digest = CommonTraining(NET, images.identity, training.record(), 0, torch.float32, "fp32").digest()
    other = claim_expert(tmp_path, lambda: [0], digest)
    monkeypatch.setattr("mtt_fast.experts.missing.time.sleep", lambda _: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped, match="stopped while other processes train the last experts; the same command"):
        train_missing_experts(tmp_path, 1, images, NET, training, seed=0)
    assert other is not None
    other.release()


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (0.01, ""),
        (0.02, "expert_0002.safetensors: trained with lr 0.02, not 0.01"),
        (None, "expert_0002.safetensors: "),
    ],
)
def test_an_expert_that_another_process_writes_meanwhile_is_checked(
    images: RealImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lr: float | None, message: str
) -> None:
    training, folder = ExpertTraining(train_epochs=1), tmp_path / "experts"
    content = b"broken"
    if lr is not None:
        store = train_missing_experts(tmp_path / "other", 3, images, NET, replace(training, lr=lr), seed=0)
        content = store.path(2).read_bytes()
    trained = []

    def job(*arguments: Any, index: int, **others: Any) -> Any:
        trained.append(index)
        if index == 1:  # after the first look at the folder's experts
            (folder / "expert_0002.safetensors").write_bytes(content)
        return expert_job(*arguments, index=index, **others)

    monkeypatch.setattr("mtt_fast.experts.missing.expert_job", job)
    with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
        train_missing_experts(folder, 4, images, NET, training, seed=0, at_once=1)
    assert trained == ([0, 1] if message else [0, 1, 3])


def test_claims_do_not_read_experts_again(images: RealImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[Path] = []

    def read(path: Path) -> Any:
        paths.append(path)
        return read_header(path)

    monkeypatch.setattr("mtt_fast.storage.trajectories.read_header", read)
    store = train_missing_experts(tmp_path, 6, images, NET, ExpertTraining(train_epochs=1), seed=0, at_once=1)
    # expert 0 is asked each time whether it is compressed
    assert [paths.count(store.path(expert)) for expert in range(1, 6)] == [1] * 5


def test_processes_with_other_options_train_in_other_folders(images: RealImages, tmp_path: Path) -> None:
    training = ExpertTraining(train_epochs=1)
    digest = CommonTraining(NET, images.identity, training.record(), 0, torch.float32, "fp32").digest()
    other = claim_expert(tmp_path, lambda: [0], digest)
    assert other is not None
    other_trainings: list[dict[str, Any]] = [
        {"training": replace(training, lr=0.02)}, {"seed": 1}, {"dtype": torch.bfloat16},
        {"network": replace(NET, width=8)}, {"images": replace(images, data=replace(images.data, mean=(0.3,)))},
    ]  # fmt: skip
    for changed in other_trainings:
        arguments: dict[str, Any] = {"images": images, "network": NET, "training": training, "seed": 0} | changed
        with pytest.raises(InputError, match="another process trains experts here with other options; give the same"):
            train_missing_experts(tmp_path, 2, **arguments)
    other.release()
    assert not tmp_path.exists()
