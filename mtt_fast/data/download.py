"""The download of one file whose checksum is known."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from mtt_fast.errors import InputError
from mtt_fast.storage.atomic import atomic_path

_BLOCK = 1 << 18
_MAX_BYTES = 1 << 30  # bytes of a file
_PATIENCE = 60  # seconds without a byte


def fetch(url: str, path: Path, *, md5: str, progress: bool, most: int = _MAX_BYTES) -> None:
    """Download `url` to `path`; the name appears only when the content is whole and has the checksum `md5`.

    Raises `InputError` if the server cannot be reached, stops early or sends something else, or more than `most` bytes;
    then no part of the file stays.
    """
    digest = hashlib.md5(usedforsecurity=False)  # what the publishers give: it tells damage, not malice
    fix = f"try again, or fetch it by hand to {path}"
    try:
        response = urllib.request.urlopen(url, timeout=_PATIENCE)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise InputError(f"`download`: {url}: expected an answer, found none ({error}); {fix}") from error
    length = response.headers.get("Content-Length") or ""
    size = int(length) if length.isascii() and length.isdecimal() and len(length) < 20 else 0
    with (
        response,
        atomic_path(path) as temporary,
        open(temporary, "wb") as file,
        tqdm(
            total=size or None,
            desc=f"fetching {path.name}",
            unit="B",
            unit_scale=True,
            disable=None if progress else True,
        ) as bar,
    ):
        while True:
            try:
                block = response.read(_BLOCK)
            except (OSError, http.client.HTTPException) as error:  # not one of atomic_path's: the disk is fine
                raise InputError(
                    f"`download`: {url}: the transfer broke off after {file.tell()} bytes ({error}); {fix}"
                ) from error
            if not block:
                break
            file.write(block)
            digest.update(block)
            bar.update(len(block))
            if file.tell() > most:
                raise InputError(f"`download`: {url}: expected at most {most:,} bytes, found more; {fix}")
        if file.tell() < size:
            raise InputError(f"`download`: {url}: expected {size} bytes, found only {file.tell()}; {fix}")
        if digest.hexdigest() != md5:
            raise InputError(f"`download`: {url}: expected the checksum (md5) {md5}, found {digest.hexdigest()}; {fix}")
