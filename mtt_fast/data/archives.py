"""Read files from archives, with limits on their size, and to the end, so that checksums are verified."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mtt_fast.errors import InputError
from mtt_fast.storage.foreign import complaint_of
from mtt_fast.storage.regular import check_regular

_BLOCK = 1 << 20
_OVERHEAD = 1 << 20  # bytes of an archive besides the content of the files: headers, other small files
_MAX_MEMBERS = 1000


def is_file_or_link(path: Path) -> bool:
    """Return whether `path` exists and is not a folder. (A reader refuses all but regular files by name.)"""
    return os.path.lexists(path) and not path.is_dir()


def read_tar(archive: Path, limits: Mapping[str, int], fix: str) -> dict[str, bytes]:
    """Return the content of some files in a .tar.gz. `limits` maps their paths to the largest number of bytes of each.

    Paths are compared by their last two parts. Nothing is written, and links are not followed.
    Raises `InputError`, which ends in `fix`, for a damaged archive, for one that lacks a file or holds it twice, and for one that
    unpacks to much more than the files.
    """
    most = sum(limits.values()) + _OVERHEAD
    check_regular(archive, most, fix)
    try:
        with gzip.open(archive) as stream:
            limited = _Limited(stream, most)
            with tarfile.open(fileobj=limited, mode="r|") as tar:
                files = _read_members(tar, limits)
            while limited.read(_BLOCK):  # the checksum is at the end
                pass
    except Exception as error:  # a broken header raises nearly anything
        raise InputError(
            f"{archive}: expected a whole .tar.gz, found a broken one ({complaint_of(error)}); {fix}"
        ) from error
    if missing := set(limits) - set(files):
        raise InputError(f"{archive}: expected {min(missing)} in it, found none; {fix}")
    return files


def read_gzip(path: Path, most: int, fix: str) -> bytes:
    """Return the content of a .gz file, of at most `most` bytes. Raises `InputError` for a broken or longer one."""
    check_regular(path, most + _OVERHEAD, fix)
    try:
        with gzip.open(path) as stream:
            content = stream.read(most + 1)  # up to the end, if it is no longer
            if len(content) <= most:
                return content
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: expected a whole (gzip) file, found a broken one ({error}); {fix}") from error
    raise InputError(f"{path}: expected at most {most:,} bytes in it, found more; {fix}")


def _read_members(tar: tarfile.TarFile, limits: Mapping[str, int]) -> dict[str, bytes]:
    """Return the content of the members at the paths in `limits`. Raises `TarError` for suspicious members."""
    files: dict[str, bytes] = {}
    for count, member in enumerate(tar):
        if count > _MAX_MEMBERS:
            raise tarfile.TarError(f"more than {_MAX_MEMBERS} members")
        path = _path_in(member.name, limits)
        if path is None:
            continue
        if not member.isreg() or member.issparse():
            raise tarfile.TarError(f"{path} is no regular file in it")
        if path in files:
            raise tarfile.TarError(f"{path} is in it twice")
        if member.size > limits[path]:
            raise tarfile.TarError(f"{path} of {member.size:,} bytes, where at most {limits[path]:,} can be")
        content = tar.extractfile(member)
        files[path] = content.read() if content else b""
    return files


def _path_in(name: str, limits: Mapping[str, int]) -> str | None:
    """Return the path in `limits` with which the name of a member ends, or None."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return None
    tail = "/".join(path.parts[-2:])
    return tail if tail in limits else None


class _Limited(io.RawIOBase):
    """A stream that refuses to give more than `most` bytes."""

    def __init__(self, stream: gzip.GzipFile, most: int) -> None:
        self._stream = stream
        self._left = most

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read up to `len(buffer)` bytes into `buffer`, and return their number. Raises `OSError` beyond the limit."""
        count = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise OSError("it unpacks to more than the data set")
        return count
