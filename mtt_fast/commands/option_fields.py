"""Declare beside an option's field its range, its role, the option that it needs, and the like.

    mom_y: Annotated[float, Range(0, 1), Needs("lr_y")] = 0.9

Command lines, files of --config, recipes, config.toml and the record of a distilled set are all checked by these
declarations (option_checks.py), and nowhere else. Without a declaration a number is finite, a whole number fits 64 bits, and a
text is not empty.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, Union

FLOAT32_MAX = 3.4028234e38
FLOAT32_TINY = 1.1754944e-38
"""The largest and the smallest normal number of float32, in which learning rates are used."""


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes: from `low` to `high`, both included unless `exclude_low` or `exclude_high` is set."""

    low: float = -math.inf
    high: float = math.inf
    exclude_low: bool = False
    """exclude `low` itself"""
    exclude_high: bool = False
    """exclude `high` itself"""
    allow_infinity: bool = False
    """allow inf; the option's help says what it means"""
    largest: int | None = None
    """the largest sensible number; a larger one would only exhaust the memory"""

    def problem(self, value: float) -> str | None:
        """Return what is expected in place of `value` if that is out of range, else None."""
        if isinstance(value, float) and not math.isfinite(value):
            expected = ", ".join(filter(None, ("expected a finite number", str(self))))
            return None if self.allow_infinity and value == math.inf else expected
        too_low = value <= self.low if self.exclude_low else value < self.low
        too_high = value >= self.high if self.exclude_high else value > self.high
        if too_low or too_high:
            return f"expected {self}"
        if self.largest is not None and value > self.largest:
            return f"expected at most {self.largest}"
        if abs(value) > FLOAT32_MAX:
            return f"expected at most {FLOAT32_MAX:.2g}, the largest number of float32"
        if isinstance(value, float) and self.exclude_low and self.low == 0 and value < FLOAT32_TINY:
            return f"expected more than 0 in float32, which begins at {FLOAT32_TINY:.2g}"
        return None

    def __str__(self) -> str:
        """Return the range in words: "at least 0 and less than 1"."""
        low = f"{'more than' if self.exclude_low else 'at least'} {_number(self.low)}" if self.low > -math.inf else ""
        high = f"{'less than' if self.exclude_high else 'at most'} {_number(self.high)}" if self.high < math.inf else ""
        return " and ".join(filter(None, (low, high)))


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


class Group(Enum):
    """The box of --help in which an option is shown, in the order of the boxes.

    An option declares its group, or else has that of its class, `GROUP`.
    """

    OTHER = "options"
    RUN = "run"
    DATA = "data"
    NETWORK = "network"
    AUGMENTATION = "augmentation"
    EXPERTS = "experts"
    DISTILLATION = "distillation"
    LABELS = "labels"
    TEXTURE = "texture"
    SET = "set"
    EVALUATION = "evaluation"
    OUTPUT = "output"
    MACHINE = "machine"


class Role(Enum):
    """The part of a run that an option decides."""

    RESULT = "the result; a run cannot continue with another value"
    EVALUATION = "the evaluation of the result"
    EXTENT = "the amount of work, which a run may extend"
    LOCATION = "the files and folders, and their names"
    MACHINE = "the device and the speed; the result is the same"


@dataclass(frozen=True)
class Needs:
    """A condition of an option: it has an effect only if another one, `option`, is on."""

    option: str
    also: str = ""
    """the value or the option that turns it on as well, for the message"""


@dataclass(frozen=True)
class Remark:
    """A remark for the log when the option is given: how it differs from the public code's option of the same name."""

    words: str


@dataclass(frozen=True)
class Checked:
    """A check of a text: `check` raises `InputError` for one that the option does not take."""

    check: Callable[[str], object]


HARMLESS = "harmless"
"""Marks an option that changes no result: where it has no effect, it is named in the log and not refused."""


MAY_BE_EMPTY = "may be empty"
"""Marks a text that may be empty."""


@dataclass(frozen=True)
class Field:
    """An option as it is declared."""

    name: str
    annotation: Any
    """its type, without the declarations"""
    declared: tuple[Any, ...]
    default: Any
    declaring: type
    """the class that declares it"""

    @property
    def flag(self) -> str:
        """Return the name of the option's flag, without the two hyphens."""
        return self.name.rstrip("_")

    @property
    def role(self) -> Role:
        """Return the option's role."""
        return next((word for word in self.declared if isinstance(word, Role)), Role.RESULT)

    @property
    def group(self) -> Group:
        """Return the option's group, its box of --help."""
        own = (word for word in self.declared if isinstance(word, Group))
        return next(own, getattr(self.declaring, "GROUP", Group.OTHER))

    @property
    def is_positional(self) -> bool:
        """Return whether the option stands on the command line without a flag."""
        import tyro  # here, since only the commands need it

        return tyro.conf.Positional in self.declared

    @property
    def name_in_messages(self) -> str:
        """Return the option's name in messages: its flag, or the name of a positional argument."""
        return self.flag if self.is_positional else f"--{self.flag}"

    @property
    def is_switch(self) -> bool:
        """Return whether the option is a switch, on or off."""
        return self.annotation is bool

    @property
    def is_list(self) -> bool:
        """Return whether the option's value is a list."""
        inner, _ = without_none(self.annotation)
        return typing.get_origin(inner) is tuple

    def declarations(self, kind: type[_Declared]) -> list[_Declared]:
        """Return the option's declarations of one `kind`."""
        return [word for word in self.declared if isinstance(word, kind)]


_Declared = typing.TypeVar("_Declared", Needs, Remark, Checked, Range)


def fields_of(kind: type) -> Mapping[str, Field]:
    """Return the options of the dataclass `kind` by name."""
    return _fields_of(kind)


@cache  # apart from `fields_of`, since mypy takes no class for hashable
def _fields_of(kind: Any) -> Mapping[str, Field]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        field.name: Field(
            field.name, *_type_and_declarations(hints[field.name]), field.default, _declaring(kind, field.name)
        )
        for field in dataclasses.fields(kind)
    }


def _declaring(kind: type, name: str) -> type:
    """Return the class among `kind` and its bases that declares the option `name`, the most derived one."""
    return next(base for base in kind.__mro__ if name in vars(base).get("__annotations__", {}))


def _type_and_declarations(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a type without its declarations, and these. Those of T count for T | None too."""
    if typing.get_origin(hint) is typing.Annotated:
        inner, *declared = typing.get_args(hint)
        plain, within = _type_and_declarations(inner)
        return plain, (*within, *declared)
    other, allows_none = without_none(hint)
    if allows_none:
        plain, within = _type_and_declarations(other)
        return plain | None, within
    return hint, ()


def without_none(annotation: Any) -> tuple[Any, bool]:
    """Return the type without None, and whether it allows None."""
    if typing.get_origin(annotation) not in (Union, types.UnionType):
        return annotation, False
    (other,) = (argument for argument in typing.get_args(annotation) if argument is not type(None))
    return other, True


def names_of(kind: type, *roles: Role) -> frozenset[str]:
    """Return the names of the options of the dataclass `kind` that have one of `roles`."""
    return frozenset(name for name, field in fields_of(kind).items() if field.role in roles)


def outside_result(kind: type) -> frozenset[str]:
    """Return the names of the options of `kind` on which a run's result does not depend, so that it may go on with others."""
    return names_of(kind, Role.EVALUATION, Role.EXTENT, Role.LOCATION, Role.MACHINE)
