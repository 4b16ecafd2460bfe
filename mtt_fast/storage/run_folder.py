"""Lock a run's folder, and write and read the options with which the run, a distillation or a baseline, continues."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w
from filelock import FileLock, Timeout

from mtt_fast.errors import InputError
from mtt_fast.storage.checksums import checksum_of
from mtt_fast.storage.file_locks import acquire
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.records import check_form
from mtt_fast.storage.regular import read_text
from mtt_fast.storage.run_files import CONFIG
from mtt_fast.storage.temporaries import remove_leftovers
from mtt_fast.storage.text_files import parse_toml, write_text

_LOCK = ".lock"
_CONFIG_BEGINS = "# the options of this run: flags change them, and the last line tells whether anything else did"
_CONFIG_ENDS = "# checksum "

log = logging.getLogger(__name__)


@contextlib.contextmanager
def lock_folder(
    folder: Path, doing: str = "writing to this run", fix: str = "choose another `out`", *, wait: float = 0
) -> Iterator[FileLock]:
    """Make and lock `folder` within the block, and remove partial files of killed processes.

    The lock ends with the process that holds it. Raises `InputError` if the folder cannot be made or written, or if another
    process still holds the lock after `wait` seconds (below 0: wait without end); the message says what that process is `doing`,
    and what to do instead of waiting (`fix`).
    """
    check_output_folder(folder, fix)
    lock = FileLock(folder / _LOCK)
    try:
        acquire(lock, max(wait, 0))
    except Timeout as error:
        if wait >= 0:
            raise InputError(f"{folder}: another process is {doing}; wait for it or {fix}") from error
        log.info("%s: waiting for another process, which is %s", folder, doing)
        acquire(lock)
    try:
        remove_leftovers(folder)
        for leftover in folder.glob(".*.partial"):  # of former versions, which did not lock what they write
            if leftover.is_file():
                leftover.unlink()
        yield lock
    finally:
        lock.release()


def lock_inode(folder: Path) -> tuple[int, int] | None:
    """Return the device and inode of the lock in `folder`, or None. They differ if another folder has taken its name."""
    try:
        status = (folder / _LOCK).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def check_not_taken(folder: Path, lock: tuple[int, int] | None) -> None:
    """Raise `InputError` if another run has taken `folder`: its lock is not the one that `lock_inode` found, `lock`."""
    if lock_inode(folder) not in (None, lock):
        raise InputError(
            f"{folder}: another run has taken this folder; continue this one where its own folder was moved to"
        )


def write_config(folder: Path, options: dict[str, Any], note: str = "") -> None:
    """Write options (text, numbers, booleans, lists; None is left out) as TOML, below a `note` of one line.

    The last line is a comment with the checksum of all before it.
    """
    notes = f"{_CONFIG_BEGINS}\n# {note}\n" if note else f"{_CONFIG_BEGINS}\n"
    text = notes + tomli_w.dumps({name: value for name, value in options.items() if value is not None})
    write_text(folder / CONFIG, f"{text}{_CONFIG_ENDS}{checksum_of(text.encode())}\n")


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the options that the run was started with, or None if there is no run in `folder`.

    Raises `InputError` if the file was damaged or changed.
    """
    path = folder / CONFIG
    if not path.exists():
        return None
    text = read_text(path)
    above, mark, checksum = text.rpartition(_CONFIG_ENDS)
    is_checked = bool(mark) or text.startswith(_CONFIG_BEGINS)  # else it is from before there were checksums
    options = parse_toml(text, path) if not is_checked or checksum == f"{checksum_of(above.encode())}\n" else {}
    try:
        check_form(options, dict.fromkeys(("method?", "recipe?", "dataset?", "model?"), str))
    except TypeError:
        options = {}
    if not options:
        raise InputError(
            f"{path}: damaged or changed by hand; restore a copy, or delete it and give the command that began the run with "
            "all its options, which continues it"
        )
    return options
