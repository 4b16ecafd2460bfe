"""Read only regular files of a plausible size: never block on a pipe, read a device or load a decompression bomb."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

from mtt_fast.errors import InputError, reason_of, remedy_for

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_CHECK_PATH = "check the path"
_MAX_TEXT_BYTES = 4 << 20  # bytes of options or of a record, which are parsed at once
_MAX_LINE = 10_000  # characters

StrPath = str | os.PathLike[str]


def open_regular(path: StrPath, most: int | None = None, fix: str = _CHECK_PATH) -> BinaryIO:
    """Open a file for reading, unbuffered, if it is a regular one, or a link to one, of at most `most` bytes.

    Raises `InputError`, which ends in `fix`, for one that is missing, larger, or of another kind: a folder, a FIFO, a device.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO that nobody writes to would be waited for
    except (OSError, ValueError) as error:
        raise unreadable(path, error, fix) from error
    try:
        _check_status(os.fstat(handle), path, most, fix)
    except InputError:
        os.close(handle)
        raise
    return open(handle, "rb", buffering=0)


def check_regular(path: StrPath, most: int, fix: str = _CHECK_PATH) -> None:
    """Raise `InputError` as `open_regular` does, without opening the file, for a library that opens it by its path."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error, fix) from error
    _check_status(status, path, most, fix)


def read_bytes(path: StrPath, most: int, fix: str = _CHECK_PATH) -> bytes:
    """Return the content of a file of at most `most` bytes. Raises `InputError` as `open_regular`."""
    with open_regular(path, most, fix) as file:
        try:
            return file.read()
        except OSError as error:
            raise unreadable(path, error, "check the disk") from error


def read_text(path: StrPath, most: int = _MAX_TEXT_BYTES) -> str:
    """Return the text, UTF-8, of a file of at most `most` bytes.

    Raises `InputError` as `open_regular`, and for a file that is no text.
    """
    return _decoded(read_bytes(path, most), "utf-8", path, "restore a copy, or delete it and make it again")


def read_lines(path: StrPath, most: int, fix: str) -> list[str]:
    """Return the lines of a text file, UTF-8, of at most `most` bytes; an empty last one is left out.

    Raises `InputError` as `open_regular`, and for a file that is no text.
    """
    return lines_of(read_bytes(path, most, fix), path, fix)


def lines_of(content: bytes, path: StrPath, fix: str) -> list[str]:
    """Return the lines in the `content` of the text file `path`. Raises `InputError` if it is no text."""
    text = _decoded(content, "utf-8-sig", path, fix)
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if "\0" in text or max(map(len, lines)) > _MAX_LINE:
        raise InputError(f"{path}: expected text, found bytes that are none or a line without an end; {fix}")
    return lines if text else []


def _check_status(status: os.stat_result, path: StrPath, most: int | None, fix: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise InputError(f"{path}: expected a file, found {kind}; {fix}")
    if most is not None and status.st_size > most:
        raise InputError(f"{path}: expected at most {most:,} bytes, found {status.st_size:,}; {fix}")


def _decoded(content: bytes, encoding: str, path: StrPath, fix: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8, found other bytes ({error.reason}); {fix}") from error


def unreadable(path: StrPath, error: OSError | ValueError, fix: str = _CHECK_PATH) -> InputError:
    """Return the error for a file that cannot be read; a path with a NUL gives a `ValueError`."""
    return InputError(f"{path}: cannot be read ({reason_of(error)}); {remedy_for(error, fix)}")
