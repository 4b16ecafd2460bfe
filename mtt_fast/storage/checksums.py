"""Compute checksums, by which damaged files are found."""

from __future__ import annotations

from typing import Any

import xxhash

_BLOCK = 64 << 20  # bytes hashed at once: between two blocks Ctrl-C is heard


def checksum_of(*parts: Any) -> str:
    """Return the checksum, XXH3 of 128 bits, of bytes or of views of bytes, one after another."""
    digest = xxhash.xxh3_128()
    for part in parts:
        whole = memoryview(part)
        for begin in range(0, whole.nbytes, _BLOCK):
            digest.update(whole[begin : begin + _BLOCK])
    return digest.hexdigest()
