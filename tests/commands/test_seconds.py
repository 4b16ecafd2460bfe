"""Check that each moment of a run counts under one part of the work, over all its processes, and that the sum is the wall clock."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mtt_fast.commands import cli
from mtt_fast.commands.seconds import PARTS, Stopwatch, accumulate_seconds, describe_seconds
from mtt_fast.distill.command import main as distill
from mtt_fast.errors import InputError
from mtt_fast.storage.checkpoint import State, load_checkpoint, save_checkpoint
from mtt_fast.storage.records import read_record, write_record
from mtt_fast.storage.tensor_files import load_tensors, save_tensors

TOY = (
    "--dataset digits --model ConvNetD1W4 --num_experts 1 --train_epochs 2 --max_start_epoch 1 --expert_epochs 1 "
    "--syn_steps 2 --Iteration 2 --eval_it 1 --num_eval 1 --epoch_eval_train 1 --batch_real 512 --zca"
).split()


@dataclass
class Clock:
    now: float = 5.0

    def __call__(self) -> float:
        return self.now


def counted(**seconds: float) -> dict[str, float]:
    return {part: seconds.get(part, 0.0) for part in PARTS}


def test_the_inner_one_of_nested_parts_counts() -> None:
    seconds = Stopwatch(clock := Clock())
    clock.now += 1
    with seconds.of("evaluations"):
        clock.now += 10
        with seconds.of("saving"):
            clock.now += 100
        clock.now += 1000
        assert seconds.totals() == counted(other=1, evaluations=1010, saving=100)
        clock.now += 10_000
    clock.now += 1
    assert seconds.totals() == counted(other=2, evaluations=11_010, saving=100)
    assert sum(seconds.totals().values()) == clock.now - 5


def test_earlier_seconds_are_added_to_those_that_are_counted() -> None:
    seconds = Stopwatch(clock := Clock())
    with seconds.of("data"):
        clock.now += 2
    seconds.add({"data": 5.0, "saving": 1.0})
    assert seconds.totals() == counted(data=7, saving=1)


def test_an_error_ends_the_part_that_it_leaves() -> None:
    seconds = Stopwatch(clock := Clock())
    with suppress(KeyError), seconds.of("data"):
        clock.now += 2
        raise KeyError
    clock.now += 3
    assert seconds.totals() == counted(data=2, other=3)


def test_processes_of_a_run_add_up_whatever_ended_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        seconds = Stopwatch(clock := Clock())
        clock.now += 1
        with suppress(KeyboardInterrupt), accumulate_seconds(tmp_path, seconds), seconds.of("experts"):
            clock.now += 2
            raise KeyboardInterrupt
    with accumulate_seconds(tmp_path, seconds := Stopwatch(Clock())):
        assert seconds.totals() == counted(other=3, experts=6)
    assert not caplog.messages


def test_parts_that_an_earlier_version_did_not_count_are_zero(tmp_path: Path) -> None:
    write_record(tmp_path / "seconds.json", {"experts": 2, "saving": 0.5})
    with accumulate_seconds(tmp_path, seconds := Stopwatch(Clock())):
        assert seconds.totals() == counted(experts=2, saving=0.5)


def test_seconds_that_cannot_be_saved_hide_no_error_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KeyError), accumulate_seconds(tmp_path / "file", Stopwatch(Clock())):
        raise KeyError
    with (
        pytest.raises(InputError, match=r"seconds\.json: cannot be written"),
        accumulate_seconds(tmp_path / "file", Stopwatch()),
    ):
        pass


@pytest.mark.parametrize("content", ["{", "[]", '{"experts": "many"}', '{"experts": 1, "format": 2, "checksum": "x"}'])
def test_a_damaged_file_is_told_and_does_not_stop_a_run(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "seconds.json").write_text(content)
    with accumulate_seconds(tmp_path, Stopwatch(Clock())):
        pass
    assert "seconds.json: the seconds before are not counted (" in caplog.text
    assert read_record(tmp_path / "seconds.json", "", "") == counted()


def test_the_line_at_the_end_leaves_out_short_parts() -> None:
    assert (
        describe_seconds(counted(first_iteration=8, iterations=55.04, other=0.01))
        == "63.0 s: first iteration 8.0, iterations 55.0"
    )


def test_the_summary_of_a_run_tells_the_wall_clock_of_both_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, no_curves: None
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    totals = []
    start = time.monotonic()
    for more in (["--Iteration", "1"], []):
        caplog.clear()  # both may tell the same, rounded to tenths
        assert cli.run(distill, [*TOY, "--out", "run", *more]) == 0
        totals.append(json.loads(Path("run/summary.json").read_text())["seconds"])
    taken = time.monotonic() - start
    first, both = totals
    assert list(both) == list(PARTS)
    assert all(both[part] >= first[part] > 0 for part in PARTS if part != "iterations")
    assert both["experts"] + both["whitening"] + both["first_iteration"] > 0.9 * first["experts"]
    assert first["iterations"] == both["iterations"] == 0  # one iteration each, the first of its process
    assert sum(both.values()) == pytest.approx(taken, abs=0.1 + 0.1 * taken)
    assert sum(both.values()) < taken
    assert caplog.text.count(f"run: {describe_seconds(both)}") == 1


def test_checkpoints_from_before_go_on(tmp_path: Path) -> None:
    images = torch.zeros(2, 1, 2, 2)
    save_checkpoint(tmp_path, State(7, 1, images, torch.arange(2), torch.tensor(0.1), images, torch.tensor(0.0)))
    tensors, metadata = load_tensors(tmp_path / "checkpoint.safetensors")
    numbers = json.loads(metadata["numbers"]) | {"seconds": 1.5, "seconds_evaluation": 2.5}
    save_tensors(tmp_path / "checkpoint.safetensors", tensors, metadata | {"numbers": json.dumps(numbers)})
    state = load_checkpoint(tmp_path, torch.device("cpu"))
    assert state is not None
    assert state.iteration == 7
