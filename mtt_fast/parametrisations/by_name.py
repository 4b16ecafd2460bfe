"""Make a parametrisation by its name, or by the place of a class of the user's own, and try it before the run begins."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtt_fast.errors import InputError, did_you_mean
from mtt_fast.parametrisations.ddif import Ddif
from mtt_fast.parametrisations.parametrisation import Parametrisation, are_close, learned_parameters
from mtt_fast.parametrisations.speed import Speed

_KNOWN: dict[str, type[Parametrisation]] = {"ddif": Ddif, "speed": Speed}


def make_parametrisation(
    name: str, options: str, images: Tensor, num_classes: int, generator: torch.Generator
) -> Parametrisation:
    """Return the parametrisation `name` of `images` (n, C, H, W), on the CPU, with its parameters drawn from `generator`.

    `name` is a known one, or FILE.py:CLASS or MODULE:CLASS. `options` are its arguments, as "num_saet=64 dim_saet=96".
    Raises `InputError` for another name, for arguments that it does not take, and with the error that it raises.
    """
    cls = _class_of(name)
    arguments = _arguments(name, cls, options)
    with _named(name), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(1 << 62, (), generator=generator, device="cpu")))
        return cls(images, num_classes, **arguments)


def try_parametrisation(name: str, parametrisation: Parametrisation, count: int, image_shape: Sequence[int]) -> None:
    """Raise `InputError` unless the parametrisation can be learned, judged by the first and the last of its `count` images.

    Their shape must be `image_shape`. A second call must return the same, and a call for one image what it is beside others:
    otherwise the gradient would be wrong without any other symptom.
    """
    learned = learned_parameters(parametrisation)
    if not learned:
        raise InputError(
            f"`parametrisation` {name}: expected a parameter that requires a gradient, found none; nothing is learned"
        )
    for parameter_name, tensor in [*learned.items(), *parametrisation.named_buffers()]:
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise InputError(f"`parametrisation` {name}: {parameter_name}: expected float32, found {tensor.dtype}")
    index = torch.tensor([0, count - 1]).unique()
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
    """Return the module in the file `path`. It is in `sys.modules`, where dataclasses look for it."""
    name = f"mtt_fast_parametrisation_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _arguments(name: str, cls: type[Parametrisation], text: str) -> dict[str, Any]:
    """Return the arguments in `text` for `cls`. Raises `InputError` for those that it does not take, or that are missing."""
    given = dict(_split(name, part) for part in text.split())
    _, _, *parameters = inspect.signature(cls).parameters.values()  # after images and num_classes
    known = [parameter.name for parameter in parameters]
    for argument in given:
        if argument not in known:
            raise InputError(
                f"`parametrisation_options` {argument}: expected an argument of {name} ({', '.join(known) or 'it has none'})"
                f"{did_you_mean(argument, known)}"
            )
    missing = [each.name for each in parameters if each.default is each.empty and each.name not in given]
    if missing:
        raise InputError(f"`parametrisation_options`: expected {', '.join(missing)} of {name}, found none")
    return given


def _split(name: str, part: str) -> tuple[str, Any]:
    argument, equals, text = part.partition("=")
    if not equals:
        raise InputError(
            f"`parametrisation_options` {part}: expected NAME=VALUE, separated by spaces, for {name}, found another"
        )
    try:
        return argument, ast.literal_eval(text)
    except (ValueError, SyntaxError):
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
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"`parametrisation` {name}: {type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
        ) from error
