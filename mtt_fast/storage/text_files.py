"""Write text, and read and write JSON and TOML."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

from mtt_fast.errors import InputError
from mtt_fast.storage.atomic import atomic_path
from mtt_fast.storage.regular import read_text

MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""The errors of code that takes apart a record of another form than it expects."""


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` atomically, in UTF-8; bytes of a path that are not UTF-8 are written as \\udcNN."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` to `path` atomically, as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def not_json_error(path: str | os.PathLike[str], error: Exception) -> InputError:
    """Return the error that the record for `path` cannot be written, since JSON cannot hold it, as `error` says."""
    return InputError(
        f"{os.fspath(path)}: not written: expected texts, numbers, lists and dictionaries in all fields but tensors ({error}); "
        "use .tolist() of an array, .item() of a number of NumPy or torch, and str() of other objects"
    )


def parse_json(text: str | bytes) -> Any:
    """Return the value of JSON text. Raises `ValueError` for text that is not JSON, or is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table in a TOML file. Raises `InputError` if it is missing or is not TOML."""
    return parse_toml(read_text(path), path)


def parse_toml(text: str, path: Path) -> dict[str, Any]:
    """Return the table in TOML text from the file `path`. Raises `InputError` if it is not TOML."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of the syntax, a number's digits, or the depth
        raise InputError(f"{path}: not valid TOML ({error})") from error
