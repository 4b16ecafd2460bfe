"""Test that a place where results cannot be written is refused in one line, before the work whose results they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import bench.__main__ as bench
import mtt_fast.convert.command as convert
import mtt_fast.cross.command as cross
import mtt_fast.distill.command as distill
from mtt_fast import InputError, compress, evaluate
from mtt_fast.analysis import grid, score, tables
from mtt_fast.baselines import command as baselines
from mtt_fast.commands import cli
from mtt_fast.experts import command as experts
from mtt_fast.report import __main__ as report
from mtt_fast.storage.outputs import check_output_file, check_output_folder
from mtt_fast.storage.run_files import CONFIG, METRICS, SECONDS, SUMMARY, SYNTHETIC

DIGITS = "--dataset digits --model ConvNetD1W4"


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in which nothing may be written; the system lets root write everywhere."""
    folder, allowed = tmp_path / "read_only", os.access
    folder.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and allowed(path, mode))
    return folder


def test_what_is_in_the_way_is_named(tmp_path: Path, read_only: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for place, words in (
        ("file", "found a file; choose another place"),
        ("file/sub/folder", f"found a file at {tmp_path}/file; choose"),
        ("link", "found a link to nothing; choose"),
        ("read_only", f"found that {read_only} is read-only; choose"),
        ("read_only/sub/folder", f"found that {read_only} is read-only; choose"),
    ):
        with pytest.raises(InputError, match=f"^{tmp_path}/{place}: expected a folder to write in, {words}"):
            check_output_folder(tmp_path / place)
        with pytest.raises(InputError, match="expected a folder to write in, found"):
            check_output_file(tmp_path / place / "x.json")
    with pytest.raises(InputError, match="expected a file to write, found a folder; choose another place"):
        check_output_file(tmp_path)
    (tmp_path / "empty").mkdir()
    check_output_folder(tmp_path / "empty")
    check_output_folder(tmp_path / "new" / "folder")
    check_output_file(tmp_path / "file")
    check_output_file(tmp_path / "new" / "x.json")


@pytest.mark.parametrize("place", ["file", "read_only"])
@pytest.mark.parametrize(
    ("command", "words", "option"),
    [
        (distill.main, f"{DIGITS} --buffer_path b --out PLACE", "--out"),
        (distill.main, f"{DIGITS} --buffer_path b --out PLACE --dry_run", "--out"),
        (distill.main, f"{DIGITS} --buffer_path PLACE --out o", "--buffer_path"),
        (distill.main, f"{DIGITS} --buffer_path PLACE --out o --dry_run", "--buffer_path"),
        (distill.main, f"{DIGITS} --buffer_path b --out o --packed_path PLACE", "--packed_path"),
        (experts.main, f"{DIGITS} --buffer_path PLACE", "--buffer_path"),
        (baselines.main, f"random {DIGITS} --out PLACE", "--out"),
        (baselines.main, f"herding {DIGITS} --out o --buffer_path PLACE", "--buffer_path"),
        (evaluate.main, f"random {DIGITS} --out PLACE/x.json", "--out"),
        (cross.main, f"random {DIGITS} --out PLACE", "--out"),
        (compress.main, "buffers --out PLACE", "--out"),
        (convert.main, "images_x.pt PLACE/x.safetensors", "destination"),
        (report.main, "run --out PLACE/x.html", "--out"),
        (grid.main, f"{DIGITS} --out PLACE", "--out"),
        (tables.main, "run --out PLACE", "--out"),
        (score.main, "--hlr 1 --ior 1 --out PLACE/x.json", "--out"),
        (bench.main, "gpu suite --out PLACE", "--out"),
        (bench.main, "tune --table PLACE/table.toml", "--table"),
        (bench.main, "meta_step --device cpu --out PLACE", "--out"),
        (bench.main, "methods --device cpu --out PLACE", "--out"),
        (bench.main, "profile --device cpu --out PLACE", "--out"),
    ],
)
def test_commands_refuse_it_before_any_work(
    command: Callable[[Sequence[str]], None],
    words: str,
    option: str,
    place: str,
    tmp_path: Path,
    read_only: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("file", "images_x.pt", "labels_x.pt"):
        Path(name).touch()
    assert cli.run(command, words.replace("PLACE", place).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    problem = "found a file" if place == "file" else f"found that {read_only} is read-only"
    assert f"{place}" in line.split(": expected")[0], line
    assert f": expected a folder to write in, {problem}" in line
    assert option in line
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "read_only", "images_x.pt", "labels_x.pt", "data"}
    assert not list(read_only.iterdir())


def test_a_file_is_expected_where_a_folder_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, words in ((evaluate.main, f"random {DIGITS}"), (report.main, "run"), (score.main, "--hlr 1 --ior 1")):
        assert cli.run(command, [*words.split(), "--out", str(tmp_path)]) == 2
        line = capsys.readouterr().err
        assert line == f"error: --out {tmp_path}: expected a file to write, found a folder; choose another place\n"


@pytest.mark.parametrize(
    "name", ["images_best.pt", "set.npz", "set.parquet", SYNTHETIC, SUMMARY, CONFIG, METRICS, SECONDS]
)
def test_no_result_replaces_a_set_or_a_file_of_a_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.write_text("precious")
    for command, words in ((evaluate.main, f"random {DIGITS}"), (report.main, "run"), (score.main, "--hlr 1 --ior 1")):
        assert cli.run(command, [*words.split(), "--out", str(file)]) == 2
        line = capsys.readouterr().err
        assert line.startswith(
            f"error: --out {file}: expected a new file, or a result to replace, found a set or a run's"
        )
    assert file.read_text() == "precious"
    check_output_file(tmp_path / "new" / name)


def test_what_is_there_already_is_used_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = f"{DIGITS} --num_experts 1 --train_epochs 1 --batch_train 1024".split()
    assert cli.run(experts.main, words) == 0
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cli.run(experts.main, words) == 0
    words[words.index("--num_experts") + 1] = "2"
    assert cli.run(experts.main, words) == 2
