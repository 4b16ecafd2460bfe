"""Check, before the work, that its results can be written where they are asked for."""

from __future__ import annotations

import os
from pathlib import Path

from mtt_fast.errors import InputError
from mtt_fast.storage.run_files import CONFIG, METRICS, SECONDS, SUMMARY

_FIX = "choose another place"
_NOT_WRITTEN_OVER = (".safetensors", ".pt", ".npz", ".parquet", CONFIG, METRICS, SUMMARY, SECONDS)
"""Endings of sets, experts, checkpoints and a run's records, which no result replaces."""


def check_output_folder(folder: str | os.PathLike[str], fix: str = _FIX) -> None:
    """Raise `InputError` unless files can be written in `folder`, which is made later if it is missing.

    The message names what is in the way, and ends in `fix`, what to do instead.
    """
    place = Path(folder).absolute()
    nearest = next(each for each in (place, *place.parents) if os.path.lexists(each))
    if not os.path.isdir(nearest):
        where = "" if nearest == place else f" at {nearest}"
        raise InputError(f"{folder}: expected a folder to write in, found {_kind(nearest)}{where}; {fix}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: expected a folder to write in, found that {nearest} is read-only; {fix}")


def check_output_file(path: str | os.PathLike[str], fix: str = _FIX) -> None:
    """Raise `InputError` unless `path` is a result that may be replaced, or does not exist, in a folder where files can be written.

    The message ends in `fix`, what to do instead.
    """
    if os.path.isdir(path):
        raise InputError(f"{path}: expected a file to write, found a folder; {fix}")
    if os.path.lexists(path) and os.fspath(path).endswith(_NOT_WRITTEN_OVER):
        raise InputError(f"{path}: expected a new file, or a result to replace, found a set or a run's own file; {fix}")
    check_output_folder(Path(path).absolute().parent, fix)


def _kind(path: Path) -> str:
    return "a file" if path.is_file() else "a link to nothing" if path.is_symlink() else "no folder"
