"""One iteration of the distillation as a pure function of tensors: both sweeps of the student, the loss and its gradients.

The iteration reads no tensor on the host and draws no random numbers, so that a CUDA graph can capture and replay it
(mtt_fast/runtime/cuda_graphs.py). Its random numbers are arguments, drawn beforehand (mtt_fast/engine/draws.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.engine.draws import Apply
from mtt_fast.engine.matching import path_loss
from mtt_fast.engine.mean_loss import watched_student
from mtt_fast.engine.memory_plan import Plan
from mtt_fast.engine.optimizers import PLAIN_SGD, Optimizer
from mtt_fast.engine.students.protocol import Loss, Student
from mtt_fast.engine.sweeps import Gradient, StudentSteps, path_of
from mtt_fast.runtime.cuda_graphs import graphed

Iteration = Callable[..., tuple[Tensor, ...]]
"""A function of the tensors start, target, images, labels, lr and `StepDraws.tensors` that returns a loss and its gradients."""

PathLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A loss () of the student's path (N + 1, P) and the expert's start and target (P,) that reads no tensor on the host."""


def planned_iteration(
    plan: Plan,
    augment: Apply | None,
    lengths: tuple[int, ...],
    *,
    loss: PathLoss = path_loss,
    optimizer: Optimizer = PLAIN_SGD,
    gradient: Gradient = "exact",
    graph: bool = True,
    watched_loss: Loss | None = None,
) -> Iteration:
    """Return the `iteration` that follows `plan`. On CUDA its calls are captured in a CUDA graph and replayed.

    `lengths` are the batch sizes of the steps. If the path is in host memory, nothing is captured. Use `graph=False` for iterations
    that are too rare to hold a graph's memory.
    """
    run = iteration(
        plan.student, augment, lengths, loss=loss, optimizer=optimizer, gradient=gradient, saved_steps=plan.saved_steps,
        path_on_host=plan.path_on_host, watched_loss=watched_loss,
    )  # fmt: skip
    return graphed(run, plan.work.device, kernels.compile_ahead) if graph and not plan.path_on_host else run


def iteration(
    student: Student,
    augment: Apply | None,
    lengths: tuple[int, ...],
    *,
    loss: PathLoss = path_loss,
    optimizer: Optimizer = PLAIN_SGD,
    gradient: Gradient = "exact",
    saved_steps: int = 0,
    path_on_host: bool = False,
    watched_loss: Loss | None = None,
) -> Iteration:
    """Return a function that computes `loss` () in float64, and its gradients with respect to images, lr and soft labels.

    `lengths` are the batch sizes of the steps. For `gradient` see `unroll`, for `saved_steps` and `path_on_host` see `Plan`. If
    the student assumes that its loss, given as `watched_loss`, is a mean over the samples, the last result says whether it was,
    as a boolean tensor ().

    The returned function is pure. Its arguments are tensors on one device: the expert's parameters start and target (P,), all
    synthetic images (n, C, H, W), labels and lr as in `unroll`, and the tensors of `StepDraws`, where ΣB = Σ `lengths`. Neither
    arguments nor results are checked: gradients may be NaN or infinite.
    """

    def iterate(
        start: Tensor,
        target: Tensor,
        images: Tensor,
        labels: Tensor,
        lr: Tensor,
        indices: Tensor,
        parameters: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        watching, watched = watched_student(student, watched_loss, lengths)
        steps = StudentSteps(
            student=watching,
            batches=indices.split(lengths),
            saved_steps=saved_steps,
            path_on_host=path_on_host,
            augment=augment,
            draws=(None,) * len(lengths) if parameters is None else parameters.split(lengths),
            optimizer=optimizer,
            gradient=gradient,
        )
        learned = [images, lr, *([labels] if labels.is_floating_point() else [])]
        with torch.enable_grad():
            images, lr, *soft = (tensor.detach().requires_grad_() for tensor in learned)
            path, _ = path_of(steps, start, images, soft[0] if soft else labels, lr)
            adds_up = [] if watched is None else [watched.result()]
            value = loss(path, start, target)
            return value.detach(), *torch.autograd.grad(value, (images, lr, *soft)), *adds_up

    return iterate
