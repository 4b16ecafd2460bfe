"""Flip bits of files, and offer texts that are no records."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def bits_of(path: Path, count: int) -> Iterator[int]:
    """Yield `count` of the file's bits: half of them in the first 2 KiB, where a header lies."""
    draw, bits = random.Random(path.name), 8 * path.stat().st_size
    for number in range(count):
        yield draw.randrange(min(bits, 8 * 2048) if number % 2 else bits)


def one_of_each_byte(path: Path) -> Iterator[int]:
    """Yield a bit of each of the file's bytes, not always the same."""
    for byte in range(path.stat().st_size):
        yield 8 * byte + (3 * byte + byte // 8) % 8


TEXTS = {
    "deep": b"[" * 100_000,
    "deep-object": b'{"a":' * 100_000,
    "digits": b'{"iterations": ' + b"9" * 5000 + b"}",
    "nul": b'{"a": "\0"}',
    "no-utf8": b'{"a": "\xff\xfe"}',
    "half-a-character": b'{"a": "\\ud800"}',
    "list": b"[]",
    "number": b"1e999",
    "empty": b"",
    "large": b" " * (5 << 20) + b"{}",
}
