"""Test the grid of expert epochs and steps on toy runs: cells, stops, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mtt_fast.analysis import grid
from mtt_fast.runtime.interrupts import Stopped
from mtt_fast.storage.text_files import write_json
from tests.analysis.helpers import TOY, folders, read, run, summary


@pytest.mark.slow
def test_grid_runs_every_cell_once_and_draws_them(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    flags = [
        "grid",
        *TOY,
        *folders(toy),
        "--expert-epochs",
        "2,1",
        "--syn_steps=1,3",
        "--out",
        str(out),
        "--lr_lr",
        "1e-6",
    ]
    flags += ["--eval_it", "5"]
    assert run(*flags) == 0
    cells = read(out / "grid.json")["cells"]
    assert [(cell["expert_epochs"], cell["syn_steps"]) for cell in cells] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    for cell in cells:
        summary = read(out / cell["run"] / "summary.json")
        assert cell["accuracy"] == summary["accuracy"]["distilled"]
        options = summary["options"]
        assert (options["expert_epochs"], options["syn_steps"], options["lr_lr"]) == (
            cell["expert_epochs"],
            cell["syn_steps"],
            1e-6,
        )
        assert (
            f" {100 * cell['accuracy']['mean']:.1f} |" in (out / "grid.md").read_text()
        )  # of one network: no deviation
    with Image.open(out / "grid.png") as picture:
        assert len(set(picture.convert("RGB").get_flattened_data())) > 50  # colours of the map
    before = {path: path.stat().st_mtime_ns for path in out.glob("M*/*")}
    assert run(*flags) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("M*/*")} == before


def test_a_cell_that_diverges_is_left_open(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    flags = ["grid", *TOY, *folders(toy), "--expert_epochs", "1", "--syn_steps", "1,2", "--out", str(out)]
    assert run(*flags, "--Iteration", "30", "--eval_it", "40", "--lr_teacher", "1e30") == 0
    assert [cell["accuracy"] for cell in read(out / "grid.json")["cells"]] == [None, None]
    assert "| M = 1 | — | — |" in (out / "grid.md").read_text()


def test_a_stopped_grid_keeps_what_is_finished(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def distilled_or_stopped(command: Sequence[str]) -> None:
        place = Path(command[-1])
        if place.name == "M1-N2":
            raise Stopped("stopped", 2)
        write_json(place / "summary.json", summary(0.5))

    monkeypatch.setattr("mtt_fast.distill.command.main", distilled_or_stopped)
    out = tmp_path / "grid"
    assert run("grid", *TOY, *folders(toy), "--expert_epochs", "1", "--syn_steps", "1,2", "--out", str(out)) == 130
    assert [cell["accuracy"] is None for cell in read(out / "grid.json")["cells"]] == [False, True]
    assert "| M = 1 | 50.0 ± 1.0 | — |" in (out / "grid.md").read_text()
    assert (out / "grid.png").exists()


def test_the_picture_has_each_accuracy_at_its_steps_and_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(grid, "save_figure", lambda path, figure: figures.append(figure))
    accuracies = {(m, n): {"mean": 0.1 * m + 0.01 * n, "std": 0.0, "n": 1} for m in (1, 2) for n in (1, 2, 5)}
    grid.write(tmp_path, [1, 2], [1, 2, 5], accuracies | {(2, 1): None}, [])
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["11.0", "12.0", "15.0", "—", "22.0", "25.0"]
    assert [text.get_position() for text in axes.texts] == [(n, m) for m in range(2) for n in range(3)]
    values = axes.images[0].get_array()
    assert values is not None
    np.testing.assert_allclose(np.ma.getdata(values), np.array([[11, 12, 15], [np.nan, 22, 25]]))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "5"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--syn_steps", "1,x"], "--syn_steps 1,x: expected numbers as in 1,10,100"),
        (["--expert_epochs", "0"], "--expert_epochs 0: expected numbers of at least 1"),
        (["--ipcc", "3"], "ipcc: unknown option (did you mean --ipc?)"),
        (["--expert_epochs", "1,4"], "reach epoch 5, but the expert ends at epoch 4"),
    ],
)
def test_wrong_options_are_refused_before_the_first_cell(
    flags: list[str], message: str, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("grid", *TOY, *folders(toy), "--out", str(tmp_path / "grid"), *flags) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("summary.json"))


def test_cells_that_do_not_compare_are_refused(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a finished cell does not stand beside cells of another protocol, or of fewer iterations."""
    flags = ["grid", *TOY, *folders(toy), "--expert_epochs", "1", "--out", str(tmp_path / "grid")]
    assert run(*flags, "--syn_steps", "1", "--Iteration", "2") == 0
    more = [*flags, "--syn_steps", "1,2"]
    assert run(*more, "--Iteration", "2", "--protocol", "datm") == 2
    assert "M1-N1: holds a run with --protocol mtt, not datm" in capsys.readouterr().err
    assert run(*more, "--Iteration", "1") == 2
    assert "M1-N1: holds a run of 2 iterations, not 1" in capsys.readouterr().err
    assert not (tmp_path / "grid/M1-N2").exists()


def test_a_dry_run_of_a_grid_writes_nothing(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*TOY, *folders(toy), "--out", str(tmp_path / "grid"), "--expert_epochs", "1", "--syn_steps", "1,2"]
    assert run("grid", *flags, "--dry_run") == 0
    assert capsys.readouterr().out.count("data set  digits") == 2
    assert not (tmp_path / "grid").exists()
