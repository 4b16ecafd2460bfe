"""Test distillation from experts of other kinds: along flat trajectories, and compressed to waypoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mtt_fast import SyntheticDataset, TrajectoryStore
from mtt_fast.commands import cli
from mtt_fast.compress import main as compress
from mtt_fast.distill.command import main
from mtt_fast.errors import InputError

pytestmark = pytest.mark.usefixtures("no_curves")

TOY = (
    "--dataset digits --model ConvNetD1W4 --num_experts 2 --train_epochs 6 --max_start_epoch 4 --expert_epochs 2 "
    "--syn_steps 2 --Iteration 4 --eval_it 4 --num_eval 1 --epoch_eval_train 1 --batch_real 512 --lr_img 10"
).split()
FLAT = "--rho_max 0.01 --rho_min 0.01 --alpha 0.3".split()
MCT = "--num_interpolation 3 --continuous_start".split()


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of data, and of buffers with two flat experts and their waypoints."""
    folder = tmp_path_factory.mktemp("flat")
    assert run(folder, folder / "run", *FLAT, *MCT, "--Iteration", "0") == 0
    return folder


def run(trained_folder: Path, out: Path, *flags: str) -> int:
    paths = [
        "--data_path",
        str(trained_folder / "data"),
        "--buffer_path",
        str(trained_folder / "buffers"),
        "--out",
        str(out),
    ]
    return cli.run(main, [*TOY, *paths, *flags])


def experts(folder: Path) -> Path:
    return folder / "buffers" / "digits" / "ConvNetD1W4"


def steps(out: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "step"]


def images(out: Path) -> torch.Tensor:
    return SyntheticDataset.load(out / "synthetic.safetensors").images


def test_missing_experts_are_trained_flat_and_compressed(trained_folder: Path) -> None:
    whole, few = TrajectoryStore(experts(trained_folder)), TrajectoryStore(experts(trained_folder) / "waypoints_3")
    assert whole.indices == few.indices == (0, 1)
    assert [few.metadata(0).hyperparameters[name] for name in ("rho_max", "alpha", "adaptive")] == [0.01, 0.3, True]
    course = few.course(1)
    assert course is not None
    assert course.epochs == (0, 3, 6)


def test_missing_experts_are_trained_as_the_run_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def train(folder: Path, count: int, *_: Any, **others: Any) -> None:
        asked.append((count, *(others[name] for name in ("seed", "precision", "at_once", "memory_budget"))))
        raise InputError("this is enough")

    monkeypatch.setattr("mtt_fast.distill.experts.train_missing_experts", train)
    monkeypatch.setattr("mtt_fast.distill.experts.precision_on", lambda *_: "tf32")  # a CPU's is always fp32
    flags = "--seed 7 --networks_at_once 2 --memory_budget 1GiB --num_experts 4".split()
    assert run(tmp_path, tmp_path / "run", *flags) == 2
    assert asked == [(4, 7, "tf32", 2, "1GiB")]


def test_flat_experts_are_not_taken_for_others_nor_others_for_flat(
    trained_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(trained_folder, tmp_path / "plain", "--Iteration", "1") == 0
    )  # whatever is there is used where nothing is asked for
    assert run(trained_folder, tmp_path / "other", "--rho_max", "0.05", "--rho_min", "0.05") == 2
    assert "trained with rho_max 0.01, not 0.05; choose another" in capsys.readouterr().err
    assert run(trained_folder, tmp_path / "more", "--num_experts", "3") == 2
    assert "trained with rho_max 0.01, not 0.0" in capsys.readouterr().err
    assert len(TrajectoryStore(experts(trained_folder))) == 2


def test_a_run_needs_waypoints_alone(trained_folder: Path, tmp_path: Path) -> None:
    """Run without the whole experts, which are no longer needed; a resumed run has the same bits as an uninterrupted one."""
    few = tmp_path / "few"
    shutil.copytree(experts(trained_folder) / "waypoints_3", experts(few) / "waypoints_3")
    (few / "data").symlink_to(trained_folder / "data")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(few, whole, *MCT) == 0
    assert run(few, parts, *MCT, "--Iteration", "2") == 0
    assert cli.run(main, ["--out", str(parts), "--resume", "--Iteration", "4"]) == 0
    assert torch.equal(images(whole), images(parts))
    assert steps(whole) == steps(parts)
    starts = [record["start_epoch"] for record in steps(whole)]
    assert all(0 < start < 4 and start != int(start) for start in starts)
    assert not list(experts(few).glob("*.safetensors"))


def test_compressed_experts_are_found_by_their_folder(
    trained_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Use a buffer of compressed experts as any other, with the same result as by --num_interpolation."""
    few = tmp_path / "few"
    assert (
        cli.run(compress, [str(experts(trained_folder)), "--num_interpolation", "3", "--out", str(experts(few))]) == 0
    )
    (few / "data").symlink_to(trained_folder / "data")
    assert run(trained_folder, tmp_path / "named", "--num_interpolation", "3") == 0
    assert run(few, tmp_path / "placed") == 0
    assert steps(tmp_path / "named") == steps(tmp_path / "placed")
    assert all(record["start_epoch"] == int(record["start_epoch"]) for record in steps(tmp_path / "placed"))
    assert run(trained_folder, tmp_path / "whole") == 0
    assert steps(tmp_path / "whole")[0]["loss"] != steps(tmp_path / "placed")[0]["loss"]
    assert run(few, tmp_path / "more", "--num_experts", "3") == 2
    assert "holds 2 compressed experts, to which none can be added; give --num_experts 2" in capsys.readouterr().err
    assert len(TrajectoryStore(experts(few))) == 2


def test_whole_experts_may_have_a_continuous_start(trained_folder: Path, tmp_path: Path) -> None:
    assert run(trained_folder, tmp_path / "run", "--continuous_start") == 0
    assert any(record["start_epoch"] != int(record["start_epoch"]) for record in steps(tmp_path / "run"))


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--num_interpolation", "1"], "--num_interpolation 1: expected at least 2"),
        (["--num_interpolation", "8"], "--num_interpolation 8: expected from 2 waypoints (the ends) to the 7 recorded"),
        (["--num_interpolation", "3", "--max_start_epoch", "6"], "reach epoch 7, but the expert ends at epoch 6"),
        (["--alpha", "0.3"], "--alpha 0.3: has no effect without --rho_max"),
    ],
)
def test_mistakes_are_told(
    trained_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], complaint: str
) -> None:
    assert run(trained_folder, tmp_path / "run", *flags) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.toml").exists()


def test_buffers_of_the_public_code_are_not_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts(tmp_path).mkdir(parents=True)
    torch.save([], experts(tmp_path) / "replay_buffer_0.pt")
    assert run(tmp_path, tmp_path / "run", "--dry-run") == 2
    assert run(tmp_path, tmp_path / "run") == 2
    complaint = capsys.readouterr().err
    assert "found buffers of the public code such as replay_buffer_0.pt; convert them with" in complaint
    assert "in another --buffer_path" in complaint
    assert [path.name for path in experts(tmp_path).iterdir()] == ["replay_buffer_0.pt"]


def test_a_dry_run_tells_what_will_be_compressed(
    trained_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*flags: str) -> str:
        capsys.readouterr()
        assert run(trained_folder, tmp_path / "run", *flags, "--dry-run") == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("experts"))

    assert f"0 to train for 6 epochs, 2 in {experts(trained_folder)}" in told("--num_interpolation", "3")
    assert "waypoints" not in told("--num_interpolation", "3")
    assert told("--num_interpolation", "4").endswith(", 2 to compress to 4 waypoints")
    assert "1 to train" in told("--num_interpolation", "4", "--num_experts", "3", *FLAT)
