"""N student steps, and the exact meta-gradient through all of them in the memory of one.

The forward sweep keeps only the parameters θ_0 … θ_N. The backward sweep walks the steps in reverse with the adjoint λ of the
parameters: a step's contribution is one directional derivative of its ordinary gradient (docs/adjoint.md).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.augmentation.protocol import Augment, footprint_of, warp_of
from mtt_fast.engine import arguments
from mtt_fast.engine.batch import AugmentedBatch, Batch
from mtt_fast.engine.memory_plan import Plan, Work, plan_for
from mtt_fast.engine.rows import Rows
from mtt_fast.engine.student import GenericStudent, Loss, Student, in_microbatches
from mtt_fast.engine.student_choice import student_for
from mtt_fast.engine.trials import few_of, try_augmentation, try_step
from mtt_fast.errors import InputError
from mtt_fast.kernels import LabelKind, PartialSums, Precision
from mtt_fast.networks.protocol import Network

Gradient = Literal["exact", "truncated"]
"""The gradient is exact, or leaves out the steps' Hessians as TESLA does, an approximation (docs/adjoint.md)."""


@overload
def unroll(
    net: Network, theta: Tensor, images: Tensor, labels: Tensor, lr: Tensor | float, batches: Tensor | Sequence[Tensor],
    augment: Augment | None = None, microbatch: int | None = None, memory_budget: int | str | None = None,
    momentum: float = 0.0, weight_decay: float = 0.0, *, velocity: Tensor | None = None,
    return_velocity: Literal[False] = False, plan: Plan | None = None, label_kind: LabelKind | None = None,
    loss: Loss | None = None, generator: torch.Generator | None = None, draws: Sequence[Any] | None = None,
    precision: Precision = "fp32", gradient: Gradient = "exact",
) -> Tensor: ...  # fmt: skip


@overload
def unroll(
    net: Network, theta: Tensor, images: Tensor, labels: Tensor, lr: Tensor | float, batches: Tensor | Sequence[Tensor],
    augment: Augment | None = None, microbatch: int | None = None, memory_budget: int | str | None = None,
    momentum: float = 0.0, weight_decay: float = 0.0, *, velocity: Tensor | None = None,
    return_velocity: Literal[True], plan: Plan | None = None, label_kind: LabelKind | None = None,
    loss: Loss | None = None, generator: torch.Generator | None = None, draws: Sequence[Any] | None = None,
    precision: Precision = "fp32", gradient: Gradient = "exact",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def unroll(
    net: Network,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor | float,
    batches: Tensor | Sequence[Tensor],
    augment: Augment | None = None,
    microbatch: int | None = None,
    memory_budget: int | str | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    *,
    velocity: Tensor | None = None,
    return_velocity: bool = False,
    plan: Plan | None = None,
    label_kind: LabelKind | None = None,
    loss: Loss | None = None,
    generator: torch.Generator | None = None,
    draws: Sequence[Any] | None = None,
    precision: Precision = "fp32",
    gradient: Gradient = "exact",
) -> Tensor | tuple[Tensor, Tensor]:
    """Train a student for N steps of SGD on synthetic images; return its path θ_0 … θ_N, shape (N + 1, P).

    With `return_velocity` return the path and the velocity (P,) after the last step. A further `unroll` whose `theta` and
    `velocity` are row N and this velocity goes on as if both were one.

    Any function of any rows of the path and of that velocity can be differentiated, with exact gradients to `theta`,
    `velocity`, `images`, floating `labels` and `lr` through all N steps (the paper's algorithm 1, lines 8 to 12). The
    graph kept is the path itself: peak memory is that of one step of one micro-batch, whatever N. The path is
    differentiable once: a backward pass with create_graph=True is refused. Within `torch.autocast` the result is the
    same as without, and within `torch.no_grad` path and velocity alone are kept.

    The path lies on the device of `theta`, unless the plan puts it in host memory (on a GPU, if it takes a large part
    of the budget): then a single row `path[n]` is brought to the device on access.

    Args:
        net: the student's network, `net(theta, images) -> logits`.
        theta: initial parameters (P,), float32 or float64; all arithmetic is in this dtype.
        images: all synthetic images (n, C, H, W); for a `FlatModule`, any (n, …) that the module takes.
        labels: class indices (n,), or soft labels (n, classes).
        lr: learning rate, a scalar (tensor), or one a step (N,). A number is checked, at least 0; a tensor, which may be learned
            and lie on a GPU, is taken as it is.
        batches: indices into `images`, (N, b), or N index vectors of any lengths; an index may come again. They are copied.
        augment: `SiameseAugment`, `Augmentation`, `KorniaAugment`, or any object with their two methods. Its random numbers
            are drawn here, once a step in order, and used again by the backward sweep.
        microbatch: at most so many samples at once; exact for networks that do not mix samples.
        memory_budget: peak of the unroll's own memory, for which the steps are planned: bytes, "6GiB", or "auto" for most of
            the free memory. Without it batches are whole, and nothing is saved that can be computed again.
        momentum: SGD momentum (as torch.optim.SGD); keeps N more vectors of P.
        weight_decay: SGD weight decay (as torch.optim.SGD).
        velocity: momentum buffer (P,) before the first step, of `theta`'s dtype; without it zero, as in a new optimiser.
        return_velocity: return the momentum buffer (P,) after the last step as well, on the device of `theta`.
        plan: in place of `microbatch` and `memory_budget`: the plan of `mtt_fast.plan` for these steps.
        label_kind: of soft labels, "probabilities" (the default) or "logits"; "indices" for integers.
        loss: in place of cross-entropy, from logits (b, classes) and the labels; a mean over the samples, so that
            micro-batches add up to it.
        generator: source of the augmentation's random numbers.
        draws: those numbers themselves, one a step, made beforehand by `augment.draw`.
        precision: of the factors of float32 convolutions in ConvNet's fused step, "fp32", "tf32", "fp16" or "bf16"; sums
            are float32. With "fp16" a number beyond 65,504 makes results that are not finite. Any other network takes torch's own settings.
        gradient: "exact", or "truncated", an approximation: each g_n is taken for a constant in θ_n, so that every
            Hessian term is left out. With a loss of θ_N and plain SGD that is TESLA's gradient, λ_N for every λ_n,
            at the cost of the exact one. Momentum, weight decay and losses of other rows stay exact.

    Raises:
        InputError: shapes, dtypes, indices or options that do not fit each other; `torch.inference_mode`, `torch.func`, `torch.compile`. A network, a loss or
            an augmentation of the caller's own is tried on a few samples first (on a whole batch if the network mixes samples), and
            refused if it does not repeat itself or if its samples do not add up where batches are cut.
    """
    arguments.check_context()
    arguments.check_types(theta, images, labels, augment)
    arguments.check_number("momentum", momentum)
    arguments.check_number("weight_decay", weight_decay)
    student = student_for(net, theta.device, arguments.kind_of(labels, label_kind), loss, precision)
    indices = arguments.checked_batches(batches, images)
    lr = arguments.rates_of(lr, theta)
    arguments.check_tensors(theta, images, labels, lr, len(indices), net)
    arguments.check_velocity(velocity, theta)
    if gradient not in ("exact", "truncated"):
        raise InputError(f"unroll gradient: expected 'exact' or 'truncated', found '{gradient}'")
    if [microbatch, memory_budget, plan].count(None) < 2:
        raise InputError("unroll: expected one of `microbatch`, `memory_budget` and `plan`, found several; give one")
    has_velocity = momentum != 0 or velocity is not None or return_velocity
    largest, steps = max(len(index) for index in indices), len(indices)
    if draws is None:
        draws = [augment.draw(images.detach()[index], generator) if augment else None for index in indices]
    elif augment is None or len(draws) != len(indices):
        raise InputError(
            f"unroll draws: expected those of an augmentation for each of {len(indices)} steps, found {len(draws)}"
            + (" and no augment" if augment is None else "")
        )
    shape, few = images.shape[1:], few_of(net, len(indices[0]))
    is_warp = warp_of(augment, draws[0], torch.Size((len(indices[0]), *shape))) is not None
    tried: Tensor | None = None
    if not (augment is None or is_warp or theta.is_meta):
        tried = try_augmentation(augment, images.detach()[indices[0]], draws[0], few)
    if plan is None:
        work = Work(
            student=student,
            num_parameters=net.num_parameters,
            mixes_samples=net.mixes_samples,
            images=images.shape,
            input_shape=shape if tried is None else tried.shape[1:],
            batch=largest,
            steps=steps,
            dtype=theta.dtype,
            device=theta.device,
            momentum=has_velocity,
            augment=augment is not None,
            augment_bytes=footprint_of(augment, shape, images.dtype).extra_bytes,
        )
        plan = plan_for(work, memory_budget, microbatch, "give fewer or smaller `batches`")
    planned = student_for_plan(student, net, plan, largest)
    if isinstance(student, GenericStudent) and not theta.is_meta:
        if tried is None:
            tried = images.detach()[indices[0][few]]
        labels_of_tried, is_cut = labels.detach()[indices[0][few]], planned is not student
        _try_in_dtype(student, theta, tried, labels_of_tried, is_cut=is_cut, wants_images=images.requires_grad)
    del tried  # the plan has no memory for it
    student_steps = StudentSteps(
        student=planned,
        batches=indices,
        saved_from=max(0, steps - plan.saved_steps),
        path_on_host=plan.path_on_host,
        augment=augment,
        draws=tuple(draws),
        momentum=momentum,
        weight_decay=weight_decay,
        gradient=gradient,
        has_velocity=has_velocity,
    )
    path, after = path_of(student_steps, theta, images, labels, lr, velocity)
    return (path, after) if return_velocity and after is not None else path


def _try_in_dtype(
    student: GenericStudent, theta: Tensor, inputs: Tensor, labels: Tensor, *, is_cut: bool, wants_images: bool
) -> None:
    """Try a step on `inputs` and `labels` in the dtypes that the sweeps give them (mtt_fast/engine/trials.py)."""
    targets = labels.to(theta.dtype) if labels.is_floating_point() else labels.long()
    wants_images = wants_images and torch.is_grad_enabled()
    with _without_autocast(theta.device):
        try_step(student, theta, inputs.to(theta.dtype), targets, is_cut=is_cut, wants_images=wants_images)


def student_for_plan(student: Student, net: Network, plan: Plan, batch: int) -> Student:
    """Return `student`, cutting batches of at most `batch` images if the plan says so.

    Raises `InputError` if the samples of `net` depend on each other.
    """
    return in_microbatches(student, net, plan.microbatch) if plan.microbatch < batch else student


def path_of(
    steps: StudentSteps, theta: Tensor, images: Tensor, labels: Tensor, lr: Tensor, velocity: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the path of `unroll` and the velocity (P,) after it, if there is one, for steps that fit the tensors.

    No tensor is asked for its values, so on a GPU nothing waits for the device, and both sweeps can be recorded
    (mtt_fast/runtime/cuda_graphs.py).
    """
    with _without_autocast(theta.device):
        path, after, *rows = _Unroll.apply(steps, theta, velocity, images, labels, lr)
    path = path.as_subclass(_Path)
    path.rows, path.home = tuple(rows), theta.device
    return path, after


class _Path(Tensor):
    """A path whose single rows remember that they are rows, and come to the device where the student was trained.

    The gradient of an ordinary `path[-1]` is as large as the path, and all zeros but for one row.
    """

    rows: tuple[Tensor, ...]
    home: torch.device
    # results computed from a path are ordinary tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Tensor:
        return self.rows[index].to(self.home) if isinstance(index, int) else super().__getitem__(index)

    def __reduce_ex__(self, protocol: Any) -> Any:  # a file of a path is a file of an ordinary tensor
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)


@dataclass(frozen=True)
class StudentSteps:
    """The arguments of both sweeps besides the tensors that are differentiated."""

    student: Student
    batches: tuple[Tensor, ...]
    saved_from: int  # the first step whose activations are saved
    path_on_host: bool
    augment: Callable[[Tensor, Any], Tensor] | None
    draws: tuple[Any, ...]
    momentum: float = 0.0
    weight_decay: float = 0.0
    gradient: Gradient = "exact"
    has_velocity: bool = False  # always true with momentum

    def batch(self, images: Tensor, n: int, dtype: torch.dtype, *, tracked: bool = False) -> Batch | AugmentedBatch:
        """Return the inputs of step n, of `dtype`, out of all `images`; `tracked` where their gradient will be asked for.

        The student gathers them itself, unless an augmentation is none that it knows or the dtype is another.
        """
        index, draws, augment = self.batches[n], self.draws[n], self.augment
        warp = warp_of(augment, draws, torch.Size((len(index), *images.shape[1:])))
        as_pictures = images.dim() == 4 and images.dtype == dtype and images.is_contiguous()
        if (augment is None or warp is not None) and as_pictures:
            if warp is not None:
                warp = warp.to(images.device, torch.float64 if dtype == torch.float64 else torch.float32)
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


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Compute in the dtype of the parameters, whatever the caller has chosen for networks of their own."""
    available = torch.amp.is_autocast_available(device.type)  # not on the meta device
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def _backward_sweep(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` as an autograd function's `backward`, once: its results would be constants to a second derivative."""

    @functools.wraps(function)
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise InputError(
                "unroll: differentiable once, found a backward pass with create_graph=True; leave create_graph out, or "
                "record the steps with torch.autograd.grad(…, create_graph=True) yourself"
            )
        with _without_autocast(ctx.device):
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
        saved, targets = {}, steps.targets(labels, theta.dtype)
        for n in range(count):
            inputs = steps.batch(images, n, theta.dtype).inputs
            save = n >= steps.saved_from
            _, sums, activations = steps.student.gradient(path.near(n), inputs, targets(n), save=save)
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
        ctx.steps, ctx.saved, ctx.device = steps, saved, theta.device
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
        # asked for once: with torch.autograd.graph's hooks each access is a copy, and torch.utils.checkpoint allows one alone
        *tensors, stored = ctx.saved_tensors
        images, labels, lr, rows = (tensor.detach() for tensor in tensors)
        path = Rows(rows, lr.device, on_host=steps.path_on_host)
        velocities = None if stored is None else Rows(stored, lr.device, on_host=steps.path_on_host)
        _, _, wants_velocity, wants_images, wants_labels, _ = ctx.needs_input_grad
        start = path.near(0)
        rates = _rates(lr, len(steps.batches), start)
        # of a step's gradients in what they add to the loss's: −α, as the direction below is λ; with momentum 1
        sizes = -rates if velocities is None else torch.ones_like(rates)
        negated_sizes, targets = -sizes, steps.targets(labels, start.dtype)
        grad_images, grad_labels = (
            torch.zeros_like(each, memory_format=torch.contiguous_format) if wanted else None
            for each, wanted in ((images, wants_images), (labels, wants_labels))
        )
        slopes: list[Tensor] = []  # the losses' derivatives by −α_n, from the last step on

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

            if velocities is None:
                slope = tangent.v_dot_g
                if steps.weight_decay:
                    slope = slope + steps.weight_decay * torch.dot(direction, theta)
            else:
                slope = torch.dot(adjoint, velocities.load(n))
            slopes.append(slope)
            of_batch = None
            if grad_images is not None:
                of_batch = batch.add_gradient(grad_images, tangent.images, sizes[n])
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

        grad_rates = torch.zeros_like(rates)
        if slopes:
            grad_rates[:last] = -torch.stack(slopes[::-1])
        grad_lr = (grad_rates if lr.numel() > 1 else grad_rates.sum().view(lr.shape)).to(lr.dtype)
        return None, adjoint, velocity_adjoint if wants_velocity else None, grad_images, grad_labels, grad_lr


def _rates(lr: Tensor, steps: int, like: Tensor) -> Tensor:
    """Return one learning rate a step (N,), in the dtype and on the device of the parameters."""
    return lr.detach().to(like).expand(steps)
