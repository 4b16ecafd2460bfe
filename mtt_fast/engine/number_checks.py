"""Check arguments that are numbers."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from mtt_fast.errors import InputError


def check_number(name: str, value: Any) -> None:
    """Raise `InputError` unless `value` is a finite number of at least 0, as torch.optim's classes do."""
    if not isinstance(value, Real):
        raise InputError(f"`{name}`: expected a number, found {value!r}")
    if not (math.isfinite(value) and float(value) >= 0):
        raise InputError(f"`{name}`: expected a finite number of at least 0, found {value}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise `InputError` unless `value` is a whole number of at least `least`."""
    if not isinstance(value, Integral):
        raise InputError(f"`{name}`: expected a whole number, found {value!r}")
    if int(value) < least:
        raise InputError(f"`{name}`: expected at least {least}, found {value}")
