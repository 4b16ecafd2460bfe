"""Make, lock and remove hidden folders for files that are being written, even if their writer is killed.

Each is beside the final place of its content, as `.NAME.RANDOM.partial`, and holds a file that its writer locks. The system
releases the lock when the process ends, however it ends. So a folder that is not locked is a leftover, and the next writer
in the same place removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}\.partial")  # the eight are tempfile's
_CONTENT, _LOCK = "content", "lock"


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, for content that the caller renames to `path`; remove the rest at the end.

    The parent folder of `path` is made if it is missing; if the block fails, it is then removed again, unless it holds something
    else. Raises `OSError`.
    """
    with made_folder(path.parent):
        remove_leftovers(path.parent)
        folder, lock = _locked_folder(path)
        try:
            content = folder / _CONTENT
            content.mkdir()
            yield content
        finally:
            _remove(folder)
            os.close(lock)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of ended processes from `folder`, if it exists; keep those of live processes."""
    try:
        names = os.listdir(folder)
    except (OSError, ValueError):  # of a name with a NUL; the writer will raise the error
        return
    for name in filter(_LEFTOVER.fullmatch, names):
        with contextlib.suppress(OSError):  # it is in use, or its writer is removing it
            _remove_leftover(folder / name)


def _remove_leftover(path: Path) -> None:
    """Remove a temporary folder, or a file of earlier versions, unless it is in use. Raises `OSError` if it is."""
    is_folder = path.is_dir() and not path.is_symlink()
    place = path / _LOCK if is_folder else path
    try:
        lock = os.open(place, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:  # the lock is made first and removed last
        path.rmdir()
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), place.lstat()):
            _remove(path) if is_folder else path.unlink()
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a temporary folder that is locked, the lock last."""
    shutil.rmtree(folder / _CONTENT, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):  # others remove one without a lock
        (folder / _LOCK).unlink()
        folder.rmdir()


def is_free(path: Path) -> bool:
    """Return whether there is nothing at `path`, or an empty folder, once leftovers are removed. Raises `OSError`."""
    remove_leftovers(path.parent)
    remove_leftovers(path)
    return not any(path.iterdir()) if path.is_dir() else not os.path.lexists(path)


def _locked_folder(path: Path) -> tuple[Path, int]:
    """Make a folder beside `path` and lock it; return it with the lock's descriptor."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        with contextlib.suppress(FileNotFoundError):  # it was not locked for a moment, and was taken for a leftover
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            with contextlib.suppress(OSError):  # a file system without locks: then nobody takes it for a leftover
                fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / _LOCK).exists():
                return folder, lock
            os.close(lock)


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make `folder` with its parents; if the block fails, remove those of them that were made and are empty."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in missing:
            with contextlib.suppress(OSError):  # it holds something, or was never made
                each.rmdir()
        raise
