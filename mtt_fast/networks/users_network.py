"""A network that a function or a class of the user's own makes: `--model FILE.py:NAME`."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtt_fast.checks import device_of
from mtt_fast.errors import InputError
from mtt_fast.networks.flat_module import FlatModule
from mtt_fast.user_code import load, user_errors

_IMAGES = 8  # at which networks are compared
_DIGITS = 6  # significant ones of an output in a record
_TOLERANCE = 0.01  # of the largest output: processors round differently
_MOST_OUTPUTS = 32  # in a record
_DRAWING = (
    threading.Lock()
)  # networks are drawn in several threads, and the user's code draws from torch's one generator


class UsersNetwork(FlatModule):
    """A network of the user's own, in the mode in which it is made.

    `make` returns an `nn.Module`, and draws its parameters by torch's default generator. What it draws besides, such as the
    buffers of random features, is the same in all networks.
    Raises `InputError` for a module that a `FlatModule` refuses, and for outputs other than logits (n, `num_classes`).
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], nn.Module],
        image_shape: tuple[int, int, int],
        num_classes: int,
    ) -> None:
        super().__init__(_made(make, seed=0))
        if (dtype := self._initial.dtype) != torch.float32:
            raise InputError(f"expected parameters in torch.float32, found {dtype}; leave out .to({dtype})")
        self._make = make
        self._name = name
        generator = torch.Generator().manual_seed(0)
        parameters = torch.cat([_uniform(shape, generator).flatten() for shape in self.layout.shapes])
        images = _uniform((_IMAGES, *image_shape), generator)
        self._outputs = self._logits(parameters, images, num_classes)
        pairs = torch.cat([self._logits(parameters, pair, num_classes) for pair in images.split(2)])
        # a layer of the user's own may mix samples without being a batch norm
        self.mixes_samples = self.mixes_samples or not _are_close(pairs, self._outputs)

    def init(self, generator: torch.Generator | None = None) -> Tensor:
        """Return the parameters (P,), float32, of a module made anew, with a seed from `generator`, on the generator's device."""
        device = device_of(generator)
        module = _made(self._make, seed=int(torch.randint(1 << 62, (), generator=generator, device=device)))
        parameters = dict(module.named_parameters())
        return torch.cat([parameters[name].detach().reshape(-1) for name in self.layout.names]).to(device)

    def describe(self) -> dict[str, Any]:
        """Return the name of the function or class, and outputs by which `is_same_function` knows another version of its code."""
        outputs = self._outputs.flatten()[:_MOST_OUTPUTS].tolist()
        known = all(map(math.isfinite, outputs))
        return {"kind": self._name, "outputs": [float(f"{each:.{_DIGITS}g}") for each in outputs] if known else []}

    @torch.no_grad()
    def _logits(self, parameters: Tensor, images: Tensor, num_classes: int) -> Tensor:
        """Return the outputs (n, num_classes) of `images`. Raises `InputError` for others."""
        outputs = self(parameters, images)
        if outputs.shape != (len(images), num_classes):
            raise InputError(
                f"expected logits {(len(images), num_classes)} of images {tuple(images.shape)} in {num_classes} classes, found "
                f"{tuple(outputs.shape)}"
            )
        return outputs


def users_network(option: str, name: str, image_shape: tuple[int, int, int], num_classes: int) -> UsersNetwork:
    """Return the network that the function or class at the place `name` makes for images (C, H, W).

    It is called with those of `channel`, `num_classes` and `im_size` (the pair H, W) that it takes; these are the names of the public
    code. Raises `InputError`, which names the `option`, if it cannot be made, or has other outputs than logits.
    """
    make = load(option, name)
    if not callable(make):
        raise InputError(
            f"`{option}` {name}: expected a function or a class that makes the network, found {type(make).__name__}"
        )
    channels, height, width = image_shape
    arguments = _taken_by(make, {"channel": channels, "num_classes": num_classes, "im_size": (height, width)})

    def make_module() -> nn.Module:
        with user_errors(option, name):
            return make(**arguments)  # type: ignore[no-any-return]

    try:
        with user_errors(option, name):
            return UsersNetwork(name.rpartition(":")[2], make_module, image_shape, num_classes)
    except InputError as error:
        begin = f"`{option}` {name}: "
        raise InputError(begin + str(error).removeprefix(begin).removeprefix("FlatModule: ")) from error


def is_same_function(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Return False if two descriptions (`UsersNetwork.describe`) have different outputs, True as well if one has none."""
    outputs, others = (torch.tensor(each.get("outputs", ()), dtype=torch.float64) for each in (first, second))
    return not len(outputs) or not len(others) or _are_close(outputs, others)


def _are_close(outputs: Tensor, others: Tensor) -> bool:
    if outputs.shape != others.shape:
        return False
    return torch.allclose(outputs, others, rtol=0, atol=_TOLERANCE * float(others.abs().max()), equal_nan=True)


def _taken_by(make: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return those of the `arguments` that `make` has a parameter for, and the number of classes if it takes any name."""
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):  # a class of an extension module
        return arguments
    takes_any = any(each.kind == each.VAR_KEYWORD for each in parameters.values())
    return {
        name: value for name, value in arguments.items() if name in parameters or (takes_any and name == "num_classes")
    }


def _made(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return what `make` returns with torch's random numbers from `seed`, which are as before afterwards."""
    with _DRAWING, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw numbers under which layers neither fade nor explode: for matrices in ±√(6 / fan_in), else near one.

    They are the same on all processors, as normal ones are not.
    """
    numbers = 2 * torch.rand(shape, generator=generator) - 1
    return numbers * math.sqrt(6 / math.prod(shape[1:])) if len(shape) > 1 else 1 + 0.1 * numbers
