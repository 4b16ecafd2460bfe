"""A set that is chosen at once: made, saved, evaluated."""

from __future__ import annotations

import time

import torch

from mtt_fast.baselines.results import Job, as_set, evaluated, save_pictures, write_summary
from mtt_fast.commands.plots import save_snapshot
from mtt_fast.runtime.interrupts import Stopped, stop_request
from mtt_fast.storage.run_folder import HISTORY, SYNTHETIC
from mtt_fast.training.images import Images


def evaluate_chosen(job: Job, images: Images, seconds: float) -> None:
    """Write the set, which took `seconds` to choose, evaluate it, and write the rest of the run folder.

    Raises `Stopped` on Ctrl-C or SIGTERM; the same command begins the evaluation again.
    """
    made = as_set(job, images.pixels, images.labels, torch.tensor(job.options.lr_net), 0)
    made.save(job.folder / SYNTHETIC)
    began = time.monotonic()
    try:
        with stop_request() as stop:
            evaluation = evaluated(job, made, 0, stop, job.method.title)
    except Stopped as stopped:
        raise Stopped(
            f"stopped during the evaluation; the set is in {job.folder}, and the same command evaluates it again",
            stopped.signum,
        ) from None
    save_pictures(job, {job.method.title: made}, [evaluation])
    save_snapshot(job.folder / HISTORY / "iteration_000000.png", made.pictures(), job.classes)
    write_summary(job, made, evaluation, {}, 0, {"iterations": seconds, "evaluations": time.monotonic() - began})
