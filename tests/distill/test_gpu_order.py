"""Test the order of work in which a GPU does not wait for the host, on a CPU that is told to keep to it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtt_fast.distill import command
from mtt_fast.distill.gradients import PendingGradients
from mtt_fast.errors import InputError
from mtt_fast.runtime import prefetch
from mtt_fast.storage.metrics import MetricsLog
from tests.distill.command_runs import TOY, images_of, metrics_of, run

Work = Callable[[], PendingGradients]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let iterations start as on a GPU, and return the starts and the records of iterations in their order."""
    events: list[str] = []

    def run_now_on_gpu(device: torch.device, work: Work) -> Work:
        events.append("start")
        return prefetch.run_now_on_gpu(torch.device("cuda"), work)

    write = MetricsLog.write

    def watched(log: MetricsLog, kind: str, iteration: int, **values: Any) -> None:
        events.append(f"{kind} {iteration}")
        write(log, kind, iteration, **values)

    monkeypatch.setattr("mtt_fast.distill.command.run_now_on_gpu", run_now_on_gpu)
    monkeypatch.setattr(MetricsLog, "write", watched)
    return events


def test_an_iteration_starts_before_the_last_one_is_recorded(
    experts: list[str], tmp_path: Path, events: list[str]
) -> None:
    assert run(*TOY, *experts, "--Iteration", "3", "--eval_it", "3", "--out", str(tmp_path)) == 0
    iterations = [event for event in events if event.split()[0] in ("start", "step")]
    assert iterations == ["start", "start", "step 1", "start", "step 2", "step 3"]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--num_trajectories", "2"],
        ["--threshold", "1e-9"],
        ["--lr_y", "1"],
        ["--teacher_label"],
        ["--lr_lr", "1e9"],
    ],
    ids=" ".join,
)
def test_the_order_does_not_change_a_run(
    options: list[str], experts: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    one, other, continued = (str(tmp_path / name) for name in ("one", "other", "continued"))
    assert run(*TOY, *experts, *options, "--out", one) == 0
    request.getfixturevalue("events")
    assert run(*TOY, *experts, *options, "--out", other) == 0
    assert run(*TOY, *experts, *options, "--out", continued, "--Iteration", "3") == 0
    assert run("--out", continued, "--resume", "--Iteration", "6") == 0
    for folder in (other, continued):
        assert torch.equal(images_of(Path(folder)), images_of(Path(one)))
        assert _steps(folder) == _steps(one)


def test_a_run_that_diverges_for_good_ends(
    experts: list[str], tmp_path: Path, events: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    diverging = ("--lr_teacher", "1e38", "--Iteration", "40", "--eval_it", "40")
    assert run(*TOY, *experts, *diverging, "--out", str(tmp_path)) == 2
    assert "25 iterations in a row diverged" in capsys.readouterr().err
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["skipped"] == 25


@pytest.mark.gpu
def test_a_run_on_a_gpu_that_is_continued_ends_in_the_same_bits(experts: list[str], tmp_path: Path) -> None:
    whole, continued = (str(tmp_path / name) for name in ("whole", "continued"))
    flags = [*TOY, *experts, "--device", "cuda", "--eval_it", "6"]
    assert run(*flags, "--out", whole) == 0
    assert run(*flags, "--out", continued, "--Iteration", "3") == 0
    assert run("--out", continued, "--resume", "--Iteration", "6") == 0
    assert torch.equal(images_of(Path(continued)), images_of(Path(whole)))
    assert _steps(continued) == _steps(whole)


@pytest.mark.parametrize("fails", ["read_segment", "start_gradients"])
@pytest.mark.parametrize("order", ["CPU", "GPU"])
def test_what_the_next_iteration_cannot_do_takes_nothing_from_the_last(
    order: str,
    fails: str,
    experts: list[str],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if order == "GPU":
        request.getfixturevalue("events")
    original, calls = getattr(command, fails), itertools.count(1)

    def failing(*arguments: Any) -> Any:
        if next(calls) == 4:
            raise InputError("the fourth")
        return original(*arguments)

    monkeypatch.setattr(command, fails, failing)
    assert run(*TOY, *experts, "--eval_it", "3", "--save_seconds", "9", "--out", str(tmp_path)) == 2
    kinds = [(record["kind"], record["iteration"]) for record in metrics_of(tmp_path)]
    assert kinds == [("evaluation", 0), ("step", 1), ("step", 2), ("step", 3), ("evaluation", 3)]
    monkeypatch.setattr(command, fails, original)
    assert run("--out", str(tmp_path), "--resume") == 0


def _steps(folder: str) -> list[dict[str, Any]]:
    return [record for record in metrics_of(Path(folder)) if record["kind"] in ("step", "above_threshold")]
