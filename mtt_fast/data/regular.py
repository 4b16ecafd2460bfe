"""Reading what other people wrote: only regular files, and none longer than it can honestly be."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mtt_fast.errors import InputError, reason_of, remedy_for

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_LONGEST_LINE = 10_000  # characters


def check_regular(path: str | os.PathLike[str], most: int, mend: str = "get it again") -> int:
    """Return the size of `path` in bytes, after a look at its kind alone: a FIFO or a device would never end.

    Raises `InputError`, which ends in `mend`, unless it is a regular file, or a link to one, of at most `most` bytes.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({reason_of(error)}); {remedy_for(error, mend)}") from error
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: expected a file, found {_KINDS.get(stat.S_IFMT(found.st_mode), 'no file')}; {mend}")
    if found.st_size > most:
        raise InputError(f"{path}: expected at most {most:,} bytes, found {found.st_size:,}; {mend}")
    return found.st_size


def read_bytes(path: str | os.PathLike[str], most: int, mend: str = "get it again") -> bytes:
    """Return the content of a regular file of at most `most` bytes. Raises `InputError` as `check_regular` does."""
    check_regular(path, most, mend)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason_of(error)}); {remedy_for(error, mend)}") from error


def read_lines(path: str | os.PathLike[str], most: int, mend: str = "get it again") -> list[str]:
    """Return the lines of a text file of at most `most` bytes, in UTF-8; an empty last one is left out.

    Raises `InputError` as `check_regular` does, and for a file that is no text.
    """
    return lines_of(read_bytes(path, most, mend), path, mend)


def lines_of(raw: bytes, path: str | os.PathLike[str], mend: str = "get it again") -> list[str]:
    """Return the lines in `raw`, the content of the text file `path`. Raises `InputError` if it is no text."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8, found other bytes ({error.reason}); {mend}") from error
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if "\0" in text or max(map(len, lines)) > _LONGEST_LINE:
        raise InputError(f"{path}: expected text, found bytes that are none or a line without an end; {mend}")
    return lines if text else []
