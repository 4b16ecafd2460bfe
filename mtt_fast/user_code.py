"""Load a user's functions and classes, and turn their errors into one line."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import operator
import os
import sys
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mtt_fast.errors import InputError

_NOT_OWN = (*(f"{Path(file).parent}/" for file in (torch.__file__, inspect.__file__, __file__)), "<frozen")
"""Prefixes of the names of files that are not a user's."""
_PREFIX = "mtt_fast_user "  # of the names of users' modules


def is_user_code(name: str) -> bool:
    """Return whether `name` has the form FILE.py:NAME or MODULE:NAME."""
    place, _, attribute = name.rpartition(":")
    return bool(place and attribute)


def load(option: str, name: str) -> Any:
    """Return the object that `name`, FILE.py:NAME or MODULE:NAME, refers to; None if the file or module does not define it.

    Raises `InputError`, which names the `option`, for a missing file, and for any error that the file's code raises.
    """
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py") and not Path(place).is_file():
        raise InputError(f"`{option}` {name}: expected a Python file {place}, found none; check the path")
    with user_errors(option, name):
        module = _module_of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError:
        return None


def file_digest(cls: type) -> str:
    """Return the SHA-256 of the file with the class `cls`; "" without such a file."""
    try:
        return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return ""


@contextlib.contextmanager
def user_errors(option: str, name: str, *passed: type[Exception]) -> Iterator[None]:
    """Turn an error in a user's code into an `InputError` of one line, with the `option`, `name`, and the line that raised it.

    Errors of the classes `passed` stay as they are.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, (InputError, *passed)):
            raise
        raise InputError(f"`{option}` {name}: {type(error).__name__}: {error}{line_of(error)}") from error


def line_of(error: BaseException) -> str:
    """Return " (FILE, line N)" of the last line that led to `error` in code other than torch's and this package's; "" without one."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f" ({each.filename}, line {each.lineno})" for each in frames if not each.filename.startswith(_NOT_OWN)]
    return "".join(lines[-1:])


def _module_of_file(path: Path) -> ModuleType:
    """Return the module in the file `path`. As for a script, it can import the files beside it."""
    module, folder = _module_of_source(path, path.read_bytes()), path.parent.resolve()
    if str(folder) not in sys.path:  # for imports in functions; in the last place, where it hides no other module
        sys.path.append(str(folder))
    _check_imports(folder)
    return module


@cache
def _module_of_source(path: Path, source: bytes) -> ModuleType:
    """Run the `source` of `path` once. The module is in `sys.modules`, where dataclasses look for it."""
    module = ModuleType(f"{_PREFIX}{path}")
    module.__file__, module.__package__ = str(path), ""
    sys.modules[module.__name__] = module
    sys.path.insert(0, folder := str(path.parent.resolve()))
    try:
        exec(compile(source, path, "exec"), vars(module))
    finally:
        sys.path.remove(folder)
    return module


def _check_imports(folder: Path) -> None:
    """Raise `InputError` if a file in `folder` cannot be imported, since one of its name in another user's folder has been."""
    files = {
        name: str(vars(module).get("__file__")) for name, module in sys.modules.items() if hasattr(module, "__dict__")
    }
    others = {str(Path(file).parent.resolve()) for name, file in files.items() if name.startswith(_PREFIX)} - {
        str(folder)
    }
    for name, file in files.items():
        for place in (f"{name}.py", f"{name}{os.sep}__init__.py"):
            if file.removesuffix(f"{os.sep}{place}") in others and (folder / place).is_file():
                raise InputError(
                    f"{folder / place}: cannot be imported, since {file} of the same name was imported before; rename one of them"
                )
