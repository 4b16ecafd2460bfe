"""A set that is learned in iterations: evaluated on the way, saved so that it goes on after whatever stops it."""

from __future__ import annotations

import math
import shlex
import time
from typing import Any

from tqdm import tqdm

from mtt_fast.baselines.checkpoint import Progress, load_checkpoint, save_checkpoint
from mtt_fast.baselines.method import Learning
from mtt_fast.baselines.results import Job, as_set, evaluated, save_pictures, write_summary
from mtt_fast.commands.accuracies import accuracy_record, measured
from mtt_fast.commands.plots import save_curves, save_snapshot
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.errors import InputError
from mtt_fast.runtime.interrupts import Stopped, StopRequest, stop_request
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.storage.metrics import MetricsLog
from mtt_fast.storage.run_folder import BEST, HISTORY, SYNTHETIC
from mtt_fast.training.protocols import Accuracy
from mtt_fast.training.sgd import accuracy


def learn(job: Job, learning: Learning) -> None:
    """Run iterations from the last checkpoint, or from the start, to the end; write everything to the job's folder.

    Raises `Stopped` on Ctrl-C or SIGTERM, after the iteration under way and with everything saved; `InputError` if the
    loss is no longer finite.
    """
    options, began = job.options, _set(job, learning, 0)
    progress = load_checkpoint(job.folder, learning)
    progress.data = job.real.identity.record()
    metrics = MetricsLog(job.folder, progress.iteration)
    saved = time.monotonic()
    try:
        with stop_request() as stop, _bar(job, progress) as bar:
            while True:
                due = progress.iteration % options.eval_it == 0 or progress.iteration == options.Iteration
                if due and metrics.find("evaluation", progress.iteration) is None:
                    _assess(job, learning, progress, metrics, began, stop)
                    save_checkpoint(job.folder, learning, progress, metrics.evaluations)
                if progress.iteration >= options.Iteration:
                    break
                loss = _iterate(job, learning, progress, metrics)
                bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
                bar.update()
                if stop or time.monotonic() - saved > options.save_seconds:
                    save_checkpoint(job.folder, learning, progress, metrics.evaluations)
                    saved = time.monotonic()
                if stop:
                    raise Stopped("stopped by a signal", stop.signum)
            _summarise(job, learning, progress, metrics)
    except Stopped as stopped:
        save_checkpoint(job.folder, learning, progress, metrics.evaluations)
        raise Stopped(
            f"stopped at iteration {progress.iteration} of {options.Iteration}, everything is saved; continue with: "
            f"{job.program} --out {shlex.quote(str(job.folder))} --resume",
            stopped.signum,
        ) from None
    finally:
        metrics.close()


def _iterate(job: Job, learning: Learning, progress: Progress, metrics: MetricsLog) -> float:
    began = time.monotonic()
    loss = learning.step(progress.iteration)
    if not math.isfinite(loss):
        raise InputError(
            f"{job.folder}: iteration {progress.iteration + 1} diverged (loss {loss}); start again with smaller "
            "learning rates and another --out"
        )
    progress.iteration += 1
    progress.seconds += time.monotonic() - began
    metrics.write("step", progress.iteration, loss=loss, lr=float(learning.lr()))
    return loss


def _set(job: Job, learning: Learning, iterations: int) -> SyntheticDataset:
    return as_set(job, learning.images, learning.labels, learning.lr(), iterations)


def _assess(
    job: Job,
    learning: Learning,
    progress: Progress,
    metrics: MetricsLog,
    start: SyntheticDataset,
    stop: StopRequest,
) -> None:
    """Test fresh networks on the set as it is now, and write it and its pictures."""
    began, made, iteration = time.monotonic(), _set(job, learning, progress.iteration), progress.iteration
    found = evaluated(job, made, iteration, stop, f"{job.method.title}, iteration {iteration}")
    progress.seconds_evaluation += time.monotonic() - began
    best = max((record["accuracy_mean"] for record in _evaluations(metrics)), default=-1.0)
    if found["accuracy_mean"] > best:
        made.save(job.folder / BEST)
    made.save(job.folder / SYNTHETIC)
    metrics.write("evaluation", iteration, **found)
    panels = {"at the start": start, f"{job.method.title}, {iteration} iterations": made}
    save_pictures(job, panels, [metrics.find("evaluation", 0), found])
    save_snapshot(job.folder / HISTORY / f"iteration_{iteration:06d}.png", made.pictures(), job.classes)
    save_curves(job.folder / "curves.png", metrics.records)


def _summarise(job: Job, learning: Learning, progress: Progress, metrics: MetricsLog) -> None:
    evaluations = _evaluations(metrics)
    best = max(evaluations, key=lambda record: float(record["accuracy_mean"]))
    others = {"best_evaluation_chosen_on_the_test_images": accuracy_record(best) | {"iteration": best["iteration"]}}
    if learning.own_training is not None:
        others["own_training"] = accuracy_record(measured({"": _own_accuracy(job, learning)}))
    seconds = {"iterations": progress.seconds, "evaluations": progress.seconds_evaluation}
    made = _set(job, learning, progress.iteration)
    write_summary(job, made, evaluations[-1], others, progress.iteration, seconds)


def _own_accuracy(job: Job, learning: Learning) -> Accuracy:
    """Test fresh networks after the method's own steps on the set, in place of the common protocol."""
    assert learning.own_training is not None
    trained = (
        learning.own_training(generator_for(job.options.seed, "own training", k)) for k in range(job.options.num_eval)
    )
    return Accuracy(tuple(accuracy(job.network, theta, job.real.test) for theta in trained))


def _evaluations(metrics: MetricsLog) -> list[dict[str, Any]]:
    return [record for record in metrics.records if record["kind"] == "evaluation"]


def _bar(job: Job, progress: Progress) -> tqdm:
    return tqdm(
        total=job.options.Iteration, initial=progress.iteration, desc=job.method.title, unit="it", smoothing=0.05
    )
