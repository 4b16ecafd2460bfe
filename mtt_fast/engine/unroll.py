"""N student steps, and the exact meta-gradient through all of them in the memory of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args, overload

import torch
import torch.distributed as dist
from torch import Tensor

from mtt_fast.augmentation.protocol import Augment, footprint_of
from mtt_fast.checks import check_generator, check_number
from mtt_fast.engine import arguments
from mtt_fast.engine.agreement import check_agreement, checked_group
from mtt_fast.engine.mean_loss import watched_student
from mtt_fast.engine.memory_plan import CANNOT_CUT, Plan, Work, plan_for
from mtt_fast.engine.optimizers import Adam, Optimizer, StudentSgd
from mtt_fast.engine.students.choice import student_for
from mtt_fast.engine.students.generic import GenericStudent
from mtt_fast.engine.students.live_bytes import output_bytes
from mtt_fast.engine.students.processes import InProcesses
from mtt_fast.engine.students.protocol import Loss, Student
from mtt_fast.engine.sweeps import Gradient, StudentSteps, path_of
from mtt_fast.engine.trials import try_augmentation, try_step
from mtt_fast.errors import InputError
from mtt_fast.kernels import LabelKind, Precision
from mtt_fast.networks.protocol import Network
from mtt_fast.runtime.cuda_graphs import is_capturing
from mtt_fast.runtime.numerics import without_saved_tensor_hooks


@overload
def unroll(
    net: Network, theta: Tensor, images: Tensor, labels: Tensor, lr: Tensor | float, batches: Tensor | Sequence[Tensor],
    augment: Augment | None = None, microbatch: int | None = None, memory_budget: int | str | None = None,
    momentum: float = 0.0, weight_decay: float = 0.0, *, velocity: Tensor | None = None,
    return_velocity: Literal[False] = False, optimizer: Adam | None = None, plan: Plan | None = None,
    label_kind: LabelKind | None = None, loss: Loss | None = None, generator: torch.Generator | None = None, draws: Sequence[Any] | None = None,
    precision: Precision = "fp32", gradient: Gradient = "exact", group: dist.ProcessGroup | None = None,
) -> Tensor: ...  # fmt: skip


@overload
def unroll(
    net: Network, theta: Tensor, images: Tensor, labels: Tensor, lr: Tensor | float, batches: Tensor | Sequence[Tensor],
    augment: Augment | None = None, microbatch: int | None = None, memory_budget: int | str | None = None,
    momentum: float = 0.0, weight_decay: float = 0.0, *, velocity: Tensor | None = None,
    return_velocity: Literal[True], optimizer: Adam | None = None, plan: Plan | None = None,
    label_kind: LabelKind | None = None, loss: Loss | None = None, generator: torch.Generator | None = None, draws: Sequence[Any] | None = None,
    precision: Precision = "fp32", gradient: Gradient = "exact", group: dist.ProcessGroup | None = None,
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
    optimizer: Adam | None = None,
    plan: Plan | None = None,
    label_kind: LabelKind | None = None,
    loss: Loss | None = None,
    generator: torch.Generator | None = None,
    draws: Sequence[Any] | None = None,
    precision: Precision = "fp32",
    gradient: Gradient = "exact",
    group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Train a student for N steps of SGD, or of Adam, on synthetic images; return its path θ_0 … θ_N, shape (N + 1, P).

    With `return_velocity`, also return the velocity (P,) after the last step, or Adam's two moments (2, P). Another `unroll` that
    starts from `path[-1]` and this velocity continues the same training.

    Any function of the path and of the velocity can be differentiated with respect to `theta`, `velocity`, `images`, floating
    `labels` and `lr`. The gradients through all N steps are exact (the paper's algorithm 1, lines 8 to 12). The backward pass needs
    only the path, so peak memory is the path and one step on one micro-batch. The path is differentiable once: a backward pass with
    create_graph=True is refused. `torch.autocast` does not change the result.

    The path is on the device of `theta`, unless the plan puts it in host memory (on a GPU, if it takes a large part of the
    budget). `path[n]` then copies the row to the device.

    All rows are outputs of one autograd node. A hook or `retain_grad` on `path[n]` therefore sees only the direct gradient of the
    loss with respect to θ_n, without what flows back through later steps.

    Rows are views of the path. Use `path[n].clone()` for a row that outlives the iteration, is saved by `torch.save`, or is
    modified in place (as when a module that got it from `vector_to_parameters` is trained). safetensors needs
    `path.contiguous()`. The backward pass raises an error if the path, images, labels or rates were modified in place since the
    call; writes through `.data` and by such a module are detected only on a CPU.

    Args:
        net: the student's network, `net(theta, images) -> logits`.
        theta: initial parameters (P,), float32 or float64; all arithmetic is in this dtype.
        images: all synthetic images (n, C, H, W); for a `FlatModule`, any shape (n, …) that the module takes.
        labels: class indices (n,), or soft labels (n, classes); with a `loss`, any shape (n, …).
        lr: learning rate: a number or tensor (), one for each step (N,), or one for each step and parameter (N, P);
            `lrs.expand(N, -1)` uses rates (P,) in all steps. (N, P) keeps N + 1 more vectors (P,), and N more if `lr` requires a
            gradient. A number must be at least 0; the values of a tensor are not checked.
        batches: indices into `images`, (N, b), or N index vectors of any lengths; an index may repeat. They are copied.
        augment: `SiameseAugment`, `Augmentation`, `KorniaAugment`, or any object with their methods `draw` and `__call__`. Its
            random numbers are drawn here, once for each step in order, and used again by the backward sweep.
        microbatch: largest number of samples in memory at once; exact for networks that do not mix samples.
        memory_budget: limit on the peak of the unroll's own memory: bytes, "6GiB", or "auto" for most of the free memory. Batches
            are cut to fit, and activations are saved where there is room. By default batches are whole, and no activations are
            saved. For a loss of `path` itself or of more than three rows, give a `plan` made with `path_gradient=True`.
        momentum: SGD momentum (as torch.optim.SGD); keeps N + 1 more vectors (P,).
        weight_decay: SGD weight decay (as torch.optim.SGD).
        velocity: momentum buffer (P,) before the first step, of `theta`'s dtype; by default zero, as in a new optimizer. With
            `Adam` its moments (2, P).
        return_velocity: return the momentum buffer (P,), or Adam's moments (2, P), after the last step as well, on the device of
            `theta`.
        optimizer: `mtt_fast.Adam(…)`, in place of SGD with `momentum` and `weight_decay`; keeps 2 (N + 1) more vectors (P,).
        plan: the result of `mtt_fast.plan` for these steps, in place of `microbatch` and `memory_budget`. If the steps exceed its
            budget, a new plan is made.
        label_kind: for soft labels "probabilities" (the default) or "logits"; for integers "indices".
        loss: a function of the network's output and the labels of a step, in place of cross-entropy. It gets the labels
            unchanged, whatever `label_kind` says, except that floating labels are cast to the dtype of `theta`. Gradients flow to
            all columns of floating labels, such as a teacher's logits or a temperature. The loss may compare the samples of a
            batch, as a contrastive loss does. If batches are cut and the loss is not a mean over the samples, the network gets
            the pieces and the loss the outputs of the whole batch; a step then costs 17 forward passes in place of 12. The memory
            of such a loss itself is estimated from the size of the outputs.
        generator: source of the augmentation's random numbers. Within torch.utils.checkpoint, which repeats the call without
            restoring this generator, give `draws` instead.
        draws: the random numbers themselves: for each step a value that `augment.draw` returned. Tensors in them are copied.
        precision: "fp32", "tf32", "fp16" or "bf16": the precision to which ConvNet's fused step rounds the factors of float32
            convolutions; sums are float32. With "fp16", values above 65,504 overflow, and the results are not finite. Other
            networks follow torch's own settings, and so does a ConvNet whose batches are cut for a loss that is not a mean.
        gradient: "exact", or "truncated", an approximation that treats each step's gradient as independent of θ_n, and so drops
            every Hessian term. For plain SGD and a loss of θ_N alone it is TESLA's gradient. It costs as much as the exact
            gradient. The terms of momentum, weight decay and losses of earlier steps stay exact.
        group: a process group of torch.distributed, such as `torch.distributed.group.WORLD`, whose processes share the samples of
            each step. All make the same call with the same arguments, then the same backward pass. The results are those of one
            process up to rounding, and the same in all processes, bit for bit. The network must not mix samples, and the loss
            must be a mean over them. Each call compares checksums of the arguments, but not network and loss, and each backward
            pass compares its incoming gradients. Both synchronise with the GPU. If one process fails, the others wait until
            torch.distributed or torchrun ends them.

    Raises:
        InputError: shapes, dtypes, indices or options do not fit each other, or the call is within `torch.inference_mode`,
            `torch.func`, `torch.jit.trace` or `torch.compile`. A user's network, loss or augmentation is first tried on a few
            samples (on a whole batch if the network mixes samples). It is refused if a second call gives different results, if a
            batch is cut and the network mixes its samples, if its backward pass clips gradients, or if it reads a tensor that
            requires a gradient and is not an argument, since no gradient would flow to that tensor. Arguments that differ between
            the processes of a `group` are refused in all of them, and so are losses of the path.
    """
    options = StepOptions(
        augment=augment, microbatch=microbatch, memory_budget=memory_budget, plan=plan, momentum=momentum,
        weight_decay=weight_decay, optimizer=optimizer, label_kind=label_kind, loss=loss, precision=precision,
        gradient=gradient, group=checked_group(group),
    )  # fmt: skip
    steps = checked_steps(net, options, theta, images, labels, lr, batches)
    student_optimizer = optimizer_of(options, steps.lr, has_velocity=velocity is not None or return_velocity)
    arguments.check_velocity(velocity, theta, optimizer)
    check_generator(generator)
    draws = arguments.draws_of(draws, augment, images, steps.batches, generator)
    if options.group is not None:
        check_agreement(
            options.group, steps.theta, images=steps.images, labels=steps.labels, lr=steps.lr, batches=steps.batches,
            draws=draws, momentum=momentum, weight_decay=weight_decay, optimizer=repr(optimizer), velocity=velocity,
            return_velocity=return_velocity, label_kind=label_kind, precision=precision, gradient=gradient,
        )  # fmt: skip
    plan = checked_plan(net, options, steps, draws[0], moments=student_optimizer.moments)
    _, path, after = planned_path(plan, net, options, steps, student_optimizer, draws, velocity)
    return (path, after) if return_velocity and after is not None else path


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The arguments of `unroll` that say how steps are computed."""

    augment: Augment | None = None
    microbatch: int | None = None
    memory_budget: int | str | None = None
    plan: Plan | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    optimizer: Adam | None = None
    label_kind: LabelKind | None = None
    loss: Loss | None = None
    precision: Precision = "fp32"
    gradient: Gradient = "exact"
    group: dist.ProcessGroup | None = None  # of several processes

    def __post_init__(self) -> None:
        """Raise `InputError` for options that are wrong by themselves or do not fit each other."""
        arguments.check_augment(self.augment)
        for name in ("momentum", "weight_decay"):
            check_number(name, getattr(self, name))
        arguments.check_optimizer(self.optimizer, self.momentum, self.weight_decay)
        if self.gradient not in get_args(Gradient):
            raise InputError(f"`gradient`: expected 'exact' or 'truncated', found '{self.gradient}'")
        sizes = [f"`{name}`" for name in ("microbatch", "memory_budget", "plan") if getattr(self, name) is not None]
        if len(sizes) > 1:
            raise InputError(f"{', '.join(sizes)}: expected one of these, found {len(sizes)}; give one")


class CheckedSteps(NamedTuple):
    """The checked tensors of `unroll`, and the student that computes its steps."""

    student: Student
    theta: Tensor  # (P,)
    images: Tensor  # (n, C, H, W)
    labels: Tensor  # (n,) or (n, classes), or what the caller's loss takes
    lr: Tensor  # (), (1,), (N,) or (N, P)
    batches: tuple[Tensor, ...]  # N times (b,) int64


def optimizer_of(options: StepOptions, lr: Tensor, *, has_velocity: bool = False) -> Optimizer:
    """Return the optimizer of `options`, which have been checked.

    SGD without momentum has a state if `has_velocity`, or if each parameter has a rate: the gradient of that rate is λ ∘ g, and g
    is in the state.
    """
    return options.optimizer or StudentSgd(options.momentum, options.weight_decay, has_velocity or lr.dim() == 2)


def checked_steps(
    net: Network,
    options: StepOptions,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor | float,
    batches: Tensor | Sequence[Tensor],
    *,
    theta_name: str = "theta",
) -> CheckedSteps:
    """Return the arguments of `unroll` as tensors, with the student for the steps of `options`.

    `theta_name` is the name that errors use for `theta`. Raises `InputError` for options and tensors that do not fit each other,
    and for a call where no gradient can be taken.
    """
    arguments.check_context()
    arguments.check_types(**{theta_name: theta}, images=images, labels=labels)
    indices = arguments.checked_batches(batches, images)
    kind = arguments.kind_of(labels, options.label_kind)
    student = student_for(net, theta.device, kind, options.loss, options.precision)
    has_loss = options.loss is not None
    arguments.check_student_tensors(theta, images, labels, net, has_loss=has_loss, theta_name=theta_name)
    lrs = arguments.checked_lr(lr, theta, len(indices))
    if not (has_loss or labels.is_floating_point()):
        labels = labels.long()  # indices of any integer dtype; the labels of a user's loss may mean anything
    theta, images, labels, lrs = map(arguments.saveable, (theta, images, labels, lrs))
    return CheckedSteps(student, theta, images, labels, lrs, indices)


@without_saved_tensor_hooks()
def checked_plan(
    net: Network,
    options: StepOptions,
    steps: CheckedSteps,
    draws: Any,
    *,
    moments: int,
    path_gradient: bool = False,
) -> Plan:
    """Return the plan of `steps`, after a trial of a user's network, loss and augmentation.

    `draws` are the first step's. `moments` is the number of vectors in the optimizer's state. `path_gradient` says whether the
    gradient of the loss with respect to the path is as large as the path. Raises `InputError` as `unroll` does.
    """
    student, theta, images, labels, lr, batches = steps
    augment, shape = options.augment, images.shape[1:]
    processes = 1 if options.group is None else options.group.size()
    if processes > 1 and net.mixes_samples:
        raise InputError(
            "`group`: the network's batch norm uses batch statistics, so sharing a batch would change the result; use instance "
            "norm, evaluation mode, or no `group`"
        )
    augmented = None if theta.is_meta else try_augmentation(net, augment, images, batches[0], draws)
    input_shape = shape if augmented is None else augmented.shape[1:]
    if not theta.is_meta or augment is None:  # on meta tensors an augmentation is not tried, and may change the shape
        arguments.check_image_shape(net, input_shape)
    work = Work(
        student=student,
        num_parameters=net.num_parameters,
        mixes_samples=net.mixes_samples,
        images=images.shape,
        input_shape=input_shape,
        batch=math.ceil(max(len(index) for index in batches) / processes),
        steps=len(batches),
        dtype=theta.dtype,
        device=theta.device,
        processes=processes,
        moments=moments,
        augment=augment is not None,
        augment_bytes=footprint_of(augment, shape, images.dtype).extra_bytes,
        path_gradient=path_gradient,
        lr_per_parameter=lr.dim() == 2,
    )
    plan = _plan_of(work, options)
    loss = student.loss if isinstance(student, GenericStudent) else options.loss
    if loss is None or theta.is_meta:  # the fused step with cross-entropy needs no trial
        return plan
    loss_is_mean = try_step(net, loss, theta, images, labels, batches, augmented, is_cut=plan.cut or processes > 1)
    return plan if loss_is_mean else plan_of_batch_loss(plan, net, options)


def planned_path(
    plan: Plan,
    net: Network,
    options: StepOptions,
    steps: CheckedSteps,
    optimizer: Optimizer,
    draws: Sequence[Any],
    velocity: Tensor | None = None,
) -> tuple[Plan, Tensor, Tensor | None]:
    """Return the plan that was used, the path of `steps`, and the optimizer's last state.

    The plan differs from `plan` if that assumes that the loss is a mean over the samples and a step shows that it is not.
    """
    theta, images, labels = steps.theta, steps.images, steps.labels
    checks = not (theta.is_meta or is_capturing(theta))
    student, watched = watched_student(
        _student_of(plan, options.group), options.loss if checks else None, [len(index) for index in steps.batches]
    )
    student_steps = StudentSteps(
        student=student,
        batches=steps.batches,
        saved_steps=plan.saved_steps if torch.is_grad_enabled() else 0,  # without a gradient there is no backward sweep
        path_on_host=plan.path_on_host,
        augment=options.augment,
        draws=tuple(draws),
        optimizer=optimizer,
        gradient=options.gradient,
        group=options.group,
        checks_repeat=checks,
    )
    path, after = path_of(student_steps, theta, images, labels, steps.lr, velocity)
    if watched is None or watched.adds_up(options.group):
        return plan, path, after
    del path, after  # free the memory before the second try
    return planned_path(plan_of_batch_loss(plan, net, options), net, options, steps, optimizer, draws, velocity)


def plan_of_batch_loss(plan: Plan, net: Network, options: StepOptions) -> Plan:
    """Return the plan that replaces `plan`, with the same budget, for a loss that is not a mean over the samples."""
    assert options.loss is not None
    if options.group is not None:
        raise InputError(
            "`loss`: expected a mean over the samples, since the processes of the `group` share each batch, found another, such as one "
            "of pairs or with class weights; leave `group` out"
        )
    # only the generic student can cut batches for such a loss; it may need more memory
    work = replace(plan.work, student=GenericStudent(net, options.loss), loss_is_mean=False)
    if plan.budget is not None:
        options = replace(options, plan=None, memory_budget=options.memory_budget or plan.budget)
        work = replace(work, output_bytes=output_bytes(net, work.batch, work.input_shape, work.dtype))
    return _plan_of(work, options)


def _student_of(plan: Plan, group: dist.ProcessGroup | None) -> Student:
    """Return the student that cuts batches as `plan` says, and shares them with the processes of `group`."""
    return plan.student if group is None else InProcesses(plan.work.student, plan.microbatch, group)


def _plan_of(work: Work, options: StepOptions) -> Plan:
    """Return the plan for `work` that `options` ask for. Raises `InputError` for a plan or a limit that does not fit."""
    if options.plan is None:
        return plan_for(work, options.memory_budget, options.microbatch, "give fewer or smaller `batches`")
    if not isinstance(options.plan, Plan):
        raise InputError(f"`plan`: expected what mtt_fast.plan returned, found {type(options.plan).__name__}")
    plan = replace(options.plan, work=replace(work, path_gradient=options.plan.work.path_gradient))
    if plan.budget is not None and plan.peak_bytes > plan.budget:  # it was made for smaller steps
        return plan_for(plan.work, plan.budget, None, "give fewer or smaller `batches`")
    if plan.microbatch < 1:
        raise InputError(f"`plan`: expected a `microbatch` of at least 1 in it, found {plan.microbatch}")
    if plan.cut and work.mixes_samples:
        raise InputError(CANNOT_CUT)
    return plan
