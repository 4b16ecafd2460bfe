"""Hidden folders for what is being written, which end with the process that writes: made, locked, cleared away.

Each lies beside what its content will become, as `.NAME.RANDOM.partial`, and holds a file that its writer locks. The
system lets go of the lock when the process ends, however it ends, so what nobody locks is a leftover; whoever writes in
the same place next removes it.
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
_LOCK = "lock"


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder on the file system of `path`, for what is to be renamed to it; remove the rest at the end.

    The folder that is to hold `path` is made; if the block fails it goes again, unless it holds other things.
    Raises `OSError`.
    """
    with _made_folder(path.parent):
        remove_leftovers(path.parent)
        folder, lock = _locked_folder(path)
        try:
            content = folder / "content"
            content.mkdir()
            yield content
        finally:
            shutil.rmtree(folder)
            os.close(lock)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that have ended left in `folder`; leave what live ones are writing. Raises `OSError`."""
    for name in filter(_LEFTOVER.fullmatch, os.listdir(folder)):
        path = folder / name
        with contextlib.suppress(OSError):  # it is in use, or just goes by itself
            is_folder = path.is_dir() and not path.is_symlink()
            lock = _open_lock(path / _LOCK if is_folder else path)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if is_folder else path.unlink()
            finally:
                os.close(lock)


def is_empty(folder: Path) -> bool:
    """Return whether `folder` holds nothing, once leftovers are removed. Raises `OSError`."""
    remove_leftovers(folder)
    return not any(folder.iterdir())


def _locked_folder(path: Path) -> tuple[Path, int]:
    """Make a folder beside `path` and lock it; return it with the lock's descriptor."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        with contextlib.suppress(FileNotFoundError):  # between two lines it was not locked yet: taken for a leftover
            lock = _open_lock(folder / _LOCK)
            with contextlib.suppress(OSError):  # a file system without locks: then nobody takes it for a leftover
                fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / _LOCK).exists():
                return folder, lock
            os.close(lock)


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)


@contextlib.contextmanager
def _made_folder(folder: Path) -> Iterator[None]:
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
