"""Run folders as the analyses read them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mtt_fast.errors import InputError
from mtt_fast.storage import run_folder
from mtt_fast.storage.files import MALFORMED
from mtt_fast.storage.run_folder import SUMMARY


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return what summary.json says, or None if the run is not finished. Raises `InputError` if it has no accuracy."""
    summary = run_folder.read_summary(folder)
    try:
        if summary is not None:
            float(summary["accuracy"]["distilled"]["mean"])
    except MALFORMED as error:
        raise run_folder.broken_summary(folder, error) from error
    return summary


def finished_runs(places: Iterable[str | os.PathLike[str]]) -> dict[Path, dict[str, Any]]:
    """Return the summaries of the finished runs in `places`, by folder: each place a run folder, or one that holds some.

    Raises `InputError` for a place that is no folder or holds no finished run.
    """
    found: dict[Path, dict[str, Any]] = {}
    for place in map(Path, places):
        if not place.is_dir():
            raise InputError(f"{place}: expected a run folder, or a folder of runs; check the path")
        here = sorted(path.parent for path in place.rglob(SUMMARY))
        if not here:
            raise InputError(f"{place}: expected a finished run in it or below, found no {SUMMARY}")
        for folder in here:
            if (summary := read_summary(folder)) is not None:
                found[folder] = summary
    return found
