"""Check files of other software before they are read, so that a bad file is refused at once.

The kind and size of a file are checked before any byte of it is read, and the kind and claimed size of a tensor before any value
of it is read.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from mtt_fast.checks import check_ordinary, shown
from mtt_fast.errors import InputError, reason_of, remedy_for
from mtt_fast.storage.regular import read_text
from mtt_fast.storage.text_files import parse_json

LARGEST_FILE = 64 << 30
"""Bytes; the largest distilled set that was published takes 10 GB, a buffer of ten experts of ResNet-18 23 GB."""
LARGEST_TEXT = 64 << 20
"""Bytes of a file of JSON: a million labels of a hundred classes are fewer."""

_NUMBERS = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip
_MAX_EXPANSION, _EXTRA_BYTES = 20, 64 << 20  # how many times its size, besides so many bytes, a file may unpack to
_BEYOND_ITS_STORAGE = 1 << 20  # bytes that an expanded view may claim besides those that it has
_WORDS = 200  # letters of a library's complaint


def largest_unpacked(size: int) -> int:
    """Return the number of bytes to which a file of `size` bytes may unpack."""
    return size * _MAX_EXPANSION + _EXTRA_BYTES


def names_in(folder: str | os.PathLike[str]) -> list[str]:
    """Return the sorted names in a folder. Raises `InputError` if it cannot be listed."""
    try:
        return sorted(os.listdir(folder))
    except (OSError, ValueError) as error:  # of a name with a NUL
        raise InputError(
            f"{os.fspath(folder)}: expected a folder, found none that can be read ({reason_of(error)}); {remedy_for(error)}"
        ) from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the value in a file of JSON. Raises `InputError` if it is missing, too large, not JSON or nested too deeply."""
    text = read_text(path, LARGEST_TEXT)
    try:
        return parse_json(text)
    except ValueError as error:
        raise InputError(
            f"{path}: expected JSON, found a broken file ({complaint_of(error)}); write it again"
        ) from error


def as_tensor(values: Any, dtype: torch.dtype) -> Tensor:
    """Return lists of numbers as a tensor. Raises `ValueError` for anything else, and numbers that `dtype` cannot hold."""
    exact = not dtype.is_floating_point
    _check_numbers(values, (int,) if exact else (int, float))
    try:
        return torch.tensor(values, dtype=dtype, device="cpu")
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(str(error).partition("\n")[0]) from error


def plain_tensor(value: Any, where: str | os.PathLike[str]) -> Tensor:
    """Return a tensor from a file of other software, detached, if it is strided, in memory, and of real numbers.

    A subclass becomes a `Tensor`. It may be a view, and expanded, but may not claim many more bytes than its storage has, so that
    copies of it are bounded. Raises `InputError`, which begins with `where`, for anything else.
    """
    if not isinstance(value, Tensor):
        raise InputError(f"{where}: expected a tensor, found {shown(value)}; name the right file")
    check_ordinary(str(where), value)
    if value.device.type != "cpu" or value.dtype not in _NUMBERS:
        other = f"of {value.dtype}" if value.device.type == "cpu" else f"on the device {value.device}"
        raise InputError(
            f"{where}: expected a dense tensor of real numbers, found one {other}; convert and save it again"
        )
    tensor: Tensor = value.detach().as_subclass(Tensor)
    stored, claimed = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
    if claimed > stored + _BEYOND_ITS_STORAGE:
        raise InputError(
            f"{where}: expected a tensor that holds its numbers, found {claimed:,} bytes claimed of a storage of {stored:,}; "
            "save a copy of it (tensor.clone())"
        )
    return tensor


def complaint_of(error: Exception) -> str:
    """Return a library's complaint about a bad file, in one line."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= _WORDS else words[:_WORDS] + " …"


def _check_numbers(values: Any, kinds: tuple[type, ...]) -> None:
    """Raise `ValueError` unless `values` are lists, at most one within another, of numbers of `kinds`."""
    if not isinstance(values, list):
        raise ValueError(f"expected a list of numbers, found {shown(values)}")
    for row in values:
        for value in row if isinstance(row, list) else [row]:
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ValueError(f"expected {kinds[-1].__name__}, found {shown(value)}")
