"""Read run folders for the analyses."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mtt_fast.errors import InputError
from mtt_fast.storage import run_folder
from mtt_fast.storage.run_files import SUMMARY
from mtt_fast.storage.text_files import MALFORMED


def read_finished_summary(folder: Path) -> dict[str, Any] | None:
    """Return the content of summary.json, or None if the run is not finished. Raises `InputError` if it has no accuracy."""
    summary = run_folder.read_summary(folder)
    try:
        if summary is not None:
            float(summary["accuracy"]["distilled"]["mean"])
    except MALFORMED as error:
        raise run_folder.broken_summary(folder, error) from error
    return summary


def finished_runs(folders: Iterable[str | os.PathLike[str]]) -> dict[Path, dict[str, Any]]:
    """Return the summaries of the finished runs in `folders`, run folders or folders of runs, by run folder.

    Raises `InputError` for a path that is no folder or holds no finished run.
    """
    summaries: dict[Path, dict[str, Any]] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise InputError(f"{folder}: expected a run folder, or a folder of runs; check the path")
        runs = sorted(path.parent for path in folder.rglob(SUMMARY))
        if not runs:
            raise InputError(f"{folder}: expected a finished run in it or below, found no {SUMMARY}")
        for run in runs:
            if (summary := read_finished_summary(run)) is not None:
                summaries[run] = summary
    return summaries
