"""Try a user's network, loss and augmentation on a few samples of the first batch, before the first step.

The backward sweep computes each step again, and may cut its batch. The gradient is correct only if the same inputs give the same
outputs, and if in a cut batch the outputs of a sample do not depend on the other samples. Otherwise it would be wrong without any
other symptom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mtt_fast.augmentation.protocol import Augment, warp_of
from mtt_fast.engine.mean_loss import FAILURES, is_mean
from mtt_fast.engine.students.batch_loss import outputs_in_pieces
from mtt_fast.engine.students.generic import cross_entropy, cross_entropy_from_logits, no_gradient_error
from mtt_fast.engine.students.protocol import Loss
from mtt_fast.errors import InputError
from mtt_fast.networks.protocol import Network
from mtt_fast.runtime.cuda_graphs import is_capturing
from mtt_fast.runtime.dispatch_mode import DispatchMode
from mtt_fast.runtime.numerics import plain_attention, without_autocast

_MAX_SAMPLES = 8  # in a trial
_SAMPLES_AT_ONCE = 2  # in memory, with their gradient
_LARGE = 2.0**20  # times a loss, so that its gradient exceeds what is clipped; a power of two rounds nothing


def try_augmentation(
    network: Network, augment: Augment | None, images: Tensor, index: Tensor, draws: Any
) -> Tensor | None:
    """Return the `images` at `index`, augmented with `draws`; None without an augmentation, and for a warp.

    All images are returned, since some networks fail on a few. Raises `InputError` if a second call returns other images, and if
    `augment` reads another tensor that requires a gradient.
    """
    if augment is None:
        return None
    warp = warp_of(augment, draws, torch.Size((len(index), *images.shape[1:])))
    if warp is not None:
        _check_nothing_else_is_learned("augment", warp)
        return None
    _check_may_synchronise(images)
    batch, few = images.detach()[index], _trial_positions(network, len(index))
    with without_autocast(images.device), _RandomOperations(images.device) as operations:
        with torch.no_grad():
            first = augment(batch.clone(), draws)  # of copies, since the augmentation may write into them
        operations.begin_second_call()
        second = augment(batch.clone(), draws)
    if not isinstance(first, Tensor) or first.shape[:1] != index.shape:
        found = f"shape {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
        raise InputError(f"`augment`: expected one image for each of the {len(index)} of a step, found {found}")
    _check_nothing_else_is_learned("augment", second)
    # small noise, as of less than a grey value, is close
    if operations.drew() or not _are_close(first[few], second[few]):
        found = "random numbers" if operations.drew() else "others"
        raise InputError(
            f"`augment`: expected the same images for the same draws, found {found} at the second call of {type(augment).__name__}; "
            "take all random numbers in its draw"
        )
    return first


def try_step(
    network: Network,
    loss: Loss,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    batches: Sequence[Tensor],
    augmented: Tensor | None,
    *,
    is_cut: bool,
) -> bool:
    """Return whether the loss of a batch is the mean of its samples' losses; True if batches are not cut (`is_cut`).

    The test uses `theta` (P,) and a few samples of the first batch. `augmented` is the result of `try_augmentation`. Raises
    `InputError` unless network and loss return the same at a second call, and read no other tensor that requires a gradient. The
    loss must be a scalar that depends on the parameters, and on the images if they require a gradient, and its backward pass must
    be linear in the gradient that it gets. If batches are cut, the outputs of a sample must be independent of the other samples.
    If network or loss fail on a few samples (as with a graph neural network with fixed edges), the whole batch is used; if it is
    cut, only for the loss.
    """
    _check_may_synchronise(theta)
    index, needs_images = batches[0], images.requires_grad and torch.is_grad_enabled()

    def samples(positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets at `positions` of the batch, in the dtypes that the sweeps use."""
        inputs = images.detach()[index[positions]] if augmented is None else augmented[positions]
        targets = labels.detach()[index[positions]]
        return inputs.to(theta.dtype), targets.to(theta.dtype) if labels.is_floating_point() else targets

    whole = torch.arange(len(index), device="cpu")
    positions = _trial_positions(network, len(index))
    if is_cut:  # the samples with the highest and the lowest sum come first: they reveal a network that branches on its whole batch
        sums = samples(positions)[0].reshape(len(positions), -1).sum(1)
        positions = positions[sums.argsort().roll(1).cpu()]
    inputs, targets = samples(positions)
    first = slice(None) if network.mixes_samples else slice(_SAMPLES_AT_ONCE)
    is_known_mean = loss in (cross_entropy, cross_entropy_from_logits)
    with without_autocast(theta.device):
        try:
            logits = _try_gradient(network, loss, theta, inputs[first], targets[first], needs_images=needs_images)
        except InputError:
            raise
        except FAILURES:
            if len(inputs[first]) == len(index):
                raise
            if not is_cut:
                _try_gradient(network, loss, theta, *samples(whole), needs_images=needs_images)
                return True
            inputs, targets = samples(whole)
            with torch.no_grad():
                logits = outputs_in_pieces(network, theta, inputs, _SAMPLES_AT_ONCE)
                _check_rows(logits, inputs)
                _check_samples_are_independent(network, theta, inputs[first], logits[first])
            _try_loss(loss, logits.requires_grad_(), targets)
            return is_known_mean
        if not is_cut:
            return True
        _check_rows(logits, inputs[first])
        with torch.no_grad():
            _check_samples_are_independent(network, theta, inputs, logits)
            if is_known_mean:
                return True
            outputs = outputs_in_pieces(network, theta, inputs, _SAMPLES_AT_ONCE)
            return is_mean(loss, outputs, targets, labels.detach())


def _check_may_synchronise(tensor: Tensor) -> None:
    """Raise `InputError` while work on `tensor` is captured in a CUDA graph, since the host cannot compare results then."""
    if is_capturing(tensor):
        raise InputError(
            "found the capture of a CUDA graph, in which a network, a loss or an augmentation of your own cannot be tried; call "
            "`GraphedMatchingLoss` outside of it, which captures the steps itself, and whose later calls can be captured too"
        )


def _trial_positions(network: Network, batch: int) -> Tensor:
    """Return the positions of a few samples, spread over a batch of this size; all if `network` mixes samples.

    Such a network may take only full batches (ghost batch norm does), and its batches are never cut.
    """
    few = batch if network.mixes_samples else min(batch, _MAX_SAMPLES) // _SAMPLES_AT_ONCE * _SAMPLES_AT_ONCE or 1
    return torch.linspace(0, batch - 1, few, device="cpu").round().long()


def _try_gradient(
    network: Network, loss: Loss, theta: Tensor, inputs: Tensor, labels: Tensor, *, needs_images: bool
) -> Tensor:
    """Return the logits of `inputs`, after a trial of network, loss and its gradient. Raises `InputError` as `try_step` does."""
    leaves = [theta.detach().requires_grad_(), inputs.detach().requires_grad_(needs_images)]
    # on copies, since a network may modify its images in place, and a loss its logits (one with a margin) or labels
    logits = _call_twice("net", lambda theta, images: network(theta, images.clone()), *leaves)
    value = _try_loss(loss, logits, labels)
    names = ["parameters", "images"] if needs_images else ["parameters"]

    def gradients(factor: float) -> Sequence[Tensor | None]:
        """Return the gradients of the loss times `factor`."""
        if not value.requires_grad:
            return [None]
        scale = torch.full_like(value, factor)
        return torch.autograd.grad(value, leaves[: len(names)], scale, retain_graph=True, allow_unused=True)

    for name, gradient, scaled in zip(names, gradients(1), gradients(_LARGE), strict=False):
        if gradient is None or scaled is None:
            raise no_gradient_error(name)
        if scaled.isfinite().all() and not _are_close(_LARGE * gradient, scaled):
            raise InputError(
                "`net`, `loss`: expected a backward pass that is linear in the gradient that it gets, found another; take out hooks and "
                "functions that clip or normalise gradients, since the two sweeps pass them gradients of other scales"
            )
    return logits.detach()


def _try_loss(loss: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of a batch, with its graph. Raises `InputError` as `_call_twice` does, and unless it is a floating-point scalar."""
    value = _call_twice("loss", lambda logits, labels: loss(logits.clone(), labels.clone()), logits, labels)
    if value.dim() or not value.is_floating_point():
        raise InputError(
            f"`loss`: expected one number for a batch, a floating-point tensor (), found {value.dtype} of shape {tuple(value.shape)}"
        )
    return value


def _call_twice(name: str, function: Callable[[Tensor, Tensor], Any], *arguments: Tensor) -> Tensor:
    """Return the result of `function`, with its graph, after a second call.

    Raises `InputError` if the result is not a tensor, if the second call draws random numbers or returns another result, and if
    `function` reads another tensor that requires a gradient. A call that seeds or restores the generators itself may draw, since
    it draws the same numbers each time.
    """
    with plain_attention, _RandomOperations(arguments[0].device) as operations:
        # the call without a graph comes first, since a graph would leave less memory for it
        again = function(*(argument.detach() for argument in arguments))
        operations.begin_second_call()
        with torch.enable_grad():
            result = function(*arguments)
    if not isinstance(result, Tensor):
        raise InputError(f"`{name}`: expected a tensor as its result, found {type(result).__name__}")
    if operations.drew():
        raise InputError(
            f"`{name}`: expected no random numbers, since the backward sweep would not repeat those of the forward one, found "
            f"{', '.join(dict.fromkeys(operations.names))}; take out what draws them, or call .eval() on a module before it is wrapped"
        )
    if not _are_close(result, again):
        raise InputError(
            f"`{name}`: expected the same outputs for the same arguments, found others at the second call; take out what "
            "changes from call to call, or call .eval() on a module before it is wrapped"
        )
    _check_nothing_else_is_learned(name, result, again)
    return result


def _check_nothing_else_is_learned(name: str, *results: Tensor) -> None:
    """Raise `InputError` if all `results`, each computed from different arguments, depend on the same leaf that requires a gradient.

    (A network that differentiates with respect to its images, for forces say, creates new leaves in each call.)
    """
    has_graphs = torch.is_grad_enabled() and all(result.requires_grad for result in results)
    if has_graphs and (others := set.intersection(*map(_leaves_of, results))):
        shape = tuple(next(iter(others)).shape)
        held = "; a module's lambda over self or compiled method still holds its own: make it a method"
        raise InputError(
            f"`{name}`: expected no tensor that requires a gradient besides its arguments, since none flows to it, found one of "
            f"shape {shape}; detach it, or make it a part of the parameters, `images` or floating `labels`{held if name == 'net' else ''}"
        )


def _leaves_of(result: Tensor) -> set[Tensor]:
    """Return the tensors at the ends of the autograd graph of `result`, which requires a gradient."""
    nodes = {torch.autograd.graph.get_gradient_edge(result).node}
    reached = set(nodes)
    while nodes:
        nodes = {node for each in nodes for node, _ in each.next_functions if node is not None} - reached
        reached |= nodes
    return {cast(Any, node).variable for node in reached if node.name().endswith("AccumulateGrad")}


def _check_rows(outputs: Tensor, inputs: Tensor) -> None:
    """Raise `InputError` unless the `outputs` have one row per input, as pieces of a batch require."""
    if outputs.shape[:1] != inputs.shape[:1]:
        raise InputError(
            f"`net`: expected outputs (b, …), a row for each sample, since batches are cut, found shape {tuple(outputs.shape)} of "
            f"{len(inputs)} samples; flatten them in the `loss`, or leave `microbatch`, `memory_budget` and `group` out"
        )


def _check_samples_are_independent(network: Network, theta: Tensor, inputs: Tensor, logits: Tensor) -> None:
    """Raise `InputError` if the outputs of a sample depend on the samples beside it.

    `logits` are the outputs of the first `inputs`, computed together. Each input is computed again beside a copy of itself, and
    two mixtures of it and another input: a layer that takes the mean of a group of samples, by a number in them, hides among
    copies. Parameters near zero, such as gates and last layers at initialisation, hide a layer that mixes samples. So the last two
    inputs are also computed with other values for such parameters.
    """
    even = (torch.arange(inputs[0].numel(), device=inputs.device) % 2 == 0).view(inputs.shape[1:])
    last = inputs[-_SAMPLES_AT_ONCE:]
    small = (theta.abs() <= 0.01 * theta.square().mean().sqrt()).nonzero()[:, 0]
    signs = (small + 1).to(theta.dtype).sin().sign()  # irregular, but deterministic
    moved = theta.index_copy(0, small, 0.3 * signs)
    for parameters, samples, outputs in (
        (theta, inputs[: len(logits)], logits),
        (moved, last, network(moved, last.clone())),
    ):
        factor = 0.5 if bool((samples == samples[:1]).all()) else 1
        for sample, output, other in zip(samples, outputs, samples.roll(1, 0), strict=True):
            # not one sample, since some networks fail with it (those that squeeze), nor two, since others depend on their number
            mixed = [torch.where(even == part, sample, factor * other) for part in (True, False)]
            try:
                again = network(parameters, torch.stack([*mixed, sample, sample]))
            except FAILURES:  # a mixture of two samples may be none, as of positive definite matrices
                again = network(parameters, torch.stack([factor * sample, sample] * 2))
            if not _are_close(output, again[-1]):
                raise InputError(
                    "`net`: expected samples that do not depend on each other, since batches are cut, found other outputs for "
                    "a sample beside others; take a norm that is not over the batch, or leave `microbatch`, `memory_budget` and `group` out"
                )


class _RandomOperations(DispatchMode):
    """Collect the names of operations that may draw random numbers in two calls, on a CPU or on `device`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.names: list[str] = []
        self._device = device

    def begin_second_call(self) -> None:
        """Record the states of the generators."""
        self._state = _generators_state(self._device)

    def drew(self) -> bool:
        """Return whether the second call drew new random numbers."""
        # other threads may draw at the same time, so a change of state alone proves nothing
        return bool(self.names) and not all(map(torch.equal, self._state, _generators_state(self._device)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _generators_state(device: torch.device) -> tuple[Tensor, ...]:
    """Return the states of torch's generators that a network on `device` may draw from."""
    state = torch.get_rng_state()
    return (state, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (state,)


def _are_close(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are equal up to rounding, relative to the largest magnitude in `first`."""
    scale = float(first.detach().abs().nan_to_num(0, 0, 0).max())
    # the two may differ in the order of sums, and have products in half precision
    rounding = 1e-4 if first.dtype == torch.float64 else 1e-2
    return first.shape == second.shape and torch.allclose(first, second, rtol=0, atol=rounding * scale, equal_nan=True)
