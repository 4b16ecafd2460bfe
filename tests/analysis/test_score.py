"""Test the score of accuracies: the formulas, and refusals."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from mtt_fast.storage.text_files import write_json
from tests.analysis.helpers import read, run


def write_evaluation(path: Path, mean: float, **others: Any) -> str:
    record = {
        "dataset": "CIFAR10",
        "model": "ConvNet",
        "protocol": {"name": others.pop("protocol", "ddranking"), "best_epoch": others.pop("best_epoch", True)}
        | others.pop("training", {}),
    } | others
    diverged = {"diverged": record.pop("diverged")} if "diverged" in record else {}
    write_json(path, record | {"accuracy": {"mean": mean, "std": 0.0, "n": 5} | diverged})
    return str(path)


@pytest.mark.parametrize(("hard", "weight"), [(None, 0.5), ("40", 0.8)])
def test_the_score_follows_from_accuracies(
    hard: str | None, weight: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    out = tmp_path / "score.json"
    made_from = {"source": "runs/x", "made_from": {"name": "CIFAR10"}}
    files = ["--distilled", write_evaluation(tmp_path / "set.json", 0.6, **made_from), "--random"]
    files += [write_evaluation(tmp_path / "random.json", 0.3), "--full", "85", "--out", str(out)]
    assert run("score", *files, *(["--hard", hard, "--weight", str(weight)] if hard else [])) == 0
    record = read(out)
    hlr = 0.85 - (0.4 if hard else 0.6)
    assert (record["hard_label_recovery"], record["improvement_over_random"]) == pytest.approx((hlr, 0.3))
    score = (math.exp(weight * 0.3 - (1 - weight) * hlr) - math.exp(-1)) / (math.exp(1) - math.exp(-1))
    assert record["label_robust_score"] == pytest.approx(score)
    assert (record["protocol"], record["dataset"], record["model"]) == ("ddranking", "CIFAR10", "ConvNet")
    assert record["weight"] == weight
    (line,) = caplog.messages  # and no doubt
    assert f"label-robust score {score:.3f} (weight {weight:g})" in line


def test_the_score_follows_from_the_numbers_of_the_board(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert run("score", "--hlr", "23.73", "--ior", "30.90") == 0
    assert "HLR 23.73 %, IOR 30.90 %, label-robust score 0.284" in caplog.text


def test_numbers_that_are_hardly_what_they_are_given_for_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = write_evaluation(tmp_path / "set.json", 0.3, source="runs/x", made_from={"name": "CIFAR10"})
    assert run("score", "--full", "85", "--distilled", "0.6", "--random", other) == 0
    assert "--distilled 0.6: taken as 0.6 %; is it a fraction, 60 %?" in caplog.text
    assert "set.json: was measured on the distilled set runs/x; is it one of random real images?" in caplog.text
    some = write_evaluation(tmp_path / "random.json", 0.3, source="random", diverged=2)
    assert run("score", "--full", "85", "--distilled", "60", "--random", some) == 0
    assert "random.json: 2 networks diverged, and their accuracy counts as 0" in caplog.text


def test_a_rate_of_its_own_and_the_accuracy_of_all_images_compare(tmp_path: Path) -> None:
    files = {
        "full": write_evaluation(tmp_path / "full.json", 0.8, training={"epochs": 100}, images=50_000),
        "distilled": write_evaluation(tmp_path / "set.json", 0.6, training={"epochs": 1000, "lr": 0.1}, images=10),
        "random": write_evaluation(tmp_path / "random.json", 0.3, training={"epochs": 1000, "lr": 0.01}, images=10),
    }
    assert run("score", *(word for name, file in files.items() for word in (f"--{name}", file))) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--full: expected an accuracy, found none; or give --hlr"),
        ("--full 85", "--distilled: expected an accuracy, found none; or give --hlr"),
        ("--full 85 --distilled 60", "--random: expected an accuracy, found none; or give --ior"),
        ("--hlr 20", "--distilled: expected an accuracy, found none; or give --ior"),
        ("--hlr 20 --ior 30 --distilled 50", "--distilled: has no effect with --hlr or --ior"),
        ("--hlr 20 --full 80 --distilled 50 --random 30", "--full: has no effect with --hlr or --ior"),
        ("--full 80 --distilled 50 --ior 3 --random 2", "--random: has no effect with --hlr or --ior"),
        ("--full 0.85 --distilled 60 --random 30", "--full 0.85: expected an accuracy in per cent, such as 84.8"),
        ("--full 850 --distilled 60 --random 30", "--full 850: expected an accuracy in per cent, 0 to 100"),
        ("--full nan --distilled 60 --random 30", "--full nan: expected an accuracy in per cent, 0 to 100"),
        ("--hlr 200 --ior 30", "--hlr 200.0: expected per cent, -100 to 100"),
        ("--hlr 20 --ior nan", "--ior nan: expected a finite number"),
        ("--hlr 20 --ior 30 --weight 2", "--weight 2.0: expected 0 to 1"),
        (
            "--full 85 --distilled no.json --random 30",
            "--distilled: expected a number in per cent or a file; no.json: cannot be read (No such",
        ),
        (
            "--full 85 --distilled list.json --random 30",
            "list.json: expected what mtt_fast.evaluate writes with --out FILE.json, found",
        ),
        (
            "--full 85 --distilled run.json --random 30",
            "run.json: expected what mtt_fast.evaluate writes with --out FILE.json, found no field 'mean'",
        ),
        ("--full 85 --distilled a.json --random b.json", "--random: expected the protocol ddranking as in the files"),
        ("--full 85 --distilled a.json --random last.json", "--random: expected the best_epoch True as in the files"),
        ("--full 85 --distilled a.json --random other.json", "--random: expected the fingerprint 1 as in the files"),
        ("--full 85 --distilled a.json --random large.json", "--random: expected the model ConvNet as in the files"),
        (
            "--full 85 --distilled ten.json --random hundred.json",
            "--random: expected the images 10 as in the files before",
        ),
        (
            "--full 85 --distilled ten.json --random short.json",
            "--random: expected the epochs 1000 as in the files before",
        ),
        (
            "--full 85 --distilled percent.json --random 30",
            "percent.json: expected an accuracy from 0 to 1, found 60.0",
        ),
        ("--full 85 --distilled random.json --random 30", "found that on random real images"),
        (
            "--full 85 --hard random.json --distilled 60 --random 30",
            "--hard random.json: expected the accuracy on a dis",
        ),
        ("--full 85 --distilled damaged.json --random 30", "damaged.json: expected what mtt_fast.evaluate writes"),
        ("--full 85 --distilled pipe --random 30", "pipe: expected a file, found a FIFO; check the path"),
        ("--full 85 --distilled long.json --random 30", "long.json: expected at most 4,194,304 bytes, found 4,194,305"),
        ("--full 85 --distilled deep.json --random 30", "deep.json: expected what mtt_fast.evaluate writes"),
    ],
)
def test_wrong_numbers_are_refused(
    flags: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[1]")
    Path("run.json").write_text('{"accuracy": {}}')
    Path("long.json").write_text(" " * ((4 << 20) + 1))
    Path("deep.json").write_text("[" * 10**5)
    os.mkfifo("pipe")
    write_evaluation(Path("a.json"), 0.6, data={"fingerprint": "1"})
    write_evaluation(Path("other.json"), 0.3, data={"fingerprint": "2"})
    write_evaluation(Path("last.json"), 0.3, best_epoch=False)
    write_evaluation(Path("percent.json"), 60)
    write_evaluation(Path("random.json"), 0.3, source="random")
    write_evaluation(Path("damaged.json"), 0.6, format=2, checksum="0")
    write_evaluation(Path("b.json"), 0.3, protocol="mtt")
    write_evaluation(Path("large.json"), 0.3, model="ConvNetW256")
    write_evaluation(Path("ten.json"), 0.6, images=10, training={"epochs": 1000})
    write_evaluation(Path("hundred.json"), 0.3, images=100, training={"epochs": 1000})
    write_evaluation(Path("short.json"), 0.3, images=10, training={"epochs": 300})
    assert run("score", *flags.split(), "--out", "score.json") == 2
    assert message in capsys.readouterr().err
    assert not Path("score.json").exists()
