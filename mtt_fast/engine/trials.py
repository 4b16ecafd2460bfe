"""Trials of a caller's network, loss and augmentation before a student trains with them, on a few samples of its first batch.

The backward sweep computes each step again, and may cut its batch. Both give the right gradient only where the same
inputs give the same numbers, and where the loss of a batch is the mean of its samples'. What breaks that has no other
symptom than a wrong gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtt_fast.augmentation.protocol import Augment, warp_of
from mtt_fast.engine.student import GenericStudent, plain_attention
from mtt_fast.errors import InputError
from mtt_fast.networks.protocol import Network
from mtt_fast.runtime.numerics import without_autocast

_MOST = 8  # samples of a trial
_AT_ONCE = 2  # of them: their gradient takes less memory than a step of one, and little time


def try_augmentation(
    network: Network, augment: Augment | None, images: Tensor, index: Tensor, draws: Any
) -> Tensor | None:
    """Return the inputs that `augment` makes of the `images` at `index` with `draws`, a few of them.

    None where there is nothing to try: no augmentation, or a warp. Raises `InputError` if a second time gives other inputs, and
    where a gradient would have to flow to what it reads besides the images.
    """
    if augment is None:
        return None
    warp = warp_of(augment, draws, torch.Size((len(index), *images.shape[1:])))
    if warp is not None:
        _check_nothing_else_is_learned("augment", warp)
        return None
    rows, few = images.detach()[index], _few_of(network, len(index))
    with without_autocast(images.device):  # of copies, since it may write into them
        with torch.no_grad():
            first = augment(rows.clone(), draws)[few]
        second = augment(rows.clone(), draws)[few]
    _check_nothing_else_is_learned("augment", second)
    if not _alike(first, second):
        raise InputError(
            f"unroll augment: expected the same images for the same draws, found others at the second call of {type(augment).__name__}; "
            "take all random numbers in its draw"
        )
    return first


def try_step(
    student: GenericStudent,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    augmented: Tensor | None,
    *,
    is_cut: bool,
) -> None:
    """Raise `InputError` unless unrolling is exact for the loss at `theta` (P,) of a few of the samples at `index`.

    `augmented` are the inputs that `try_augmentation` returned for them; where it is None, the images themselves are tried.
    Outputs and loss have to be the same each time, and the loss a scalar that depends on the parameters, and on the images if
    their gradient is recorded. Where gradients are recorded, neither may read any other tensor that requires one. Where a batch
    `is_cut`, the outputs of each sample also must not depend on the others, and the loss has to be the mean of the samples' losses.
    """
    network, wants_images = student.network, images.requires_grad and torch.is_grad_enabled()
    few = index[_few_of(network, len(index))]
    # in the dtypes that the sweeps give them
    inputs = (images.detach()[few] if augmented is None else augmented).to(theta.dtype)
    targets = labels.detach()[few].to(theta.dtype if labels.is_floating_point() else torch.long)
    together = slice(None) if network.mixes_samples else slice(_AT_ONCE)
    with without_autocast(theta.device):
        logits = _try_gradient(student, theta, inputs[together], targets[together], wants_images=wants_images)
        if is_cut:
            with torch.no_grad():
                _check_samples_are_apart(student, theta, inputs[together], logits)
                every = torch.cat([network(theta, pair.clone()) for pair in inputs.split(_AT_ONCE)])
                _check_mean(student, every, targets)


def _few_of(network: Network, batch: int) -> Tensor:
    """Return the positions of a few samples, spread over a batch of so many.

    Where `network` mixes samples all are tried: a norm over parts of a batch takes no other number, and the batch is not cut.
    """
    few = batch if network.mixes_samples else min(batch, _MOST) // _AT_ONCE * _AT_ONCE or 1
    return torch.linspace(0, batch - 1, few, device="cpu").round().long()


def _try_gradient(
    student: GenericStudent, theta: Tensor, inputs: Tensor, labels: Tensor, *, wants_images: bool
) -> Tensor:
    """Return the logits of `inputs`. Raises `InputError` for what differs at a second call, and where the loss has no gradient."""
    theta = theta.clone() if theta.is_inference() else theta  # an expert that was read in torch.inference_mode
    leaves = [theta.detach().requires_grad_(), inputs.detach().requires_grad_(wants_images)]
    # of copies, since a network may write into its images, and a loss, as one with a margin does, into the logits
    logits = _called_twice("net", lambda theta, images: student.network(theta, images.clone()), *leaves)
    loss = _called_twice("loss", lambda logits, labels: student.loss(logits.clone(), labels), logits, labels)
    if loss.dim() or not loss.is_floating_point():
        raise InputError(
            f"unroll loss: expected the mean over a batch, a floating-point tensor (), found {loss.dtype} of shape {tuple(loss.shape)}"
        )
    names = ["parameters", "images"] if wants_images else ["parameters"]
    gradients = torch.autograd.grad(loss, leaves[: len(names)], allow_unused=True) if loss.requires_grad else [None]
    for name, gradient in zip(names, gradients, strict=False):
        if gradient is None:
            raise InputError(
                f"unroll: expected a loss that depends on the {name}, found none of their gradients; `net` or `loss` cuts them off, as "
                "detach, item and torch.no_grad do"
            )
    return logits.detach()


def _called_twice(name: str, function: Callable[[Tensor, Tensor], Any], *arguments: Tensor) -> Tensor:
    """Return the result of `function`, with its graph.

    Raises `InputError` if it is no tensor, if a second call draws again or has another result, and where a gradient would have to
    flow to what it reads besides its arguments.

    A call may draw if it seeds the generators itself or puts them back, so that it draws the same numbers each time.
    """
    device = arguments[0].device
    with plain_attention, _RandomOperations() as operations:
        with torch.enable_grad():
            result = function(*arguments)
        state = _generators_state(device)
        again = function(*(argument.detach() for argument in arguments))
    if not isinstance(result, Tensor):
        raise InputError(f"unroll {name}: expected a tensor as its result, found {type(result).__name__}")
    # other threads may draw meanwhile, so a change of state alone says nothing
    if operations.names and not all(map(torch.equal, state, _generators_state(device))):
        raise InputError(
            f"unroll {name}: expected no random numbers, since the backward sweep would not repeat those of the forward one, found "
            f"{', '.join(dict.fromkeys(operations.names))}; take out what draws them, or call .eval() on a module before it is wrapped"
        )
    if not _alike(result, again):
        raise InputError(
            f"unroll {name}: expected the same outputs for the same arguments, found others at the second call; take out what "
            "changes from call to call, or call .eval() on a module before it is wrapped"
        )
    _check_nothing_else_is_learned(name, again)
    return result


def _check_nothing_else_is_learned(name: str, result: Tensor) -> None:
    """Raise `InputError` if the `result` of arguments without gradients has one, and gradients are recorded."""
    if result.requires_grad and torch.is_grad_enabled():
        raise InputError(
            f"unroll {name}: expected no tensor that requires a gradient besides its arguments, since none flows to it, found one; "
            "detach it, or make it a part of `theta`, `images` or floating `labels`"
        )


def _check_samples_are_apart(student: GenericStudent, theta: Tensor, inputs: Tensor, logits: Tensor) -> None:
    # beside itself in place of others: one sample by itself is no batch to some networks, as where they squeeze
    for position in range(len(inputs)):
        beside_itself = student.network(theta, inputs[[position, position]])
        if not _alike(logits[position], beside_itself[-1]):
            raise InputError(
                "unroll net: expected samples that do not depend on each other, since batches are cut, found other outputs for "
                "a sample beside others; take a norm that is not over the batch, or leave `microbatch` and `memory_budget` out"
            )


def _check_mean(student: GenericStudent, logits: Tensor, labels: Tensor) -> None:
    loss = student.loss(logits.clone(), labels)
    parts = torch.stack(
        [student.loss(single.clone(), label) for single, label in zip(logits.split(1), labels.split(1), strict=True)]
    )
    if not _alike(parts.mean(), loss, parts.abs().mean()):
        raise InputError(
            f"unroll loss: expected the mean of the samples' losses, since batches are cut, found {float(loss):.6g} for {len(parts)} "
            f"samples whose mean is {float(parts.mean()):.6g}; take one without weights of classes and with every label, or leave "
            "`microbatch` and `memory_budget` out"
        )


class _RandomOperations(TorchDispatchMode):
    """Note the names of operations that may draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _generators_state(device: torch.device) -> tuple[Tensor, ...]:
    """Return the states of torch's generators that a network on `device` may draw from."""
    state = torch.get_rng_state()
    return (state, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (state,)


def _alike(first: Tensor, second: Tensor, like: Tensor | None = None) -> bool:
    """Return whether tensors are the same within the rounding of numbers as large as those in `like`, `first` by default."""
    scale = float((first if like is None else like).detach().abs().nan_to_num(0, 0, 0).max())
    return first.shape == second.shape and torch.allclose(
        first, second, rtol=0, atol=_rounding(first) * scale, equal_nan=True
    )


def _rounding(like: Tensor) -> float:
    """Return the error, relative to the largest number, that another order of sums may cause; products may be in half precision."""
    return 1e-4 if like.dtype == torch.float64 else 1e-2
