"""Test distillation from experts of other kinds: along flat trajectories, and compressed to waypoints."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mtt_fast import SyntheticDataset, TrajectoryStore
from mtt_fast.commands import cli
from mtt_fast.compress import main as compress
from mtt_fast.compress import waypoint_folder
from mtt_fast.data.catalogue import dataset_info
from mtt_fast.distill.command import main
from mtt_fast.distill.experts import inventory_of, matched_experts, remark_on_expert_count, requested_hyperparameters
from mtt_fast.distill.options import DistillOptions
from mtt_fast.errors import InputError
from mtt_fast.storage.expert_metadata import ExpertMetadata
from mtt_fast.storage.trajectories import write_expert
from mtt_fast.training.experts import ExpertTraining

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


def write_experts(folder: Path, numbers: str) -> None:
    """Write experts of the given `numbers`; those in brackets come from other software."""
    for number in filter(str.isdigit, numbers):
        known = {} if number in numbers.partition("(")[2] else ExpertTraining().record()
        metadata = ExpertMetadata({}, "weight:2", "digits", "", "none", known, 0, [0.5] * 4, {})
        write_expert(folder, int(number), torch.randn(4, 2), metadata)


@pytest.mark.parametrize(
    ("whole", "ready", "options", "expected"),
    [
        ("", "", {"num_experts": 3}, (0, 3, 0, False)),
        ("01", "", {"num_experts": 3}, (2, 1, 0, False)),
        ("02", "", {"num_experts": 3}, (2, 1, 0, False)),  # number 1 alone is trained
        ("012", "", {"num_experts": 2}, (3, 0, 0, False)),
        ("01", "", {"num_experts": 5, "max_experts": 2}, (2, 0, 0, False)),
        ("01", "", {"num_experts": 5, "max_experts": 3}, (2, 3, 0, False)),  # more than are matched, as asked for
        ("01", "", {"num_experts": 5, "max_experts": 2, "num_interpolation": 3}, (2, 0, 2, False)),
        ("01", "0", {"num_experts": 2, "num_interpolation": 3}, (2, 0, 1, False)),
        ("01", "", {"num_experts": 4, "num_interpolation": 3}, (2, 2, 4, False)),
        ("012", "01", {"num_experts": 2, "num_interpolation": 3}, (3, 0, 0, False)),
        ("", "01", {"num_experts": 2, "num_interpolation": 3}, (2, 0, 0, False)),
        ("(01)", "", {"num_experts": 5}, (2, 0, 0, True)),
        ("0(1)", "", {"num_experts": 5}, (2, 0, 0, True)),
        ("(01)", "", {"num_experts": 5, "num_interpolation": 3}, (2, 0, 2, True)),
        ("(01)", "(0)", {"num_experts": 5, "num_interpolation": 3}, (2, 0, 1, True)),
        ("", "(01)", {"num_experts": 5, "num_interpolation": 3}, (2, 0, 0, True)),
    ],
)
def test_the_experts_that_are_there_and_those_that_are_missing_are_counted(
    tmp_path: Path, whole: str, ready: str, options: dict[str, int], expected: tuple[int, int, int, bool]
) -> None:
    write_experts(experts(tmp_path), whole)
    write_experts(waypoint_folder(experts(tmp_path), 3), ready)
    given = DistillOptions(model="ConvNetD1W4", buffer_path=str(tmp_path / "buffers"), **options)  # type: ignore[arg-type]
    used = waypoint_folder(experts(tmp_path), 3) if given.num_interpolation else experts(tmp_path)
    found = inventory_of(given, dataset_info("digits"))
    assert (found.uncompressed_folder, found.matched_folder) == (experts(tmp_path), used)
    assert (found.num_available, found.num_missing, found.num_to_compress, found.imported) == expected


@pytest.mark.parametrize(("max_experts", "expected"), [(None, 3), (2, 2), (5, 3)])
def test_all_experts_that_are_there_are_matched_unless_fewer_are_asked_for(
    tmp_path: Path, max_experts: int | None, expected: int
) -> None:
    write_experts(tmp_path, "012")
    matched = matched_experts(DistillOptions(num_experts=2, max_experts=max_experts), TrajectoryStore(tmp_path))
    assert matched.indices == (0, 1, 2)[:expected]


@pytest.mark.parametrize(
    ("whole", "options", "remark"),
    [
        ("012", {"num_experts": 2}, "all 3 experts in the folder are matched, more than --num_experts 2; --max_experts 2 takes"),
        ("", {"num_experts": 4, "max_experts": 1}, "--num_experts 4 trains 4 more, and --max_experts 1 matches 1 of the 4; --num_experts 1"),
        ("0", {"num_experts": 4, "max_experts": 2}, "--num_experts 4 trains 3 more, and --max_experts 2 matches 2 of the 4; --num_experts 2"),
        ("0", {"num_experts": 4, "max_experts": 2, "num_interpolation": 3}, "--num_experts 4 trains 3 more, and --max_experts 2 matches 2"),
        ("012", {"num_experts": 2, "num_interpolation": 3}, "all 3 experts in the folder are matched"),
        ("012", {"num_experts": 4, "max_experts": 2}, ""),  # none is trained
        ("", {"num_experts": 2, "max_experts": 2}, ""),
        ("01", {"num_experts": 2}, ""),
        ("(012)", {"num_experts": 2}, ""),  # of converted experts all are used
    ],
)  # fmt: skip
def test_experts_that_are_trained_and_not_matched_or_matched_unasked_are_told(
    tmp_path: Path, whole: str, options: dict[str, int], remark: str
) -> None:
    write_experts(experts(tmp_path), whole)
    given = DistillOptions(model="ConvNetD1W4", buffer_path=str(tmp_path / "buffers"), **options)  # type: ignore[arg-type]
    told = remark_on_expert_count(given, inventory_of(given, dataset_info("digits")))
    assert told.startswith(remark)
    assert bool(told) == bool(remark)


def test_the_log_and_the_dry_run_tell_how_many_experts_are_matched(
    trained_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    told, flags = "all 2 experts in the folder are matched, more than --num_experts 1", ["--num_experts", "1"]
    assert run(trained_folder, tmp_path, *flags, "--dry-run") == 0
    assert told in capsys.readouterr().out
    caplog.set_level("INFO")
    assert run(trained_folder, tmp_path, *flags, "--Iteration", "0") == 0
    assert f"experts: {told}" in caplog.text
    capsys.readouterr()
    assert run(trained_folder, tmp_path, *flags, "--Iteration", "1", "--dry-run") == 0
    assert told not in capsys.readouterr().out  # the run goes on with its own


def test_who_asks_for_an_option_of_sam_asks_for_all_of_them() -> None:
    training = ExpertTraining(lr=0.5, rho_max=0.1, rho_min=0.1, alpha=0.3, adaptive=True)
    assert requested_hyperparameters(training, {"expert_lr", "ipc"}) == {"lr": 0.5}
    sam = {"rho_max": 0.1, "rho_min": 0.1, "alpha": 0.3, "adaptive": True}
    assert requested_hyperparameters(training, {"rho_max"}) == sam


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


def test_a_run_needs_waypoints_alone(trained_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run without the whole experts, which are no longer needed; a resumed run has the same bits as an uninterrupted one."""
    few = tmp_path / "few"
    shutil.copytree(experts(trained_folder) / "waypoints_3", experts(few) / "waypoints_3")
    buffer = experts(few) / "replay_buffer_0.pt"
    torch.save([], buffer)  # need not be converted, since no expert is missing
    (few / "data").symlink_to(trained_folder / "data")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(few, whole, *MCT) == 0
    assert run(few, parts, *MCT, "--Iteration", "2") == 0
    assert cli.run(main, ["--out", str(parts), "--resume", "--Iteration", "4"]) == 0
    assert torch.equal(images(whole), images(parts))
    assert steps(whole) == steps(parts)
    starts = [record["start_epoch"] for record in steps(whole)]
    assert all(0 < start < 4 and start != int(start) for start in starts)
    buffer.unlink()
    more = [*MCT, "--num_experts", "3"]
    for dry in (["--dry-run"], []):
        assert run(few, tmp_path / "more", *more, *FLAT, *dry) == 2
        assert (
            f"{experts(few)}: expected the uncompressed experts of those in waypoints_3, to train further ones, found none of 2; "
            "restore them, choose another --buffer_path, or give --max_experts 2 to use those that are compressed"
        ) in capsys.readouterr().err
    assert run(few, tmp_path / "more", *more, "--max_experts", "2", "--Iteration", "0") == 0
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
    ("flags", "problem"),
    [
        (["--num_interpolation", "1"], "--num_interpolation 1: expected at least 2"),
        (
            ["--num_interpolation", "8"],
            "--num_interpolation 8: expected from 2 waypoints (the ends) to the 7 saved epochs",
        ),
        (["--num_interpolation", "3", "--max_start_epoch", "6"], "reach epoch 7, but the expert ends at epoch 6"),
        (["--alpha", "0.3"], "--alpha 0.3: has no effect without --rho_max"),
    ],
)
def test_mistakes_are_told(
    trained_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], problem: str
) -> None:
    assert run(trained_folder, tmp_path / "run", *flags) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.toml").exists()


@pytest.mark.parametrize("flags", [[], ["--num_interpolation", "4"]])
def test_a_place_where_experts_cannot_be_written_is_told_before_any_work(
    trained_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """Find a file in place of the folder of experts to train, or of the waypoints to make of those that are there."""
    other = shutil.copytree(trained_folder, tmp_path / "other")
    folder = experts(other) / "waypoints_4" if flags else experts(other)
    shutil.rmtree(folder, ignore_errors=True)
    folder.touch()
    assert run(other, tmp_path / "run", *flags, "--dry-run") == 2
    expected = f"{folder}: expected a folder to write in, found a file; choose another --buffer_path"
    assert expected in capsys.readouterr().err


def test_buffers_of_the_public_code_are_not_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts(tmp_path).mkdir(parents=True)
    torch.save([], experts(tmp_path) / "replay_buffer_0.pt")
    assert run(tmp_path, tmp_path / "run", "--dry-run") == 2
    assert run(tmp_path, tmp_path / "run") == 2
    problem = capsys.readouterr().err
    assert "found buffers of the public code such as replay_buffer_0.pt; convert them with" in problem
    assert "in another --buffer_path" in problem
    assert [path.name for path in experts(tmp_path).iterdir()] == ["replay_buffer_0.pt"]


def test_a_dry_run_compares_the_precision_of_the_experts_as_the_run_does(
    trained_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = TrajectoryStore(experts(trained_folder))
    other = dataclasses.replace(store.metadata(0), precision="bf16")
    write_expert(experts(tmp_path), 0, torch.stack([store.read(0, epoch) for epoch in range(7)]), other)
    for flags in (["--dry_run"], []):
        assert run(tmp_path, tmp_path / "out", *FLAT, *flags, "--data_path", str(trained_folder / "data")) == 2
        assert "trained with precision bf16, not fp32, tf32 or fp16; choose another" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
