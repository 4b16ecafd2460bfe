"""Make a parametrisation by its name, or by the place of a class of the user's own, and try it before the run begins."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import SourceFileLoader
from numbers import Real
from pathlib import Path
from types import CodeType
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from mtt_fast.errors import InputError, did_you_mean
from mtt_fast.parametrisations.ddif import Ddif
from mtt_fast.parametrisations.parametrisation import (
    Optimizer,
    Parametrisation,
    are_close,
    learned_parameters,
    set_values,
)
from mtt_fast.parametrisations.speed import Speed

_KNOWN: dict[str, type[Parametrisation]] = {"ddif": Ddif, "speed": Speed}
_WORD = re.compile(r"""[^\s=]+=(?:"[^"]*"|'[^']*')(?!\S)|\S+""")
"""A word of the options: NAME='VALUE', with spaces in the value, or anything without spaces."""
_NOT_OWN = (str(Path(torch.__file__).parent), "<frozen", __file__)
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
    with _named(name), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(1 << 62, (), generator=generator, device="cpu")))
        return cls(images, num_classes, **arguments)


def try_parametrisation(
    name: str, make: Callable[[], Parametrisation], count: int, image_shape: Sequence[int]
) -> Parametrisation:
    """Return the parametrisation that `make` returns, after a trial on the first and the last of its `count` images.

    Raises `InputError` unless images have the shape `image_shape`, a second call returns the same images, an image is the same alone and
    beside others, and images change with the parameters, to those of a new object with the same parameters. Otherwise the gradient would
    be wrong without any other symptom, or a run could not be resumed.
    """
    parametrisation = make()
    _check_parameters(name, parametrisation)
    buffers = {key: buffer.clone() for key, buffer in parametrisation.named_buffers()}
    index = torch.tensor([0, count - 1], device=next(parametrisation.parameters()).device).unique()
    for training in (False, True):
        parametrisation.train(training)
        with _named(name):
            images, again = parametrisation(index), parametrisation(index)
            single = torch.cat([parametrisation(each) for each in index.split(1)])
        _check_images(name, images, (len(index), *image_shape))
        if not are_close(images, again):
            raise InputError(
                f"`parametrisation` {name}: expected the same images at a second call, found others; draw random numbers in __init__"
            )
        if not are_close(images, single):
            raise InputError(
                f"`parametrisation` {name}: expected each image to be independent of those that are computed with it, found another "
                "alone; leave out layers such as batch norm"
            )
    if not images.requires_grad:
        raise InputError(f"`parametrisation` {name}: expected images that depend on its parameters, found others")
    _try_step(name, parametrisation, index)
    _try_other_values(name, parametrisation, make, index, images.detach(), buffers)
    return parametrisation


def _check_parameters(name: str, parametrisation: Parametrisation) -> None:
    learned = learned_parameters(parametrisation)
    if not learned:
        raise InputError(
            f"`parametrisation` {name}: expected a parameter that requires a gradient, found none; nothing is learned"
        )
    if parametrisation.optimizer not in get_args(Optimizer):
        raise InputError(
            f"`parametrisation` {name}: optimizer: expected {' or '.join(get_args(Optimizer))}, found {parametrisation.optimizer!r}"
        )
    for key, tensor in [*learned.items(), *parametrisation.named_buffers()]:
        if is_lazy(tensor):
            raise InputError(f"`parametrisation` {name}: {key}: expected a known shape, found a lazy layer's")
        if tensor.dtype != torch.float32 and (key in learned or tensor.is_floating_point()):
            raise InputError(f"`parametrisation` {name}: {key}: expected float32, found {tensor.dtype}")


def _try_step(name: str, parametrisation: Parametrisation, index: Tensor) -> None:
    """Raise `InputError` unless there are gradients of the images at each call, a penalty and rates."""
    with _named(name), torch.enable_grad():
        for _ in range(2):
            parametrisation(index).sum().backward()
        penalty = parametrisation.penalty()
        if penalty is not None and not (isinstance(penalty, Tensor) and penalty.shape == () and penalty.requires_grad):
            found = tuple(penalty.shape) if isinstance(penalty, Tensor) else type(penalty).__name__
            raise InputError(
                f"`parametrisation` {name}: penalty: expected None, or a tensor () that depends on the parameters, found {found}"
            )
        for key in learned_parameters(parametrisation):
            rate: Any = parametrisation.relative_rate(key)
            if not (isinstance(rate, Real) and math.isfinite(rate)):
                raise InputError(f"`parametrisation` {name}: relative_rate of {key}: expected a number, found {rate!r}")
        parametrisation.stored_numbers()
    parametrisation.zero_grad()


@torch.no_grad()
def _try_other_values(
    name: str,
    parametrisation: Parametrisation,
    make: Callable[[], Parametrisation],
    index: Tensor,
    images: Tensor,
    buffers: dict[str, Tensor],
) -> None:
    """Raise `InputError` unless images are computed from the values of the parameters, and nothing else changes.

    `images` are those at `index` so far, and `buffers` those before the first call.
    """
    other, generator, values = make().train(), torch.Generator().manual_seed(0), {}
    for key, each in learned_parameters(other).items():
        noise = torch.randn(each.shape, dtype=each.dtype, generator=generator).to(each.device)
        values[key] = each + 0.1 * (1 + each.abs()) * noise
    with _named(name):
        set_values(parametrisation, values)
        set_values(other, values)
        moved, expected = parametrisation(index).nan_to_num(), other(index).nan_to_num()
    if torch.equal(moved, images):
        raise InputError(
            f"`parametrisation` {name}: expected other images at other parameters, found the same; compute images from the parameters in "
            "forward, at each call"
        )
    kept = values | buffers
    for key, tensor in [*learned_parameters(parametrisation).items(), *parametrisation.named_buffers()]:
        if not torch.equal(tensor, kept[key]):
            raise InputError(
                f"`parametrisation` {name}: {key}: expected the values that it was given, found others; forward must leave parameters and "
                "buffers as they are, and no two parameters may overlap in memory"
            )
    if not are_close(moved, expected):
        raise InputError(
            f"`parametrisation` {name}: expected the images of a new object with the same parameters, found others; draw random numbers "
            "with torch, and keep no results from one call to the next"
        )


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
    with _named(name):
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


def _check_images(name: str, images: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(images, Tensor) or images.shape != shape or images.dtype != torch.float32:
        found = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"`parametrisation` {name}: expected images torch.float32 {shape}, found {found}")
    if not bool(images.isfinite().all()):
        raise InputError(f"`parametrisation` {name}: expected finite images, found others")


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
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
