"""Make a parametrisation by its name, or by the place of a class of the user's own."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from mtt_fast.errors import InputError, did_you_mean
from mtt_fast.parametrisations.ddif import Ddif
from mtt_fast.parametrisations.parametrisation import Parametrisation
from mtt_fast.parametrisations.speed import Speed

_KNOWN: dict[str, type[Parametrisation]] = {"ddif": Ddif, "speed": Speed}
_WORD = re.compile(r"""[^\s=]+=(?:"[^"]*"|'[^']*')(?!\S)|\S+""")
"""A word of the options: NAME='VALUE', with spaces in the value, or anything without spaces."""
_NOT_OWN = (str(Path(torch.__file__).parent), "<frozen", __file__, str(Path(__file__).with_name("trial.py")))
"""Where the names of files begin that no user wrote."""


def make_parametrisation(
    name: str, options: str, images: Tensor, num_classes: int, generator: torch.Generator
) -> Parametrisation:
    """Return the parametrisation `name` of `images` (n, C, H, W), on the CPU, with its parameters drawn from `generator`.

    `name` is a known one, or FILE.py:CLASS or MODULE:CLASS. `options` are its arguments, as "num_saet=64 path='my net.pt'".
    Raises `InputError` for another name, for arguments that it does not take, and with the error that it raises.
    """
    cls = _class_of(name)
    arguments = _arguments(name, cls, options)
    with user_errors(name), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(1 << 62, (), generator=generator, device="cpu")))
        return cls(images, num_classes, **arguments)


def is_users_class(name: str) -> bool:
    """Return whether the parametrisation `name` is a class of the user's own."""
    return name not in _KNOWN


def code_digest(parametrisation: Parametrisation) -> str:
    """Return the SHA-256 of the file with the class of `parametrisation`; "" for one of this package, and without such a file."""
    cls = type(parametrisation)
    if cls in _KNOWN.values():
        return ""
    try:
        return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return ""


def _class_of(name: str) -> type[Parametrisation]:
    if name in _KNOWN:
        return _KNOWN[name]
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise InputError(
            f"`parametrisation` {name}: expected {', '.join(_KNOWN)}, FILE.py:CLASS or MODULE:CLASS{did_you_mean(name, list(_KNOWN))}"
        )
    if place.endswith(".py") and not Path(place).is_file():
        raise InputError(f"`parametrisation` {name}: expected a Python file {place}, found none; check the path")
    with user_errors(name):
        module = _module_of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    cls = getattr(module, attribute, None)
    if not (isinstance(cls, type) and issubclass(cls, Parametrisation)):
        kind = "none" if cls is None else f"{type(cls).__name__}"
        raise InputError(
            f"`parametrisation` {name}: expected a class {attribute} that inherits mtt_fast.Parametrisation, found {kind}"
        )
    return cls


def _module_of_file(path: Path) -> Any:
    """Return the module in the file `path`. It is in `sys.modules`, where dataclasses look for it.

    As for a script, it can import the files beside it.
    """
    if (folder := str(path.parent.resolve())) not in sys.path:
        sys.path.append(folder)
    name = f"mtt_fast_parametrisation_{path.stem}"
    loader = _SourceLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    return module


class _SourceLoader(SourceFileLoader):
    """Compile a file each time: Python takes cached bytecode for a file that was changed within a second and has the same size."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _arguments(name: str, cls: type[Parametrisation], text: str) -> dict[str, Any]:
    """Return the arguments in `text` for `cls`. Raises `InputError` for arguments that it does not take, and for missing ones."""
    given = dict(_split(name, part) for part in _WORD.findall(text))
    parameters = inspect.signature(cls).parameters.values()
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    by_name = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    by_name = [each for each in by_name if each not in positional[:2]]  # images and num_classes
    takes_any = any(each.kind == each.VAR_KEYWORD for each in parameters)
    known = [each.name for each in by_name]
    for argument in given:
        if argument not in known and not takes_any:
            raise InputError(
                f"`parametrisation_options` {argument}: expected an argument of {name} ({', '.join(known) or 'it has none'})"
                f"{did_you_mean(argument, known)}"
            )
    missing = [each.name for each in by_name if each.default is each.empty and each.name not in given]
    if missing:
        raise InputError(f"`parametrisation_options`: expected {', '.join(missing)} of {name}, found none")
    return given


def _split(name: str, part: str) -> tuple[str, Any]:
    argument, equals, text = part.partition("=")
    if not equals:
        raise InputError(
            f"`parametrisation_options` {part}: expected NAME=VALUE, separated by spaces, for {name}, found another; quote a value with "
            "spaces, as in NAME='A B'"
        )
    try:
        return argument, ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return argument, text


@contextlib.contextmanager
def user_errors(name: str) -> Iterator[None]:
    """Turn an error of the user's code into one line with the place where it was raised."""
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((each for each in reversed(frames) if not each.filename.startswith(_NOT_OWN)), frames[-1])
        raise InputError(
            f"`parametrisation` {name}: {type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
        ) from error
