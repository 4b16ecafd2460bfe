"""One iteration of the distillation as a function of tensors alone: student out, student back, gradients.

Nothing in it depends on the value of a tensor or draws a random number, so that it can be recorded once and replayed
(mtt_fast/runtime/cuda_graphs.py). What is random comes in as tensors, drawn beforehand (mtt_fast/engine/draws.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mtt_fast.engine.draws import Apply
from mtt_fast.engine.matching import path_loss
from mtt_fast.engine.memory_plan import Plan
from mtt_fast.engine.student import Student
from mtt_fast.engine.unroll import Gradient, StudentSteps, path_of, student_for_plan
from mtt_fast.networks.protocol import Network
from mtt_fast.runtime.cuda_graphs import graphed

Iteration = Callable[..., tuple[Tensor, ...]]
"""`iterate` with its first three arguments given: from start, target, images, labels, lr and `StepDraws.tensors`."""

PathLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the student's path (N + 1, P) and the expert's start and target (P,) to a loss (); it asks for no value."""


def planned_iteration(
    net: Network,
    steps: Plan,
    augment: Apply | None,
    lengths: tuple[int, ...],
    *,
    loss: PathLoss = path_loss,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    gradient: Gradient = "exact",
    graph: bool = True,
) -> Iteration:
    """Return `iterate` as the plan `steps` says, for steps that see `lengths` images each; on CUDA it replays a graph.

    With the path in host memory it is called instead: a graph knows the device's alone. So it is without `graph`, for
    what is done too rarely to keep the graph's memory.
    """
    student = student_for_plan(steps.work.student, net, steps, steps.work.batch)
    run = partial(
        iterate, student, augment, lengths, loss=loss, momentum=momentum, weight_decay=weight_decay, gradient=gradient,
        saved_steps=steps.saved_steps, path_on_host=steps.path_on_host,
    )  # fmt: skip
    return graphed(run, steps.work.device) if graph and not steps.path_on_host else run


def iterate(
    student: Student,
    augment: Apply | None,
    lengths: tuple[int, ...],
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    indices: Tensor,
    parameters: Tensor | None = None,
    *,
    loss: PathLoss = path_loss,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    gradient: Gradient = "exact",
    saved_steps: int = 0,
    path_on_host: bool = False,
) -> tuple[Tensor, ...]:
    """Return the loss () in float64, the matching loss unless told, and its gradients to images, lr and soft labels.

    The steps see `lengths` images each, through `augment`, and `student` answers for them. `momentum`, `weight_decay`
    and `gradient` are those of `unroll`; `saved_steps` and `path_on_host` those of a plan (mtt_fast/engine/memory_plan.py).

    A pure function of its tensors, all on one device: those of `matching_loss` and `unroll`, where `images` are all
    synthetic images (n, C, H, W), and those of `StepDraws`, ΣB = Σ `lengths`. Nothing is checked: indices were drawn in
    range, and `augment` takes the rows of a step. A gradient that is not finite is returned as it is.
    """
    draws = (None,) * len(lengths) if parameters is None else parameters.split(lengths)
    saved_from = max(0, len(lengths) - saved_steps)
    batches = indices.split(lengths)
    steps = StudentSteps(
        student, batches, saved_from, path_on_host, augment, draws, momentum, weight_decay, gradient, momentum != 0
    )
    wanted = [images, lr, *([labels] if labels.is_floating_point() else [])]
    with torch.enable_grad():
        images, lr, *soft = (tensor.detach().requires_grad_() for tensor in wanted)
        path, _ = path_of(steps, start, images, soft[0] if soft else labels, lr)
        value = loss(path, start, target)
        return value.detach(), *torch.autograd.grad(value, (images, lr, *soft))
