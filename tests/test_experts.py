"""Test experts: the algorithm against torch.optim, independence of (seed, index), continuation, mistakes."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mtt_fast import ConvNet, TrajectoryStore
from mtt_fast.baselines.options import TrainedNetworkOptions
from mtt_fast.commands import cli
from mtt_fast.commands.options import buffer_folder
from mtt_fast.data import from_tensors
from mtt_fast.data.published_info import dataset_info
from mtt_fast.distill.options import DistillOptions
from mtt_fast.errors import InputError
from mtt_fast.experts.command import main
from mtt_fast.experts.missing import train_missing_experts
from mtt_fast.experts.options import ExpertOptions
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.runtime.interrupts import Stopped, StopRequest
from mtt_fast.storage.expert_checks import training_digest
from mtt_fast.storage.expert_locks import claim_expert
from mtt_fast.storage.tensor_files import load_tensors, read_header
from mtt_fast.storage.trajectories import write_expert
from mtt_fast.testing import assert_close, reference_convnet
from mtt_fast.training.experts import ExpertTraining, expert_job
from mtt_fast.training.images import RealImages, real_images
from tests.training.jobs import finished

TOY = "--dataset digits --model ConvNetD1W4 --num_experts 3 --train_epochs 2 --batch_train 512".split()
NET = ConvNet(in_channels=1, num_classes=3, image_size=6, width=4, depth=1)


@pytest.fixture
def images() -> RealImages:
    def split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(0, 256, (count, 1, 6, 6), dtype=torch.uint8), torch.arange(count) % 3

    return real_images(from_tensors(split(30), split(9)), zca=False, device=torch.device("cpu"))


def run(folder: Path, *flags: str) -> int:
    return cli.run(main, [*TOY, "--data_path", str(folder / "data"), "--buffer_path", str(folder / "buffers"), *flags])


def buffers(folder: Path) -> Path:
    return folder / "buffers" / "digits" / "ConvNetD1W4"


@pytest.mark.parametrize(("mom", "l2", "decay"), [(0.0, 0.0, False), (0.9, 0.01, False), (0.9, 0.0, True)])
def test_an_expert_is_that_of_a_plain_loop_with_torch_optim(
    images: RealImages, mom: float, l2: float, decay: bool
) -> None:
    training = ExpertTraining(train_epochs=5, lr=0.05, mom=mom, l2=l2, decay=decay, batch_size=30, augment="none")
    parameters, accuracies = finished(expert_job(images, NET, training, seed=3, index=1))
    module = reference_convnet(1, 3, 6, 4, 1)
    torch.nn.utils.vector_to_parameters(parameters[0].clone(), module.parameters())
    pixels, labels = images.train.batch(slice(None))  # one batch holds all: its order does not matter
    lr = training.lr
    optimizer = torch.optim.SGD(module.parameters(), lr, momentum=mom, weight_decay=l2)
    for epoch in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(pixels), labels).backward()
        optimizer.step()
        if decay and epoch == 5 // 2 + 1:
            lr *= 0.1
            optimizer = torch.optim.SGD(module.parameters(), lr, momentum=mom, weight_decay=l2)
        flat = torch.nn.utils.parameters_to_vector(module.parameters())
        assert_close(f"epoch {epoch + 1}", parameters[epoch + 1] - parameters[0], flat.detach() - parameters[0], 1e-4)
    seen, truth = images.test.batch(slice(None))
    assert accuracies[-1] == pytest.approx(float((module(seen).argmax(1) == truth).float().mean()))


def test_the_accuracies_of_an_expert_with_batch_norm_are_of_its_running_statistics() -> None:
    """Use darker test images, whose own statistics are others."""
    labels = torch.arange(30) % 3
    train, dark = torch.randint(0, 256, (30, 1, 6, 6), dtype=torch.uint8), torch.randint(0, 64, (300, 1, 6, 6))
    data = from_tensors((train, labels), (dark.to(torch.uint8), labels.repeat(10)))
    images = real_images(data, zca=False, device=torch.device("cpu"))
    training = ExpertTraining(train_epochs=4, lr=0.1, batch_size=30, augment="none")
    rows, accuracies = finished(
        expert_job(images, network_by_name("ConvNetD1W4BN", (1, 6, 6), 3), training, seed=3, index=1)
    )
    layers = (nn.Conv2d(1, 4, 3, padding=3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
    module = nn.Sequential(*layers, nn.Linear(100, 3))
    (pixels, _), (seen, truth) = images.train.batch(slice(None)), images.test.batch(slice(None))
    right, in_training = [], []
    with torch.no_grad():
        for epoch in range(5):
            nn.utils.vector_to_parameters(rows[epoch], module.parameters())
            right.append(float((module.eval()(seen).argmax(1) == truth).float().mean()))
            module.train()(pixels)  # the batch of the next step
            in_training.append(float((copy.deepcopy(module)(seen).argmax(1) == truth).float().mean()))
    assert accuracies == pytest.approx(right, abs=0.5 / 300)
    assert right != pytest.approx(in_training, abs=0.03)


@pytest.mark.parametrize("decay", [False, True])
def test_flat_trajectories_are_those_of_gsam(images: RealImages, decay: bool) -> None:
    """Check that with --decay the radius falls from rho_max to rho_min, as the learning rate does."""
    rho_min = 0.2 if decay else 0.5
    training = ExpertTraining(
        5, 0.05, decay=decay, batch_size=30, augment="none", rho_max=0.5, rho_min=rho_min, alpha=0.3, adaptive=True
    )
    parameters, _ = finished(expert_job(images, NET, training, seed=3, index=1))
    module = reference_convnet(1, 3, 6, 4, 1)
    pixels, labels = images.train.batch(slice(None))

    def gradient_at(theta: torch.Tensor) -> torch.Tensor:
        torch.nn.utils.vector_to_parameters(theta.clone(), module.parameters())
        loss = torch.nn.functional.cross_entropy(module(pixels), labels)
        return torch.nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(module.parameters())))

    theta = parameters[0]
    for epoch in range(5):
        lr, rho = (0.005, rho_min) if decay and epoch > 5 // 2 + 1 else (0.05, 0.5)
        here = gradient_at(theta)
        there = gradient_at(theta + rho * theta**2 * here / (theta * here).norm())
        across = here - torch.dot(here, there) / torch.dot(there, there) * there
        theta = theta - lr * (there - 0.3 * across)
        assert_close(f"epoch {epoch + 1}", parameters[epoch + 1] - parameters[0], theta - parameters[0], 1e-4)


def test_every_command_trains_experts_as_its_options_say() -> None:
    plain: dict[str, Any] = {"train_epochs": 7, "mom": 0.5, "l2": 0.1, "decay": True, "dsa_strategy": "flip"}
    flat: dict[str, Any] = {"rho_max": 0.3, "rho_min": 0.2, "alpha": 0.4}
    expected = ExpertTraining(7, 0.3, 0.5, 0.1, decay=True, batch_size=64, augment="flip")
    expected_flat = replace(expected, **flat, adaptive=True)
    assert TrainedNetworkOptions(**plain, expert_lr=0.3, batch_train=64).expert() == expected
    for more, same in (({}, expected), (flat, expected_flat)):
        assert ExpertOptions(**plain, **more, lr_teacher=0.3, batch_train=64).training() == same
        assert DistillOptions(**plain, **more, expert_lr=0.3, batch_real=64).experts() == same
    assert DistillOptions(rho_max=0.3, adaptive=False).experts() == ExpertTraining(rho_max=0.3, rho_min=0.3)
    assert TrainedNetworkOptions(dsa=False).expert().augment == "none"


def test_experts_lie_where_the_public_code_keeps_them() -> None:
    for dataset, zca, folder in (
        ("CIFAR10", True, "CIFAR10"),
        ("CIFAR100", False, "CIFAR100_NO_ZCA"),
        ("Tiny", False, "Tiny"),
        ("digits", True, "digits_ZCA"),
    ):
        assert buffer_folder("buffers", dataset_info(dataset), "ConvNet", zca=zca) == Path("buffers", folder, "ConvNet")


def test_an_expert_depends_on_seed_and_index_alone(images: RealImages) -> None:
    training = ExpertTraining(train_epochs=2, batch_size=7)
    first, _ = finished(expert_job(images, NET, training, seed=0, index=4))
    finished(expert_job(images, NET, training, seed=0, index=3))
    again, _ = finished(expert_job(images, NET, training, seed=0, index=4))
    assert torch.equal(first, again)
    for seed, index in ((0, 5), (1, 4)):
        assert not torch.equal(first, finished(expert_job(images, NET, training, seed=seed, index=index))[0])


def test_the_command_and_what_it_records(tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    store = TrajectoryStore(buffers(tmp_path))
    assert (len(store), store.epochs(0)) == (3, 2)
    metadata = store.metadata(0)
    assert len(metadata.accuracy) == 3
    assert metadata.dataset == "digits"
    assert metadata.hyperparameters["lr"] == 0.01
    assert metadata.layout.startswith("features.0.weight:4x1x3x3;")
    store.verify(2)
    assert not torch.equal(store.read(0, 1), store.read(0, 2))


def test_experts_record_the_seed_and_the_precision_and_the_log_tells_their_last_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mtt_fast.experts.command.precision_on", lambda *_: "tf32")  # a CPU's is always fp32
    caplog.set_level("INFO")
    assert run(tmp_path, "--seed", "3", "--lr_teacher", "0.1") == 0
    store = TrajectoryStore(buffers(tmp_path))
    recorded = [store.metadata(expert) for expert in range(3)]
    assert [(each.seed, each.precision) for each in recorded] == [(3, "tf32")] * 3
    mean = torch.tensor([each.accuracy[-1] for each in recorded]).mean()
    assert f"3 experts in {store.folder}, test accuracy {mean:.4f} ± " in caplog.text


def test_flat_and_other_experts_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = ["--rho_max", "0.01", "--rho_min", "0.01", "--alpha", "0.3"]
    assert run(tmp_path, *flat) == 0
    recorded = TrajectoryStore(buffers(tmp_path)).metadata(0).hyperparameters
    assert [recorded[name] for name in ("rho_max", "rho_min", "alpha", "adaptive")] == [0.01, 0.01, 0.3, True]
    assert run(tmp_path, "--rho_max", "0.01", "--alpha", "0.3", "--num_experts", "4") == 0
    for other, problem in ([], "rho_max 0.01, not 0.0"), ([*flat, "--adaptive", "False"], "adaptive True, not False"):
        assert run(tmp_path, *other, "--num_experts", "5") == 2
        assert f"trained with {problem}" in capsys.readouterr().err
    assert len(TrajectoryStore(buffers(tmp_path))) == 4


def test_experts_recorded_before_there_were_flat_ones_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 0
    store = TrajectoryStore(buffers(tmp_path))
    for expert in range(len(store)):
        metadata = store.metadata(expert)
        for name in ("rho_max", "rho_min", "alpha", "adaptive"):
            del metadata.hyperparameters[name]
        write_expert(store.folder, expert, torch.stack([store.read(expert, row) for row in range(3)]), metadata)
    assert run(tmp_path, "--num_experts", "4") == 0
    assert run(tmp_path, "--num_experts", "5", "--rho_max", "0.01", "--rho_min", "0.01") == 2
    assert "trained with rho_max 0.0, not 0.01" in capsys.readouterr().err


def test_missing_experts_alone_are_trained_again(tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    paths = sorted(buffers(tmp_path).iterdir())
    before = [load_tensors(path)[0]["parameters"].clone() for path in paths]
    paths[1].unlink()
    kept = paths[0].stat().st_mtime_ns
    assert run(tmp_path) == 0
    for path, parameters in zip(paths, before, strict=True):
        assert torch.equal(load_tensors(path)[0]["parameters"], parameters)
    assert paths[0].stat().st_mtime_ns == kept


def test_experts_are_stored_as_those_that_they_are_added_to(images: RealImages, tmp_path: Path) -> None:
    network, training = ConvNet(1, 3, 6, width=4, depth=1), ExpertTraining(train_epochs=1, batch_size=8, augment="flip")
    train_missing_experts(tmp_path, 1, images, network, training, seed=0, dtype=torch.bfloat16)
    store = train_missing_experts(tmp_path, 2, images, network, training, seed=0)
    assert [store.dtype(expert) for expert in range(2)] == [torch.bfloat16] * 2


def test_experts_in_bfloat16_take_half_the_size(tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    assert run(tmp_path, "--store_dtype", "bfloat16", "--buffer_path", str(tmp_path / "half")) == 0
    exact = TrajectoryStore(buffers(tmp_path)).read(0, 2)
    rounded = TrajectoryStore(tmp_path / "half" / "digits" / "ConvNetD1W4").read(0, 2)
    assert torch.equal(rounded, exact.bfloat16().float())


def test_a_stop_request_ends_an_expert_after_its_epoch(images: RealImages) -> None:
    stop = StopRequest()
    job = expert_job(images, NET, ExpertTraining(train_epochs=3), seed=0, index=4, stop=stop)
    next(job)
    stop.signum = signal.SIGTERM
    with pytest.raises(Stopped, match=r"^stopped in expert 4; .* the same command continues$") as stopped:
        next(job)
    assert stopped.value.signum == signal.SIGTERM


@pytest.mark.slow
@pytest.mark.usefixtures("default_signals")
def test_a_stopped_training_goes_on(tmp_path: Path) -> None:
    flags = ["--num_experts", "40", "--train_epochs", "20"]
    command = [sys.executable, "-m", "mtt_fast.buffer", *TOY, *flags]
    command += ["--data_path", str(tmp_path / "data"), "--buffer_path", str(tmp_path / "buffers")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 120
    while len(list(buffers(tmp_path).glob("expert_*.safetensors"))) < 2:  # in any order: several are trained at once
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command continues" in said
    done = len(TrajectoryStore(buffers(tmp_path)))
    assert 2 <= done < 40
    assert run(tmp_path, "--num_experts", str(done + 1), "--train_epochs", "20") == 0
    assert len(TrajectoryStore(buffers(tmp_path))) == done + 1


def test_experts_that_another_process_trains_are_left_to_it(
    images: RealImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the other process, which trains expert 1, end without having written it."""
    training = ExpertTraining(train_epochs=1, batch_size=8, augment="flip")
    digest = training_digest(NET, images.identity, training.record(), 0, torch.float32, "fp32")
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
    digest = training_digest(NET, images.identity, training.record(), 0, torch.float32, "fp32")
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
    assert [paths.count(store.path(expert)) for expert in range(1, 6)] == [1] * 5  # the first tells the dtype each time


def test_processes_with_other_options_train_in_other_folders(images: RealImages, tmp_path: Path) -> None:
    training = ExpertTraining(train_epochs=1)
    digest = training_digest(NET, images.identity, training.record(), 0, torch.float32, "fp32")
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


@pytest.mark.slow
def test_processes_share_the_experts_and_take_over_those_of_a_killed_one(tmp_path: Path) -> None:
    flags = ["--num_experts", "8", "--train_epochs", "10"]
    command = [sys.executable, "-m", "mtt_fast.experts", *TOY, *flags]
    command += ["--data_path", str(tmp_path / "data"), "--buffer_path", str(tmp_path / "buffers")]
    alone_on_a_core = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=alone_on_a_core) for _ in range(3)]
    deadline = time.monotonic() + 240
    while not all(process.poll() is not None for process in processes[1:]):
        if buffers(tmp_path).is_dir() and len(TrajectoryStore(buffers(tmp_path))) >= 2:
            processes[0].kill()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [-signal.SIGKILL, 0, 0]
    assert all("8 experts in" in text for text in said[1:])
    shared = TrajectoryStore(buffers(tmp_path))
    assert run(tmp_path, *flags, "--buffer_path", str(tmp_path / "alone")) == 0
    alone = TrajectoryStore(tmp_path / "alone" / "digits" / "ConvNetD1W4")
    assert shared.indices == alone.indices == tuple(range(8))
    assert all(torch.equal(shared.read(expert, 10), alone.read(expert, 10)) for expert in range(8))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--lr_teacher", "0.1"],
            "expert_0000.safetensors: trained with lr 0.01, not 0.1; choose another --buffer_path",
        ),
        (["--train_epochs", "3"], "trained with train_epochs 2, not 3"),
        (["--seed", "1"], "trained with seed 0, not 1"),
        (["--num_experts", "0"], "--num_experts 0: expected at least 1"),
        (["--store_dtype", "bfloat16"], "trained with store_dtype float32, not bfloat16"),
        (["--store_dtype", "int4"], "--store_dtype: expected one of 'float32', 'bfloat16', found 'int4'"),
        (["--lr_teacher", "-1"], "--lr_teacher -1.0: expected more than 0"),
        (["--rho_max", "0.01"], "trained with rho_max 0.0, not 0.01"),
        (
            ["--rho_max", "0.01", "--rho_min", "0"],
            "--rho_max 0.01, --rho_min 0.0: expected the same value for both, or",
        ),
        (["--rho_min", "0.01", "--decay"], "--rho_min 0.01: has no effect without --rho_max"),
        (["--rho_max", "-1", "--rho_min", "-1"], "--rho_max -1.0: expected at least 0"),
        (["--alpha", "0.3"], "--alpha 0.3: has no effect without --rho_max"),
        (
            ["--lr_teacher", "1e30", "--buffer_path", "other"],
            "are not finite; its training diverged; train with a smaller",
        ),
    ],
)
def test_mistakes_are_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path) == 0
    before = [path.read_bytes() for path in sorted(buffers(tmp_path).iterdir())]
    assert run(tmp_path, *flags) == 2
    assert message in capsys.readouterr().err
    assert [path.read_bytes() for path in sorted(buffers(tmp_path).iterdir())] == before


def test_flags_of_the_public_code_without_a_use_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert run(tmp_path, "--save_interval", "10", "--num-experts", "1", "--dsa", "True") == 0
    assert "--save_interval is ignored: every expert is saved" in caplog.text
