"""A network made by a user's function or class: `--model FILE.py:NAME`."""

from __future__ import annotations

import inspect
import logging
import math
import threading
from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mtt_fast.checks import device_of
from mtt_fast.errors import InputError
from mtt_fast.networks.flat_module import FlatModule
from mtt_fast.user_code import load, user_errors

log = logging.getLogger(__name__)

_IMAGES = 8  # at which networks are compared
_DIGITS = 6  # significant ones of an output in a record
_TOLERANCE = 1e-3  # of the largest output: processors round differently
_MOST_OUTPUTS = 32  # in a record
# networks are drawn in several threads, and the user's code draws from torch's one generator
_DRAWING = threading.Lock()


class UsersNetwork(FlatModule):
    """A user's network, in the mode (training or evaluation) in which `make` returns it.

    `make` returns an `nn.Module`, and draws its parameters from torch's default generator. Anything else that it draws, such as
    random features in buffers, is the same in all networks. Raises `InputError` for a module that a `FlatModule` refuses, and for
    outputs other than logits (n, `num_classes`).
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], nn.Module],
        image_shape: tuple[int, int, int],
        num_classes: int,
    ) -> None:
        super().__init__(_made(make, seed=0))
        self._check_parameters()
        self._make = make
        self._name = name
        generator = torch.Generator().manual_seed(0)
        parameters = torch.cat([_uniform(shape, generator).flatten() for shape in self.layout.shapes])
        images = math.sqrt(3) * (2 * torch.rand(_IMAGES, *image_shape, generator=generator) - 1)  # of variance one
        self._outputs = self._logits(parameters, images, num_classes)
        second = _made(make, seed=0)
        self._check_repeats(FlatModule(second), parameters, images)
        last = _last_linear(second, images)
        self._features = self._inputs_of(last) if last else None
        pairs = torch.cat([self._logits(parameters, pair, num_classes) for pair in images.split(2)])
        # a user's layer may mix samples without being a batch norm
        self.mixes_samples = self.mixes_samples or not _are_close(pairs, self._outputs)

    def init(self, generator: torch.Generator | None = None) -> Tensor:
        """Return the parameters (P,), float32, of a new module, made with a seed from `generator`, on the generator's device."""
        device = device_of(generator)
        module = _made(self._make, seed=int(torch.randint(1 << 62, (), generator=generator, device=device)))
        parameters = dict(module.named_parameters())
        return torch.cat([parameters[name].detach().reshape(-1) for name in self.layout.names]).to(device)

    def begins_always_the_same(self) -> bool:
        """Return whether a module made with another seed has the same parameters, as a pretrained module does."""
        return torch.equal(self.init(torch.Generator().manual_seed(1)), self._initial)

    def describe(self) -> dict[str, Any]:
        """Return the name of the function or class, and outputs by which `is_same_function` detects a change of its code."""
        outputs = self._outputs.flatten()[:_MOST_OUTPUTS].tolist()
        known = all(map(math.isfinite, outputs))
        return {"kind": self._name, "outputs": [float(f"{each:.{_DIGITS}g}") for each in outputs] if known else []}

    def _check_parameters(self) -> None:
        """Raise `InputError` unless all parameters are float32 and on the CPU."""
        every = dict(self._module.named_parameters())
        for name in self.layout.names:
            dtype, device = every[name].dtype, every[name].device
            if (dtype, device.type) != (torch.float32, "cpu"):
                raise InputError(
                    f"expected parameters in torch.float32 on the CPU, found {name} in {dtype} on {device}; leave out .to(…), which the "
                    "commands do"
                )

    @torch.no_grad()
    def _check_repeats(self, second: FlatModule, parameters: Tensor, images: Tensor) -> None:
        """Raise `InputError` for other outputs in another call, and if the `second` module from the same seed differs from this one."""
        if not _are_close(self(parameters, images), self._outputs):
            raise InputError(
                "expected the same outputs for the same arguments, found others at the second call; take out what draws random numbers or "
                "changes from call to call, or call .eval() on the module where it is made"
            )
        if not torch.equal(second._initial, self._initial) or not _are_close(second(parameters, images), self._outputs):
            raise InputError(
                "expected the same module from the same seed of torch, found another at the second call; draw all numbers by torch, not by "
                "numpy or random, and leave no parameter or buffer uninitialised"
            )

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
    """Return the network that the function or class `name` (FILE.py:NAME or MODULE:NAME) makes for images (C, H, W).

    It is called with whichever of the public code's arguments `channel`, `num_classes` and `im_size` (H, W) it has. Raises
    `InputError`, which names the `option`, if it cannot be made, or has other outputs than logits.
    """
    make = load(option, name)
    if not callable(make) or isinstance(make, nn.Module) or not isinstance(make, Hashable):
        found = "nothing of this name" if make is None else f"an object of {type(make).__name__}"
        raise InputError(f"`{option}` {name}: expected a function or a class that makes the network, found {found}")
    return _made_by(make, option, name, image_shape, num_classes)


@lru_cache
def _made_by(
    make: Callable[..., Any], option: str, name: str, image_shape: tuple[int, int, int], num_classes: int
) -> UsersNetwork:
    """Return the network that `make` makes; for the arguments see `users_network`. Warn if it begins in the same way whatever the seed.

    A command asks for its network several times, and to make one takes seconds, since it is called.
    """
    channels, height, width = image_shape
    arguments = {"channel": channels, "num_classes": num_classes, "im_size": (height, width)}
    try:
        arguments = _taken_by(make, arguments)
    except TypeError as error:
        raise InputError(
            f"`{option}` {name}: {error}; it is called with those of {', '.join(arguments)} that it has parameters for"
        ) from error

    def make_module() -> nn.Module:
        with user_errors(option, name):
            return make(**arguments)  # type: ignore[no-any-return]

    try:
        with user_errors(option, name):
            network = UsersNetwork(name.rpartition(":")[2], make_module, image_shape, num_classes)
    except InputError as error:
        begin = f"`{option}` {name}: "
        raise InputError(begin + str(error).removeprefix(begin).removeprefix("FlatModule: ")) from error
    if network.begins_always_the_same():
        log.warning(
            "--%s %s: every module begins with the same parameters, and so do all experts, and the networks of a test; if they should "
            "not, take out what seeds torch where it is made",
            option,
            name,
        )
    return network


def is_same_function(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Return False if two descriptions (`UsersNetwork.describe`) have different outputs, True as well if one has none."""
    outputs, others = (torch.tensor(each.get("outputs", ()), dtype=torch.float64) for each in (first, second))
    return not len(outputs) or not len(others) or _are_close(outputs, others)


def _are_close(outputs: Tensor, others: Tensor) -> bool:
    if outputs.shape != others.shape:
        return False
    return torch.allclose(outputs, others, rtol=0, atol=_TOLERANCE * float(others.abs().max()), equal_nan=True)


def _taken_by(make: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return those of the `arguments` that `make` has a parameter for, and the number of classes if it takes any name.

    Raises `TypeError` if it needs others.
    """
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):  # a class of an extension module
        return arguments
    takes_any = any(each.kind == each.VAR_KEYWORD for each in signature.parameters.values())
    taken = {
        name: value
        for name, value in arguments.items()
        if name in signature.parameters or (takes_any and name == "num_classes")
    }
    signature.bind(**taken)
    return taken


def _made(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return what `make` returns with torch's random numbers from `seed`, which are as before afterwards."""
    with _DRAWING, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


@torch.no_grad()
def _last_linear(module: nn.Module, images: Tensor) -> str | None:
    """Return the name of the linear layer that is called last, which need not be defined last; None without one."""
    called: list[str] = []
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) and name:
            part.register_forward_hook(lambda *_, name=name: called.append(name))
    module(images)
    return called[-1] if called else None


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw numbers under which layers neither fade nor explode: for matrices in ±√(6 / fan_in), else near one.

    They are the same on all processors, as normal ones are not.
    """
    numbers = 2 * torch.rand(shape, generator=generator) - 1
    return numbers * math.sqrt(6 / math.prod(shape[1:])) if len(shape) > 1 else 1 + 0.1 * numbers
