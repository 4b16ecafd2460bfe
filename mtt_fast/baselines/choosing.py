"""Write, evaluate and summarise a set that is chosen at once."""

from __future__ import annotations

import torch

from mtt_fast.baselines.checkpoint import Progress
from mtt_fast.baselines.results import as_set, log_accuracies, summarise
from mtt_fast.commands.accuracies import accuracy_fields
from mtt_fast.commands.run_loop import Run, draw_set, evaluate_set
from mtt_fast.runtime.interrupts import stop_request, stopped_with
from mtt_fast.storage.run_files import SYNTHETIC
from mtt_fast.training.images import Images


def evaluate_chosen(run: Run, images: Images) -> None:
    """Write the set, evaluate it, and write the rest of the run folder. Labels of `images` that are not classes are probabilities.

    Raises `Stopped` on Ctrl-C or SIGTERM; the same command starts the evaluation again.
    """
    label_kind = "probabilities" if images.labels.is_floating_point() else "indices"
    synthetic = as_set(run, images.pixels, images.labels, torch.tensor(run.options.lr_net), 0, label_kind)
    synthetic.save(run.folder / SYNTHETIC)
    message = f"stopped during the evaluation; the set is in {run.folder}, and the same command evaluates it again"
    with stop_request() as stop, stopped_with(message):
        results = evaluate_set(run, synthetic, 0, stop)
    evaluation = accuracy_fields(results)
    log_accuracies(run.method, results)
    draw_set(run, synthetic, 0, [(run.method, synthetic.pictures(), evaluation)])
    summarise(run, Progress(), float(synthetic.lr), evaluation, {})
