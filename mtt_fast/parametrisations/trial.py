"""Try a parametrisation before the run begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from mtt_fast.errors import InputError
from mtt_fast.parametrisations.parametrisation import (
    Optimizer,
    Parametrisation,
    are_close,
    learned_parameters,
    set_values,
)
from mtt_fast.user_code import user_errors


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
        with user_errors("parametrisation", name):
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
    """Raise `InputError` unless there are gradients of the images at each call, a penalty, rates, and a count of numbers."""
    with user_errors("parametrisation", name), torch.enable_grad():
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
        stored: Any = parametrisation.stored_numbers()
        if not isinstance(stored, Real | Tensor):
            raise InputError(f"`parametrisation` {name}: stored_numbers: expected a number, found {stored!r}")
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
    with user_errors("parametrisation", name):
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


def _check_images(name: str, images: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(images, Tensor) or images.shape != shape or images.dtype != torch.float32:
        found = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"`parametrisation` {name}: expected images torch.float32 {shape}, found {found}")
    if not bool(images.isfinite().all()):
        raise InputError(f"`parametrisation` {name}: expected finite images, found others")
