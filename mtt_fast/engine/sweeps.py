"""Both sweeps over the steps of a student: forward along the path, and back with the adjoint.

The forward sweep keeps only the parameters θ_0 … θ_N. The backward sweep walks the steps in reverse with the adjoint λ of the
parameters: a step's contribution is one directional derivative of its ordinary gradient (docs/adjoint.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.augmentation.protocol import warp_of
from mtt_fast.engine.arguments import check_differentiated_once, check_one_gradient, check_repeated
from mtt_fast.engine.batch import AugmentedBatch, Batch, Inputs
from mtt_fast.engine.path import StudentPath
from mtt_fast.engine.rows import Rows
from mtt_fast.engine.student import Student
from mtt_fast.kernels import PartialSums
from mtt_fast.runtime.numerics import without_autocast
from mtt_fast.runtime.prefetch import upload

Gradient = Literal["exact", "truncated"]
"""The gradient is exact, or leaves out the steps' Hessians as TESLA does, an approximation (docs/adjoint.md)."""


@dataclass(frozen=True)
class StudentSteps:
    """The arguments of both sweeps besides the tensors that are differentiated."""

    student: Student
    batches: tuple[Tensor, ...]
    saved_steps: int  # the last so many steps save their activations
    path_on_host: bool
    augment: Callable[[Tensor, Any], Tensor] | None
    draws: tuple[Any, ...]
    momentum: float = 0.0
    weight_decay: float = 0.0
    gradient: Gradient = "exact"
    has_velocity: bool = False  # always true with momentum
    compares: bool = False  # whether both sweeps are compared, which waits for the device

    def batch(self, images: Tensor, n: int, dtype: torch.dtype, *, tracked: bool = False) -> Batch | AugmentedBatch:
        """Return the inputs of step n, of `dtype`, out of all `images`; `tracked` if their gradient will be needed.

        The student gathers them itself, unless the augmentation is no warp or the dtype is another.
        """
        index, draws, augment = self.batches[n], self.draws[n], self.augment
        warp = warp_of(augment, draws, torch.Size((len(index), *images.shape[1:])))
        as_pictures = images.dim() == 4 and images.dtype == dtype and images.is_contiguous()
        if (augment is None or warp is not None) and as_pictures:
            if warp is not None:
                warp = upload(warp.to(torch.float64 if dtype == torch.float64 else torch.float32), images.device)
            return Batch(images.detach(), index, warp)

        def augmented(rows: Tensor) -> Tensor:
            return rows if augment is None else augment(rows, draws)

        return AugmentedBatch.of(images, index, augmented, dtype, tracked=tracked)

    def targets(self, labels: Tensor, dtype: torch.dtype) -> Callable[[int], Tensor]:
        """Return the function from a step to its targets out of `labels`, in the dtypes that losses expect.

        Class indices, some bytes a sample, are looked up for all steps at once. Soft labels take the memory of a step's logits.
        """
        if labels.is_floating_point():
            return lambda n: labels[self.batches[n]].to(dtype)
        every = labels[torch.cat(self.batches)].long().split([len(index) for index in self.batches])
        return lambda n: every[n]


def path_of(
    steps: StudentSteps, theta: Tensor, images: Tensor, labels: Tensor, lr: Tensor, velocity: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the path of `unroll` and the velocity (P,) after it, if there is one, for steps that fit the tensors.

    Unless the `steps` compare, no tensor is read on the host, so on a GPU nothing waits for the device, and both sweeps can be
    recorded (mtt_fast/runtime/cuda_graphs.py).
    """
    with without_autocast(theta.device):
        path, after, *rows = _Unroll.apply(steps, theta, velocity, images, labels, lr)
    return StudentPath.of(path, rows, theta.device), after


def _backward_sweep(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make `function` an autograd function's `backward` that can be differentiated no further and ignores the caller's autocast."""

    @functools.wraps(function)
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        check_differentiated_once()
        check_one_gradient(gradients)
        with without_autocast(ctx.device):
            return function(ctx, *gradients)

    return backward


class _Unroll(torch.autograd.Function):
    """One node in the user's graph for all N steps."""

    @staticmethod
    def forward(
        ctx: Any,
        steps: StudentSteps,
        theta: Tensor,
        velocity: Tensor | None,
        images: Tensor,
        labels: Tensor,
        lr: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Return the path (N + 1, P), the last velocity (P,), and the rows, each an output (and a gradient) of its own."""
        count = len(steps.batches)
        rates = _rates(lr, count, theta)
        path = Rows.empty(count + 1, theta, on_host=steps.path_on_host)
        path.near(0).copy_(theta)
        path.save(0)
        # with momentum the update is no longer a function of one step, so the velocities are kept as well
        velocities = Rows.empty(count, theta, on_host=steps.path_on_host) if steps.has_velocity else None
        before = None if velocity is None else velocity.detach().contiguous()
        saved, targets, seen = {}, steps.targets(labels, theta.dtype), []
        for n in range(count):
            inputs = steps.batch(images, n, theta.dtype).inputs
            save = n >= count - steps.saved_steps
            loss, sums, activations = steps.student.gradient(path.near(n), inputs, targets(n), save=save)
            if steps.compares:
                seen.append(_marks(inputs, loss))
            if activations:
                saved[n] = activations
            after = None if velocities is None else velocities.near(n)
            kernels.sgd_step(
                path.near(n),
                sums,
                rates[n],
                out=path.near(n + 1),
                velocity=before,
                velocity_out=after,
                momentum=steps.momentum,
                weight_decay=steps.weight_decay,
            )
            path.save(n + 1)
            if velocities is not None:
                velocities.save(n)
            before = after
        if steps.path_on_host and theta.is_cuda:  # a reader of the rows in host memory must find them written
            torch.cuda.current_stream(theta.device).synchronize()
        ctx.steps, ctx.saved, ctx.seen, ctx.device = steps, saved, seen, theta.device
        ctx.save_for_backward(images, labels, lr, path.stored, None if velocities is None else velocities.stored)
        ctx.set_materialize_grads(False)
        # a copy, so that a caller who keeps it keeps neither the other velocities nor this backward sweep's tensors
        return path.stored, None if after is None else after.clone(), *path.stored.unbind()

    @staticmethod
    @_backward_sweep
    def backward(
        ctx: Any, grad_path: Tensor | None, grad_velocity: Tensor | None, *grad_rows: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        steps: StudentSteps = ctx.steps
        # read once: under torch.autograd.graph's hooks each access copies, and torch.utils.checkpoint allows only one
        *tensors, stored = ctx.saved_tensors
        images, labels, lr, rows = (tensor.detach() for tensor in tensors)
        path = Rows(rows, lr.device, on_host=steps.path_on_host)
        velocities = None if stored is None else Rows(stored, lr.device, on_host=steps.path_on_host)
        _, _, wants_velocity, wants_images, wants_labels, _ = ctx.needs_input_grad
        start = path.near(0)
        rates = _rates(lr, len(steps.batches), start)
        # the factors with which a step's gradients enter the loss's: −α, since the direction below is λ; with momentum 1
        sizes = -rates if velocities is None else torch.ones_like(rates)
        negated_sizes, targets = -sizes, steps.targets(labels, start.dtype)
        grad_images, grad_labels = (
            torch.zeros_like(each, memory_format=torch.contiguous_format) if wanted else None
            for each, wanted in ((images, wants_images), (labels, wants_labels))
        )
        slopes: list[Tensor] = []  # the losses' derivatives by −α_n, from the last step on
        again: list[list[Tensor]] = []  # the marks of the steps, from the last one on

        def incoming(n: int) -> Tensor | None:
            """Return the loss's own gradient to row n, both as a row of the path and as a row by itself, or None."""
            from_path, from_row = None if grad_path is None else grad_path[n], grad_rows[n]
            parts = [part.to(lr.device).contiguous() for part in (from_path, from_row) if part is not None]
            return parts[0] + parts[1] if len(parts) == 2 else next(iter(parts), None)

        # after the last row that the loss depends on every adjoint is zero, and a step contributes nothing
        needs_all = grad_path is not None or grad_velocity is not None
        last = max((n for n, grad_row in enumerate(grad_rows) if needs_all or grad_row is not None), default=0)
        for n in range(last, len(steps.batches)):
            ctx.saved.pop(n, None)
        adjoint = torch.zeros_like(start)  # λ_{n+1}, of the parameters
        if (gradient_to_last := incoming(last)) is not None:
            adjoint.copy_(gradient_to_last)
        velocity_adjoint = None if velocities is None else torch.zeros_like(adjoint)  # π_{n+1}, then ν
        if velocity_adjoint is not None and grad_velocity is not None:
            velocity_adjoint.copy_(grad_velocity)
        for n in reversed(range(last)):
            # the loss depends on g_n through ν·g_n. Without momentum ν = −α λ, and λ itself is used as the
            # direction: it stays defined at α = 0 and gives λ·g_n, which dα needs, for nothing
            direction = adjoint
            if velocity_adjoint is not None:
                direction = velocity_adjoint.addcmul_(adjoint, rates[n], value=-1)
            batch, theta = steps.batch(images, n, adjoint.dtype, tracked=wants_images), path.load(n)
            # saved activations are used up: a second backward through the same graph computes them again
            saved = ctx.saved.pop(n, None)
            tangent = steps.student.gradient_jvp(theta, batch.inputs, targets(n), direction, saved)
            if steps.compares:
                again.append(_marks(batch.inputs, tangent.loss))

            if velocities is None:
                slope = tangent.v_dot_g
                if steps.weight_decay:
                    slope = slope + steps.weight_decay * torch.dot(direction, theta)
            else:
                slope = torch.dot(adjoint, velocities.load(n))
            slopes.append(slope)
            of_batch = None
            if grad_images is not None:
                if isinstance(batch, Batch):
                    of_batch = batch.gradient_to_add(grad_images, tangent.images)
                else:
                    batch.add_gradient(grad_images, tangent.images, sizes[n])
            if grad_labels is not None and tangent.labels is not None:
                to_targets = (negated_sizes[n] * tangent.labels).to(labels.dtype)
                kernels.index_add(grad_labels, steps.batches[n], to_targets, alpha=-1)
            kernels.adjoint_step(
                adjoint,
                tangent.sums if steps.gradient == "exact" else PartialSums((adjoint.new_empty(0, len(adjoint)),)),
                direction,
                sizes[n],
                out=adjoint,
                incoming=incoming(n),
                weight_decay=steps.weight_decay,
                batch=of_batch,
            )
            if velocity_adjoint is not None:
                velocity_adjoint.mul_(steps.momentum)  # π_n
            del batch, tangent, of_batch

        def forward_marks(n: int) -> Tensor:
            """Return the marks (k,) that the forward sweep's operations find for step n and the images of this sweep."""
            inputs = steps.batch(images, n, start.dtype, tracked=wants_images).inputs
            loss = steps.student.gradient(path.load(n), inputs, targets(n)).loss
            return _numbers([_marks(inputs, loss)])[0, :compared]

        if compared := len(again[0]) if again else 0:  # a fused student has no second loss
            check_repeated(_numbers(ctx.seen[:last])[:, :compared], _numbers(again[::-1]), forward_marks)
        grad_rates = torch.zeros_like(rates)
        if slopes:
            grad_rates[:last] = -torch.stack(slopes[::-1])
        grad_lr = grad_rates if lr.numel() > 1 else grad_rates.sum().view(lr.shape)  # autograd casts it
        return None, adjoint, velocity_adjoint if wants_velocity else None, grad_images, grad_labels, grad_lr


def _marks(inputs: Inputs, loss: Tensor | None) -> list[Tensor]:
    """Return numbers () that show whether a caller's own augmentation, network or loss has changed between the sweeps."""
    of_images = [] if isinstance(inputs, Batch) else [torch.linalg.vector_norm(inputs)]
    return of_images if loss is None else [*of_images, loss]


def _numbers(marks: list[list[Tensor]]) -> Tensor:
    """Return the marks of N steps (N, k)."""
    return torch.stack([mark.double() for of_step in marks for mark in of_step]).view(len(marks), -1)


def _rates(lr: Tensor, steps: int, like: Tensor) -> Tensor:
    """Return one learning rate a step (N,), in the dtype and on the device of the parameters."""
    return lr.detach().to(like).expand(steps)
