"""The memory plan: how an unroll cuts its batches to fit a memory budget, decided before the first step."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from mtt_fast.augmentation.protocol import Augment, footprint_of
from mtt_fast.checks import check_count, check_number
from mtt_fast.engine.arguments import check_augment, check_image_shape, check_optimizer
from mtt_fast.engine.optimizers import Adam, StudentSgd
from mtt_fast.engine.students.batch_loss import BatchLossStudent
from mtt_fast.engine.students.choice import student_for
from mtt_fast.engine.students.generic import GenericStudent
from mtt_fast.engine.students.microbatches import InMicrobatches
from mtt_fast.engine.students.protocol import Loss, Student
from mtt_fast.errors import InputError
from mtt_fast.kernels import LabelKind, Precision
from mtt_fast.networks.convnet import ConvNet
from mtt_fast.networks.protocol import Network
from mtt_fast.runtime.memory_info import AUTO, MARGIN, free_bytes, parse_bytes
from mtt_fast.runtime.provenance import choose_device

_VECTORS = 5  # λ_{n+1}, the loss's gradient with respect to θ_N, and room for those of a few more rows, or for temporaries of a loss
_VECTORS_OF_STATE = (0, 2, 9)  # by moments: the adjoint of the state, the direction, and temporaries of Adam
_COPIES = 2  # of a batch: the network's inputs, and their gradient on the way to the images
_COPIES_OF_AUGMENTATION = 1  # the augmented batch
_COPIES_OF_OUTPUTS = 16  # in a loss and its derivatives; 15 were measured with a weighted cross-entropy of pixels
_BASE = (4 << 20, 256 << 20)  # code loaded at its first use, stacks of threads; on a GPU (not measured) cuDNN, cuBLAS
_ROUNDING = 20  # allow 1/20 for what allocators round up and keep; at most 1/28 was measured
_LARGE_PATH = 4  # a path of more than 1/4 of the budget is kept on the host

CANNOT_CUT = (
    "`microbatch`: the network's batch norm uses batch statistics, so cutting the batch would change the result; "
    "use instance norm, evaluation mode, or no micro-batches"
)
"""The error for a plan that cuts the batches of a network that mixes samples."""


@dataclass(frozen=True)
class Work:
    """The sizes of an unroll, N steps of a student, from which its plan follows."""

    student: Student
    num_parameters: int
    mixes_samples: bool
    images: torch.Size  # (n, C, H, W), as stored, before the augmentation
    input_shape: torch.Size  # (C, H, W) of an augmented image
    batch: int  # of one process
    steps: int
    dtype: torch.dtype
    device: torch.device
    processes: int = 1
    """number of processes that share each batch"""
    moments: int = 0
    """vectors of the optimizer's state: 1 with momentum, 2 with Adam"""
    augment: bool = False
    augment_bytes: int = 0
    """bytes that the augmentation takes for each image of a batch, beyond the augmented image"""
    path_gradient: bool = False
    """whether the gradient of the loss with respect to the path is as large as the path, as with `path.index_select` or a loss of all rows"""
    lr_per_parameter: bool = False
    """whether each step has a learning rate for each parameter, (N, P)"""
    loss_is_mean: bool = True
    """whether the loss of a batch is the mean of its samples' losses; assumed for a user's loss until it has been tried"""
    output_bytes: int = 0
    """bytes of the network's outputs for a whole batch, if the loss gets the whole batch at once"""


@dataclass(frozen=True)
class Plan:
    """The cut of an unroll's batches, the activations that it saves, and the memory that this takes. `str` describes it for a log."""

    work: Work
    microbatch: int
    """largest number of samples at once; `work.batch` or more means whole batches"""
    saved_steps: int = 0
    """number of last steps whose activations the forward sweep saves for the backward sweep"""
    path_on_host: bool = False
    """whether θ_0 … θ_N are in pinned host memory"""
    budget: int | None = None
    """bytes"""

    @property
    def parts(self) -> dict[str, int]:
        """Return the bytes at the peak by purpose; `peak_bytes` is their sum."""
        work = self.work
        vector = work.num_parameters * work.dtype.itemsize
        image, network_input = (shape.numel() * work.dtype.itemsize for shape in (work.images[1:], work.input_shape))
        # if path and states are on the host, two device buffers each hold the rows in use
        rows = (
            2 * (1 + work.moments) if self.path_on_host else (work.steps + 1) * (1 + work.path_gradient + work.moments)
        )
        is_shared = work.processes > 1
        adds_pieces = self.cut or is_shared
        vectors = _VECTORS + _VECTORS_OF_STATE[work.moments] + adds_pieces + is_shared
        lr_gradients = work.steps * work.lr_per_parameter
        copies = _COPIES + _COPIES_OF_AUGMENTATION * work.augment + adds_pieces
        whole_batch = work.batch * work.processes  # each process augments all of it
        step = self.student.step_bytes(work.batch, work.input_shape, work.dtype, work.device)
        saved_bytes = self.saved_steps * step.saved
        peaks = [step.gradient_jvp, step.gradient]
        if self.saved_steps:  # the last piece of the forward sweep, and the first one of the backward sweep
            peaks = [saved_bytes - step.saved + step.gradient_saving, saved_bytes + step.gradient_jvp_saved, *peaks]
        parts = {
            "path": rows * vector,
            "vectors": vectors * vector,
            "learning rate gradients": lr_gradients * vector,
            "images": work.images[0] * image + copies * whole_batch * network_input,
            "augmentation": work.augment_bytes * whole_batch,
            "loss": _COPIES_OF_OUTPUTS * work.output_bytes,
            "saved activations": saved_bytes,
            "step": max(peaks) - saved_bytes,
            "workspace": step.workspace,
        }
        return parts | {"rest": _BASE[work.device.type == "cuda"] + sum(parts.values()) // _ROUNDING}

    @property
    def peak_bytes(self) -> int:
        """Return the peak memory of the unroll, forward and backward, beyond its arguments."""
        return sum(self.parts.values())

    @property
    def cut(self) -> bool:
        """Return whether batches are cut into pieces."""
        return self.microbatch < self.work.batch

    @property
    def student(self) -> Student:
        """Return the student that cuts batches as the plan says."""
        student = self.work.student
        if not self.cut:
            return student
        if isinstance(student, GenericStudent) and not self.work.loss_is_mean:
            return BatchLossStudent(student, self.microbatch)
        return InMicrobatches(student, self.microbatch)

    @property
    def passes(self) -> float:
        """Return the mean cost of a step in both sweeps, in forward passes."""
        recomputed, saved = self.student.passes
        share = self.saved_steps / self.work.steps
        return saved * share + recomputed * (1 - share)

    def smaller(self) -> Plan:
        """Return the next smaller plan: first without saved activations, then with pieces of half the size. Results stay exact.

        Raises `InputError` if there is no smaller plan.
        """
        if self.saved_steps:
            return dataclasses.replace(self, saved_steps=0)
        if self.microbatch == 1 or self.work.mixes_samples:
            smallest = (
                "with batch statistics, which cannot be cut" if self.work.mixes_samples else "a piece of one image"
            )
            raise InputError(
                f"out of memory at {smallest} ({_mib(self.peak_bytes)} planned); lower the width, the resolution, `steps` "
                "or `batch`, or take a device with more memory"
            )
        return dataclasses.replace(self, microbatch=_even(self.work.batch, self.microbatch // 2))

    def __str__(self) -> str:
        work, (_, least) = self.work, self.student.passes
        pieces = math.ceil(work.batch / self.microbatch)
        cut = f"in {pieces} pieces of at most {self.microbatch}" if self.cut else "whole"
        parts = ", ".join(f"{name} {_mib(size)}" for name, size in self.parts.items() if size)
        allowed = "" if self.budget is None else f" of {_mib(self.budget)}"
        return (
            f"memory plan: {work.steps} steps on {work.batch} images, {cut}; activations of {self.saved_steps} steps saved; "
            f"{'path on the host; ' if self.path_on_host else ''}"
            f"peak {_mib(self.peak_bytes)}{allowed} ({parts}); "
            f"{self.passes:.1f} convolution passes a step, {least} at least"
        )


def plan(
    net: Network,
    *,
    images: Tensor | Sequence[int],
    steps: int,
    batch: int | None = None,
    memory_budget: int | str | None = AUTO,
    microbatch: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    momentum: float = 0.0,
    optimizer: Adam | None = None,
    augment: Augment | bool = False,
    label_kind: LabelKind = "indices",
    loss: Loss | None = None,
    precision: Precision = "fp32",
    path_gradient: bool = False,
    lr_per_parameter: bool = False,
) -> Plan:
    """Return the memory plan of an `unroll`, before a run. `unroll` makes the same plan itself, or accepts this one as `plan=`.

    Args:
        net: the student's network.
        images: the synthetic images, or their shape (n, C, H, W); for a `FlatModule`, any shape (n, …) that the module takes.
        steps: N.
        batch: images in a step; by default all.
        memory_budget: limit on the peak memory of the unroll beyond its arguments: bytes, "6GiB", or "auto" for most of the free
            memory of `device`. None means no limit: whole batches, and no saved activations.
        microbatch: largest number of samples at once, in place of a budget.
        device: where `unroll` will run; it must exist on this machine.
        dtype: dtype of the parameters, float32 or float64.
        momentum: as in `unroll`; only whether it is zero matters.
        optimizer: as in `unroll`.
        augment: the augmentation, or True for any that keeps the images' shape.
        label_kind: as in `unroll`, as are `loss` and `precision`. The plan assumes that the loss is a mean over the samples; if
            it is not, `unroll` may cut the batches into smaller pieces.
        path_gradient: whether the loss uses `path` itself (as `path.mean()`), or more than three rows `path[n]`, so that its
            gradient takes as much memory as the path. Memory that such a loss itself allocates is not counted: `path.square()`
            and its backward pass need twice the memory of the path in addition.
        lr_per_parameter: whether `lr` is (N, P), a rate for each step and parameter.

    Raises:
        InputError: this machine has no such device; the budget is too small even for one sample at once (the message says how
            much is needed); batches would have to be cut but the network mixes samples; or an argument is wrong.
    """
    if dtype not in (torch.float32, torch.float64):
        raise InputError(f"`dtype`: expected torch.float32 or torch.float64, found {dtype!r}")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"`device`: expected a device of torch, such as cpu or cuda, found {device!r}") from error
    if device.type == "cuda":
        choose_device(str(device))
    shape = _shape_of(images, is_2d=isinstance(net, ConvNet))
    check_number("momentum", momentum)
    check_optimizer(optimizer, momentum, 0.0)
    check_augment(None if isinstance(augment, bool) else augment)
    check_count("steps", steps)
    if batch is not None:
        check_count("batch", batch)
    input_shape, augment_bytes = footprint_of(augment, shape[1:], dtype)
    check_image_shape(net, input_shape)
    work = Work(
        student=student_for(net, device, label_kind, loss, precision),
        num_parameters=net.num_parameters,
        mixes_samples=net.mixes_samples,
        images=shape,
        input_shape=input_shape,
        batch=batch or shape[0],
        steps=steps,
        dtype=dtype,
        device=device,
        moments=(optimizer or StudentSgd(momentum, has_velocity=lr_per_parameter)).moments,
        augment=augment is not False,
        augment_bytes=augment_bytes,
        path_gradient=path_gradient,
        lr_per_parameter=lr_per_parameter,
    )
    return plan_for(work, memory_budget, microbatch)


def _shape_of(images: Any, *, is_2d: bool) -> torch.Size:
    """Return the shape of `images`, a tensor or its shape. Raises `InputError` unless it is (n, …), or with `is_2d` (n, C, H, W)."""
    shape = tuple(images.shape) if isinstance(images, Tensor) else images
    fits = isinstance(shape, Sequence) and (len(shape) == 4 if is_2d else len(shape) > 1)
    if not fits or not all(isinstance(side, Integral) and int(side) > 0 for side in shape):
        raise InputError(
            f"`images`: expected a tensor or a shape {'(n, C, H, W)' if is_2d else '(n, …)'}, found {shape}"
        )
    return torch.Size(shape)


def plan_for(
    work: Work,
    memory_budget: int | str | None,
    microbatch: int | None,
    fix: str = "lower `batch` or `steps`",
    *,
    reserved: int = 0,
) -> Plan:
    """Return the plan for `work`: the largest pieces that fit, and then as many saved activations as fit.

    `reserved` bytes of the budget are left free. Raises as `plan` does; if the budget is too small, the error advises to raise it, or `fix`.
    """
    if microbatch is not None and memory_budget not in (None, AUTO):
        raise InputError("expected `microbatch` or `memory_budget`, found both; give one")
    if microbatch is not None:
        check_count("microbatch", microbatch)
        if work.mixes_samples and microbatch < work.batch:
            raise InputError(CANNOT_CUT)
        return Plan(work, min(microbatch, work.batch))
    if memory_budget is None:
        return Plan(work, work.batch)
    is_auto = memory_budget == AUTO
    available = int(MARGIN * free_bytes(work.device)) if is_auto else parse_bytes(memory_budget)
    budget = available - reserved
    whole = Plan(work, work.batch, budget=budget)
    if work.device.type == "cuda" and _LARGE_PATH * whole.parts["path"] > budget:
        whole = dataclasses.replace(whole, path_on_host=True)
    cut = _largest(work.batch, lambda size: dataclasses.replace(whole, microbatch=size), budget)
    if cut is None or (cut.cut and work.mixes_samples):
        least = whole if work.mixes_samples else dataclasses.replace(whole, microbatch=1)
        found = f", found {_mib(available)}, {MARGIN:.0%} of the free memory" if is_auto else ""
        raise InputError(
            f"`memory_budget` {memory_budget}: expected at least {_mib(least.peak_bytes + reserved)} for {work.steps} steps of "
            f"{work.batch} images{' (batch statistics: the batch cannot be cut)' if work.mixes_samples else ''}{found}; "
            f"{'free memory' if is_auto else 'raise it'}, or {fix}"
        )
    even = dataclasses.replace(cut, microbatch=_even(work.batch, cut.microbatch))
    recomputed, saved = even.student.passes
    if saved == recomputed:
        return even
    return _largest(work.steps, lambda steps: dataclasses.replace(even, saved_steps=steps), budget) or even


def check_budget(amount: str) -> None:
    """Raise `InputError` unless `amount` is "auto" or a number of bytes as `parse_bytes` reads it."""
    if amount != AUTO:
        parse_bytes(amount)


def _largest(most: int, plan_of: Callable[[int], Plan], budget: int) -> Plan | None:
    """Return `plan_of(n)` for the largest n in 1 … `most` whose peak is within `budget`, or None. The peak grows with n."""
    number = bisect.bisect_right(range(1, most + 1), budget, key=lambda number: plan_of(number).peak_bytes)
    return plan_of(number) if number else None


def _even(batch: int, most: int) -> int:
    """Return the piece size that cuts `batch` into as few pieces as `most` samples per piece do, but evenly."""
    return math.ceil(batch / math.ceil(batch / most))


def _mib(size: int) -> str:
    return f"{math.ceil(size / 2**20)} MiB"
