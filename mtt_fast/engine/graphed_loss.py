"""The matching loss and its gradients in a CUDA graph.

`unroll` launches each kernel from Python, which takes longer than a GPU needs for the kernel. `GraphedMatchingLoss` takes the
network and the options once. Its first call captures the kernels, and later calls replay them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtt_fast.augmentation.protocol import Augment, is_equivalent, is_warp, warp_of
from mtt_fast.augmentation.siamese import SiameseAugment
from mtt_fast.checks import check_generator
from mtt_fast.engine import arguments
from mtt_fast.engine.backward_checks import check_differentiated_once, refuse_forward_mode
from mtt_fast.engine.draws import Draw, draw_steps
from mtt_fast.engine.iteration import Iteration, PathLoss, planned_iteration
from mtt_fast.engine.matching import path_loss
from mtt_fast.engine.optimizers import Adam
from mtt_fast.engine.path import StudentPath
from mtt_fast.engine.rows import Rows
from mtt_fast.engine.students.microbatches import InMicrobatches
from mtt_fast.engine.students.protocol import Loss
from mtt_fast.engine.sweeps import Gradient
from mtt_fast.engine.unroll import (
    CheckedSteps,
    StepOptions,
    checked_plan,
    checked_steps,
    optimizer_of,
    plan_of_batch_loss,
)
from mtt_fast.errors import InputError
from mtt_fast.kernels import LabelKind, Precision
from mtt_fast.networks.protocol import Network
from mtt_fast.runtime.cuda_graphs import GraphedFunction, is_capturing
from mtt_fast.runtime.numerics import without_autocast, without_saved_tensor_hooks
from mtt_fast.runtime.prefetch import upload

log = logging.getLogger(__name__)

_MAX_GRAPHS = 8  # of one object, since each holds the memory of its plan


class GraphedMatchingLoss:
    """Compute `unroll` and a loss of its path, on a GPU by a CUDA graph that is captured once and replayed.

    The first call for each set of shapes and batch sizes checks the arguments as `unroll` does, compiles kernels, and captures
    the loss and its gradients. Later calls copy their tensors into the graph and launch it. They do not synchronise with the GPU,
    unless batches are cut with a `loss`: then each call checks that the loss is a mean over the samples. Python values that
    network, loss and augmentation read, such as a module's mode, are fixed by the first call. Each graph holds the memory of its
    plan until the object is freed. On a CPU nothing is captured, and each call checks the arguments. Call one object on one stream.

    The gradients are always computed together with the loss; a backward pass only scales them.

    Args:
        net: the student's network. All other arguments but `path_loss` are those of `unroll`. An `optimizer` must have `steps` 0.
        path_loss: the loss () as a function of the path (N + 1, P), as `unroll` returns it, the start and the target (P,). By
            default it is the paper's; `functools.partial(mtt_fast.path_loss, match_step="nearest")` is ATT's. Your own function
            must not read tensors on the host, draw random numbers, or depend on other tensors.

    Example:
        ```python
        graphed_loss = mtt_fast.GraphedMatchingLoss(net, augment=augment, memory_budget="2GiB")
        for start, target, order in segments:
            loss = graphed_loss(start, target, images, labels, lr, order)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ```
    """

    def __init__(
        self,
        net: Network,
        *,
        augment: Augment | None = None,
        microbatch: int | None = None,
        memory_budget: int | str | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        optimizer: Adam | None = None,
        label_kind: LabelKind | None = None,
        loss: Loss | None = None,
        precision: Precision = "fp32",
        gradient: Gradient = "exact",
        path_loss: PathLoss = path_loss,
    ) -> None:
        self._options = StepOptions(
            augment=augment, microbatch=microbatch, memory_budget=memory_budget, momentum=momentum,
            weight_decay=weight_decay, optimizer=optimizer, label_kind=label_kind, loss=loss, precision=precision,
            gradient=gradient,
        )  # fmt: skip
        if optimizer is not None and optimizer.steps:
            raise InputError(
                f"`optimizer`: expected Adam(steps=0), since the students start a training, found steps={optimizer.steps}; use "
                "`unroll`, which takes the moments as `velocity`"
            )
        if not callable(path_loss):
            raise InputError(f"`path_loss`: expected a function of path, start and target, found {path_loss!r}")
        self._net, self._path_loss = net, path_loss
        self._iterations: dict[Any, Iteration] = {}
        self._problem: str | None = None

    def __call__(
        self,
        start: Tensor,
        target: Tensor,
        images: Tensor,
        labels: Tensor,
        lr: Tensor | float,
        batches: Tensor | Sequence[Tensor],
        *,
        draws: Sequence[Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the loss () in float64, differentiable once in `images`, floating `labels` and `lr`.

        The student starts at the parameters `start` (P,), and should reach `target` (P,); both are constants. All other arguments
        are those of `unroll`. The paper's loss is not finite if the expert did not move. Raises `InputError` as `unroll` does, and
        for an augmentation whose draws for a step are not a tensor with one row per image, such as `KorniaAugment`.
        """
        steps = checked_steps(self._net, self._options, start, images, labels, lr, batches, theta_name="start")
        arguments.check_target(target, start)
        check_generator(generator)
        parameters = _parameters(draws, self._options.augment, images, steps.batches, generator)
        iteration = self._iteration(steps, target, parameters)
        constants = (start, target, torch.cat(steps.batches), *(() if parameters is None else (parameters,)))
        return _LossWithGradients.apply(iteration, constants, steps.images, steps.labels, steps.lr)  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        # captured graphs belong to this process, and their memory to this object
        return vars(self) | {"_iterations": {}, "_problem": None}

    @property
    def problem(self) -> str | None:
        """Return why some calls on a GPU are not captured (they run slower), or None."""
        return next((each.problem for each in self._graphed_functions() if each.problem), self._problem)

    def _graphed_functions(self) -> list[GraphedFunction]:
        every = [each.iteration if isinstance(each, _WatchedIteration) else each for each in self._iterations.values()]
        return [each for each in every if isinstance(each, GraphedFunction)]

    def _iteration(self, steps: CheckedSteps, target: Tensor, parameters: Tensor | None) -> Iteration:
        """Return the iteration for tensors of these shapes, cached or new; `parameters` are the augmentation's."""
        options, lengths = self._options, tuple(len(index) for index in steps.batches)
        if is_warp(options.augment):  # `parameters` are those of the warp, which DSA takes as they are
            options = replace(options, augment=SiameseAugment())
        optimizer = optimizer_of(options, steps.lr)
        tensors = (steps.theta, steps.images, steps.labels, steps.lr)
        key = (lengths, *((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors))
        known = self._iterations.get(key)
        if known is not None and steps.theta.is_cuda:
            return known
        # a call on a CPU reads Python values anew, such as a module's mode, so they are tried again
        first_draws = None if parameters is None else parameters[: lengths[0]]
        with torch.enable_grad():  # a later call may need the images' gradient even if this one does not
            plan = checked_plan(
                self._net, options, steps._replace(images=steps.images.detach().requires_grad_()), first_draws,
                moments=optimizer.moments, path_gradient=self._path_loss is not path_loss,
            )  # fmt: skip
            _check_reads_constants(self._path_loss, steps, target, on_host=plan.path_on_host)
        if known is not None:
            return known
        is_full = len(self._graphed_functions()) == _MAX_GRAPHS
        if is_full or plan.path_on_host:
            self._problem = (
                f"more than {_MAX_GRAPHS} sets of shapes" if is_full else "path in host memory; raise `memory_budget`"
            )
            log.warning("not captured, so that it runs slower, with the same result: %s", self._problem)
        planned = partial(
            planned_iteration, augment=options.augment, lengths=lengths, loss=partial(_checked_loss, self._path_loss),
            optimizer=optimizer, gradient=options.gradient, graph=not is_full,
        )  # fmt: skip
        if options.loss is not None and isinstance(plan.student, InMicrobatches):
            net = self._net  # not `self`, whose graphs would be freed late, with the cycle
            self._iterations[key] = _WatchedIteration(
                planned(plan, watched_loss=options.loss), lambda: planned(plan_of_batch_loss(plan, net, options))
            )
        else:
            self._iterations[key] = planned(plan)
        return self._iterations[key]


class _WatchedIteration:
    """Compute an iteration, assuming that its loss is a mean over the samples until a call shows that it is not."""

    def __init__(self, iteration: Iteration, of_batches: Callable[[], Iteration]) -> None:
        self.iteration = iteration
        self._of_batches: Callable[[], Iteration] | None = of_batches

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the loss and its gradients. Synchronises with a GPU as long as the loss is assumed to be a mean.

        Raises `InputError` in a capture by the caller, in which it cannot synchronise.
        """
        if self._of_batches is not None:
            if is_capturing(tensors[0]):
                raise InputError(
                    "`loss`: expected no capture of a CUDA graph, in which it cannot be checked that a loss of your own is a mean over "
                    "the samples of cut batches; call outside of it, or leave `microbatch` and `memory_budget` out"
                )
            *results, adds_up = self.iteration(*tensors)
            if _adds_up(adds_up):
                return tuple(results)
            self.iteration, self._of_batches = self._of_batches(), None
        return self.iteration(*tensors)


def _adds_up(result: Tensor) -> bool:
    """Return the `result` of a `WatchedLoss` as a bool. Synchronises with a GPU."""
    return bool(result)


class _LossWithGradients(torch.autograd.Function):
    """A loss whose gradients are computed in the forward pass."""

    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    @without_saved_tensor_hooks()
    def forward(
        ctx: Any, iteration: Iteration, constants: Sequence[Tensor], images: Tensor, labels: Tensor, lr: Tensor
    ) -> Tensor:
        start, target, *draws = constants
        with without_autocast(start.device):
            loss, *gradients = iteration(start, target, images, labels, lr, *draws)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once()
        images, lr, *labels = (grad.to(gradient.dtype) * gradient for gradient in ctx.saved_tensors)
        return None, None, images, next(iter(labels), None), lr


def _checked_loss(path_loss: PathLoss, path: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """Return the value of `path_loss` in float64. Raises `InputError` unless it is a scalar that depends on the path."""
    loss = path_loss(path, start, target)
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        without = ", without a gradient" if isinstance(loss, Tensor) and not loss.requires_grad else ""
        raise InputError(f"`path_loss`: expected a tensor () that depends on the path, found {found}{without}")
    if loss.is_complex():
        raise InputError(f"`path_loss`: expected a real number, found {loss.dtype}; use .real or .abs()")
    return loss.double()


def _check_reads_constants(path_loss: PathLoss, steps: CheckedSteps, target: Tensor, *, on_host: bool) -> None:
    """Raise `InputError` if `path_loss` reads another tensor that requires a gradient, since no gradient would flow to it."""
    start = steps.theta.detach()
    # in the memory layout of a student's path
    path = Rows.empty(len(steps.batches) + 1, start, on_host=on_host).stored.copy_(start)
    loss = path_loss(StudentPath.from_rows(path, path.unbind(), start.device), start, target.detach())
    if isinstance(loss, Tensor) and loss.requires_grad:
        raise InputError(
            "`path_loss`: expected no tensor that requires a gradient besides the path, since none flows to it, found "
            "one; detach it, or use `unroll`, whose path may enter any loss"
        )


def _parameters(
    draws: Sequence[Any] | None,
    augment: Augment | None,
    images: Tensor,
    batches: Sequence[Tensor],
    generator: torch.Generator | None,
) -> Tensor | None:
    """Return the draws of all steps as one tensor (ΣB, …) on the device of `images`; None without an augmentation.

    Those of a `Warp` are its parameters (ΣB, 13).
    """
    draw_all: Draw | None = getattr(augment, "draw_parameters", None)
    # the same random numbers, and less work
    if draws is None and draw_all is not None and is_equivalent(augment, "draw_parameters", "draw"):
        drawn = draw_steps(batches, images.shape[1:], images.dtype, draw_all, generator).parameters
        assert drawn is not None
        warp = warp_of(augment, drawn, torch.Size((len(drawn), *images.shape[1:])))
        return upload(drawn if warp is None else warp, images.device)
    draws = arguments.draws_of(draws, augment, images, batches, generator)
    if augment is None:
        return None
    tensors = [_as_tensor(augment, step_draws, images, index) for step_draws, index in zip(draws, batches, strict=True)]
    kinds = {(str(each.dtype), tuple(each.shape[1:]), str(each.device)) for each in tensors}
    if len(kinds) > 1:
        raise InputError(
            f"`augment`: expected draws of one dtype and shape in all steps, found {sorted(kinds)}; use `unroll`, which "
            "takes any"
        )
    return upload(torch.cat(tensors), images.device)


def _as_tensor(augment: Augment, draws: Any, images: Tensor, index: Tensor) -> Tensor:
    """Return the `draws` of a step on the `images` at `index` (b,) as a tensor (b, …). Raises `InputError` if they are not one."""
    warp = warp_of(augment, draws, torch.Size((len(index), *images.shape[1:])))
    if warp is not None:
        return warp.to(torch.promote_types(images.dtype, torch.float32))
    if isinstance(draws, Tensor) and draws.shape[:1] == index.shape:
        return draws
    found = f"shape {tuple(draws.shape)}" if isinstance(draws, Tensor) else type(draws).__name__
    raise InputError(
        f"`augment`: expected draws for a step that are a tensor with a row for each of {len(index)} images, "
        f"found {found}; use `unroll`, which takes any"
    )
