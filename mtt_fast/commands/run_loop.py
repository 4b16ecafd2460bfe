"""The loop that distillations and baselines share: iterate, evaluate, save, and write sets, metrics, pictures and the summary."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from mtt_fast.commands.accuracies import accuracy_by_network, accuracy_fields, accuracy_record, format_accuracy
from mtt_fast.commands.network_trial import named_after_option
from mtt_fast.commands.pictures import save_grid, save_snapshot
from mtt_fast.commands.plots import save_curves
from mtt_fast.commands.seconds import Part, Stopwatch, describe_seconds, save_seconds
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.data.whitening import Whitening
from mtt_fast.engine.students.choice import precision_on
from mtt_fast.errors import InputError
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.interrupts import Stopped, StopRequest, raise_if_stopped, stop_request
from mtt_fast.runtime.memory_info import AUTO
from mtt_fast.runtime.provenance import device_name, peak_memory_bytes, versions
from mtt_fast.storage.metrics import MetricsLog
from mtt_fast.storage.records import write_record
from mtt_fast.storage.run_files import BEST, BEST_EMA, EMA, HISTORY, SUMMARY, SYNTHETIC
from mtt_fast.storage.run_folder import check_not_taken, lock_inode
from mtt_fast.training.evaluation import Accuracy, evaluate
from mtt_fast.training.images import Images, RealImages, as_training_images

log = logging.getLogger(__name__)

Record = Mapping[str, Any]
"""A line of metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The constants of a run: options, data and networks."""

    program: str
    """the command that continues the run, without its arguments"""
    command: str
    """the command line, for the summary"""
    method: str
    options: Any
    """the options, of a class of the method"""
    folder: Path
    lock: tuple[int, int] | None
    """the lock that this process holds in `folder` (`lock_inode`); it differs if a later run has replaced the folder"""
    real: RealImages
    network: Trainable
    evaluated: Mapping[str, Trainable]
    """the networks of an evaluation by name; the first decides which set is best"""
    memory_budget: str = AUTO
    """memory for the networks that an evaluation trains at the same time"""
    numerics: str
    """student and precision, as text"""
    seconds: Stopwatch = field(default_factory=Stopwatch)
    """the run's time by purpose"""


@dataclass(frozen=True, kw_only=True)
class LoopRun(Run):
    """A run in iterations, whose options have `Iteration`, `eval_it` and `save_seconds`."""

    metrics: MetricsLog

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl of one `kind`."""
        return [record for record in self.metrics.records if record["kind"] == kind]


class Progress(Protocol):
    """The counter that every run keeps in its checkpoint."""

    iteration: int  # number of completed iterations


class SetNames(NamedTuple):
    """The names of an evaluated set, and of the best one so far, in the log, in the summary and as files."""

    words: str
    name: str
    best_name: str
    last: str
    best: str


SET_NAMES = {
    "evaluation": SetNames("distilled", "distilled", "best_evaluation_chosen_on_the_test_images", SYNTHETIC, BEST),
    "ema_evaluation": SetNames(
        "average over the iterations", "ema", "best_ema_evaluation_chosen_on_the_test_images", EMA, BEST_EMA
    ),
}
"""The names of each set by the kind of its evaluation records in metrics.jsonl."""


def run_to_the_end(
    run: LoopRun,
    progress: Progress,
    *,
    title: str,
    iterate: Callable[[], None],
    progress_fields: Callable[[float], Mapping[str, str]],
    evaluate: Callable[[StopRequest], None],
    save: Callable[[Sequence[Record]], None],
    summarise: Callable[[StopRequest], None],
) -> None:
    """Run iterations from `progress` to the last; evaluate every `eval_it` iterations, save at intervals, and summarise.

    `iterate` does the next iteration and counts it. `progress_fields` returns the fields of the progress bar from the seconds of the last
    iteration. `evaluate` evaluates the set unless an earlier process did, and draws it. `save` writes the checkpoint with the
    evaluations' records. Raises `Stopped` on Ctrl-C or SIGTERM, after the current iteration and with everything saved, `InputError` if
    the run's folder was moved or deleted, and any exception of these functions.
    """
    options, metrics, seconds_of = run.options, run.metrics, run.seconds.of
    saved = time.monotonic()
    part: Part = "first_iteration"  # compiles kernels, and on CUDA captures the graph

    def save_state() -> None:
        with seconds_of("saving"):
            save(metrics.evaluations)
            save_seconds(run.folder, run.seconds)

    def check_in_place() -> None:
        """Raise `InputError` if the folder is no longer the one that this process has locked; a new run's is left alone."""
        check_not_taken(run.folder, run.lock)
        if lock_inode(run.folder) == run.lock:
            return
        save_state()
        raise InputError(
            f"{run.folder}: was moved or deleted during the run; its state at iteration {progress.iteration} is saved in a new folder of this "
            "name, where the command that began the run, with all its options, continues it"
        )

    def save_progress() -> None:
        check_in_place()
        save_state()

    with (
        contextlib.closing(metrics),
        stop_request() as stop,
        tqdm(total=options.Iteration, initial=progress.iteration, desc=title, unit="it", smoothing=0.05) as bar,
    ):
        try:
            if progress.iteration == 0:
                save_progress()  # the checkpoint names the experts, even if the first evaluation is interrupted
            while True:
                if progress.iteration % options.eval_it == 0 or progress.iteration >= options.Iteration:
                    check_in_place()
                    with seconds_of("evaluations"):
                        evaluate(stop)
                    with seconds_of("saving"):
                        draw_curves(run)
                    save_progress()
                if progress.iteration >= options.Iteration:
                    break
                start = time.monotonic()
                with seconds_of(part):
                    iterate()
                part = "iterations"
                bar.set_postfix(progress_fields(time.monotonic() - start), refresh=False)
                bar.update()
                raise_if_stopped(stop, "stopped by a signal")
                if time.monotonic() - saved > options.save_seconds:
                    save_progress()
                    saved = time.monotonic()
            check_in_place()
            with seconds_of("saving"):
                summarise(stop)
        except Stopped as stopped:
            save_progress()  # in the block of `stop_request`, so that a terminal that ends does not cut it short
            raise Stopped(
                f"stopped at iteration {progress.iteration} of {options.Iteration}, everything is saved; continue with: "
                f"{run.program} --out {shlex.quote(str(run.folder))} --resume",
                stopped.signum,
            ) from None


def set_to_save(
    run: Run, images: Tensor, labels: Tensor, lr: Tensor, *, label_kind: str, recipe: dict[str, Any], **others: Any
) -> SyntheticDataset:
    """Return copies of `images` (n, C, H, W) and `labels`, with the learning rate `lr` (), as the set to save.

    `recipe` is recorded besides the options; `others` are further fields of `SyntheticDataset`.
    """
    data, transform = run.real.data, run.real.transform
    return SyntheticDataset(
        images.detach().clone(), labels.detach().clone(), lr.detach().to(images.device), data.class_names, data.mean,
        data.std, transform if isinstance(transform, Whitening) else None, label_kind,
        recipe=dataclasses.asdict(run.options) | recipe, versions=versions(), dataset=data.name,
        fingerprint=data.fingerprint, **others,
    )  # fmt: skip


def evaluate_and_save(
    run: LoopRun, progress: Progress, kind: str, synthetic: SyntheticDataset, stop: StopRequest, *, words: str = ""
) -> dict[str, Accuracy]:
    """Evaluate the set, write it (also as the best one, if it is) and a record of `kind`; return the accuracies by network.

    Do nothing, and return {}, if an earlier process wrote this record.
    """
    if run.metrics.find(kind, progress.iteration):
        return {}
    results = evaluate_set(run, synthetic, progress.iteration, stop, words=words)
    first, *_ = results.values()
    with run.seconds.of("saving"):
        if first.mean > max((record["accuracy_mean"] for record in run.records(kind)), default=-1.0):
            synthetic.save(run.folder / SET_NAMES[kind].best)
        synthetic.save(run.folder / SET_NAMES[kind].last)
        run.metrics.write(kind, progress.iteration, **accuracy_fields(results))
    return results


def evaluate_set(
    run: Run, synthetic: SyntheticDataset, iteration: int, stop: StopRequest, *, words: str = ""
) -> dict[str, Accuracy]:
    """Return the accuracy of each evaluated network by name, trained on the set as it is after `iteration`.

    The networks start from the same parameters for every set. `words` precede a network's name in warnings and bars.
    """
    images, lr = as_training_images(synthetic, run.real.test.labels.device), float(synthetic.lr)
    results = {}
    for name, network in run.evaluated.items():
        with named_after_option(name):
            results[name] = evaluate_network(run, network, lambda _: images, lr, stop, words + name, (iteration,))
    return results


def evaluate_network(
    run: Run,
    network: Trainable,
    train: Callable[[torch.Generator], Images],
    lr: float,
    stop: StopRequest,
    name: str,
    indices: Sequence[int] = (),
) -> Accuracy:
    """Return the accuracy that `mtt_fast.training.evaluation.evaluate` measures with the run's options.

    Raises `InputError` if another run took the folder in the meantime.
    """
    options, protocol, test = run.options, run.options.evaluation_protocol(), run.real.test
    with run.seconds.of("evaluations"):
        accuracy = evaluate(
            network, train, test, protocol.initial_lr(lr), protocol, num_networks=options.num_eval, seed=options.seed,
            indices=indices, name=name, stop=stop,
            precision=precision_on(test.labels.device, network, options.precision),
            at_once=options.networks_at_once, memory_budget=run.memory_budget,
        )  # fmt: skip
    check_not_taken(run.folder, run.lock)
    return accuracy


def draw_set(
    run: Run, synthetic: SyntheticDataset, iteration: int, panels: Sequence[tuple[str, Tensor, Record | None]]
) -> None:
    """Write images.png, and the snapshot of the set as it is after `iteration`.

    Each of `panels` is a title, pictures (n, C, H, W) in [0, 1], and the record of the set's evaluation if there is one.
    """
    drawn = []
    for title, pictures, record in panels:
        accuracy = f": networks trained on them reach {format_accuracy(record)}" if record else ""
        drawn.append((f"{run.real.data.name}, {run.options.ipc} per class, {title}{accuracy}", pictures))
    snapshot = run.folder / HISTORY / f"iteration_{iteration:06d}.png"
    with run.seconds.of("saving"):
        save_grid(run.folder / "images.png", drawn, synthetic.classes, run.real.data.class_names)
        save_snapshot(snapshot, synthetic.pictures(), synthetic.classes)


def format_iterations(count: int) -> str:
    """Return `count` with its noun, as "1 iteration"."""
    return f"{count} iteration{'' if count == 1 else 's'}"


def draw_curves(run: LoopRun, baseline: float | None = None) -> None:
    """Write curves.png, where the accuracy of random real images is `baseline`, if it is known."""
    save_curves(run.folder / "curves.png", run.metrics.records, baseline)


def best_accuracy(records: Sequence[Record]) -> dict[str, Any]:
    """Return the accuracy of the best of the `records` of evaluations, with its iteration."""
    best = max(records, key=lambda record: float(record["accuracy_mean"]))
    return accuracy_record(best) | {"iteration": best["iteration"]}


def write_summary(
    run: Run,
    progress: Progress,
    lr: float,
    *,
    text: str,
    evaluations: Mapping[str, dict[str, Any]],
    accuracies: Mapping[str, Record],
    others: Record | None = None,
) -> None:
    """Write summary.json, which marks the run as finished, and log its `text` and where the time went.

    `evaluations` are the last records of the sets by name, `accuracies` further accuracies by name, and `others` the method's
    own fields. Raises `InputError` if another run took the folder in the meantime.
    """
    check_not_taken(run.folder, run.lock)
    device, (first, *_) = run.real.test.labels.device, run.evaluated
    if first != run.options.model and run.evaluated[first] != run.network:  # --eval_mode
        text = f"{text}; the images were tested on {first}"
    seconds = run.seconds.totals()
    write_record(
        run.folder / SUMMARY,
        {
            "text": text,
            "method": run.method,
            "accuracy": {name: accuracy_record(record) for name, record in evaluations.items()} | dict(accuracies),
            "accuracy_by_network": {name: accuracy_by_network(record, first) for name, record in evaluations.items()},
            "protocol": run.options.evaluation_protocol().record(),
            "iterations": progress.iteration,
            "learning_rate": lr,
            **(others or {}),
            "seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(device),
            "device": device_name(device),
            "arithmetic": run.numerics,
            "network": run.network.describe(),
            "versions": versions(),
            "command": run.command,
            "data": run.real.identity.record(),
            "options": dataclasses.asdict(run.options),
        },
    )
    log.info("%s: %s", run.folder, text)
    log.info("%s: %s", run.folder, describe_seconds(seconds))
