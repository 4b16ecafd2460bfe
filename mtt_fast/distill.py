"""Distil a data set by matching training trajectories: `python -m mtt_fast.distill`.

The paper's algorithm 1. Missing experts are trained first. Everything is written to a run folder from which the run
continues, whatever stopped it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mtt_fast import cli
from mtt_fast.arithmetic import arithmetic, describe_arithmetic, precision_on
from mtt_fast.augment import SiameseAugment, augment_by_strategy, augment_with
from mtt_fast.convnet import ConvNet
from mtt_fast.distill_options import NOT_PART_OF_THE_RESULT, PROGRAM, DistillOptions, parse_options
from mtt_fast.draws import Draw, draw_steps
from mtt_fast.errors import InputError
from mtt_fast.evaluate import (
    REAL_IMAGES_LR,
    Accuracy,
    as_training_images,
    evaluate,
    random_subset,
)
from mtt_fast.experts import train_missing_experts
from mtt_fast.files import write_json
from mtt_fast.interrupts import Stopped, StopRequest, stop_request
from mtt_fast.iteration import Iteration, planned_iteration
from mtt_fast.kernels import Precision
from mtt_fast.memory import Plan, plan, with_smaller_pieces
from mtt_fast.options import RealImages, buffer_folder, real_images
from mtt_fast.pictures import save_curves, save_grid
from mtt_fast.prefetch import prefetched, sender
from mtt_fast.provenance import choose_device, device_name, peak_memory_bytes, versions
from mtt_fast.run_folder import (
    SUMMARY,
    MetricsLog,
    State,
    load_checkpoint,
    only_user,
    read_config,
    save_checkpoint,
    write_config,
)
from mtt_fast.seeding import generator_for
from mtt_fast.synthetic import SyntheticDataset
from mtt_fast.trajectories import TrajectoryStore, check_compatible
from mtt_fast.whitening import Whitening

log = logging.getLogger(__name__)

PIXEL_MOMENTUM = 0.5
_GIVE_UP_AFTER = 25  # iterations without a finite gradient


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    options = parse_options(argv)
    folder = options.folder()
    device = choose_device(options.device)
    _check_same_run(folder, options)
    summary = _finished(folder, options)
    if summary:
        log.info("%s is finished: %s", folder, summary["text"])
        return
    with arithmetic(device, options.precision):
        _run(options, folder, device, shlex.join([*PROGRAM.split(), *argv]))


def _run(options: DistillOptions, folder: Path, device: torch.device, command: str) -> None:
    data = options.load_data()
    network = options.network(data)
    if options.batch_syn and options.batch_syn > options.ipc * data.num_classes:
        raise InputError(
            f"--batch_syn {options.batch_syn}: expected at most the {options.ipc * data.num_classes} synthetic images there are "
            f"({options.ipc} for each of {data.num_classes} classes); leave it out to use all"
        )
    student = describe_arithmetic(device, network, options.precision)
    real = real_images(data, options.zca, device)
    precision = precision_on(device, network, options.precision)
    steps = _planned(options, network, (options.ipc * data.num_classes, *data.image_shape), device, precision)
    with only_user(folder):
        experts = _experts(options, real, network)
        write_config(folder, dataclasses.asdict(dataclasses.replace(options, resume=False)))
        log.info(
            "%s: %d synthetic images of %s, %s with %d parameters (%s), %d experts, on %s",
            folder, options.ipc * data.num_classes, data.name, options.model, network.num_parameters, student,
            len(experts), device_name(device),
        )  # fmt: skip
        log.info("%s", steps)
        distill(options, folder, real, network, experts, steps, command)


def _check_same_run(folder: Path, options: DistillOptions) -> None:
    before = read_config(folder)
    if before is None:
        return
    before = dataclasses.asdict(DistillOptions()) | before  # an option that is younger than the run
    for name, value in dataclasses.asdict(options).items():
        if name not in NOT_PART_OF_THE_RESULT and before[name] != value:
            raise InputError(
                f"{folder}: holds a run with --{name} {before[name]}, not {value}; choose another --out "
                f"(or delete the folder)"
            )


def _finished(folder: Path, options: DistillOptions) -> dict[str, Any] | None:
    path = folder / SUMMARY
    if not path.exists():
        return None
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return summary if summary["iterations"] >= options.Iteration else None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: broken; delete it, and the same command writes it again") from error


def _experts(options: DistillOptions, real: RealImages, network: ConvNet) -> TrajectoryStore:
    needed = options.max_start_epoch + options.expert_epochs
    folder = buffer_folder(options.buffer_path, real.data, options.model, options.zca)
    store = TrajectoryStore(folder) if folder.is_dir() else None
    if (store is None or len(store) == 0) and needed > options.train_epochs:
        raise InputError(
            f"--max_start_epoch {options.max_start_epoch} + --expert_epochs {options.expert_epochs}: experts of "
            f"--train_epochs {options.train_epochs} end before that; raise --train_epochs to {needed} or lower the others"
        )
    if store is None or len(store) < (options.max_experts or options.num_experts):
        store = train_missing_experts(
            folder, options.num_experts, real, network, options.experts(), seed=options.seed,
            precision=precision_on(real.train.labels.device, network, options.precision),
            at_once=options.networks_at_once, memory_budget=options.memory_budget,
        )  # fmt: skip
    for expert in range(len(store)):
        check_compatible(
            store.metadata(expert),
            layout=network.layout.describe(),
            fingerprint=real.data.fingerprint,
            whitening=real.whitening,
            needed_epochs=needed,
            epochs=store.epochs(expert),
            where=str(folder),
        )
    return store


def distill(
    options: DistillOptions,
    folder: Path,
    real: RealImages,
    network: ConvNet,
    experts: TrajectoryStore,
    steps: Plan,
    command: str,
) -> None:
    """Run iterations from the last checkpoint, or from the start, to the end; write everything to `folder`.

    Student steps are done as the plan `steps` says, or in smaller pieces where memory runs out.
    Raises `Stopped` on Ctrl-C or SIGTERM, after the iteration under way and with everything saved; `InputError` if the
    distillation has diverged for good.
    """
    device = real.train.labels.device
    state = load_checkpoint(folder, device)
    if state is None:
        state = _initial_state(options, real, min(options.max_experts or len(experts), len(experts)))
    elif len(experts) < state.experts:
        raise InputError(
            f"{folder}: the run was started with {state.experts} experts, found {len(experts)}; "
            f"say --num_experts {state.experts}, or give back its --buffer_path"
        )
    else:
        log.info("continuing at iteration %d", state.iteration)
    augment, precision = _augmentation(options), precision_on(device, network, options.precision)
    draw = None if augment is None else augment.draw_parameters
    iteration = lru_cache(maxsize=1)(partial(_iteration, options, network))  # the last plan's
    metrics = MetricsLog(folder, state.iteration)
    job = _Job(options, folder, real, network, experts, metrics, precision, draw, iteration, sender(device))
    segment = partial(_segment, job, state.experts, state.images)
    ahead = prefetched(segment, range(state.iteration, options.Iteration))
    saved = time.monotonic()
    try:
        with stop_request() as stop, _progress(options, state) as bar, contextlib.closing(ahead):
            while True:
                due = state.iteration % options.eval_it == 0 or state.iteration == options.Iteration
                if due and metrics.find("evaluation", state.iteration) is None:
                    _evaluate(job, state, stop)
                    save_checkpoint(folder, state)
                if state.iteration >= options.Iteration:
                    break
                began = time.monotonic()
                steps = _iterate(job, state, steps, next(ahead))
                seconds = time.monotonic() - began
                state.seconds += seconds
                bar.set_postfix(_postfix(options, state, metrics, seconds), refresh=False)
                bar.update()
                if stop or time.monotonic() - saved > options.save_seconds:
                    save_checkpoint(folder, state)
                    saved = time.monotonic()
                if stop:
                    raise Stopped("stopped by a signal", stop.signum)
            _summarise(job, state, command, stop)
    except Stopped as stopped:
        save_checkpoint(folder, state)
        raise Stopped(
            f"stopped at iteration {state.iteration} of {options.Iteration}, everything is saved; continue with: "
            f"{PROGRAM} --out {shlex.quote(str(folder))} --resume",
            stopped.signum,
        ) from None
    finally:
        metrics.close()


@dataclass(frozen=True)
class _Job:
    """What stays the same over all iterations."""

    options: DistillOptions
    folder: Path
    real: RealImages
    network: ConvNet
    experts: TrajectoryStore
    metrics: MetricsLog
    precision: Precision
    draw: Draw | None  # the augmentation's parameters
    iteration: Callable[[Plan], Iteration]
    send: Callable[[tuple[Tensor, ...]], Callable[[], tuple[Tensor, ...]]]


def _augmentation(options: DistillOptions) -> SiameseAugment | None:
    """Return that of the student's steps."""
    return None if options.no_aug else augment_by_strategy(options.strategy)


def _iteration(options: DistillOptions, network: ConvNet, steps: Plan) -> Iteration:
    """Return the function that does every iteration as the plan `steps` says."""
    # each iteration begins a permutation of its own, so the steps of all have the same lengths
    batches = student_batches(steps.work.images[0], options.batch_syn, options.syn_steps, torch.Generator())
    augment = None if _augmentation(options) is None else augment_with
    return planned_iteration(network, steps, augment, tuple(len(index) for index in batches))


def _initial_state(options: DistillOptions, real: RealImages, experts: int) -> State:
    generator = generator_for(options.seed, "initial images")
    start = random_subset(real.train, real.data.num_classes, options.ipc, generator)
    images = start.pixels
    if options.pix_init == "noise":
        images = torch.randn(images.shape, generator=generator).to(images.device)
    lr = torch.tensor(options.lr_teacher, device=images.device)
    return State(0, experts, images, start.labels.clone(), lr, torch.zeros_like(images), torch.zeros_like(lr))


def _planned(
    options: DistillOptions, network: ConvNet, images: Sequence[int], device: torch.device, precision: Precision
) -> Plan:
    """How the student steps of each iteration, on `images` (n, C, H, W), fit into memory."""
    return plan(
        network,
        images=images,
        steps=options.syn_steps,
        batch=options.batch_syn,
        memory_budget=options.memory_budget,
        microbatch=options.microbatch,
        device=device,
        augment=_augmentation(options) is not None,
        precision=precision,
    )


class _Segment(NamedTuple):
    """What one iteration has to match, and what is random in it."""

    expert: int
    epoch: int
    tensors: Callable[[], tuple[Tensor, ...]]  # start, target (P,) and those of `StepDraws`, on the device


def _segment(job: _Job, experts: int, images: Tensor, iteration: int) -> _Segment:
    """Read and draw what an iteration needs; all of it follows from the seed and the iteration's number alone.

    `experts` take turns; of `images` only shape and dtype are looked at. Called in a thread.
    """
    options = job.options
    generator = generator_for(options.seed, "iteration", iteration)
    expert = _expert_of(options.seed, experts, iteration)
    epoch = int(torch.randint(options.max_start_epoch, (), generator=generator))
    start, target = (job.experts.read(expert, row) for row in (epoch, epoch + options.expert_epochs))
    if start.equal(target):
        raise InputError(
            f"{job.experts.folder}: expert {expert} did not move between epochs {epoch} and "
            f"{epoch + options.expert_epochs}; train it again with a larger learning rate, or leave it out"
        )
    batches = student_batches(len(images), options.batch_syn, options.syn_steps, generator)
    draws = draw_steps(batches, images.shape[1:], images.dtype, job.draw, generator)
    return _Segment(expert, epoch, job.send((start, target, *draws.tensors())))


def _iterate(job: _Job, state: State, steps: Plan, segment: _Segment) -> Plan:
    """One iteration of the paper's algorithm 1: match one segment of one expert, update the images and the rate.

    Returns the plan for the next one: a smaller one, if memory ran out.
    """
    start, target, *draws = segment.tensors()
    inputs = (start, target, state.images, state.labels, state.lr, *draws)
    found, steps = with_smaller_pieces(steps, lambda steps: job.iteration(steps)(*inputs))
    loss, images_gradient, lr_gradient = found
    value = float(loss)
    state.iteration += 1
    if math.isfinite(value) and bool(images_gradient.isfinite().all()) and bool(lr_gradient.isfinite()):
        _update(job.options, state, images_gradient, lr_gradient)
        job.metrics.write(
            "step", state.iteration, loss=value, lr=float(state.lr), start_epoch=segment.epoch, expert=segment.expert
        )
    else:
        _skip(job, state, value)
    return steps


def _expert_of(seed: int, count: int, iteration: int) -> int:
    """Visit the experts in random order, each once before any comes again."""
    order = torch.randperm(count, generator=generator_for(seed, "expert order", iteration // count))
    return int(order[iteration % count])


def student_batches(count: int, batch: int | None, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Return the indices of each student step as the public code draws them.

    A random permutation of all `count` images is cut into chunks of `batch` (all if None) which are used from the end,
    so that a shorter last chunk comes first; a new permutation follows when they are used up.
    """
    batches: list[Tensor] = []
    while len(batches) < steps:
        batches += reversed(torch.randperm(count, generator=generator).split(batch or count))
    return batches[:steps]


def _update(options: DistillOptions, state: State, images_gradient: Tensor, lr_gradient: Tensor) -> None:
    """SGD with momentum on pixels and learning rate; the learning rate stays positive."""
    state.images_velocity.mul_(PIXEL_MOMENTUM).add_(images_gradient)
    state.images.sub_(state.images_velocity, alpha=options.lr_img)
    state.lr_velocity.mul_(PIXEL_MOMENTUM).add_(lr_gradient)
    proposed = state.lr - options.lr_lr * state.lr_velocity
    if proposed > 0:
        state.lr = proposed
        return
    if not state.lr_kept:
        log.warning(
            "iteration %d: the update would make the student's learning rate negative (%.3g); it is kept at %.3g. "
            "If this goes on, lower --lr_lr",
            state.iteration, float(proposed), float(state.lr),
        )  # fmt: skip
    state.lr_kept += 1
    state.lr_velocity.zero_()


def _skip(job: _Job, state: State, loss: float) -> None:
    """Count an iteration whose gradient is not finite; give up if no other kind comes any more."""
    state.skipped += 1
    if state.skipped == 1:
        log.warning(
            "iteration %d: the student diverged (loss %s) and the step is skipped. If this goes on, lower --lr_img, --lr_lr or "
            "--lr_teacher",
            state.iteration, loss,
        )  # fmt: skip
    job.metrics.write("skip", state.iteration, skipped=state.skipped)
    kinds = [record["kind"] for record in job.metrics.records if record["kind"] in ("step", "skip")]
    if kinds[-_GIVE_UP_AFTER:] == ["skip"] * _GIVE_UP_AFTER:
        raise InputError(
            f"{job.folder}: {_GIVE_UP_AFTER} iterations in a row diverged at a student's learning rate of {float(state.lr):.3g}; "
            "the last checkpoint is good; start again with a smaller --lr_lr, --lr_img or --lr_teacher and another --out"
        )


def _distilled(job: _Job, state: State) -> SyntheticDataset:
    data, transform = job.real.data, job.real.transform
    return SyntheticDataset(
        state.images.detach().clone(),
        state.labels,
        state.lr,
        class_names=data.class_names,
        mean=data.mean,
        std=data.std,
        whitening=transform if isinstance(transform, Whitening) else None,
        recipe=dataclasses.asdict(job.options) | {"iterations": state.iteration},
        versions=versions(),
    )


def _evaluate(job: _Job, state: State, stop: StopRequest) -> None:
    """Test fresh networks on the images as they are now, and write images and pictures."""
    began = time.monotonic()
    options, synthetic = job.options, _distilled(job, state)
    images = as_training_images(synthetic, state.lr.device)
    result = evaluate(
        job.network,
        lambda _: images,
        job.real.test,
        float(state.lr),
        options.protocol(),
        networks=options.num_eval,
        seed=options.seed,
        place=(state.iteration,),
        stop=stop,
        precision=job.precision,
        at_once=options.networks_at_once,
        memory_budget=options.memory_budget,
    )
    state.seconds_evaluation += time.monotonic() - began
    log.info("iteration %d: %s", state.iteration, result)
    best = max(
        (record["accuracy_mean"] for record in job.metrics.records if record["kind"] == "evaluation"), default=-1.0
    )
    if result.mean > best:
        synthetic.save(job.folder / "best.safetensors")
    synthetic.save(job.folder / "synthetic.safetensors")
    job.metrics.write(
        "evaluation", state.iteration, accuracy_mean=result.mean, accuracy_std=result.std, networks=len(result.values)
    )
    _draw(job, state, synthetic)


def _draw(job: _Job, state: State, synthetic: SyntheticDataset) -> None:
    """Write images.png (what the run began with, and the images as they are now) and curves.png."""
    options, metrics = job.options, job.metrics
    began = dataclasses.replace(synthetic, images=_initial_state(options, job.real, state.experts).images)
    panels = []
    for iteration, pictures in {0: began.pictures(), state.iteration: synthetic.pictures()}.items():
        title = f"{options.pix_init} images" if iteration == 0 else f"distilled, {iteration} iterations"
        record = metrics.find("evaluation", iteration)
        accuracy = f": networks trained on them reach {_percent(record)}" if record else ""
        panels.append((f"{job.real.data.name}, {options.ipc} a class, {title}{accuracy}", pictures))
    save_grid(job.folder / "images.png", panels, state.labels, job.real.data.class_names)
    save_curves(job.folder / "curves.png", metrics.records)


def _summarise(job: _Job, state: State, command: str, stop: StopRequest) -> None:
    """Compare with random real images and the experts, and write summary.json: the run is finished."""
    options, metrics = job.options, job.metrics
    baseline = metrics.find("baseline") or _evaluate_baseline(job, state, stop)
    evaluations = [record for record in metrics.records if record["kind"] == "evaluation"]
    last, best = evaluations[-1], max(evaluations, key=lambda record: float(record["accuracy_mean"]))
    final = Accuracy(tuple(job.experts.metadata(expert).accuracy[-1] for expert in range(len(job.experts))))
    text = (
        f"distilled {_percent(last)}, random real images {_percent(baseline)}, "
        f"experts on all the data {100 * final.mean:.2f} % ± {100 * final.std:.2f}"
    )
    device = state.lr.device
    save_curves(job.folder / "curves.png", metrics.records, float(baseline["accuracy_mean"]))
    write_json(
        job.folder / SUMMARY,
        {
            "text": text,
            "accuracy": {
                "distilled": _accuracy_record(last),
                "random_real_images": _accuracy_record(baseline) | {"lr": REAL_IMAGES_LR},
                "experts": {"mean": final.mean, "std": final.std, "n": len(final.values)},
                "best_evaluation_chosen_on_the_test_images": _accuracy_record(best) | {"iteration": best["iteration"]},
            },
            "iterations": state.iteration,
            "skipped_iterations": state.skipped,
            "learning_rate_kept": state.lr_kept,
            "learning_rate": float(state.lr),
            "seconds": {"iterations": state.seconds, "evaluations": state.seconds_evaluation},
            "peak_memory_bytes": peak_memory_bytes(device),
            "device": device_name(device),
            "arithmetic": describe_arithmetic(device, job.network, options.precision),
            "versions": versions(),
            "command": command,
            "options": dataclasses.asdict(options),
        },
    )
    log.info("%s: %s", job.folder, text)


def _evaluate_baseline(job: _Job, state: State, stop: StopRequest) -> dict[str, Any]:
    """Measure random real images, as many as the synthetic ones and drawn anew for each network."""
    began = time.monotonic()
    options, real = job.options, job.real
    result = evaluate(
        job.network,
        lambda generator: random_subset(real.train, real.data.num_classes, options.ipc, generator),
        real.test,
        REAL_IMAGES_LR,
        options.protocol(),
        networks=options.num_eval,
        seed=options.seed,
        name="random real images",
        stop=stop,
        precision=job.precision,
        at_once=options.networks_at_once,
        memory_budget=options.memory_budget,
    )
    state.seconds_evaluation += time.monotonic() - began
    job.metrics.write(
        "baseline", state.iteration, accuracy_mean=result.mean, accuracy_std=result.std, networks=len(result.values)
    )
    return job.metrics.records[-1]


def _accuracy_record(record: dict[str, Any]) -> dict[str, Any]:
    return {"mean": record["accuracy_mean"], "std": record["accuracy_std"], "n": record["networks"]}


def _percent(record: dict[str, Any]) -> str:
    return f"{100 * record['accuracy_mean']:.2f} % ± {100 * record['accuracy_std']:.2f}"


def _progress(options: DistillOptions, state: State) -> tqdm:
    return tqdm(total=options.Iteration, initial=state.iteration, desc="distil", unit="it", smoothing=0.05)


def _postfix(options: DistillOptions, state: State, metrics: MetricsLog, seconds: float) -> dict[str, str]:
    batch = options.batch_syn or len(state.images)
    shown = {"lr": f"{float(state.lr):.4g}", "images/s": f"{options.syn_steps * batch / seconds:.0f}"}
    if metrics.records and "loss" in metrics.records[-1]:
        shown = {"loss": f"{metrics.records[-1]['loss']:.4f}"} | shown
    if state.skipped or state.lr_kept:
        shown |= {"skipped": str(state.skipped), "lr kept": str(state.lr_kept)}
    return shown


if __name__ == "__main__":
    sys.exit(cli.run(main))
