"""How an unroll fits a memory budget: planned before the first step, and cut further where memory runs out all the same."""

from __future__ import annotations

import bisect
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtt_fast.engine.student import CANNOT_CUT, InMicrobatches, Loss, Student
from mtt_fast.engine.student_choice import student_for
from mtt_fast.errors import InputError
from mtt_fast.kernels import LabelKind, Precision
from mtt_fast.networks.protocol import Network
from mtt_fast.runtime.memory_info import AUTO, MARGIN, free_bytes, parse_bytes

log = logging.getLogger(__name__)

_VECTORS = 5  # the loss's gradient to θ_N, λ_{n+1} and the next one, and temporaries
_VECTORS_OF_MOMENTUM = 2  # the adjoint of the velocity and the direction
_COPIES = 5  # of a batch: as it is seen, its gradient on the way to the images
_COPIES_OF_AUGMENTATION = 1  # the augmented batch
_COPIES_OF_CANVASES = 3  # of a batch: as chosen, and its gradient, made and added up; at most
_PLACES = 2  # of a crop's pixels in its canvas, as long integers
_BASE = (
    4 << 20,
    256 << 20,
)  # code loaded at its first use and stacks of threads; on a GPU (not measured) cuDNN, cuBLAS
_ROUNDING = 20  # one part in so many for what allocators round up and keep: at most one in 28 was measured
_LARGE_PATH = 4  # from a quarter of the budget on, the path lies on the host


@dataclass(frozen=True)
class Work:
    """What is to be planned: N steps of a student on batches of some images."""

    student: Student
    num_parameters: int
    mixes_samples: bool
    images: torch.Size  # (n, C, H, W)
    batch: int
    steps: int
    dtype: torch.dtype
    device: torch.device
    momentum: bool = False
    augment: bool = False
    path_gradient: bool = False
    """whether the loss's gradient is as large as the path, as where its row is chosen by a tensor"""
    canvas_size: int = 1
    """side, in images, of the canvases of which the images are crops; 1 where there are none"""


@dataclass(frozen=True)
class Plan:
    """How the steps of an unroll are cut, and what that takes. `str` tells it in a sentence for a log."""

    work: Work
    microbatch: int
    """samples at once; the whole batch if it is as large"""
    saved_steps: int = 0
    """the last steps, whose primal activations are kept from the forward sweep for the backward one"""
    path_on_host: bool = False
    """whether θ_0 … θ_N lie in pinned host memory"""
    budget: int | None = None
    """bytes"""

    @property
    def parts(self) -> dict[str, int]:
        """Bytes at the peak, by what they are for."""
        work = self.work
        vector = work.num_parameters * work.dtype.itemsize
        image = work.images[1:].numel() * work.dtype.itemsize
        canvas, places = work.canvas_size**2 * image, work.images[2:].numel() * torch.long.itemsize
        rows = (work.steps + 1) * (1 + work.path_gradient) + work.steps * work.momentum
        vectors = _VECTORS + _VECTORS_OF_MOMENTUM * work.momentum + self.cut
        copies = _COPIES + _COPIES_OF_AUGMENTATION * work.augment + self.cut
        pieces = InMicrobatches(work.student, self.microbatch)
        step = pieces.step_bytes(work.batch, work.images[1:], work.dtype, work.device)
        held = self.saved_steps * step.saved
        steps = [step.gradient_jvp, step.gradient]
        if self.saved_steps:  # the last piece of the forward sweep, the first one of the backward sweep
            steps = [held - step.saved + step.gradient_saving, held + step.gradient_jvp_saved, *steps]
        parts = {
            "path": (2 if self.path_on_host else rows) * vector,
            "vectors": vectors * vector,
            "images": work.images[0] * canvas + copies * work.batch * image,
            "canvases": (_COPIES_OF_CANVASES * canvas + _PLACES * places) * work.batch * (work.canvas_size > 1),
            "kept activations": held,
            "step": max(steps) - held,
            "work space": step.work,
        }
        return parts | {"rest": _BASE[work.device.type == "cuda"] + sum(parts.values()) // _ROUNDING}

    @property
    def peak_bytes(self) -> int:
        """Peak of memory that the unroll, forward and backward, takes beyond its arguments."""
        return sum(self.parts.values())

    @property
    def cut(self) -> bool:
        """Whether a batch is done in pieces."""
        return self.microbatch < self.work.batch

    @property
    def passes(self) -> float:
        """Cost of a step in both sweeps, on average, in units of the convolutions of one forward pass."""
        recomputed, saved = self.work.student.passes
        share = self.saved_steps / self.work.steps
        return saved * share + recomputed * (1 - share)

    def smaller(self) -> Plan:
        """Return the next plan that takes less: first nothing is kept, then pieces are halved. Same results, exactly.

        Raises `InputError` if there is none.
        """
        if self.saved_steps:
            return dataclasses.replace(self, saved_steps=0)
        if self.microbatch == 1 or self.work.mixes_samples:
            least = "with batch statistics, which cannot be cut" if self.work.mixes_samples else "a piece of one image"
            raise InputError(
                f"out of memory at {least} ({_mib(self.peak_bytes)} planned); lower the width, the resolution, syn_steps "
                "or batch_syn, or take a device with more memory"
            )
        return dataclasses.replace(self, microbatch=_even(self.work.batch, self.microbatch // 2))

    def __str__(self) -> str:
        work, (_, least) = self.work, self.work.student.passes
        pieces = math.ceil(work.batch / self.microbatch)
        cut = f"in {pieces} pieces of at most {self.microbatch}" if self.cut else "whole"
        parts = ", ".join(f"{name} {_mib(size)}" for name, size in self.parts.items() if size)
        allowed = "" if self.budget is None else f" of {_mib(self.budget)}"
        return (
            f"memory plan: {work.steps} steps on {work.batch} images, {cut}; activations of {self.saved_steps} steps kept; "
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
    augment: bool = False,
    label_kind: LabelKind = "indices",
    loss: Loss | None = None,
    precision: Precision = "fp32",
    path_gradient: bool = False,
    canvas_size: int = 1,
) -> Plan:
    """Tell before a run what `unroll` will do and take: the plan that it makes itself, or can be given.

    Args:
        net: the student's network.
        images: the synthetic images, or their shape (n, C, H, W).
        steps: N.
        batch: images in a step; without it, all.
        memory_budget: bytes or "6GiB", the peak of the unroll beyond its arguments; "auto", most of what is free on
            `device`; None, no limit: whole batches, and nothing kept.
        microbatch: in place of a budget: at most so many samples at once.
        device: where it will run.
        dtype: of the parameters.
        momentum: as in `unroll`; only whether there is any.
        augment: whether the images are augmented.
        label_kind: as in `unroll`, as are `loss` and `precision`.
        path_gradient: whether the loss's gradient is as large as the path: of `path` itself, not of rows `path[n]`.
        canvas_size: where `images` are the shapes of crops, the side in images of the canvases that they are cut from.

    Raises:
        InputError: the budget is too small even for one sample at once, with what would do; or the network's samples
            depend on each other, so that its batches cannot be cut.
    """
    device = torch.device(device)
    shape = torch.Size(images.shape if isinstance(images, Tensor) else images)
    work = Work(
        student_for(net, device, label_kind, loss, precision),
        *(
            net.num_parameters,
            net.mixes_samples,
            shape,
            batch or shape[0],
            steps,
            dtype,
            device,
            momentum != 0,
            augment,
            path_gradient,
            canvas_size,
        ),
    )
    return plan_for(work, memory_budget, microbatch)


def plan_for(work: Work, memory_budget: int | str | None, microbatch: int | None = None) -> Plan:
    """Return the plan for `work`: the largest pieces that fit, and what then fits of activations to keep. As `plan`."""
    if microbatch is not None and memory_budget not in (None, AUTO):
        raise InputError("expected microbatch or memory_budget, found both; give one")
    if microbatch is not None:
        if microbatch < 1:
            raise InputError(f"microbatch: expected at least 1, found {microbatch}")
        if work.mixes_samples and microbatch < work.batch:
            raise InputError(CANNOT_CUT)
        return Plan(work, min(microbatch, work.batch))
    if memory_budget is None:
        return Plan(work, work.batch)
    budget = int(MARGIN * free_bytes(work.device)) if memory_budget == AUTO else parse_bytes(memory_budget)
    whole = Plan(work, work.batch, budget=budget)
    if work.device.type == "cuda" and _LARGE_PATH * whole.parts["path"] > budget:
        whole = dataclasses.replace(whole, path_on_host=True)
    cut = _largest(work.batch, lambda size: dataclasses.replace(whole, microbatch=size), budget)
    if cut is None or (cut.cut and work.mixes_samples):
        least = whole if work.mixes_samples else dataclasses.replace(whole, microbatch=1)
        raise InputError(
            f"memory budget {memory_budget}: expected at least {_mib(least.peak_bytes)} for {work.steps} steps of "
            f"{work.batch} images{' (batch statistics: the batch cannot be cut)' if work.mixes_samples else ''}; "
            "raise it, or lower batch_syn or syn_steps"
        )
    even = dataclasses.replace(cut, microbatch=_even(work.batch, cut.microbatch))
    recomputed, saved = work.student.passes
    if saved == recomputed:
        return even
    return _largest(work.steps, lambda steps: dataclasses.replace(even, saved_steps=steps), budget) or even


def check_budget(amount: str) -> None:
    """Raise `InputError` unless `amount` is "auto" or a number of bytes as `parse_bytes` reads it."""
    if amount != AUTO:
        parse_bytes(amount)


def _largest(most: int, of: Callable[[int], Plan], budget: int) -> Plan | None:
    """Return the plan `of` the largest number in 1 … `most` whose peak is within `budget`; it grows with the number."""
    fits = bisect.bisect_right(range(1, most + 1), budget, key=lambda number: of(number).peak_bytes)
    return of(fits) if fits else None


def _even(batch: int, most: int) -> int:
    """Return the size of pieces, as many as pieces of `most` are, but even."""
    return math.ceil(batch / math.ceil(batch / most))


def _mib(size: int) -> str:
    return f"{math.ceil(size / 2**20)} MiB"
