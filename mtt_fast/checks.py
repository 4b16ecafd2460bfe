"""Check tensors, generators and numbers that a caller gives, and describe any object in a message."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from mtt_fast.errors import InputError, dtype_name

_SHOWN = 60  # letters of a text


def check_ordinary(name: str, tensor: Tensor) -> None:
    """Raise `InputError` for a tensor that many operations of torch do not take: nested, sparse or float8."""
    if tensor.is_nested:
        found, remedy = "a nested tensor", "use torch.stack"
    elif tensor.layout != torch.strided:
        found, remedy = f"a tensor of layout {tensor.layout}", "use .to_dense()"
    elif tensor.dtype.is_floating_point and tensor.dtype.itemsize < 2:
        found, remedy = f"a tensor of {dtype_name(tensor.dtype)}", "use .float()"
    else:
        return
    raise InputError(f"{name}: expected an ordinary tensor, found {found}; {remedy}")


def check_generator(generator: torch.Generator | None) -> None:
    """Raise `InputError` unless `generator` is None or a generator."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(
            f"`generator`: expected a torch.Generator, found {type(generator).__name__}; torch.Generator().manual_seed(…) makes one"
        )


def device_of(generator: torch.Generator | None) -> torch.device:
    """Return the device on which `generator` draws; for None the CPU. Raises `InputError` for any other object."""
    check_generator(generator)
    return torch.device("cpu") if generator is None else generator.device


def check_number(name: str, value: Any) -> None:
    """Raise `InputError` unless `value` is a finite number of at least 0, as torch.optim's classes do."""
    if not isinstance(value, Real):
        remedy = "; use .item(), since no gradient flows to it" * isinstance(value, Tensor)
        raise InputError(f"`{name}`: expected a number, found {value!r}{remedy}")
    if not (math.isfinite(value) and float(value) >= 0):
        raise InputError(f"`{name}`: expected a finite number of at least 0, found {value}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise `InputError` unless `value` is a whole number of at least `least`."""
    if not isinstance(value, Integral):
        raise InputError(f"`{name}`: expected a whole number, found {value!r}")
    if int(value) < least:
        raise InputError(f"`{name}`: expected at least {least}, found {value}")


def shown(value: Any) -> str:
    """Return a short description of any object, without looking deep into it."""
    name = type(value).__name__
    if isinstance(value, Tensor):
        return "a nested Tensor" if value.is_nested else f"Tensor {dtype_name(value.dtype)} {tuple(value.shape)}"
    if isinstance(value, bool | float | None) or (isinstance(value, int) and abs(value) < 10**12):
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= _SHOWN else value[:_SHOWN] + "…")
    if isinstance(value, dict):
        return f"a dictionary with {_listed(value)}" if value else "an empty dictionary"
    if isinstance(value, list | tuple):
        if 0 < len(value) <= 4 and all(isinstance(one, bool | float | int) for one in value):
            return f"[{', '.join(map(shown, value))}]"
        return f"a {name} of {len(value)}"
    return name


def _listed(names: Any) -> str:
    first = [shown(name).strip("'") for name, _ in zip(names, range(4), strict=False)]
    return ", ".join(first) + (", …" if len(names) > len(first) else "")
