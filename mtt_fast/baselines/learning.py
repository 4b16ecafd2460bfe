"""A set that is learned in iterations: evaluated on the way, saved so that it goes on after whatever stops it."""

from __future__ import annotations

import math
from functools import partial

from mtt_fast.baselines.checkpoint import Progress, load_checkpoint, save_checkpoint
from mtt_fast.baselines.method import Learning
from mtt_fast.baselines.results import as_set, summarise, tell
from mtt_fast.commands.accuracies import accuracy_record, measured
from mtt_fast.commands.run_loop import (
    KEPT,
    LoopRun,
    Run,
    best_accuracy,
    draw_set,
    evaluate_and_keep,
    run_to_the_end,
)
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.errors import InputError
from mtt_fast.runtime.interrupts import StopRequest
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.storage.metrics import MetricsLog
from mtt_fast.training.protocols import Accuracy
from mtt_fast.training.sgd import accuracy


def learn(run: Run, learning: Learning) -> None:
    """Run iterations from the last checkpoint, or from the start, to the end; write everything to the run's folder.

    Raises `Stopped` on Ctrl-C or SIGTERM, after the iteration under way and with everything saved; `InputError` if the
    loss is no longer finite.
    """
    first = _set(run, learning, 0)
    progress = load_checkpoint(run.folder, learning)
    progress.data = run.real.identity.record()
    looped = LoopRun(**vars(run), metrics=MetricsLog(run.folder, progress.iteration))
    run_to_the_end(
        looped, progress, title=run.method, iterate=partial(_iterate, looped, learning, progress),
        shown=lambda _: {"loss": f"{looped.metrics.records[-1]['loss']:.4g}"},
        evaluate=partial(_evaluate, looped, learning, progress, first), kinds=["evaluation"],
        save=partial(save_checkpoint, run.folder, learning, progress),
        summarise=partial(_summarise, looped, learning, progress),
    )  # fmt: skip


def _iterate(run: LoopRun, learning: Learning, progress: Progress) -> None:
    loss = learning.step(progress.iteration)
    if not math.isfinite(loss):
        raise InputError(
            f"{run.folder}: iteration {progress.iteration + 1} diverged (loss {loss}); start again with smaller "
            "learning rates and another --out"
        )
    progress.iteration += 1
    run.metrics.write("step", progress.iteration, loss=loss, lr=float(learning.lr()))


def _set(run: Run, learning: Learning, iterations: int) -> SyntheticDataset:
    return as_set(run, learning.images, learning.labels, learning.lr(), iterations)


def _evaluate(run: LoopRun, learning: Learning, progress: Progress, first: SyntheticDataset, stop: StopRequest) -> None:
    """Test fresh networks on the set as it is now, and write it; draw it below the `first` one."""
    iteration, now = progress.iteration, _set(run, learning, progress.iteration)
    tell(f"{run.method}, iteration {iteration}", evaluate_and_keep(run, progress, "evaluation", now, stop))
    titles = {"at the start": (first, 0), f"{run.method}, {iteration} iterations": (now, iteration)}
    panels = [(title, made.pictures(), run.metrics.find("evaluation", at)) for title, (made, at) in titles.items()]
    draw_set(run, now, iteration, panels)


def _summarise(run: LoopRun, learning: Learning, progress: Progress, stop: StopRequest) -> None:
    *_, evaluation = evaluations = run.records("evaluation")
    accuracies = {KEPT["evaluation"].best_name: best_accuracy(evaluations)}
    if learning.own_training is not None:
        accuracies["own_training"] = accuracy_record(measured({"": _own_accuracy(run, learning)}))
    summarise(run, progress, float(learning.lr()), evaluation, accuracies)


def _own_accuracy(run: Run, learning: Learning) -> Accuracy:
    """Test fresh networks after the method's own steps on the set, in place of the common protocol."""
    assert learning.own_training is not None
    trained = (
        learning.own_training(generator_for(run.options.seed, "own training", k)) for k in range(run.options.num_eval)
    )
    with run.seconds.of("evaluations"):
        return Accuracy(tuple(accuracy(run.network, theta, run.real.test) for theta in trained))
