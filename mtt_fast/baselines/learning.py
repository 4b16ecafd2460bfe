"""Learn a set in iterations, with evaluations, and with checkpoints to continue a stopped run."""

from __future__ import annotations

import math
from functools import partial

from tqdm import tqdm

from mtt_fast.baselines.checkpoint import Progress, load_checkpoint, save_checkpoint
from mtt_fast.baselines.method import LearnedSet
from mtt_fast.baselines.results import as_set, log_accuracies, summarise
from mtt_fast.commands.accuracies import accuracy_fields, accuracy_record
from mtt_fast.commands.run_loop import (
    SET_NAMES,
    LoopRun,
    Run,
    best_accuracy,
    draw_set,
    evaluate_and_save,
    format_iterations,
    run_to_the_end,
)
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.errors import InputError
from mtt_fast.runtime.interrupts import StopRequest, raise_if_stopped
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.storage.metrics import MetricsLog
from mtt_fast.training.accuracy import accuracy
from mtt_fast.training.evaluation import Accuracy


def learn(run: Run, learned: LearnedSet) -> None:
    """Run iterations from the last checkpoint, or from the start, to the end; write everything to the run's folder.

    Raises `Stopped` on Ctrl-C or SIGTERM, after the current iteration and with everything saved; `InputError` if the
    loss is no longer finite.
    """
    first = _set(run, learned, 0)
    progress = load_checkpoint(run.folder, learned)
    progress.data, progress.network = run.real.identity.record(), run.network.describe()
    looped = LoopRun(**vars(run), metrics=MetricsLog(run.folder, progress.iteration))
    run_to_the_end(
        looped, progress, title=run.method, iterate=partial(_iterate, looped, learned, progress),
        progress_fields=lambda _: {"loss": f"{looped.metrics.records[-1]['loss']:.4g}"},
        evaluate=partial(_evaluate, looped, learned, progress, first),
        save=partial(save_checkpoint, run.folder, learned, progress),
        summarise=partial(_summarise, looped, learned, progress),
    )  # fmt: skip


def _iterate(run: LoopRun, learned: LearnedSet, progress: Progress) -> None:
    loss = learned.step(progress.iteration)
    if not math.isfinite(loss):
        raise InputError(
            f"{run.folder}: iteration {progress.iteration + 1} diverged (loss {loss}); start again with smaller "
            "learning rates and another --out"
        )
    progress.iteration += 1
    run.metrics.write("step", progress.iteration, loss=loss, lr=float(learned.lr()))


def _set(run: Run, learned: LearnedSet, iterations: int) -> SyntheticDataset:
    return as_set(run, learned.images, learned.labels, learned.lr(), iterations, learned.label_kind)


def _evaluate(
    run: LoopRun, learned: LearnedSet, progress: Progress, first: SyntheticDataset, stop: StopRequest
) -> None:
    """Train fresh networks on the current set, test them, and write the set; draw it below the `first` one."""
    iteration, current = progress.iteration, _set(run, learned, progress.iteration)
    log_accuracies(
        f"{run.method}, iteration {iteration}", evaluate_and_save(run, progress, "evaluation", current, stop)
    )
    sets = {"at the start": (first, 0), f"{run.method}, {format_iterations(iteration)}": (current, iteration)}
    panels = [
        (title, made.pictures(), run.metrics.find("evaluation", number)) for title, (made, number) in sets.items()
    ]
    draw_set(run, current, iteration, panels)


def _summarise(run: LoopRun, learned: LearnedSet, progress: Progress, stop: StopRequest) -> None:
    *_, evaluation = evaluations = run.records("evaluation")
    accuracies = {SET_NAMES["evaluation"].best_name: best_accuracy(evaluations)}
    if learned.own_training is not None:
        accuracies["own_training"] = accuracy_record(accuracy_fields({"": _own_accuracy(run, learned, stop)}))
    summarise(run, progress, float(learned.lr()), evaluation, accuracies)


def _own_accuracy(run: Run, learned: LearnedSet, stop: StopRequest) -> Accuracy:
    """Test fresh networks after the method's own steps on the set, in place of the common protocol.

    Raises `Stopped` between two networks after a stop request.
    """
    assert learned.own_training is not None
    accuracies = []
    with run.seconds.of("evaluations"):
        for number in tqdm(range(run.options.num_eval), desc="own training", unit="network", leave=False):
            raise_if_stopped(stop, "stopped during an evaluation; its networks are not kept")
            theta = learned.own_training(generator_for(run.options.seed, "own training", number))
            accuracies.append(accuracy(run.network, theta, run.real.test))
    return Accuracy(tuple(accuracies))
