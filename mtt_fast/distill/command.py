"""Distil a data set by matching training trajectories: `python -m mtt_fast.distill`.

The paper's algorithm 1. Missing experts are trained first. Everything is written to a run folder from which the run
continues, whatever stopped it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mtt_fast.commands.earlier_run import check_same_method, check_same_run, is_finished
from mtt_fast.commands.option_fields import outside_result
from mtt_fast.distill.checks import check_fits
from mtt_fast.distill.dry_run import dry_run
from mtt_fast.distill.evaluation import evaluate_sets, is_evaluated, summarise
from mtt_fast.distill.experts import (
    asked_of_experts,
    check_experts,
    check_same_experts,
    prepare_experts,
    with_true_experts,
)
from mtt_fast.distill.gradients import DESCRIPTIONS, compare_with_exact, iteration_of, mean_gradients, teacher_of
from mtt_fast.distill.initial import initial_images, initial_state
from mtt_fast.distill.options import PROGRAM, DistillOptions, given_options, parse_options
from mtt_fast.distill.run import Run
from mtt_fast.distill.segments import Segment, log_fields, planned, read_segment, turns
from mtt_fast.distill.updates import reject_above_threshold, skip, update
from mtt_fast.engine.iteration import Iteration
from mtt_fast.engine.memory_plan import Plan
from mtt_fast.engine.out_of_memory import with_smaller_pieces
from mtt_fast.engine.student_choice import describe_numerics, precision_on
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.interrupts import Stopped, stop_request
from mtt_fast.runtime.numerics import numerics
from mtt_fast.runtime.prefetch import prefetched, sender
from mtt_fast.runtime.provenance import choose_device, device_name
from mtt_fast.storage.checkpoint import State, check_same_images, load_checkpoint, save_checkpoint
from mtt_fast.storage.expert_checks import FLAGS
from mtt_fast.storage.metrics import MetricsLog
from mtt_fast.storage.run_folder import only_user, write_config
from mtt_fast.storage.trajectories import TrajectoryStore
from mtt_fast.training.images import RealImages, real_images

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    options, given = parse_options(argv), given_options(argv)
    asked, folder = asked_of_experts(options, given), options.folder()
    device = choose_device(options.device)
    check_same_method(folder, None)
    # an option of the experts that is not given says nothing of those that the run began with
    check_same_run(folder, options, outside_result(DistillOptions) | (set(FLAGS.values()) - given))
    if options.dry_run:
        with numerics(device, options.precision):
            print(dry_run(options, folder, device, asked))
        return
    if is_finished(folder, options, options.Iteration):
        return
    with numerics(device, options.precision):
        _run(options, asked, folder, device, shlex.join([*PROGRAM.split(), *argv]))


def _run(options: DistillOptions, asked: Mapping[str, Any], folder: Path, device: torch.device, command: str) -> None:
    data = options.load_data()
    network = options.network(data)
    check_fits(options, data, network, device, asked)
    student = describe_numerics(device, network, options.precision)
    real = real_images(data, options.zca, device)
    precision = precision_on(device, network, options.precision)
    steps = planned(options, network, (options.ipc * data.num_classes, *data.image_shape), device, precision)
    with only_user(folder):
        state = load_checkpoint(folder, device)
        if state is not None:
            check_same_images(folder, state.data, real.identity)
        experts = prepare_experts(options, real, network, asked)
        check_experts(options, data, network, asked)  # again, as they are now
        if state is not None:
            check_same_experts(folder, state, experts)
        options = with_true_experts(options, experts)
        gradient = f"gradient: {DESCRIPTIONS[options.gradient]}"
        write_config(folder, dataclasses.asdict(dataclasses.replace(options, resume=False)), gradient)
        log.info(
            "%s: %d synthetic images of %s, %s with %d parameters (%s), %d experts, on %s",
            folder, options.ipc * data.num_classes, data.name, options.model, network.num_parameters, student,
            len(experts), device_name(device),
        )  # fmt: skip
        log.info("%s", gradient)
        log.info("%s", steps)
        log.info("%s", options.evaluation_protocol().describe())
        distill(options, folder, real, network, experts, steps, command, state)


def distill(
    options: DistillOptions,
    folder: Path,
    real: RealImages,
    network: Trainable,
    experts: TrajectoryStore,
    steps: Plan,
    command: str,
    state: State | None,
) -> None:
    """Run iterations from `state`, the last checkpoint's, or from the start, to the end; write everything to `folder`.

    Student steps are done as the plan `steps` says, or in smaller pieces where memory runs out.
    Raises `Stopped` on Ctrl-C or SIGTERM, after the iteration under way and with everything saved; `InputError` if the
    distillation has diverged for good.
    """
    device = real.train.labels.device
    if state is None:
        state = initial_state(options, real, network, experts, min(options.max_experts or len(experts), len(experts)))
    else:
        log.info("continuing at iteration %d", state.iteration)
    iteration = lru_cache(maxsize=1)(partial(iteration_of, options, network))  # the last plan's
    metrics = MetricsLog(folder, state.iteration)
    first = lru_cache(maxsize=1)(partial(_first_images, options, real, network, experts, state.experts))
    run = Run(options, folder, real, network, options.evaluated_networks(real.data), experts, metrics, first)
    segment = partial(read_segment, run, sender(device), state.experts, state.images)
    ahead = prefetched(segment, turns(options, range(state.iteration, options.Iteration)))
    saved = time.monotonic()
    try:
        with stop_request() as stop, _progress(options, state) as bar, contextlib.closing(ahead):
            while True:
                due = state.iteration % options.eval_it == 0 or state.iteration == options.Iteration
                if due and not is_evaluated(run, state):
                    if options.gradient != "exact":
                        coming = turns(options, range(state.iteration, state.iteration + 1))
                        compare_with_exact(run, state, steps, [segment(turn) for turn in coming])
                    evaluate_sets(run, state, stop)
                    save_checkpoint(folder, state, metrics.evaluations)
                if state.iteration >= options.Iteration:
                    break
                began = time.monotonic()
                steps = _iterate(run, iteration, state, steps, list(islice(ahead, options.num_trajectories)))
                seconds = time.monotonic() - began
                state.seconds += seconds
                bar.set_postfix(_postfix(options, state, metrics, seconds), refresh=False)
                bar.update()
                if stop or time.monotonic() - saved > options.save_seconds:
                    save_checkpoint(folder, state, metrics.evaluations)
                    saved = time.monotonic()
                if stop:
                    raise Stopped("stopped by a signal", stop.signum)
            summarise(run, state, command, stop)
    except Stopped as stopped:
        save_checkpoint(folder, state, metrics.evaluations)
        raise Stopped(
            f"stopped at iteration {state.iteration} of {options.Iteration}, everything is saved; continue with: "
            f"{PROGRAM} --out {shlex.quote(str(folder))} --resume",
            stopped.signum,
        ) from None
    finally:
        metrics.close()


def _first_images(
    options: DistillOptions, real: RealImages, network: Trainable, store: TrajectoryStore, experts: int
) -> Tensor:
    return initial_images(options, real, network, store, experts)[0].pixels


def _iterate(
    run: Run, iteration: Callable[[Plan], Iteration], state: State, steps: Plan, segments: Sequence[Segment]
) -> Plan:
    """One iteration of the paper's algorithm 1: match a segment of an expert, or several, update the images and the rate.

    Returns the plan for the next one: a smaller one, if memory ran out.
    """
    (loss, *gradients), steps = with_smaller_pieces(
        steps, lambda steps: mean_gradients(iteration(steps), state, segments, teacher_of(run, state, steps))
    )
    value = float(loss)
    state.iteration += 1
    threshold = math.inf if run.options.threshold is None else run.options.threshold
    if not (math.isfinite(value) and all(bool(gradient.isfinite().all()) for gradient in gradients)):
        skip(run, state, value)
    elif value > threshold:
        reject_above_threshold(run, state, value, **log_fields(segments))
    else:
        update(run.options, state, *gradients)
        run.metrics.write("step", state.iteration, loss=value, lr=state.mean_lr, **log_fields(segments))
    return steps


def _progress(options: DistillOptions, state: State) -> tqdm:
    return tqdm(total=options.Iteration, initial=state.iteration, desc="distil", unit="it", smoothing=0.05)


def _postfix(options: DistillOptions, state: State, metrics: MetricsLog, seconds: float) -> dict[str, str]:
    batch, steps = options.batch_syn or len(state.images), options.num_trajectories * options.syn_steps
    shown = {"lr": f"{state.mean_lr:.4g}", "images/s": f"{steps * batch / seconds:.0f}"}
    if metrics.records and "loss" in metrics.records[-1]:
        shown = {"loss": f"{metrics.records[-1]['loss']:.4f}"} | shown
    if state.skipped or state.lr_kept:
        shown |= {"skipped": str(state.skipped), "lr kept": str(state.lr_kept)}
    if options.threshold is not None:
        shown |= {"above threshold": str(state.above_threshold)}
    return shown
