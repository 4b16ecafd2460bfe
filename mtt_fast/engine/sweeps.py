"""The forward sweep over the steps of a student, and the backward sweep with the adjoint, as one autograd function.

The forward sweep keeps only the parameters θ_0 … θ_N. The backward sweep goes through the steps in reverse with the adjoint λ of
the parameters. It needs one directional derivative of each step's gradient (docs/adjoint.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.augmentation.protocol import warp_of
from mtt_fast.engine.agreement import check_same_loss
from mtt_fast.engine.backward_checks import (
    check_differentiated_once,
    check_one_gradient,
    check_repeated,
    check_unchanged,
    checksums_of,
    refuse_forward_mode,
)
from mtt_fast.engine.optimizers import PLAIN_SGD, Optimizer
from mtt_fast.engine.path import StudentPath
from mtt_fast.engine.rows import Rows
from mtt_fast.engine.students.batch import AugmentedBatch, Batch, Inputs
from mtt_fast.engine.students.processes import add_up, averaged
from mtt_fast.engine.students.protocol import Student
from mtt_fast.kernels import PartialSums
from mtt_fast.runtime.numerics import without_autocast, without_saved_tensor_hooks
from mtt_fast.runtime.prefetch import upload

Gradient = Literal["exact", "truncated"]
"""The exact gradient, or TESLA's approximation without the Hessians of the steps (docs/adjoint.md)."""


@dataclass(frozen=True)
class StudentSteps:
    """The arguments of both sweeps that are not differentiated."""

    student: Student
    batches: tuple[Tensor, ...]
    saved_steps: int  # number of last steps that save their activations
    path_on_host: bool
    augment: Callable[[Tensor, Any], Tensor] | None
    draws: tuple[Any, ...]
    optimizer: Optimizer = PLAIN_SGD
    gradient: Gradient = "exact"
    group: dist.ProcessGroup | None = None
    """processes that share each batch, if the student is `InProcesses`"""
    checks_repeat: bool = False
    """check that the backward sweep reproduces the inputs and losses of the forward sweep; this synchronises with the device"""

    def batch(self, images: Tensor, n: int, dtype: torch.dtype, *, tracked: bool = False) -> Batch | AugmentedBatch:
        """Return the inputs of step n, in `dtype`, from all `images`; `tracked` says whether their gradient will be needed.

        The result is a `Batch`, which the student gathers itself, if the images are 4-D, contiguous and of `dtype`, and the
        augmentation is a warp or None. Otherwise it is an `AugmentedBatch`.
        """
        index, draws, augment = self.batches[n], self.draws[n], self.augment
        warp = warp_of(augment, draws, torch.Size((len(index), *images.shape[1:])))
        can_gather = images.dim() == 4 and images.dtype == dtype and images.is_contiguous()
        if (augment is None or warp is not None) and can_gather:
            if warp is not None:
                warp = upload(warp.to(torch.float64 if dtype == torch.float64 else torch.float32), images.device)
            return Batch(images.detach(), index, warp)

        def augmented(rows: Tensor) -> Tensor:
            if augment is None:
                return rows
            # the augmentation may modify its input in place, which autograd refuses for a leaf that requires a gradient
            return augment(rows.clone() if rows.requires_grad else rows, draws)

        return AugmentedBatch.from_images(images, index, augmented, dtype, tracked=tracked)

    def targets(self, labels: Tensor, dtype: torch.dtype) -> Callable[[int], Tensor]:
        """Return a function from n to the targets of step n: soft labels in `dtype`, other labels unchanged.

        Class indices (n,) are small, so they are gathered for all steps at once. Soft labels and labels per pixel are gathered
        step by step.
        """
        if labels.is_floating_point() or labels.dim() > 1:
            return lambda n: labels[self.batches[n]].to(dtype if labels.is_floating_point() else labels.dtype)
        targets = labels[torch.cat(self.batches)].split([len(index) for index in self.batches])
        return lambda n: targets[n]


def path_of(
    steps: StudentSteps, theta: Tensor, images: Tensor, labels: Tensor, lr: Tensor, velocity: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the path (N + 1, P), and the state of the optimizer after the last step, or None for an optimizer without a state.

    `velocity` is the state before the first step. The arguments are not checked. Unless `steps.checks_repeat`, no tensor is read on
    the host, so both sweeps can be captured in a CUDA graph (mtt_fast/runtime/cuda_graphs.py).
    """
    with without_autocast(theta.device):
        path, after, *rows = _Unroll.apply(steps, theta, velocity, images, labels, lr)
    return StudentPath.from_rows(path, rows, theta.device), after


def _backward_sweep(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate an autograd function's `backward`: refuse second derivatives and batched gradients, and disable autocast and hooks.

    Each step calls autograd itself. So a `torch.inference_mode` around the backward pass, which torch permits, is switched off
    inside.
    """

    @functools.wraps(function)
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        check_differentiated_once()
        check_one_gradient(gradients)
        with torch.inference_mode(False), torch.no_grad(), without_autocast(ctx.device), without_saved_tensor_hooks():
            return function(ctx, *gradients)

    return backward


class _Unroll(torch.autograd.Function):
    """Both sweeps as one node of the user's autograd graph."""

    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    @without_saved_tensor_hooks()
    def forward(
        ctx: Any,
        steps: StudentSteps,
        theta: Tensor,
        velocity: Tensor | None,
        images: Tensor,
        labels: Tensor,
        lr: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Return the path (N + 1, P), the last state of the optimizer or None, and the rows of the path as separate outputs."""
        count = len(steps.batches)
        lrs = _lrs(lr, count, theta)
        path = Rows.empty(count + 1, theta, on_host=steps.path_on_host)
        path.on_device(0).copy_(theta)
        path.save(0)
        states = _states(steps, theta, velocity)  # the backward sweep needs them
        saved, targets, fingerprints = {}, steps.targets(labels, theta.dtype), []
        for n in range(count):
            inputs = steps.batch(images, n, theta.dtype).inputs
            save = n >= count - steps.saved_steps
            loss, sums, activations = steps.student.gradient(path.on_device(n), inputs, targets(n), save=save)
            if steps.checks_repeat:
                fingerprints.append(_fingerprint(inputs, loss))
            if activations:
                saved[n] = activations
            before, after = (None, None) if states is None else (states.on_device(n), states.on_device(n + 1))
            steps.optimizer.step(n, path.on_device(n), sums, lrs[n], before, out=path.on_device(n + 1), after=after)
            path.save(n + 1)
            if states is not None:
                states.save(n + 1)
        if steps.path_on_host and theta.is_cuda:  # later reads of the rows in host memory do not synchronise
            torch.cuda.current_stream(theta.device).synchronize()
        ctx.steps, ctx.saved, ctx.fingerprints, ctx.device = steps, saved, fingerprints, theta.device
        read = {"images": images, "labels": labels, "lr": lr, "path": path.stored}
        ctx.checksums = checksums_of(**read) if steps.checks_repeat and any(ctx.needs_input_grad) else {}
        ctx.save_for_backward(images, labels, lr, path.stored, None if states is None else states.stored)
        ctx.set_materialize_grads(False)
        # a copy, so that a caller who keeps the last state does not keep all states alive
        last = None if states is None else states.on_device(count).clone()
        return path.stored, last, *path.stored.unbind()

    @staticmethod
    @_backward_sweep
    def backward(
        ctx: Any, grad_path: Tensor | None, grad_velocity: Tensor | None, *grad_rows: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to the arguments of `forward`.

        The saved activations are freed. A second backward pass (`retain_graph=True`) computes them again.
        """
        steps: StudentSteps = ctx.steps
        # read once: under torch.autograd.graph's hooks each access copies, and torch.utils.checkpoint allows only one
        *tensors, stored = ctx.saved_tensors
        images, labels, lr, rows = (tensor.detach() for tensor in tensors)
        check_unchanged(ctx.checksums, images=images, labels=labels, lr=lr, path=rows)
        if steps.group is not None:
            check_same_loss(steps.group, (grad_path, grad_velocity, *grad_rows), lr.device)
        path = Rows(rows, lr.device, on_host=steps.path_on_host)
        states = None if stored is None else Rows(stored, lr.device, on_host=steps.path_on_host)
        _, _, needs_velocity, needs_images, needs_labels, needs_lr = ctx.needs_input_grad
        start = path.on_device(0)
        lrs, targets = _lrs(lr, len(steps.batches), start), steps.targets(labels, start.dtype)
        # ν = scale · direction. Without a state the direction is λ, and ν = −α λ; with a state the direction is ν itself
        scales = -lrs if states is None else lrs.new_ones(len(lrs))
        negated_scales = -scales
        grad_images = torch.zeros_like(images, memory_format=torch.contiguous_format) if needs_images else None
        grad_labels = torch.zeros_like(labels, memory_format=torch.contiguous_format) if needs_labels else None
        grad_lrs = _LrGradients(lrs) if needs_lr else None
        repeated: list[list[Tensor]] = []  # fingerprints of the steps, last step first
        direct_gradient = functools.partial(_direct_gradient, grad_path, grad_rows, lr.device)

        # the loss does not depend on steps after row `last`
        needs_all = grad_path is not None or grad_velocity is not None
        last = max((n for n, grad_row in enumerate(grad_rows) if needs_all or grad_row is not None), default=0)
        for n in range(last, len(steps.batches)):
            ctx.saved.pop(n, None)
        adjoint = _copy_or_zeros(direct_gradient(last), start)  # λ_{n+1}, of the parameters
        state_adjoint = None  # π_{n+1}, of the optimizer's state
        if states is not None:
            state_adjoint = _copy_or_zeros(grad_velocity, states.load(last))
        for n in reversed(range(last)):
            # the loss depends on g_n through ν·g_n. Without a state ν = −α λ, and λ itself is the direction: this also
            # works for α = 0, and gives λ·g_n, which dα needs, without extra cost
            direction, grad_negated_lr = adjoint, None
            if states is not None and state_adjoint is not None:
                before, after = states.load(n), states.on_device(n + 1)  # row n + 1 is already on the device
                direction, grad_negated_lr = steps.optimizer.adjoint(n, adjoint, state_adjoint, lrs[n], before, after)
            batch, theta = steps.batch(images, n, adjoint.dtype, tracked=needs_images), path.load(n)
            tangent = steps.student.gradient_jvp(theta, batch.inputs, targets(n), direction, ctx.saved.pop(n, None))
            if steps.checks_repeat:
                repeated.append(_fingerprint(batch.inputs, tangent.loss))

            weight_decay = steps.optimizer.weight_decay
            if states is None:
                grad_negated_lr = tangent.v_dot_g
                if weight_decay:
                    grad_negated_lr = grad_negated_lr + weight_decay * torch.dot(direction, theta)
            if grad_lrs is not None and grad_negated_lr is not None:
                grad_lrs.set(n, grad_negated_lr)
            to_add = None if grad_images is None else _add_image_gradient(grad_images, batch, tangent.images, scales[n])
            if grad_labels is not None and tangent.labels is not None:
                grad_targets = (negated_scales[n] * tangent.labels).to(labels.dtype).contiguous()
                kernels.index_add(grad_labels, steps.batches[n], grad_targets, alpha=-1)
            kernels.adjoint_step(
                adjoint,
                tangent.sums if steps.gradient == "exact" else PartialSums((adjoint.new_empty(0, len(adjoint)),)),
                direction,
                scales[n],
                out=adjoint,
                incoming=direct_gradient(n),
                weight_decay=weight_decay,
                batch=to_add,
            )
            del batch, tangent, to_add, grad_negated_lr

        if steps.group is not None:
            add_up(steps.group, grad_images, grad_labels)
        _check_repeated(steps, images, targets, path, ctx.fingerprints[:last], repeated[::-1], tracked=needs_images)
        grad_lr = None if grad_lrs is None else grad_lrs.gradient_of(lr)
        return None, adjoint, state_adjoint if needs_velocity else None, grad_images, grad_labels, grad_lr


class _LrGradients:
    """The gradients of the learning rates, (N,) or (N, P); the backward sweep sets them from the last step to the first."""

    def __init__(self, lrs: Tensor) -> None:
        self._gradients = torch.zeros_like(lrs)
        self._negated: list[Tensor] = []  # each (), the last step first

    def set(self, n: int, negated: Tensor) -> None:
        """Set the gradient of step `n` from dL/d(−α_n), () or (P,)."""
        if negated.dim():
            torch.neg(negated, out=self._gradients[n])
        else:  # written by `gradient_of`, all at once: each operation is a launch on a GPU
            self._negated.append(negated)

    def gradient_of(self, lr: Tensor) -> Tensor:
        """Return the gradient in the shape of `lr`: (), (1,), (N,) or (N, P)."""
        if self._negated:
            torch.stack(self._negated[::-1], out=self._gradients[: len(self._negated)]).neg_()
        return self._gradients if lr.numel() > 1 else self._gradients.sum().view(lr.shape)  # autograd casts it


def _states(steps: StudentSteps, theta: Tensor, first: Tensor | None) -> Rows | None:
    """Return rows for the N + 1 states of the optimizer, the first of them set to `first`, or to zeros for None.

    Return None for an optimizer without a state.
    """
    moments = steps.optimizer.moments
    if not moments:
        return None
    like = theta if moments == 1 else theta.expand(moments, -1)
    states = Rows.empty(len(steps.batches) + 1, like, on_host=steps.path_on_host)
    states.on_device(0).copy_(first) if first is not None else states.on_device(0).zero_()
    states.save(0)
    return states


def _copy_or_zeros(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Return a copy of a `tensor`, or zeros for None, in the shape and dtype and on the device of `like`."""
    return like.new_zeros(like.shape) if tensor is None else like.new_empty(like.shape).copy_(tensor)


def _add_image_gradient(
    out: Tensor, batch: Batch | AugmentedBatch, inputs_bar: Tensor, scale: Tensor
) -> kernels.BatchGradient | None:
    """Add the gradient of a step's images to `out` (n, …), or return the argument with which `adjoint_step` adds it."""
    if isinstance(batch, Batch):
        return batch.gradient_to_add(out, inputs_bar)
    batch.add_gradient(out, inputs_bar, scale)
    return None


def _direct_gradient(
    grad_path: Tensor | None, grad_rows: Sequence[Tensor | None], device: torch.device, n: int
) -> Tensor | None:
    """Return e_n (P,), the direct gradient of the loss with respect to θ_n, from uses of `path` and of `path[n]`; None for zero."""
    from_path, from_row = None if grad_path is None else grad_path[n], grad_rows[n]
    parts = [part.to(device).contiguous() for part in (from_path, from_row) if part is not None]
    return parts[0] + parts[1] if len(parts) == 2 else next(iter(parts), None)


def _fingerprint(inputs: Inputs, loss: Tensor | None) -> list[Tensor]:
    """Return scalars () of a step that change if a user's augmentation, network or loss does."""
    norms = [] if isinstance(inputs, Batch) else [torch.linalg.vector_norm(inputs)]
    return norms if loss is None else [*norms, loss]


def _check_repeated(
    steps: StudentSteps,
    images: Tensor,
    targets: Callable[[int], Tensor],
    path: Rows,
    first: list[list[Tensor]],
    again: list[list[Tensor]],
    *,
    tracked: bool,
) -> None:
    """Raise `InputError` unless the fingerprints of the forward sweep, `first`, equal those of the backward sweep, `again`.

    `tracked` must be that of the backward sweep, since an augmentation may behave differently if its images require a gradient.
    """
    count = len(again[0]) if again else 0  # a fused student computes no loss in the backward sweep
    if not count:
        return

    def forward_fingerprint(n: int) -> Tensor:
        """Return the fingerprint (k,) of step n, computed again as in the forward sweep."""
        inputs = steps.batch(images, n, path.stored.dtype, tracked=tracked).inputs
        loss = steps.student.gradient(path.load(n), inputs, targets(n)).loss
        return averaged(steps.group, _stacked([_fingerprint(inputs, loss)])[0, :count])

    before, now = (averaged(steps.group, numbers) for numbers in (_stacked(first)[:, :count], _stacked(again)))
    check_repeated(before, now, forward_fingerprint)


def _stacked(fingerprints: list[list[Tensor]]) -> Tensor:
    """Return the fingerprints of N steps as a tensor (N, k), float64."""
    return torch.stack([number.double() for numbers in fingerprints for number in numbers]).view(len(fingerprints), -1)


def _lrs(lr: Tensor, steps: int, like: Tensor) -> Tensor:
    """Return the learning rates of all steps, (N,) or (N, P), in the dtype and on the device of `like`."""
    return lr.detach().to(like).resolve_neg().expand(steps, *lr.shape[1:])
