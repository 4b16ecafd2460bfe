"""Test `experts`: what it records, continuation, mistakes, processes that share a folder."""

from __future__ import annotations

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

from mtt_fast import TrajectoryStore
from mtt_fast.baselines.options import TrainedNetworkOptions
from mtt_fast.commands import cli
from mtt_fast.commands.options import buffer_folder
from mtt_fast.data.catalogue import dataset_info
from mtt_fast.distill.options import DistillOptions
from mtt_fast.experts.command import main
from mtt_fast.experts.options import ExpertOptions
from mtt_fast.storage.tensor_files import load_tensors
from mtt_fast.storage.trajectories import write_expert
from mtt_fast.training.experts import ExpertTraining

TOY = "--dataset digits --model ConvNetD1W4 --num_experts 3 --train_epochs 2 --batch_train 512".split()


def run(folder: Path, *flags: str) -> int:
    return cli.run(main, [*TOY, "--data_path", str(folder / "data"), "--buffer_path", str(folder / "buffers"), *flags])


def buffers(folder: Path) -> Path:
    return folder / "buffers" / "digits" / "ConvNetD1W4"


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


def test_experts_in_bfloat16_take_half_the_size(tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    assert run(tmp_path, "--store_dtype", "bfloat16", "--buffer_path", str(tmp_path / "half")) == 0
    exact = TrajectoryStore(buffers(tmp_path)).read(0, 2)
    rounded = TrajectoryStore(tmp_path / "half" / "digits" / "ConvNetD1W4").read(0, 2)
    assert torch.equal(rounded, exact.bfloat16().float())


def started(command: list[str], said: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start a process whose messages go to the file `said`: a pipe that nobody reads would be full of its bars, and stop it."""
    with open(said, "wb") as file:
        return subprocess.Popen(command, stderr=file, env=os.environ | environment)


@pytest.mark.slow
@pytest.mark.usefixtures("default_signals")
def test_a_stopped_training_goes_on(tmp_path: Path) -> None:
    flags = ["--num_experts", "40", "--train_epochs", "20"]
    command = [sys.executable, "-m", "mtt_fast.buffer", *TOY, *flags]
    command += ["--data_path", str(tmp_path / "data"), "--buffer_path", str(tmp_path / "buffers")]
    process = started(command, tmp_path / "said")
    deadline = time.monotonic() + 120
    while len(list(buffers(tmp_path).glob("expert_*.safetensors"))) < 2:  # in any order: several are trained at once
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert "the same command continues" in (tmp_path / "said").read_text()
    done = len(TrajectoryStore(buffers(tmp_path)))
    assert 2 <= done < 40
    assert run(tmp_path, "--num_experts", str(done + 1), "--train_epochs", "20") == 0
    assert len(TrajectoryStore(buffers(tmp_path))) == done + 1


@pytest.mark.slow
def test_processes_share_the_experts_and_take_over_those_of_a_killed_one(tmp_path: Path) -> None:
    flags = ["--num_experts", "8", "--train_epochs", "10"]
    command = [sys.executable, "-m", "mtt_fast.experts", *TOY, *flags]
    command += ["--data_path", str(tmp_path / "data"), "--buffer_path", str(tmp_path / "buffers")]
    said = [tmp_path / f"said_{number}" for number in range(3)]
    processes = [started(command, path, OMP_NUM_THREADS="1") for path in said]  # each alone on a core
    deadline = time.monotonic() + 240
    while not all(process.poll() is not None for process in processes[1:]):
        if buffers(tmp_path).is_dir() and len(TrajectoryStore(buffers(tmp_path))) >= 2:
            processes[0].kill()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [process.wait() for process in processes] == [-signal.SIGKILL, 0, 0]
    assert all("8 experts in" in path.read_text() for path in said[1:])
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


@pytest.mark.parametrize(("epochs", "told"), [("4", True), ("5", False)])
def test_a_decay_that_comes_too_late_is_told(
    epochs: str, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for name, flags in (("plain", []), ("decayed", ["--decay"])):
        assert run(tmp_path / name, "--num_experts", "1", "--train_epochs", epochs, *flags) == 0
    assert (f"--decay has no effect at --train_epochs {epochs}, as in the public code" in caplog.text) == told
    plain, decayed = (TrajectoryStore(buffers(tmp_path / name)).read(0, int(epochs)) for name in ("plain", "decayed"))
    assert torch.equal(plain, decayed) == told


def test_flags_of_the_public_code_without_a_use_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert run(tmp_path, "--save_interval", "10", "--num-experts", "1", "--dsa", "True") == 0
    assert "--save_interval is ignored: every expert is saved" in caplog.text
