"""Trials of a caller's network, loss and augmentation on a few samples of the first batch, before the first step.

The backward sweep computes each step again, and may cut its batch. The gradient is right only if the same inputs give the same
outputs, and if those of a sample do not depend on the others of a batch that is cut. Otherwise it would be wrong without any other
symptom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtt_fast.augmentation.protocol import Augment, warp_of
from mtt_fast.engine.students.batch_loss import outputs_in_pieces
from mtt_fast.engine.students.generic import GenericStudent, cross_entropy, cross_entropy_from_logits, no_gradient_error
from mtt_fast.engine.students.microbatches import InMicrobatches
from mtt_fast.engine.students.protocol import Loss, Student
from mtt_fast.errors import InputError
from mtt_fast.networks.protocol import Network
from mtt_fast.runtime.cuda_graphs import is_capturing
from mtt_fast.runtime.numerics import plain_attention, without_autocast

_MAX_SAMPLES = 8  # of a trial
_SAMPLES_AT_ONCE = 2  # in memory, with their gradient
_MAX_LABELS = 1000
# What network and loss raise where they do not take so few samples. No other: torch.utils.checkpoint stops by an exception of its own.
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError)


def try_augmentation(
    network: Network, augment: Augment | None, images: Tensor, index: Tensor, draws: Any
) -> Tensor | None:
    """Return the `images` at `index`, augmented with `draws`; None without an augmentation, and for a warp.

    All images are returned, since some networks fail on a few. They take less memory than this trial.
    Raises `InputError` if a second call returns other images, and if `augment` reads another tensor that requires a gradient.
    """
    if augment is None:
        return None
    warp = warp_of(augment, draws, torch.Size((len(index), *images.shape[1:])))
    if warp is not None:
        _check_nothing_else_is_learned("augment", warp)
        return None
    _check_may_wait(images)
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
    student: GenericStudent,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    batches: Sequence[Tensor],
    augmented: Tensor | None,
    *,
    is_cut: bool,
) -> bool:
    """Return whether the loss of a batch is the mean of its samples' losses; True if batches are not cut (`is_cut`).

    It is judged at `theta` (P,) by a few samples of the first batch. `augmented` is the result of `try_augmentation`.
    Raises `InputError` unless network and loss return the same at a second call, and read no other tensor that requires a gradient.
    The loss must be a scalar that depends on the parameters, and on the images if they require a gradient. If batches are cut, the
    outputs of a sample must be independent of the other samples. If network or loss fail on a few samples, as those of a graph with
    fixed edges do, the whole batch is taken; where it is cut, only for the loss.
    """
    _check_may_wait(theta)
    network, needs_images = student.network, images.requires_grad and torch.is_grad_enabled()
    index = batches[0]

    def samples(positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets at `positions` of the batch, in the dtypes that the sweeps use."""
        inputs = images.detach()[index[positions]] if augmented is None else augmented[positions]
        targets = labels.detach()[index[positions]]
        return inputs.to(theta.dtype), targets.to(theta.dtype) if labels.is_floating_point() else targets

    whole = torch.arange(len(index), device="cpu")
    positions = _trial_positions(network, len(index))
    if is_cut:  # of the highest and the lowest sum first: beside each other they show a decision that a network takes for its whole batch
        sums = samples(positions)[0].reshape(len(positions), -1).sum(1)
        positions = positions[sums.argsort().roll(1).cpu()]
    inputs, targets = samples(positions)
    first = slice(None) if network.mixes_samples else slice(_SAMPLES_AT_ONCE)
    is_known_mean = student.loss in (cross_entropy, cross_entropy_from_logits)
    with without_autocast(theta.device):
        try:
            logits = _try_gradient(student, theta, inputs[first], targets[first], needs_images=needs_images)
        except InputError:
            raise
        except _FAILURES:
            if len(inputs[first]) == len(index):
                raise
            if not is_cut:
                _try_gradient(student, theta, *samples(whole), needs_images=needs_images)
                return True
            inputs, targets = samples(whole)
            with torch.no_grad():
                logits = outputs_in_pieces(network, theta, inputs, _SAMPLES_AT_ONCE)
                _check_samples_are_independent(student, theta, inputs[first], logits[first])
            _try_loss(student, logits.requires_grad_(), targets)
            return is_known_mean
        if not is_cut:
            return True
        with torch.no_grad():
            _check_samples_are_independent(student, theta, inputs, logits)
            if is_known_mean:
                return True
            outputs = outputs_in_pieces(network, theta, inputs, _SAMPLES_AT_ONCE)
            # of all labels, since a captured iteration gets other batches later
            others = labels.detach()[_different_labels(labels.detach())]
            return _is_mean(student.loss, outputs, torch.cat([others.to(targets.dtype), targets]))


class WatchedLoss:
    """A loss of pieces of batches that finds out in the forward sweep whether they add up.

    `try_step` has seen other outputs: a loss may leave out samples only once they are learned. Each half of a piece is compared with
    the half before, so that this takes no more memory than a piece.
    """

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self._before: tuple[Tensor, Tensor] | None = None
        self._found: list[Tensor] | None = []

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a piece."""
        if self._found is not None:
            # of copies, since the loss may write into its arguments
            for half in zip(outputs.detach().clone().chunk(2), targets.detach().clone().chunk(2), strict=True):
                if self._before is not None:
                    self._found.append(_adds_up(self._loss, [self._before, half]))
                self._before = half
        return self._loss(outputs, targets)

    def adds_up(self) -> bool:
        """Return whether the pieces so far added up, and watch no more. A GPU is waited for."""
        return bool(self.result())

    def result(self) -> Tensor:
        """Return whether the pieces so far added up, as a boolean tensor (), and watch no more."""
        found, self._found = self._found, None
        return torch.stack(found).all() if found else torch.ones((), dtype=torch.bool, device="cpu")


def watched_student(student: Student, loss: Loss | None) -> tuple[Student, WatchedLoss | None]:
    """Return `student`, and a `WatchedLoss` within it if it takes a `loss` of the caller's own for a mean over the samples."""
    if loss is None or not isinstance(student, InMicrobatches):
        return student, None
    watched = WatchedLoss(loss)
    return InMicrobatches(replace(cast("Any", student.student), loss=watched), student.size), watched


def _check_may_wait(tensor: Tensor) -> None:
    """Raise `InputError` while work on `tensor` is captured in a CUDA graph: the host could not compare results."""
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
    student: GenericStudent, theta: Tensor, inputs: Tensor, labels: Tensor, *, needs_images: bool
) -> Tensor:
    """Return the logits of `inputs`, after a trial of network, loss and its gradient. Raises `InputError` as `try_step` does."""
    leaves = [theta.detach().requires_grad_(), inputs.detach().requires_grad_(needs_images)]
    # of copies, since a network may write into its images; a loss may, into the logits (one with a margin) and into the labels
    logits = _call_twice("net", lambda theta, images: student.network(theta, images.clone()), *leaves)
    loss = _try_loss(student, logits, labels)
    names = ["parameters", "images"] if needs_images else ["parameters"]
    gradients = torch.autograd.grad(loss, leaves[: len(names)], allow_unused=True) if loss.requires_grad else [None]
    for name, gradient in zip(names, gradients, strict=False):
        if gradient is None:
            raise no_gradient_error(name)
    return logits.detach()


def _try_loss(student: GenericStudent, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of a batch, with its graph. Raises `InputError` as `_call_twice` does, and unless it is a floating-point scalar."""
    loss = _call_twice("loss", lambda logits, labels: student.loss(logits.clone(), labels.clone()), logits, labels)
    if loss.dim() or not loss.is_floating_point():
        raise InputError(
            f"`loss`: expected one number for a batch, a floating-point tensor (), found {loss.dtype} of shape {tuple(loss.shape)}"
        )
    return loss


def _call_twice(name: str, function: Callable[[Tensor, Tensor], Any], *arguments: Tensor) -> Tensor:
    """Return the result of `function`, with its graph, after a second call.

    Raises `InputError` if the result is not a tensor, if the second call draws random numbers or returns another result, and if
    `function` reads another tensor that requires a gradient. A call that seeds or restores the generators itself may draw, since
    it draws the same numbers each time.
    """
    with plain_attention, _RandomOperations(arguments[0].device) as operations:
        with torch.enable_grad():
            result = function(*arguments)
        operations.begin_second_call()
        again = function(*(argument.detach() for argument in arguments))
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
    """Raise `InputError` if all `results`, each of other arguments, depend on the same tensor that requires a gradient.

    A network that differentiates by its images, as one of forces does, marks other ones in each call.
    """
    has_graphs = torch.is_grad_enabled() and all(result.requires_grad for result in results)
    if has_graphs and set.intersection(*map(_leaves_of, results)):
        raise InputError(
            f"`{name}`: expected no tensor that requires a gradient besides its arguments, since none flows to it, found one; "
            "detach it, or make it a part of the parameters, `images` or floating `labels`"
        )


def _leaves_of(result: Tensor) -> set[Tensor]:
    """Return the tensors at the ends of the autograd graph of `result`, which requires a gradient."""
    nodes = {torch.autograd.graph.get_gradient_edge(result).node}
    reached = set(nodes)
    while nodes:
        nodes = {node for each in nodes for node, _ in each.next_functions if node is not None} - reached
        reached |= nodes
    return {cast("Any", node).variable for node in reached if node.name().endswith("AccumulateGrad")}


def _check_samples_are_independent(student: GenericStudent, theta: Tensor, inputs: Tensor, logits: Tensor) -> None:
    """Raise `InputError` if the outputs of a sample change when it is beside a copy of itself and not beside other samples.

    The samples are the first of `inputs`, with the outputs `logits`. If they are alike, or there is only one, it is set beside half of
    itself. Parameters near zero, as gates and last layers may begin, hide a layer that mixes samples. So the same is asked with other
    numbers in their place, of the last two samples.
    """
    network, last = student.network, inputs[-_SAMPLES_AT_ONCE:]
    is_small = theta.abs() <= 0.01 * theta.square().mean().sqrt()
    signs = torch.arange(1, len(theta) + 1, dtype=theta.dtype, device=theta.device).sin_().sign_()  # in no order
    moved = torch.where(is_small, 0.3 * signs, theta)
    for parameters, samples, outputs in (
        (theta, inputs[: len(logits)], logits),
        (moved, last, network(moved, last.clone())),
    ):
        factor = 0.5 if bool((samples == samples[:1]).all()) else 1
        for sample, output in zip(samples, outputs, strict=True):
            # of two, since some networks fail with one sample (those that squeeze)
            if not _are_close(output, network(parameters, torch.stack([factor * sample, sample]))[-1]):
                raise InputError(
                    "`net`: expected samples that do not depend on each other, since batches are cut, found other outputs for "
                    "a sample beside others; take a norm that is not over the batch, or leave `microbatch` and `memory_budget` out"
                )


def _is_mean(loss: Loss, outputs: Tensor, targets: Tensor) -> bool:
    """Return whether the `loss` of a batch is the mean of the losses of its samples, which a loss of pairs, or one that fails, is not.

    There may be more `targets` than `outputs`, which are then repeated.
    """
    if bool((outputs == outputs[:1]).all()):
        return False  # of one sample, and of equal ones, a loss of differences is the mean
    rows = outputs.split(1)
    samples = [(rows[n % len(rows)], target) for n, target in enumerate(targets.split(1))]
    # a few at once, of which the last is the first of the next few
    few = [samples[first : first + _MAX_SAMPLES] for first in range(0, len(samples) - 1, _MAX_SAMPLES - 1)]
    return all(bool(_adds_up(loss, part)) for part in few)


def _adds_up(loss: Loss, parts: Sequence[tuple[Tensor, Tensor]], *, to_targets: bool = True) -> Tensor:
    """Return whether the `loss` of a batch is the mean of those of its `parts`, weighted by their sizes, as a boolean tensor ().

    Each part is outputs and targets (b, …). A loss that fails, as one of whole batches may, is no mean. Gradients are compared, too:
    at random parameters all samples may have about the same loss, so that any weights give it, and learned weights among the
    targets may be equal at first. Those of targets (`to_targets`) are left out where the loss has none: it may train under no_grad.
    """
    soft = to_targets and parts[0][1].is_floating_point()

    def loss_and_gradients(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the loss and its gradients with respect to the outputs, and to floating targets."""
        arguments = [outputs.detach().requires_grad_(), targets.detach().requires_grad_(soft)]
        with torch.enable_grad():
            value = loss(*(argument.clone() for argument in arguments))
        leaves = arguments[: 1 + soft]
        if not value.requires_grad:  # the loss leaves these outputs out
            return value.detach(), [torch.zeros_like(leaf) for leaf in leaves]
        return value.detach(), torch.autograd.grad(value, leaves, materialize_grads=True)

    outputs, targets = (torch.cat(each) for each in zip(*parts, strict=True))
    try:
        value, gradients = loss_and_gradients(outputs, targets)
        of_parts = [loss_and_gradients(*part) for part in parts]
    except InputError:
        raise
    except _FAILURES:
        if soft:
            return _adds_up(loss, parts, to_targets=False)
        return torch.zeros((), dtype=torch.bool, device=outputs.device)
    shares = [len(part[0]) / len(outputs) for part in parts]
    values = torch.stack([share * value for share, (value, _) in zip(shares, of_parts, strict=True)])
    adds_up = _are_same(values.sum(), value, values.abs().sum())
    for n, gradient in enumerate(gradients):
        added = torch.cat([share * part[n] for share, (_, part) in zip(shares, of_parts, strict=True)])
        # that of targets may be rounding errors alone, beside that of the outputs
        adds_up &= _are_same(added, gradient, torch.cat([each.flatten() for each in gradients[: n + 1]]))
    return adds_up


def _are_same(first: Tensor, second: Tensor, like: Tensor) -> Tensor:
    """Return whether two tensors are equal up to the rounding of a sum, relative to the largest magnitude in `like`, as a tensor ()."""
    rounding = 1e-9 if first.dtype == torch.float64 else 1e-5
    error, scale = (first - second).abs(), like.abs().nan_to_num(0, 0, 0).max()
    not_numbers = first.isnan() & second.isnan()
    return ((error <= rounding * scale) | (first == second) | not_numbers).all()


def _different_labels(labels: Tensor) -> Tensor:
    """Return the positions of a few of all `labels` (n, …), to which a loss may give other weights, or none.

    These have each class, or of numbers the smallest and the largest at each place. If there are too many, they are spread over all.
    """
    if labels.is_complex():
        labels = torch.view_as_real(labels.resolve_conj())
    if labels.is_floating_point():
        numbers = labels.reshape(len(labels), -1)
        rows = torch.cat([numbers.argmin(0), numbers.argmax(0)]).unique()
    else:
        _, first = np.unique(labels.cpu().numpy(), return_index=True)
        rows = torch.as_tensor(first // max(labels[0].numel(), 1), device=labels.device).unique()
    few = torch.linspace(0, len(rows) - 1, min(len(rows), _MAX_LABELS), device="cpu").round().long()
    chosen: Tensor = rows[few]
    return chosen


class _RandomOperations(TorchDispatchMode):
    """Collect the names of operations that may draw random numbers in two calls, on a CPU or on `device`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.names: list[str] = []
        self._device = device

    def begin_second_call(self) -> None:
        """Remember the states of the generators."""
        self._state = _generators_state(self._device)

    def drew(self) -> bool:
        """Return whether the second call drew random numbers that are not those of the first."""
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
    # the two may have been summed in another order, with products in half precision
    rounding = 1e-4 if first.dtype == torch.float64 else 1e-2
    return first.shape == second.shape and torch.allclose(first, second, rtol=0, atol=rounding * scale, equal_nan=True)
