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
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mtt_fast import cli
from mtt_fast.arithmetic import arithmetic, describe_arithmetic, precision_on
from mtt_fast.distillation.assessment import assess, assessed, summarise
from mtt_fast.distillation.checks import check_fits
from mtt_fast.distillation.experts import (
    asked_of_experts,
    check_experts,
    check_same_experts,
    prepare_experts,
    with_true_experts,
)
from mtt_fast.distillation.forecast import forecast
from mtt_fast.distillation.gradients import DESCRIPTIONS, compare_with_exact, iteration_of, mean_gradients, teacher_of
from mtt_fast.distillation.initial import initial_images, initial_state
from mtt_fast.distillation.job import Job
from mtt_fast.distillation.options import PROGRAM, DistillOptions, given_options, parse_options
from mtt_fast.distillation.segments import Segment, places, planned, read_segment, turns
from mtt_fast.distillation.updates import leave, skip, update
from mtt_fast.expert_checks import FLAGS
from mtt_fast.interrupts import Stopped, stop_request
from mtt_fast.iteration import Iteration
from mtt_fast.memory import Plan, with_smaller_pieces
from mtt_fast.models import Trainable
from mtt_fast.option_fields import outside_result
from mtt_fast.options import RealImages, real_images
from mtt_fast.prefetch import prefetched, sender
from mtt_fast.provenance import choose_device, device_name
from mtt_fast.run_folder import (
    MetricsLog,
    State,
    check_same_images,
    check_same_method,
    check_same_run,
    is_finished,
    load_checkpoint,
    only_user,
    save_checkpoint,
    write_config,
)
from mtt_fast.trajectories import TrajectoryStore

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
        with arithmetic(device, options.precision):
            print(forecast(options, folder, device, asked))
        return
    if is_finished(folder, options, options.Iteration):
        return
    with arithmetic(device, options.precision):
        _run(options, asked, folder, device, shlex.join([*PROGRAM.split(), *argv]))


def _run(options: DistillOptions, asked: Mapping[str, Any], folder: Path, device: torch.device, command: str) -> None:
    data = options.load_data()
    network = options.network(data)
    check_fits(options, data, network, device, asked)
    student = describe_arithmetic(device, network, options.precision)
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
    job = Job(options, folder, real, network, options.evaluated_networks(real.data), experts, metrics, first)
    segment = partial(read_segment, job, sender(device), state.experts, state.images)
    ahead = prefetched(segment, turns(options, range(state.iteration, options.Iteration)))
    saved = time.monotonic()
    try:
        with stop_request() as stop, _progress(options, state) as bar, contextlib.closing(ahead):
            while True:
                due = state.iteration % options.eval_it == 0 or state.iteration == options.Iteration
                if due and not assessed(job, state):
                    if options.gradient != "exact":
                        coming = turns(options, range(state.iteration, state.iteration + 1))
                        compare_with_exact(job, state, steps, [segment(turn) for turn in coming])
                    assess(job, state, stop)
                    save_checkpoint(folder, state, metrics.evaluations)
                if state.iteration >= options.Iteration:
                    break
                began = time.monotonic()
                steps = _iterate(job, iteration, state, steps, list(islice(ahead, options.num_trajectories)))
                seconds = time.monotonic() - began
                state.seconds += seconds
                bar.set_postfix(_postfix(options, state, metrics, seconds), refresh=False)
                bar.update()
                if stop or time.monotonic() - saved > options.save_seconds:
                    save_checkpoint(folder, state, metrics.evaluations)
                    saved = time.monotonic()
                if stop:
                    raise Stopped("stopped by a signal", stop.signum)
            summarise(job, state, command, stop)
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
    job: Job, iteration: Callable[[Plan], Iteration], state: State, steps: Plan, segments: Sequence[Segment]
) -> Plan:
    """One iteration of the paper's algorithm 1: match a segment of an expert, or several, update the images and the rate.

    Returns the plan for the next one: a smaller one, if memory ran out.
    """
    (loss, *gradients), steps = with_smaller_pieces(
        steps, lambda steps: mean_gradients(iteration(steps), state, segments, teacher_of(job, state, steps))
    )
    value = float(loss)
    state.iteration += 1
    threshold = math.inf if job.options.threshold is None else job.options.threshold
    if not (math.isfinite(value) and all(bool(gradient.isfinite().all()) for gradient in gradients)):
        skip(job, state, value)
    elif value > threshold:
        leave(job, state, value, **places(segments))
    else:
        update(job.options, state, *gradients)
        job.metrics.write("step", state.iteration, loss=value, lr=state.mean_lr, **places(segments))
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


if __name__ == "__main__":
    sys.exit(cli.run(main))
