"""Run the examples at toy size, and check that they are short enough to be read."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"
SIZES = {
    "mtt": "--iterations 12 --steps 5 --experts 1 --epochs 3 --width 8",
    "att": "--iterations 12 --steps 5 --experts 1 --epochs 3 --width 8",
    "truncated": "--iterations 16 --window 3 --longest 8 --ipc 2 --width 8",
    "frequency": "--iterations 12 --steps 5 --experts 1 --epochs 3 --width 8",
    "gradient_matching": "--iterations 12 --updates 2 --width 8",
    "multimodal": "--iterations 21 --pairs 6",
    "sample_weights": "--iterations 16 --steps 3 --batch 20 --width 4",
    "few_shot": "--iterations 16 --tasks 1 --shots 2 --steps 2 --width 4",
}
ENDS = {
    "mtt": ["trained on ten real images", "trained on ten distilled images"],
    "att": ["trained on ten real images", "trained on ten distilled images"],
    "truncated": ["trained on 20 real images", "trained on 20 distilled images"],
    "frequency": ["trained on 20 real images", "trained on 20 frequencies"],
    "gradient_matching": ["trained on ten real images", "trained on ten distilled images"],
    "multimodal": ["trained on 6 real pairs", "trained on 6 distilled pairs"],
    "sample_weights": ["trained with equal weights", "trained with learned weights"],
    "few_shot": ["from a random start", "from the learned start"],
}


def test_all_are_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_an_example_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = FOLDER / f"{name}.py"
    assert len(path.read_text().splitlines()) < 80
    monkeypatch.setattr(sys, "argv", [str(path), *SIZES[name].split()])
    runpy.run_path(str(path), run_name="__main__")
    *progress, first, second = capsys.readouterr().out.splitlines()
    losses = [float(re.findall(r"loss (\d+\.\d+)", line)[0]) for line in progress]
    assert len(losses) == 2
    for line, begins in zip((first, second), ENDS[name], strict=True):
        (share,) = re.findall(rf"{begins}: (\d+\.\d) % right", line)
        assert 0 < float(share) <= 100
