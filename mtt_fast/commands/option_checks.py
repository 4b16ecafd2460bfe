"""Convert and check the values of options by the declarations beside their fields (option_fields.py)."""

from __future__ import annotations

import math
import re
import sys
import typing
from collections.abc import Container, Mapping
from typing import Any, Literal

from mtt_fast.commands.option_fields import (
    HARMLESS,
    MAY_BE_EMPTY,
    Checked,
    Field,
    Needs,
    Range,
    Remark,
    fields_of,
    without_none,
)
from mtt_fast.errors import InputError

FLOAT64_MAX = int(sys.float_info.max)
_ANY = Range()
_ANY_INTEGER = Range(-(2**63), largest=2**63 - 1)
_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


class InvalidValue(Exception):
    """The error for a value that an option does not take; its message says what is expected."""


def converted(field: Field, value: Any) -> Any:
    """Return `value` from a file as the option's type: a whole number as a float where one is needed, a list as a tuple.

    Raises `InvalidValue` for another type, another choice or another range than is declared.
    """
    result = _as(field.annotation, value)
    for part in result if isinstance(result, tuple) else (result,):
        _check_one(field, part)
    if isinstance(result, tuple) and not result and field.default != ():
        raise InvalidValue("expected at least one value")
    return result


def _as(annotation: Any, value: Any) -> Any:
    annotation, allows_none = without_none(annotation)
    if value is None and allows_none:
        return None
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        if value in arguments:
            return value
        raise InvalidValue(f"expected one of {', '.join(map(repr, arguments))}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InvalidValue("expected a list")
        return tuple(_as(arguments[0], part) for part in value)
    if annotation is float and type(value) is int:
        return float(max(-FLOAT64_MAX, min(value, FLOAT64_MAX)))
    if type(value) is not annotation:
        raise InvalidValue(f"expected {_TYPES[annotation]}")
    return value


def from_texts(annotation: Any, texts: list[str]) -> Any:
    """Return the value of an option of type `annotation` from the words after its flag.

    Raises `InvalidValue` for words that are not of the type, or not among its choices.
    """
    if not texts:
        raise InvalidValue("expected a value after it, found none")
    annotation, allows_none = without_none(annotation)
    if texts == ["None"] and allows_none:
        return None
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple:
        return tuple(from_texts(arguments[0], [text]) for text in texts)
    text = texts[0]
    if origin is Literal and text not in arguments:
        raise InvalidValue(f"expected one of {', '.join(map(repr, arguments))}, found {text!r}")
    if annotation not in (int, float):
        return text
    try:
        return annotation(text)
    except ValueError as error:
        if text.strip("+-").isdecimal():  # more digits than Python converts
            raise InvalidValue("expected a number of fewer digits") from error
        raise InvalidValue(f"expected {_TYPES[annotation]}, found {text!r}") from error


def _check_one(field: Field, value: Any) -> None:
    """Raise `InvalidValue` if a value of the right type is out of the option's range."""
    if isinstance(value, int | float):
        ranges = field.declarations(Range) or [_ANY_INTEGER if isinstance(value, int) else _ANY]
        for problem in filter(None, (each.problem(value) for each in ranges)):
            raise InvalidValue(problem)
    if isinstance(value, str) and value != field.default:
        if not value and MAY_BE_EMPTY not in field.declared:
            raise InvalidValue("expected a text, found an empty one")
        if "\0" in value:
            raise InvalidValue("expected a text without the character 0")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidValue("expected a text of Unicode characters (UTF-8)") from error
    if isinstance(value, str):
        for checked in field.declarations(Checked):
            try:
                checked.check(value)
            except InputError as error:
                raise InvalidValue(
                    re.sub(r"^.*?: (?=expected)", "", str(error))
                ) from error  # the caller adds the name of the option


def check_values(options: Any) -> None:
    """Raise `InputError` for the first option of the dataclass `options` whose value its declarations do not allow."""
    for name, field in fields_of(type(options)).items():
        value = getattr(options, name)
        try:
            converted(field, value)
        except InvalidValue as error:
            raise InputError(f"{field.name_in_messages} {in_words(value)}: {error}") from error


def in_words(value: Any) -> str:
    """Return a value as text for a message: a very long number by its number of digits, unprintable text quoted."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return f"(a number of {int(math.log10(abs(value))) + 1} digits)"
    text = " ".join(map(in_words, value)) if isinstance(value, list | tuple) else str(value)
    return text if text and text.isprintable() else ascii(text)


def check_effects(options: Any, given: Container[str], reasons: Mapping[str, str] | None = None) -> list[str]:
    """Return the remarks for the log on the options in `given`, which the user wrote on the command line or in a file.

    `reasons` says by name why an option has no effect; by default the method `without_effect` of `options` does, for what
    `Needs` does not cover. Its method `remarks` gives further remarks.
    Raises `InputError` for an option that has no effect with the others; the message says with what it would have one.
    """
    fields = fields_of(type(options))
    if reasons is None:
        reasons = options.without_effect() if hasattr(options, "without_effect") else {}
    needed = {
        name: f"without --{fields[needs.option].flag}{needs.also}; give that too, or"
        for name, field in fields.items()
        for needs in field.declarations(Needs)
        if not _is_on(fields[needs.option], getattr(options, needs.option))
    }
    reasons = needed | {name: f"{reason};" for name, reason in reasons.items()}
    remarks: list[str] = options.remarks(given) if hasattr(options, "remarks") else []
    for name, field in fields.items():
        if name not in given:
            continue
        value = getattr(options, name)
        flag_and_value = f"--{field.flag}" + ("" if field.is_switch else f" {in_words(value)}")
        if name not in reasons:
            remarks += [f"{flag_and_value}: {remark.words}" for remark in field.declarations(Remark)]
        elif HARMLESS in field.declared:
            remarks.append(f"{flag_and_value} has no effect {reasons[name].partition(';')[0]}")
        else:
            raise InputError(f"{flag_and_value}: has no effect {reasons[name]} leave it out")
    return remarks


def _is_on(field: Field, value: Any) -> bool:
    """Return whether an option that others need is on: not off, not absent, and not 0 where 0 is the default."""
    return value is not None and value is not False and not (value == 0 and field.default == 0)
