"""Compute the gradients of an iteration, and compare truncated gradients with exact ones."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from mtt_fast.distill.cam_network import weigh_gradients
from mtt_fast.distill.frequencies import filter_frequencies
from mtt_fast.distill.labels import teacher_labels
from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.planning import plan_in_tf32
from mtt_fast.distill.run import DistillRun
from mtt_fast.distill.segments import Segment, augmentation, step_indices
from mtt_fast.distill.updates import mask_real_images
from mtt_fast.engine.iteration import Iteration, planned_iteration
from mtt_fast.engine.matching import path_loss
from mtt_fast.engine.memory_plan import Plan
from mtt_fast.engine.optimizers import StudentSgd
from mtt_fast.engine.out_of_memory import with_smaller_pieces
from mtt_fast.engine.students.fused import FusedConvNetStudent
from mtt_fast.engine.sweeps import Gradient
from mtt_fast.networks.protocol import Network
from mtt_fast.storage.checkpoint import State

log = logging.getLogger(__name__)

DESCRIPTIONS: dict[Gradient, str] = {
    "exact": "exact",
    "truncated": "truncated (approximate: TESLA's, without the Hessian terms)",
}
"""Descriptions of the gradients for the log and the summary."""


def iteration_of(options: DistillOptions, network: Network, plan: Plan, *, graph: bool = True) -> Iteration:
    """Return the function that computes loss and gradients of one segment with `plan`.

    With --teacher_label the expert at the segment's target labels the images, and the function ignores its `labels`.
    """
    # each segment starts a new permutation, so the steps have the same batch sizes in all segments
    batches = step_indices(options, plan.work.images[0], torch.Generator())
    augment = augmentation(options)
    iteration = planned_iteration(
        plan,
        augment,
        tuple(len(index) for index in batches),
        loss=partial(
            path_loss,
            match_step=options.match_step,
            loss_ratio=options.loss_ratio,
            depth_ratio=options.depth_ratio,
        ),
        optimizer=StudentSgd(options.student_mom, options.student_l2),
        gradient=options.gradient,
        graph=graph,
    )
    if options.student_dampening:
        iteration = _dampened(iteration, 1 - options.student_dampening)
    if not options.teacher_label:
        return iteration

    def labelled(
        start: Tensor, target: Tensor, images: Tensor, _: Tensor, lr: Tensor, index: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        labels = teacher_labels(network, target, images, index, plan.microbatch)
        return iteration(start, target, images, labels, lr, index, *parameters)

    return labelled


def _dampened(iteration: Iteration, factor: float) -> Iteration:
    """Return the iteration of a student with velocity μ m + `factor` g, which takes the same steps at `factor` times the learning rate."""

    def dampened(
        start: Tensor, target: Tensor, images: Tensor, labels: Tensor, lr: Tensor, *draws: Tensor
    ) -> tuple[Tensor, ...]:
        loss, images_gradient, lr_gradient, *others = iteration(start, target, images, labels, factor * lr, *draws)
        return loss, images_gradient, factor * lr_gradient, *others

    return dampened


def cached_iterations(make: Callable[..., Iteration]) -> Callable[..., Iteration]:
    """Return a function that calls `make(plan, graph=…)`, a partial of `iteration_of`, and caches its results.

    On a GPU a cached iteration holds the memory of its plan. So several are cached only if the budget has room for all, and a new
    plan for the same work replaces the others.
    """
    cache: dict[tuple[Plan, bool], Iteration] = {}

    def iteration_for(plan: Plan, *, graph: bool = True) -> Iteration:
        if (plan, graph) not in cache:
            others = [other for other, _ in cache]
            if any(other.work == plan.work for other in others) or not fit_together(plan, *others):
                cache.clear()
            cache[plan, graph] = make(plan, graph=graph)
        return cache[plan, graph]

    return iteration_for


def fit_together(plan: Plan, *others: Plan) -> bool:
    """Return whether the budget of `plan` has room for all plans at the same time."""
    return plan.budget is not None and sum(each.peak_bytes for each in (plan, *others)) <= plan.budget


def mean_gradients(iteration: Iteration, state: State, segments: Sequence[Segment]) -> tuple[Tensor, ...]:
    """Return the mean of the results of `iteration`, a loss and its gradients, over `segments`."""
    total: list[Tensor] = []
    for segment in segments:
        start, target, *draws = segment.tensors()
        gradients = iteration(start, target, state.images, state.labels, state.lr, *draws)
        total = [sum_.add_(new) for sum_, new in zip(total, gradients, strict=True)] if total else list(gradients)
    return tuple(sum_.div_(len(segments)) for sum_ in total)


class PendingGradients(NamedTuple):
    """The gradients of an iteration, which a GPU may still be computing, and the arguments to repeat it."""

    segments: Sequence[Segment]
    gradients: list[Tensor]
    """with respect to images, learning rate and, if they are learned, labels"""
    magnitudes: Tensor
    """the loss, and the largest magnitude of each gradient, in float64"""
    plan: Plan
    """the plan that fitted into memory"""
    iteration_for: Callable[..., Iteration]
    graph: bool = True


def start_gradients(
    state: State,
    segments: Sequence[Segment],
    plan: Plan,
    iteration_for: Callable[..., Iteration],
    *,
    graph: bool = True,
) -> PendingGradients:
    """Start to compute `mean_gradients`; `finish_gradients` synchronises with a GPU.

    `iteration_for(plan, graph=…)` returns the iteration (see `cached_iterations`); with `graph` it is captured in a CUDA graph.
    """

    def attempt(plan: Plan) -> tuple[list[Tensor], Tensor]:
        loss, *gradients = mean_gradients(iteration_for(plan, graph=graph), state, segments)
        largest = [torch.linalg.vector_norm(gradient, math.inf).double() for gradient in gradients]
        return gradients, torch.stack([loss.double(), *largest])

    (gradients, magnitudes), plan = with_smaller_pieces(plan, attempt)
    return PendingGradients(segments, gradients, magnitudes, plan, iteration_for, graph)


class FinishedGradients(NamedTuple):
    """The computed gradients of an iteration."""

    loss: float
    """the mean over the iteration's segments"""
    gradients: list[Tensor] | None
    """see `PendingGradients`; None if any number is not finite"""
    plan: Plan
    """the plan that fitted into memory"""
    repeated: bool = False
    """whether the iteration was repeated in tf32"""


def finish_gradients(state: State, pending: PendingGradients) -> FinishedGradients:
    """Wait for the gradients of a `pending` iteration.

    If a value is not finite in fp16, the iteration is repeated in tf32, with a line in the log. The repetition gets its own CUDA
    graph if the budget has room for both.
    """
    plan, student = pending.plan, pending.plan.work.student
    loss, *largest = pending.magnitudes.tolist()  # waits for a GPU, once
    if all(math.isfinite(magnitude) for magnitude in (loss, *largest)):
        return FinishedGradients(loss, pending.gradients, plan)
    if not isinstance(student, FusedConvNetStudent) or student.precision != "fp16":
        return FinishedGradients(loss, None, plan)
    log.warning("iteration %d: a number is too large for fp16; repeated in tf32", state.iteration + 1)
    again = plan_in_tf32(plan)
    # without room for both, the graph in fp16 is dropped from the cache, and capturing a graph for one repetition does not pay
    graph = pending.graph and fit_together(plan, again)
    repeated = start_gradients(state, pending.segments, again, pending.iteration_for, graph=graph)
    return finish_gradients(state, repeated)._replace(plan=plan, repeated=True)


def gradients_to_apply(run: DistillRun, state: State, gradients: list[Tensor] | None) -> list[Tensor] | None:
    """Return the gradients that update `state`, from the `gradients` of the loss; None (not finite) is returned as None.

    The images' gradient is weighed by Grad-CAM maps (EDF), set to zero for real images (SelMatch), and restricted to the kept
    frequencies (FreD).
    """
    weighed = weigh_gradients(run.options, run.cam, state, gradients)
    return None if weighed is None else filter_frequencies(state, mask_real_images(run.options, weighed))


def compare_with_exact(run: DistillRun, state: State, plan: Plan, segments: Sequence[Segment]) -> None:
    """Log the cosine between the truncated and the exact image gradient for the next `segments`, and write it to metrics.jsonl."""
    if run.metrics.find("gradient", state.iteration):
        return  # the run was stopped in the evaluation that follows
    both = []
    for gradient in get_args(Gradient):
        iteration_for = partial(iteration_of, dataclasses.replace(run.options, gradient=gradient), run.network)
        _, gradients, plan, _ = finish_gradients(
            state, start_gradients(state, segments, plan, iteration_for, graph=False)
        )
        gradients = gradients_to_apply(run, state, gradients)
        if gradients is None:
            log.warning("iteration %d: the student diverged, so the gradients are not compared", state.iteration)
            return
        both.append(gradients[0].double().flatten())
    cosine = float(torch.nn.functional.cosine_similarity(both[0], both[1], dim=0))
    log.info("iteration %d: cosine of the truncated image gradient to the exact one %.4f", state.iteration, cosine)
    run.metrics.write("gradient", state.iteration, cosine=cosine)
