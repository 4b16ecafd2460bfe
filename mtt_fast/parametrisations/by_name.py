"""Make a parametrisation from its name, or from a user's class (FILE.py:CLASS)."""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any

import torch
from torch import Tensor

from mtt_fast.errors import InputError, did_you_mean
from mtt_fast.parametrisations.ddif import Ddif
from mtt_fast.parametrisations.parametrisation import Parametrisation, learned_parameters
from mtt_fast.parametrisations.speed import Speed
from mtt_fast.runtime.interrupts import Stopped
from mtt_fast.runtime.numerics import numerics
from mtt_fast.user_code import file_digest, is_user_code, load, user_errors

_KNOWN: dict[str, type[Parametrisation]] = {"ddif": Ddif, "speed": Speed}
_WORD = re.compile(r"""[^\s=]+=(?:"[^"]*"|'[^']*')(?!\S)|\S+""")
"""A word of the options: NAME='VALUE', with spaces in the value, or anything without spaces."""


def make_parametrisation(
    name: str, options: str, images: Tensor, num_classes: int, generator: torch.Generator
) -> Parametrisation:
    """Return the parametrisation `name` of `images` (n, C, H, W), on the CPU, with its parameters drawn from `generator`.

    `name` is a known one, or FILE.py:CLASS or MODULE:CLASS. `options` are its arguments, as "num_saet=64 path='my net.pt'".
    Raises `InputError` for another name, for arguments that it does not take, and with any error that its constructor raises.
    """
    cls = _class_of(name)
    arguments = _arguments(name, cls, options)
    with user_errors("parametrisation", name), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_seed_from(generator))
        return cls(images, num_classes, **arguments)


def fit_parametrisation(
    name: str, parametrisation: Parametrisation, images: Tensor, generator: torch.Generator
) -> None:
    """Fit the `parametrisation` called `name` to the initial `images` (n, C, H, W), on its device.

    torch's default generators are seeded from `generator` for the fit, so that a resumed run gets the same values. Raises
    `InputError` with any error of the fit, and if it changed which parameters are learned; `Stopped` on Ctrl-C or SIGTERM.
    """
    before = _learned(parametrisation)
    with (
        user_errors("parametrisation", name, Stopped),
        torch.random.fork_rng(devices=[images.device] if images.is_cuda else []),
        torch.enable_grad(),
        numerics(images.device, "fp32"),
    ):
        torch.manual_seed(_seed_from(generator))
        parametrisation.fit(images)
    if (after := _learned(parametrisation)) != before:
        missing, new = (", ".join(sorted(each)) or "none" for each in (before - after, after - before))
        raise InputError(
            f"`parametrisation` {name}: fit: expected the learned parameters of __init__, found {new} in place of {missing}; write values "
            "into them, as in `with torch.no_grad(): self.x.copy_(…)`"
        )


def _learned(parametrisation: Parametrisation) -> set[str]:
    """Return descriptions of the learned parameters, for a comparison."""
    return {
        f"{key} {each.dtype} {tuple(each.shape)}{' of inference mode' if each.is_inference() else ''}"
        for key, each in learned_parameters(parametrisation).items()
    }


def _seed_from(generator: torch.Generator) -> int:
    return int(torch.randint(1 << 62, (), generator=generator, device="cpu"))


def is_users_class(name: str) -> bool:
    """Return whether the parametrisation `name` is a user's class."""
    return name not in _KNOWN


def code_digest(parametrisation: Parametrisation) -> str:
    """Return the SHA-256 of the file with the class of `parametrisation`; "" for one of this package, and without such a file."""
    cls = type(parametrisation)
    return "" if cls in _KNOWN.values() else file_digest(cls)


def _class_of(name: str) -> type[Parametrisation]:
    if name in _KNOWN:
        return _KNOWN[name]
    if not is_user_code(name):
        raise InputError(
            f"`parametrisation` {name}: expected {', '.join(_KNOWN)}, FILE.py:CLASS or MODULE:CLASS{did_you_mean(name, list(_KNOWN))}"
        )
    cls, attribute = load("parametrisation", name), name.rpartition(":")[2]
    if not (isinstance(cls, type) and issubclass(cls, Parametrisation)):
        kind = "none" if cls is None else f"{type(cls).__name__}"
        raise InputError(
            f"`parametrisation` {name}: expected a class {attribute} that inherits mtt_fast.Parametrisation, found {kind}"
        )
    return cls


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
