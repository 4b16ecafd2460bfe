"""Test events: TensorBoard reads what was written, and a disk that is full is one error, of the caller's own."""

from __future__ import annotations

import errno
import io
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mtt_fast.commands import cli
from mtt_fast.storage import events
from mtt_fast.storage.events import EventLog
from mtt_fast.storage.metrics import MetricsLog, read_records
from mtt_fast.storage.run_files import METRICS


def scalars_in(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard's own reader finds: of each name the steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder)).Reload()
    return {name: [(scalar.step, scalar.value) for scalar in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def test_tensorboard_reads_them_as_they_are_written(tmp_path: Path) -> None:
    log = EventLog(tmp_path, 1)
    log.write({"step/loss": 0.5}, 1)
    log.write({"step/loss": 0.25, "step/expert": 3}, 2)
    assert scalars_in(tmp_path) == {"step/loss": [(1, 0.5), (2, 0.25)], "step/expert": [(2, 3.0)]}
    log.write({"step/lr": 2}, 2)
    log.close()
    assert scalars_in(tmp_path)["step/lr"] == [(2, 2.0)]


def test_a_run_that_goes_on_takes_the_place_of_what_was_written_behind_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_number", itertools.count(9))  # TensorBoard reads files in the order of their names
    for first in (1, 3):
        log = EventLog(tmp_path, first)
        for iteration in range(first, first + 4):
            log.write({"loss": float(first)}, iteration)
        log.close()
    assert scalars_in(tmp_path) == {"loss": [(1, 1.0), (2, 1.0), (3, 3.0), (4, 3.0), (5, 3.0), (6, 3.0)]}


def test_a_run_that_was_killed_after_its_checkpoint_does_those_iterations_again_and_no_others(tmp_path: Path) -> None:
    def went_on(iteration: int, to: int, loss: float) -> MetricsLog:
        log = MetricsLog(tmp_path, iteration)
        for number in range(iteration + 1, to + 1):
            log.write("step", number, loss=loss, lr=0.5)
            log.write("gradient", number, cosine=1.0)
        log.close()
        return log

    def losses_in(records: list[dict[str, Any]]) -> list[tuple[int, float]]:
        return [(record["iteration"], record["loss"]) for record in records if record["kind"] == "step"]

    went_on(0, 4, 1.0)
    again = went_on(2, 3, 3.0)  # the last checkpoint was that of iteration 2
    losses = [(1, 1.0), (2, 1.0), (3, 3.0)]
    assert again.records == read_records(tmp_path / METRICS)
    assert losses_in(again.records) == losses
    assert [record["iteration"] for record in again.evaluations] == [1, 2, 3]
    scalars = scalars_in(tmp_path / "events")
    assert scalars["step/loss"] == losses
    assert scalars["gradient/cosine"] == [(1, 1.0), (2, 1.0), (3, 1.0)]


class FullDisk(io.FileIO):
    """A file that takes `room` bytes, as a disk does: a part of a write that fits, and then an error."""

    room = 0

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        fits = min(len(data), self.room)
        FullDisk.room -= fits
        return super().write(data[:fits])


@pytest.mark.parametrize("room", [0, 10, 100, 130, 150])
def test_a_full_disk_is_one_line(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Check one error whether nothing of a record fits or a part of it; no thread prints anything of its own."""
    monkeypatch.setattr(events, "open", lambda path, mode, buffering: FullDisk(path, mode), raising=False)
    monkeypatch.setattr(FullDisk, "room", room)
    before = threading.active_count()

    def job(_: Sequence[str]) -> None:
        metrics = MetricsLog(tmp_path, 0)
        try:
            for iteration in range(1, 100):
                metrics.write("step", iteration, loss=0.5, lr=0.01)
        finally:
            metrics.close()

    assert cli.run(job, []) == 2
    assert threading.active_count() == before
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith(f"error: {tmp_path}/events/events.out.tfevents.")
    assert told[0].endswith(": No space left on device; free some space, or choose another disk")


def test_a_part_of_a_record_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check it for a disk that took a part of a record and has room again: readers would find no record after it."""

    class HalfWritten(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[: len(data) // 2])

    monkeypatch.setattr(events, "open", lambda path, mode, buffering: HalfWritten(path, mode), raising=False)
    with pytest.raises(OSError, match="No space left on device"):
        EventLog(tmp_path, 1)
