"""JSON records that a later command reads back. Each has a checksum, so that damage is not taken for a result.

A record has two fields besides its own, `format` and `checksum`; records of the first format have neither.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mtt_fast.errors import InputError
from mtt_fast.storage.checksums import checksum_of
from mtt_fast.storage.regular import read_text
from mtt_fast.storage.text_files import MALFORMED, parse_json, write_json

NUMBER = int | float
"""The form of a number, for `check_form`."""
_FORMAT = 2
_CHECKSUM_FIELDS = ("format", "checksum")


def with_checksum(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with its checksum, ready to be written as JSON."""
    whole = {"format": _FORMAT, **record}  # the first and the last field, so that no cut removes both
    return whole | {"checksum": _checksum(json.loads(json.dumps(whole)))}  # of keys and tuples as they will be read


def verified(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record that `with_checksum` was given; one of the first format as it is.

    Raises `ValueError` if it is not what was written.
    """
    if not any(name in record for name in _CHECKSUM_FIELDS):
        return record
    whole = {name: value for name, value in record.items() if name != "checksum"}
    if record.get("checksum") != _checksum(whole):
        raise ValueError("it is not what was written")
    return {name: value for name, value in whole.items() if name != "format"}


def read_entries(
    path: Path, field: str, entry: Callable[[Mapping[str, Any]], dict[str, Any]], what: str, fix: str
) -> list[dict[str, Any]]:
    """Return `entry` of each item in the list `field` of the record in `path`; none if there is no such file.

    Raises `InputError` for a file that is not a record, or for which `entry` raises one of `MALFORMED`: the message says `what`
    was expected, and how to fix it (`fix`).
    """
    if not path.exists():
        return []
    record = read_record(path, what, fix)
    try:
        return [entry(item) for item in record[field]]
    except MALFORMED as error:
        raise InputError(f"{path}: expected {what}, found another ({type(error).__name__}: {error}); {fix}") from error


def _checksum(record: Mapping[str, Any]) -> str:
    return checksum_of(json.dumps(record, sort_keys=True).encode())


def check_form(value: Any, form: Any, name: str = "record") -> None:
    """Raise `KeyError` or `TypeError`, naming `name`, unless `value` has the structure of `form`.

    A form is a type, a list with the form of all items, or a mapping with the forms of fields. A field whose name ends in "?"
    may be missing, "*" stands for all fields there are, and fields without a form are allowed.
    """
    if isinstance(form, Mapping):
        if not isinstance(value, dict):
            raise TypeError(f"{name}: expected fields, found {type(value).__name__}")
        for key, part in form.items():
            for field in value if key == "*" else [key.rstrip("?")]:
                if field in value:
                    check_form(value[field], part, repr(field))
                elif not key.endswith("?"):
                    raise KeyError(field)
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise TypeError(f"{name}: expected a list, found {type(value).__name__}")
        for item in value:
            check_form(item, form[0], name)
    elif not isinstance(value, form):
        raise TypeError(f"{name}: expected {getattr(form, '__name__', form)}, found {type(value).__name__}")


def check_fields(record: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """Raise `KeyError` or `TypeError` unless `record` has exactly these fields, of these types."""
    for name, kind in types.items():
        if not isinstance(record[name], kind):
            raise TypeError(f"{name}: expected {kind.__name__}, found {type(record[name]).__name__}")
    for name in record:
        if name not in types:
            raise TypeError(f"{name!r}: not known here; is the file from a later version?")


def write_record(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write `record` with its checksum to `path` atomically, as indented JSON."""
    write_json(path, with_checksum(record))


def read_record(path: str | os.PathLike[str], what: str, fix: str) -> dict[str, Any]:
    """Return the record that `write_record` wrote to `path`; errors say `what` it is, and how to fix it (`fix`).

    Raises `InputError` for a file that is missing, no record, or not what was written.
    """
    try:
        record = parse_json(read_text(path))
        if not isinstance(record, dict):
            raise TypeError(f"expected an object, found {type(record).__name__}")
        return verified(record)
    except InputError:
        raise
    except MALFORMED as error:
        raise InputError(f"{path}: expected {what}, found it damaged ({error}); {fix}") from error
