"""Distil a data set by matching training trajectories, the paper's algorithm 1: `python -m mtt_fast.distill`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import islice
from typing import Any

import torch

from mtt_fast.commands.earlier_run import options_to_continue
from mtt_fast.commands.network_trial import try_users_network
from mtt_fast.commands.run_loop import run_to_the_end
from mtt_fast.commands.seconds import Stopwatch, accumulate_seconds, timed_real_images
from mtt_fast.data import ImageData
from mtt_fast.data.catalogue import published
from mtt_fast.distill.cam_network import prepare_cam_network
from mtt_fast.distill.checks import check_fits, check_options_fit, load_state
from mtt_fast.distill.command_line import parse_with_given
from mtt_fast.distill.difficulty import check_same_scores, check_scores_are_there, read_difficulty
from mtt_fast.distill.dry_run import dry_run
from mtt_fast.distill.evaluation import evaluate_sets, summarise
from mtt_fast.distill.experts import (
    check_experts,
    check_missing_experts,
    experts_of_run,
    inventory_of,
    matched_experts,
    prepare_experts,
    remark_on_expert_count,
    requested_hyperparameters,
)
from mtt_fast.distill.frequencies import describe_frequencies
from mtt_fast.distill.gradients import (
    DESCRIPTIONS,
    PendingGradients,
    cached_iterations,
    compare_with_exact,
    finish_gradients,
    gradients_to_apply,
    iteration_of,
    start_gradients,
)
from mtt_fast.distill.initial import initial_images, initial_state
from mtt_fast.distill.options import PROGRAM, DistillOptions
from mtt_fast.distill.parametrised import (
    ImageParameters,
    check_parametrisation,
    check_same_parametrisation,
    describe_parametrisation,
)
from mtt_fast.distill.planning import plan_steps
from mtt_fast.distill.run import DistillRun
from mtt_fast.distill.segments import Segment, read_segment, segment_numbers
from mtt_fast.distill.updates import apply_gradients, check_converges
from mtt_fast.engine.memory_plan import Plan
from mtt_fast.engine.students.choice import describe_numerics, precision_on
from mtt_fast.kernels import Precision
from mtt_fast.networks.protocol import Trainable
from mtt_fast.recipes import recipe_about
from mtt_fast.runtime.interrupts import StopRequest
from mtt_fast.runtime.numerics import numerics
from mtt_fast.runtime.prefetch import prefetched, run_now, run_now_on_gpu, sender
from mtt_fast.runtime.provenance import choose_device, device_name
from mtt_fast.storage.checkpoint import State, save_checkpoint
from mtt_fast.storage.expert_checks import FLAGS, with_training_of
from mtt_fast.storage.metrics import MetricsLog
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.run_folder import check_not_taken, lock_folder, lock_inode, write_config
from mtt_fast.storage.trajectories import TrajectoryStore
from mtt_fast.training.images import RealImages

log = logging.getLogger(__name__)


def main(argv: Sequence[str], *, precision: Precision | None = None) -> None:
    """Run the command with the arguments `argv`.

    `precision` overrides `--precision` for the iterations; on a CPU the reference kernels emulate it.
    """
    seconds = Stopwatch()
    options, given = parse_with_given(argv)
    requested, folder = requested_hyperparameters(options.experts(), given), options.folder()
    device = choose_device(options.device)
    # options of the experts that are not given keep the values of the run's experts
    options, finished = options_to_continue(folder, None, options, given, may_differ=set(FLAGS.values()) - given)
    if finished and not options.dry_run:
        return
    # the files of a run say the same, however it was started and continued
    options = dataclasses.replace(options, resume=False, config=None)
    check_output_folder(folder, "choose another `out`")
    with numerics(device, options.precision):
        if options.dry_run:
            print(dry_run(options, folder, device, requested))
        else:
            _run(options, requested, device, shlex.join([*PROGRAM.split(), *argv]), seconds, precision)


def _run(
    options: DistillOptions,
    requested: Mapping[str, Any],
    device: torch.device,
    command: str,
    seconds: Stopwatch,
    precision: Precision | None,
) -> None:
    """Distil with `options`. `command` is the command line; for `requested` see `check_experts`, for `precision` see `main`."""
    folder, (data, network, image_parameters) = options.folder(), _checked_data(options, requested, device, seconds)
    difficulty = read_difficulty(options, data) if options.pix_init == "window" else None
    precision, numerics_text = _numerics_of(options, network, device, precision)
    real = timed_real_images(data, device, seconds, zca=options.zca)
    batch = options.batch_syn or options.ipc * data.num_classes
    try_users_network(options.model, network, data.image_shape, data.num_classes, device, batch)
    plan = plan_steps(
        options, network, (options.ipc * data.num_classes, *data.image_shape), device, precision,
        image_parameters=image_parameters,
    )  # fmt: skip
    with lock_folder(folder), accumulate_seconds(folder, seconds):
        lock = lock_inode(folder)
        state = load_state(options, data, device)
        if state is not None:
            check_same_scores(options, difficulty, state)
        with seconds.of("experts"):
            experts = _experts_to_match(options, requested, real, network, state)
            options = with_training_of(options, options.experts().record(), experts.metadata(0))  # for the record too
            cam = prepare_cam_network(options, real, state)
        initial = cache(partial(initial_images, options, real, network, experts, difficulty))
        parametrisation = initial().parametrisation if options.parametrisation else None
        if state is not None and parametrisation is not None:
            check_same_parametrisation(options, state, parametrisation)
        gradient = f"gradient: {DESCRIPTIONS[options.gradient]}"
        note = f"{gradient}; iterations in {precision}"  # which `precision` may leave open
        check_not_taken(folder, lock)  # experts may have been trained for hours
        write_config(folder, dataclasses.asdict(options), note)
        log.info(
            "%s: %d synthetic images of %s, %s with %d parameters (%s), %d experts, on %s",
            folder, options.ipc * data.num_classes, data.name, options.model, network.num_parameters, numerics_text,
            len(experts), device_name(device),
        )  # fmt: skip
        for line in (gradient, plan, options.evaluation_protocol().describe()):
            log.info("%s", line)
        if frequencies := describe_frequencies(options, data):
            log.info("images: %s", frequencies)
        if state is None:
            state = initial_state(options, initial(), real, network, experts, difficulty)
            state.cam_digest = "" if cam is None else cam.digest
        else:
            log.info("continuing at iteration %d", state.iteration)
        if parametrisation is not None:
            log.info("images: %s", describe_parametrisation(options, data, parametrisation))
        method = recipe_about(options.recipe)["method"] if options.recipe else "MTT"
        run = DistillRun(
            program=PROGRAM, command=command, method=method, options=options, folder=folder, lock=lock,
            real=real, network=network, evaluated=options.evaluated_networks(data), memory_budget=options.memory_budget,
            experts=experts, cam=cam, initial=initial, parametrisation=parametrisation,
            metrics=MetricsLog(folder, state.iteration), numerics=numerics_text, seconds=seconds,
        )  # fmt: skip
        distill(run, state, plan)


def _numerics_of(
    options: DistillOptions, network: Trainable, device: torch.device, precision: Precision | None
) -> tuple[Precision, str]:
    """Return the precision of the iterations, and the numerics in words; for `precision` see `main`."""
    if precision is not None:
        return precision, f"iterations in {precision}"
    return (
        precision_on(device, network, options.precision, iterations=True),
        describe_numerics(device, network, options.precision, iterations=True),
    )


def _checked_data(
    options: DistillOptions, requested: Mapping[str, Any], device: torch.device, seconds: Stopwatch
) -> tuple[ImageData, Trainable, ImageParameters]:
    """Return the real images, the network, and the numbers of a parametrisation's parameters, after all cheap checks.

    Checks that need no images run before the images are downloaded and packed. Raises `InputError` as `check_fits`.
    """
    check_scores_are_there(options)
    if (info := published(options.dataset, options.subset, options.res)) is not None:
        check_options_fit(options, info, options.network(info), device)
        image_parameters = check_parametrisation(options, info, device)
        check_missing_experts(options, inventory_of(options, info))
    with seconds.of("data"):
        data = options.load_data()
    network = options.network(data)
    check_fits(options, data, network, device, requested)
    if info is None:
        image_parameters = check_parametrisation(options, data, device)
    return data, network, image_parameters


def _experts_to_match(
    options: DistillOptions, requested: Mapping[str, Any], real: RealImages, network: Trainable, state: State | None
) -> TrajectoryStore:
    """Train the missing experts; return the experts to match.

    With `state` the run continues. Raises `InputError` if the experts do not fit, or experts of `state` are missing.
    """
    if state is None and (remark := remark_on_expert_count(options, inventory_of(options, real.data))):
        log.info("experts: %s", remark)
    experts = prepare_experts(options, real, network, requested)
    # again, since other processes may write into the same folder
    check_experts(options, real.data, network, real.train.labels.device, requested)
    if state is None:
        return matched_experts(options, experts)
    matched = experts_of_run(options, state, experts)
    if len(experts) > len(matched):
        log.info("the run began with %d of the %d experts, and matches no others", len(matched), len(experts))
    return matched


def distill(run: DistillRun, state: State, plan: Plan) -> None:
    """Run the iterations of the paper's algorithm 1 after `state`, and write the results to the run's folder.

    Each iteration matches one or several segments. Student steps follow `plan`; if memory runs out, later iterations use smaller
    pieces. Raises `Stopped` on Ctrl-C or SIGTERM, after the current iteration is finished and saved, and `Diverged` if many
    iterations in a row are not finite.
    """
    options, device = run.options, state.lr.device
    iteration_for = cached_iterations(partial(iteration_of, options, run.network))
    segment = partial(read_segment, run, sender(device), state.images)
    ahead = prefetched(segment, segment_numbers(options, range(state.iteration, options.Iteration)))

    def next_segments() -> Sequence[Segment]:
        return list(islice(ahead, options.num_trajectories))

    def start(segments: Callable[[], Sequence[Segment]]) -> PendingGradients:
        return start_gradients(state, segments(), plan, iteration_for)

    def iterations() -> Iterator[None]:
        """Yield after each iteration; on a GPU the next one is then already running."""
        nonlocal plan
        result = run_now_on_gpu(device, partial(start, run_now(next_segments)))
        while True:
            pending = result()
            segments = run_now(next_segments)  # read and drawn while a GPU computes
            loss, gradients, plan, repeated = finish_gradients(state, pending)
            state.repeated += repeated
            gradients = gradients_to_apply(run, state, gradients)
            kind, values = apply_gradients(options, state, pending.segments, loss, gradients, run.parametrisation)
            del result, pending, gradients  # memory may suffice for the gradients of one iteration only
            if state.iteration < options.Iteration:
                result = run_now_on_gpu(device, partial(start, segments))  # a GPU does not wait for the log
            run.metrics.write(kind, state.iteration, **values)
            if kind == "skip":
                check_converges(run, state)
            yield

    def evaluate(stop: StopRequest) -> None:
        if options.gradient != "exact":
            upcoming = segment_numbers(options, range(state.iteration, state.iteration + 1))
            compare_with_exact(run, state, plan, [segment(number) for number in upcoming])
        evaluate_sets(run, state, stop)

    with contextlib.closing(ahead):
        run_to_the_end(
            run, state, title="distil", iterate=partial(next, iterations()), progress_fields=partial(_progress_fields, run, state), evaluate=evaluate,
            save=partial(save_checkpoint, run.folder, state), summarise=partial(summarise, run, state),
        )  # fmt: skip


def _progress_fields(run: DistillRun, state: State, seconds: float) -> dict[str, str]:
    """Return the fields of the progress bar after an iteration that took `seconds`."""
    options, record = run.options, run.metrics.records[-1]
    images = options.num_trajectories * options.syn_steps * (options.batch_syn or len(state.images))
    # from the record, since reading `state.lr` would wait for the next iteration on a GPU
    fields = {"loss": f"{record['loss']:.4f}"} if "loss" in record else {}
    fields |= {"lr": f"{record['lr']:.4g}"} if "lr" in record else {}
    fields |= {"images/s": f"{images / seconds:.0f}"}
    if state.skipped or state.lr_kept:
        fields |= {"skipped": str(state.skipped), "lr kept": str(state.lr_kept)}
    if options.threshold is not None:
        fields |= {"above threshold": str(state.above_threshold)}
    return fields
