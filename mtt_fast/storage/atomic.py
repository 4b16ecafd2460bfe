"""Write files and folders atomically: a crash at any moment leaves either the old or the new content."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from mtt_fast.errors import InputError, reason_of, remedy_for
from mtt_fast.storage.temporaries import is_free, temporary_folder


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of an empty file to write; rename it to `path` if the block succeeds, delete it if it does not.

    The content is flushed to disk before the rename, so a crash at any moment leaves the old file or the new one. Raises
    `InputError` when the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    with naming_errors(path), temporary_folder(path) as folder:
        temporary = folder / path.name
        temporary.touch()
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike[str], last: str = "") -> Iterator[Path]:
    """Yield an empty folder to write files in, which appears as `folder` if the block succeeds, and not at all if not.

    If `folder` already holds something, the files are moved into it one by one. Those whose names begin with `last` are moved
    after all others, and the first of these at the very end: a reader who finds it finds all files. Raises `InputError` when the
    folder cannot be made or written, or the disk is full.
    """
    _check_name(folder)  # before `resolve`, which raises its own error for such a name
    folder = Path(folder).resolve()
    with naming_errors(folder):
        # a folder that is in use or not empty cannot be replaced, so files are moved into it
        stays = folder.is_dir() and not (is_free(folder) and folder != Path.cwd() and not folder.is_mount())
        with temporary_folder(folder / folder.name if stays else folder) as content:
            try:
                yield content
            except InputError as error:  # from a write inside, which knows only the temporary place
                raise InputError(str(error).replace(str(content), str(folder))) from error
            for place, _, names in os.walk(content):
                for name in names:
                    _sync(Path(place, name))
                _sync(Path(place))
            if stays:
                _move_files(content, folder, last)
            else:
                os.replace(content, folder)
                _sync(folder.parent)


def _move_files(source: Path, folder: Path, last: str) -> None:
    """Move all files below `source` to the same places below `folder`, those whose names begin with `last` last."""
    files = sorted((path for path in source.rglob("*") if path.is_file()), reverse=True)
    for path in sorted(files, key=lambda path: path.name.startswith(last)):
        place = folder / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
        _sync(place.parent)


def _check_name(path: str | os.PathLike[str]) -> None:
    """Raise `InputError` for a path that no operating system accepts."""
    if "\0" in os.fspath(path):
        raise InputError(f"{os.fspath(path)}: cannot be written (its name has a NUL); choose another name")


@contextlib.contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Raise `InputError` that names `path` in place of the `OSError` of a failed write, and for a path that no system accepts."""
    _check_name(path)
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({reason_of(error)}); {remedy_for(error)}") from error


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems cannot do so with a folder
        if error.errno not in (errno.EINVAL, errno.EBADF) or not path.is_dir():
            raise
    finally:
        os.close(handle)
