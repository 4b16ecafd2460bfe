"""Turn a method's result into a set, log its accuracies, and write its summary."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mtt_fast.baselines.checkpoint import Progress
from mtt_fast.commands.accuracies import format_accuracy
from mtt_fast.commands.run_loop import Record, Run, set_to_save, write_summary
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.training.evaluation import Accuracy

log = logging.getLogger(__name__)


def as_set(run: Run, images: Tensor, labels: Tensor, lr: Tensor, iterations: int, label_kind: str) -> SyntheticDataset:
    """Return the set that is saved, with labels of `label_kind` (`SyntheticDataset`)."""
    recipe = {"method": run.method, "iterations": iterations}
    return set_to_save(run, images, labels, lr, label_kind=label_kind, recipe=recipe)


def log_accuracies(title: str, results: Mapping[str, Accuracy]) -> None:
    """Log the accuracy of each network by name on the set called `title`."""
    for name, accuracy in results.items():
        log.info("%s, %s: %s", title, name, accuracy)


def summarise(
    run: Run, progress: Progress, lr: float, evaluation: dict[str, Any], accuracies: Mapping[str, Record]
) -> None:
    """Write summary.json with the set's last `evaluation` and other `accuracies` by name, and log the result."""
    text = f"{run.method} {format_accuracy(evaluation)}"
    write_summary(run, progress, lr, text=text, evaluations={"distilled": evaluation}, accuracies=accuracies)
