"""Test the choice of tiles for a GPU: candidates, measurements, and the table that is written."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, tune
from bench.__main__ import main
from bench.candidates import BLOCKS, text_of
from mtt_fast import kernels as operations
from mtt_fast.commands import cli
from mtt_fast.kernels import reference
from tests.bench.helpers import CPU, ROOT, rows_of


@pytest.mark.slow
def test_the_passes_of_the_first_block_are_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune at a width that has kernels for the block at once."""
    pytest.importorskip("triton", reason="Triton is not installed: it comes only for Linux")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    words = "--size 8 --depth 1 --width 16 --batch 2 --repetitions 1 --device cpu --blocks 1 --candidates 1"
    command = [sys.executable, "-W", "ignore", "-m", "bench", "tune", *words.split(), "--out", str(tmp_path)]
    table = tmp_path / "configurations.toml"
    subprocess.run([*command, "--name", "tune", "--table", str(table)], cwd=ROOT, check=True, capture_output=True)
    rows = {row["operation"]: row for row in rows_of(tmp_path, "tune")}
    assert rows.keys() >= BLOCKS.keys()
    for name in BLOCKS:
        assert rows[name]["problem"] == ""
        assert rows[name]["error"] < tune.TOLERANCES["tf32"]
    assert tomllib.loads(table.read_text())["conv_norm_relu_pool_columns"]["tf32-256-16"]["sm_80"]["BLOCK_C"] == 16


def test_the_table_is_as_its_writer_writes_it() -> None:
    text = (ROOT / "kernels/triton/configurations.toml").read_text()
    assert text_of(tomllib.loads(text)) == text


def test_the_table_says_what_was_measured() -> None:
    """Check that a time belongs to one architecture, and to a kernel or its prototype; a tile of lines holds its class or is a part's."""
    table = tomllib.loads((ROOT / "kernels/triton/configurations.toml").read_text())
    for operation, classes in table.items():
        for shape_class, rows in classes.items():
            for architecture, row in rows.items():
                where = f"{operation} {shape_class} {architecture}"
                times = {name for name in row if name.endswith("microseconds")}
                assert len(times) <= (architecture != "default"), where
                assert times <= {"microseconds", "prototype_microseconds"}, where
                if operation.startswith(("norm", "bias")):
                    windows = int(shape_class.removesuffix("-partial").removesuffix("-half"))
                    in_parts = operation.startswith("bias") or row["WINDOWS"] < windows
                    assert ("TILES" in row) == in_parts, where


def test_times_of_the_prototype_are_those_of_the_record() -> None:
    record = json.loads((ROOT / "bench/results/h200/norms.json").read_text())
    measured = [row for row in record["rows"] if row["kernel"] == "prototype" and row["dtype"] == "float32"]
    table = tomllib.loads((ROOT / "kernels/triton/configurations.toml").read_text())
    operations = [name for name in table if name.startswith("norm_relu_pool")]
    assert operations
    for operation in operations:
        for size, samples in ((64, 100), (256, 100), (1024, 20), (4096, 20)):
            row = dict(table[operation][str(size)]["sm_90"])
            time, side = row.pop("prototype_microseconds"), 2 * int(size**0.5)
            same = {"operation": operation, "planes": [samples, 128, side, side], "tile": row}
            assert time in [each["microseconds"] for each in measured if same.items() <= each.items()]


def test_a_wrong_or_failing_candidate_is_not_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Check that such a candidate is not timed; the others are, and the fastest of them goes into the table."""
    takes, clock = {"fast": 0.0, "right": 0.005, "slow": 0.05}, [0.0]
    rows: dict[str, Any] = {"op": {"class": {"default": {"backend": "slow"}}}}
    chosen = tune.Table(rows, lambda: None, "sm_90", CPU, tmp_path / "table.toml")

    def run(argument: torch.Tensor) -> torch.Tensor:
        backend = rows["op"]["class"]["sm_90"]["backend"]
        clock[0] += takes[backend]
        return argument * (1.5 if backend == "fast" else 1)

    def seconds(run: Callable[[], object], device: torch.device) -> float:
        before = clock[0]
        run()
        return clock[0] - before

    monkeypatch.setattr(tune, "seconds", seconds)
    monkeypatch.setattr(operations, "conv3x3", run)
    monkeypatch.setattr(reference, "conv3x3", lambda argument: argument)
    candidates = [{"backend": backend} for backend in ("fast", "absent", "right")]
    subject = tune.Subject("op", ("class", "class"), candidates, "conv3x3", (torch.ones(3),))
    tuned = tune.tune(subject, chosen, tune.Options(repetitions=2, device="cpu"))
    assert tuned["chosen"] == "right"
    assert tuned["problem"] == "fast: wrong: error 5.0e-01; absent: KeyError: 'absent'"
    assert tuned["others"].keys() == {"slow"}
    assert rows["op"]["class"]["default"] == {"backend": "slow"}
    assert rows["op"]["class"]["sm_90"]["backend"] == "right"
    assert rows["op"]["class"]["sm_90"]["microseconds"] == 5000
    chosen.write()
    assert tomllib.loads((tmp_path / "table.toml").read_text()) == rows


@pytest.mark.parametrize("in_place", [{"close": {"sm_90": {"backend": "now", "microseconds": 9.0}}}, {}])
def test_the_row_in_place_is_timed_beside_the_candidates(
    in_place: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Check that a candidate replaces the row in place only if it is faster by more than the noise of the measurement."""
    loose = {"default": {"backend": "default"}, "sm_90": {"backend": "now"}}
    rows: dict[str, Any] = {"op": in_place | {"loose": loose}}
    table = tune.Table(rows, lambda: None, "sm_90", CPU, tmp_path / "table.toml")
    subject = tune.Subject("op", ("close", "loose"), [{"backend": "then"}], "conv3x3", (torch.ones(3),))
    monkeypatch.setattr(operations, "conv3x3", lambda argument: argument)
    monkeypatch.setattr(reference, "conv3x3", lambda argument: argument)

    def tuned(**times: list[float]) -> tune.Row:
        waiting = {name: iter(values) for name, values in times.items()}
        seconds = lambda *_: next(waiting[rows["op"]["close"]["sm_90"]["backend"]])  # noqa: E731
        monkeypatch.setattr(tune, "seconds", seconds)
        return tune.tune(subject, table, tune.Options(repetitions=3, device="cpu"))

    within_noise = tuned(now=[5.0, 4.0, 6.0], then=[4.5, 4.0, 4.5])
    assert within_noise["chosen"] == "now"
    assert within_noise["in_place_seconds"] == within_noise["seconds"]
    assert rows["op"]["close"]["sm_90"] == {"backend": "now", "microseconds": 5e6}
    assert tuned(now=[5.0, 4.0, 6.0], then=[3.5, 9.0, 3.5])["chosen"] == "then"
    assert rows["op"]["close"]["sm_90"] == {"backend": "then", "microseconds": 3.5e6}


def test_a_row_stays_where_no_candidate_is_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = {"backend": "cudnn", "microseconds": 1.0}
    rows: dict[str, Any] = {"op": {"close": {"sm_90": measured}, "loose": {"default": {"backend": "triton"}}}}
    table = tune.Table(rows, lambda: None, "sm_90", CPU, tmp_path / "table.toml")
    monkeypatch.setattr(operations, "conv3x3", lambda argument: 2 * argument)
    monkeypatch.setattr(reference, "conv3x3", lambda argument: argument)
    subject = tune.Subject("op", ("close", "loose"), [{"backend": "tma"}], "conv3x3", (torch.ones(3),))
    assert tune.tune(subject, table, tune.Options(repetitions=1, device="cpu"))["chosen"] is None
    assert rows["op"]["close"] == {"sm_90": measured}


def test_a_row_has_the_fastest_tile_of_each_back_end() -> None:
    default = {"backend": "triton", "BLOCK_M": 1, "tma": {"BLOCK_M": 2}}
    fast = [
        default | {"backend": "cudnn"},
        default | {"backend": "tma", "tma": {"BLOCK_M": 3}},
        default | {"BLOCK_M": 4},
    ]
    assert tune.fastest_tiles(fast, default) == {"backend": "cudnn", "BLOCK_M": 4, "tma": {"BLOCK_M": 3}}
    assert tune.fastest_tiles(fast[:1], default) == default | {"backend": "cudnn"}
    assert tune.fastest_tiles([{"BLOCK_C": 8}, {"BLOCK_C": 16}], {"BLOCK_C": 4}) == {"BLOCK_C": 8}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tune --blocks 3,4", "--blocks 3,4: expected some of 1 … 3, the blocks of the network"),
        ("tune --candidates 0", "--candidates 0: expected at least 1"),
        ("tune --operations nrom", "--operations nrom: expected prefixes of operations with candidates, found none"),
        ("tune --operations nrom --compile-only", "--operations nrom: expected prefixes"),
        ("first_block --precision tf16", "--precision tf16: expected fp32, tf32, fp16, bf16"),
        ("gpu steps", "steps: expected a GPU, found none (too old); rehearse on the CPU with --rehearse"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(
    words: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tune.Table({}, lambda: None, "sm_90", CPU, tmp_path / "table.toml")
    monkeypatch.setattr(tune.Table, "of", lambda *_: table)
    monkeypatch.setattr(tune, "subjects", lambda *_: iter([tune.Subject("norm_relu_pool", ("16",), [], "", ())]))
    monkeypatch.setattr(gpu, "usable_gpus", lambda: 0)
    monkeypatch.setattr(gpu, "why_no_gpu", lambda: "too old")
    monkeypatch.chdir(tmp_path)  # where a record would be left
    assert cli.run(main, [*words.split(), *([] if "gpu" in words else ["--device", "cpu"])]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
