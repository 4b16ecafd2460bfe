"""Test the loop of runs: the order of its work, and that everything is saved whatever stops it."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mtt_fast.commands.run_loop import LoopRun, best_accuracy, run_to_the_end
from mtt_fast.commands.seconds import Stopwatch
from mtt_fast.errors import InputError
from mtt_fast.runtime.interrupts import Stopped, StopRequest
from mtt_fast.storage.metrics import MetricsLog
from mtt_fast.storage.records import read_record
from mtt_fast.storage.run_folder import lock_folder, lock_inode

pytestmark = pytest.mark.usefixtures("no_curves")


@dataclass
class Counters:
    iteration: int = 0


def looped(
    folder: Path, iterations: int = 5, eval_it: int = 2, save_seconds: float = 1e9, start: int = 0, stop_at: int = -1,
    evaluated: Iterable[int] = (), seconds: Stopwatch | None = None, done: list[str] | None = None, at_2: Callable[[], object] = list,
) -> list[str]:  # fmt: skip
    """Return what a loop does, in order: e of an evaluation, i of an iteration, s of a checkpoint, ! of the summary."""
    done = [] if done is None else done
    progress = Counters(start)
    metrics = MetricsLog(folder, start)
    for iteration in evaluated:
        metrics.write("evaluation", iteration, accuracy_mean=0.5, accuracy_std=0.0, networks=1)
    options = SimpleNamespace(Iteration=iterations, eval_it=eval_it, save_seconds=save_seconds)
    named = dict.fromkeys(("command", "method", "real", "network", "evaluated", "numerics"), cast(Any, None))
    run = LoopRun(
        program="python -m it", options=options, folder=folder, lock=lock_inode(folder), metrics=metrics,
        seconds=seconds or Stopwatch(), **named,
    )  # fmt: skip

    def iterate() -> None:
        progress.iteration += 1
        done.append(f"i{progress.iteration}")
        if progress.iteration == 2:
            at_2()
        if progress.iteration == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluate(stop: StopRequest) -> None:
        done.append(f"e{progress.iteration}")
        if not metrics.find("evaluation", progress.iteration):
            metrics.write("evaluation", progress.iteration, accuracy_mean=0.5, accuracy_std=0.0, networks=1)

    try:
        run_to_the_end(
            run, progress, title="it", iterate=iterate, progress_fields=lambda seconds: {"s": f"{seconds:g}"}, evaluate=evaluate,
            save=lambda evaluations: done.append(f"s{len(evaluations)}"), summarise=lambda stop: done.append("!"),
        )  # fmt: skip
    except Stopped as stopped:
        done.append(f"{stopped} ({stopped.signum})")
    with pytest.raises(ValueError, match="closed"):  # whatever ended it
        metrics.write("step", 9, loss=0.0, lr=0.0)
    return done


def test_evaluations_are_at_the_start_when_due_and_at_the_end(tmp_path: Path) -> None:
    assert " ".join(looped(tmp_path)) == "s0 e0 s1 i1 i2 e2 s2 i3 i4 e4 s3 i5 e5 s4 !"


@pytest.mark.parametrize(
    ("new_run", "saves", "message"), [(True, 1, "another run has taken"), (False, 2, "was moved or deleted")]
)
def test_a_run_whose_folder_was_moved_leaves_a_new_run_in_its_place_alone(
    new_run: bool, saves: int, message: str, tmp_path: Path
) -> None:
    done: list[str] = []

    def move() -> None:
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").mkdir()
        if new_run:
            (tmp_path / "run/.lock").touch()

    with lock_folder(tmp_path / "run"), pytest.raises(InputError, match=f"run: {message}"):
        looped(tmp_path / "run", eval_it=9, save_seconds=0, done=done, at_2=move)
    assert [each[0] for each in done].count("s") == 2 + saves


def test_what_was_evaluated_before_is_drawn_again_as_its_process_may_have_died_in_between(tmp_path: Path) -> None:
    assert " ".join(looped(tmp_path, start=2, iterations=3, evaluated=[0, 2])) == "e2 s2 i3 e3 s3 !"


def test_what_did_more_iterations_than_it_is_asked_for_is_evaluated_as_it_is(tmp_path: Path) -> None:
    assert " ".join(looped(tmp_path, start=3, iterations=2, evaluated=[0, 2])) == "e3 s3 !"


def test_checkpoints_are_as_often_as_asked_for(tmp_path: Path) -> None:
    assert " ".join(looped(tmp_path, iterations=2, save_seconds=0)) == "s0 e0 s1 i1 s1 i2 s1 e2 s2 !"


@pytest.mark.usefixtures("default_signals")
def test_a_signal_ends_it_after_the_iteration_with_everything_saved(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    folder.mkdir()
    *done, said = looped(folder, stop_at=3)
    assert " ".join(done) == "s0 e0 s1 i1 i2 e2 s2 i3 s2"
    assert said == (
        f"stopped at iteration 3 of 5, everything is saved; continue with: python -m it --out '{folder}' --resume "
        f"({int(signal.SIGTERM)})"
    )


def test_each_part_of_a_run_has_its_seconds(tmp_path: Path) -> None:
    clock = itertools.count()  # each look at it takes a second
    seconds = Stopwatch(lambda: float(next(clock)))
    looped(tmp_path, iterations=3, eval_it=3, seconds=seconds)
    totals = seconds.totals()
    assert totals["first_iteration"] == 1
    assert totals["iterations"] == 2
    assert totals["evaluations"] == 2  # before the first iteration and after the last
    assert sum(totals.values()) == next(clock) - 1
    saved = read_record(tmp_path / "seconds.json", "", "")
    assert saved["iterations"] == 2
    assert 0 < saved["saving"] < totals["saving"]  # the summary comes later


def test_of_equal_evaluations_the_first_is_the_best() -> None:
    records = [
        {"iteration": iteration, "accuracy_mean": mean, "accuracy_std": 0.1, "networks": 2}
        for iteration, mean in ((0, 0.2), (5, 0.4), (10, 0.4))
    ]
    assert best_accuracy(records) == {"mean": 0.4, "std": 0.1, "n": 2, "iteration": 5}


def test_the_interval_of_checkpoints_begins_anew_after_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # each look at it takes a second, and an iteration takes three
    monkeypatch.setattr("mtt_fast.commands.run_loop.time.monotonic", lambda: float(next(clock)))
    done = looped(tmp_path, eval_it=9, save_seconds=5, seconds=Stopwatch(lambda: 0.0))
    assert " ".join(done) == "s0 e0 s1 i1 i2 s1 i3 i4 s1 i5 e5 s2 !"


def test_the_bar_counts_on_from_where_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count()  # each look at it takes a second
    monkeypatch.setattr("mtt_fast.commands.run_loop.time.monotonic", lambda: float(next(clock)))
    looped(tmp_path, start=2, iterations=3, evaluated=[0, 2], seconds=Stopwatch(lambda: 0.0))
    said = capsys.readouterr().err
    assert "it:  67%" in said
    assert "| 2/3 [" in said
    assert "| 3/3 [" in said
    assert "s=1]" in said
