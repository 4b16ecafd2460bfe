"""Test the records of measurements: with the commit that was measured, whole or in parts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.records import partial_rows, read_record, write_record
from mtt_fast import InputError
from tests.bench.helpers import CPU

ROWS = [{"operation": "conv3x3", "problem": None}]


def written(folder: Path, *, complete: bool) -> dict[str, Any]:
    path = write_record(str(folder), "found", "kernels", CPU, {}, ROWS, "measured so", complete=complete)
    return read_record(path)


def in_a_checkout(monkeypatch: pytest.MonkeyPatch, commit: str, changes: str = "") -> None:
    """Have git tell of this commit and of these changes."""

    def git(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(words, 0, changes if "status" in words else commit)

    monkeypatch.setattr("bench.records.subprocess.run", git)


def test_a_record_tells_the_commit_and_whether_files_were_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes in ("", " M bench/kernels.py"):
        in_a_checkout(monkeypatch, "abc", changes)
        record = written(tmp_path, complete=True)
        assert (record["commit"], record["dirty"]) == ("abc", bool(changes))


def test_rows_that_were_cut_off_go_on_at_their_commit_until_the_record_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_checkout(monkeypatch, "abc")
    written(tmp_path, complete=False)
    assert partial_rows(str(tmp_path), "found") == ROWS
    in_a_checkout(monkeypatch, "def")
    assert partial_rows(str(tmp_path), "found") == []
    assert written(tmp_path, complete=True)["rows"] == ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    for content in ("{", "[]", json.dumps({"rows": ROWS})):
        path.write_text(content)
        with pytest.raises(InputError, match=r"found\.json: expected a record of a benchmark"):
            read_record(path)
