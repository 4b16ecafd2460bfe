"""N student steps, and the exact meta-gradient through all of them in the memory of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor

from mtt_fast.augmentation.protocol import Augment, footprint_of
from mtt_fast.engine import arguments
from mtt_fast.engine.memory_plan import Plan, Work, plan_for
from mtt_fast.engine.student import CANNOT_CUT, GenericStudent, Loss, Student
from mtt_fast.engine.student_choice import student_for
from mtt_fast.engine.sweeps import Gradient, StudentSteps, path_of
from mtt_fast.engine.trials import try_augmentation, try_step
from mtt_fast.errors import InputError
from mtt_fast.kernels import LabelKind, Precision
from mtt_fast.networks.protocol import Network


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

    With `return_velocity`, also return the velocity (P,) after the last step. Another `unroll` that starts from row N and this
    velocity continues as if the two were one.

    Any function of any rows of the path and of that velocity can be differentiated, with exact gradients to `theta`,
    `velocity`, `images`, floating `labels` and `lr` through all N steps (the paper's algorithm 1, lines 8 to 12). The
    graph kept is the path itself: peak memory is that of one step of one micro-batch, whatever N. The path is
    differentiable once: a backward pass with create_graph=True is refused. `torch.autocast` does not change the result, and
    under `torch.no_grad` only path and velocity are kept.

    The path lies on the device of `theta`, unless the plan puts it in host memory (on a GPU, if it takes a large part
    of the budget): then a single row `path[n]` is brought to the device on access.

    The rows are outputs of one operation: a hook or `retain_grad` on a row sees the gradient that the loss has by itself to this
    row, without what flows through the steps after it.

    Rows are views of the path. Of a row that outlives the iteration, is saved by `torch.save`, or is written into (as by training a
    module that has it from `vector_to_parameters`) take `path[n].clone()`; safetensors needs `path.contiguous()`.

    Args:
        net: the student's network, `net(theta, images) -> logits`.
        theta: initial parameters (P,), float32 or float64; all arithmetic is in this dtype.
        images: all synthetic images (n, C, H, W); for a `FlatModule`, any (n, …) that the module takes.
        labels: class indices (n,), or soft labels (n, classes).
        lr: learning rate, a scalar (tensor), or one for each step (N,). A number must be at least 0; the values of a tensor,
            which may be learned and on a GPU, are not checked.
        batches: indices into `images`, (N, b), or N index vectors of any lengths; an index may repeat. They are copied.
        augment: `SiameseAugment`, `Augmentation`, `KorniaAugment`, or any object with their two methods. Its random numbers
            are drawn here, once for each step in order, and used again by the backward sweep.
        microbatch: largest number of samples at once; exact for networks that do not mix samples.
        memory_budget: limit on the peak of the unroll's own memory, by which the steps are planned: bytes, "6GiB", or "auto"
            for most of the free memory. Without it batches are whole, and nothing is saved that can be computed again.
        momentum: SGD momentum (as torch.optim.SGD); keeps N more vectors of P.
        weight_decay: SGD weight decay (as torch.optim.SGD).
        velocity: momentum buffer (P,) before the first step, of `theta`'s dtype; without it zero, as in a new optimiser.
        return_velocity: return the momentum buffer (P,) after the last step as well, on the device of `theta`.
        plan: in place of `microbatch` and `memory_budget`: the plan of `mtt_fast.plan` for these steps.
        label_kind: of soft labels, "probabilities" (the default) or "logits"; "indices" for integers.
        loss: in place of cross-entropy, from logits (b, classes) and the labels; a mean over the samples, so that
            micro-batches add up to it. It is given the labels as they are, whatever `label_kind` says; floating ones may have any
            number of columns, such as a teacher's logits beside a temperature, and each gets its gradient.
        generator: source of the augmentation's random numbers. Give `draws` instead within torch.utils.checkpoint, which repeats the
            call and does not put this generator back.
        draws: the random numbers themselves, for each step what `augment.draw` returned. Tensors in them are copied.
        precision: that of the factors of float32 convolutions in ConvNet's fused step, "fp32", "tf32", "fp16" or "bf16"; sums
            are float32. With "fp16" a number beyond 65,504 makes the results not finite. Other networks follow torch's own
            settings.
        gradient: "exact", or "truncated", an approximation: each g_n is treated as a constant in θ_n, which leaves out every
            Hessian term. With a loss of θ_N and plain SGD that is TESLA's gradient, λ_N for every λ_n,
            at the cost of the exact one. Momentum, weight decay and losses of other rows stay exact.

    Raises:
        InputError: shapes, dtypes, indices or options that do not fit each other; a call within `torch.inference_mode`,
            `torch.func` or `torch.compile`. A network, a loss or an augmentation of the caller's own is tried on a few samples
            first (on a whole batch if the network mixes samples), and refused if it does not repeat itself, if its samples do
            not add up where batches are cut, or if it reads a tensor that requires a gradient besides its arguments: none would
            flow to it.
    """
    options = StepOptions(
        augment=augment, microbatch=microbatch, memory_budget=memory_budget, plan=plan, momentum=momentum,
        weight_decay=weight_decay, label_kind=label_kind, loss=loss, precision=precision, gradient=gradient,
    )  # fmt: skip
    steps = checked_steps(net, options, theta, images, labels, lr, batches)
    arguments.check_velocity(velocity, theta)
    has_velocity = momentum != 0 or velocity is not None or return_velocity
    draws = arguments.draws_of(draws, augment, images, steps.batches, generator)
    plan = checked_plan(net, options, steps, draws[0], has_velocity=has_velocity)
    student_steps = StudentSteps(
        student=plan.student,
        batches=steps.batches,
        saved_steps=plan.saved_steps,
        path_on_host=plan.path_on_host,
        augment=augment,
        draws=tuple(draws),
        momentum=momentum,
        weight_decay=weight_decay,
        gradient=gradient,
        has_velocity=has_velocity,
        compares=not theta.is_meta and not (theta.is_cuda and torch.cuda.is_current_stream_capturing()),
    )
    path, after = path_of(student_steps, theta, images, labels, steps.lr, velocity)
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
    label_kind: LabelKind | None = None
    loss: Loss | None = None
    precision: Precision = "fp32"
    gradient: Gradient = "exact"


class CheckedSteps(NamedTuple):
    """The tensors of `unroll`, which fit each other, and the student for them."""

    student: Student
    theta: Tensor  # (P,)
    images: Tensor  # (n, C, H, W)
    labels: Tensor  # (n,) or (n, classes)
    lr: Tensor  # () or (N,)
    batches: tuple[Tensor, ...]  # N times (b,) int64


def checked_steps(
    net: Network,
    options: StepOptions,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor | float,
    batches: Tensor | Sequence[Tensor],
) -> CheckedSteps:
    """Return the arguments of `unroll` as tensors, with the student for the steps of `options`.

    Raises `InputError` for options and tensors that do not fit each other, and for a call where no gradient can be taken.
    """
    arguments.check_context()
    arguments.check_types(theta, images, labels, options.augment)
    indices, rates = arguments.checked_batches(batches, images), arguments.rates_of(lr, theta)
    for name in ("momentum", "weight_decay"):
        arguments.check_number(name, getattr(options, name))
    kind = arguments.kind_of(labels, options.label_kind)
    student = student_for(net, theta.device, kind, options.loss, options.precision)
    arguments.check_tensors(theta, images, labels, rates, len(indices), net)
    if options.gradient not in get_args(Gradient):
        raise InputError(f"unroll gradient: expected 'exact' or 'truncated', found '{options.gradient}'")
    if [options.microbatch, options.memory_budget, options.plan].count(None) < 2:
        raise InputError("unroll: expected one of `microbatch`, `memory_budget` and `plan`, found several; give one")
    return CheckedSteps(student, theta, images, labels, rates, indices)


def checked_plan(
    net: Network,
    options: StepOptions,
    steps: CheckedSteps,
    draws: Any,
    *,
    has_velocity: bool,
    path_gradient: bool = False,
) -> Plan:
    """Return the plan of `steps`; `draws` are those of the first step.

    With a `path_gradient` the gradient of the path's loss is as large as the path. A network, a loss and an augmentation of
    the caller's own are tried: raises `InputError` as `unroll`.
    """
    student, theta, images, labels, _, batches = steps
    augment, shape = options.augment, images.shape[1:]
    augmented = None if theta.is_meta else try_augmentation(net, augment, images, batches[0], draws)
    work = Work(
        student=student,
        num_parameters=net.num_parameters,
        mixes_samples=net.mixes_samples,
        images=images.shape,
        input_shape=shape if augmented is None else augmented.shape[1:],
        batch=max(len(index) for index in batches),
        steps=len(batches),
        dtype=theta.dtype,
        device=theta.device,
        momentum=has_velocity,
        augment=augment is not None,
        augment_bytes=footprint_of(augment, shape, images.dtype).extra_bytes,
        path_gradient=path_gradient,
    )
    if options.plan is not None:
        if not isinstance(options.plan, Plan):
            raise InputError(f"unroll plan: expected what mtt_fast.plan returned, found {type(options.plan).__name__}")
        plan = replace(options.plan, work=work)
        if plan.microbatch < 1:
            raise InputError(f"unroll plan: expected a `microbatch` of at least 1 in it, found {plan.microbatch}")
        if plan.cut and net.mixes_samples:
            raise InputError(CANNOT_CUT)
    else:
        plan = plan_for(work, options.memory_budget, options.microbatch, "give fewer or smaller `batches`")
    if isinstance(student, GenericStudent) and not theta.is_meta:
        try_step(student, theta, images, labels, batches[0], augmented, is_cut=plan.cut)
    return plan
