"""Draw the curves of a run, and write any figure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mtt_fast.storage.atomic import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_curves(path: str | os.PathLike[str], records: Sequence[dict[str, Any]], baseline: float | None) -> None:
    """Write loss, learning rate and accuracy over the iterations as one figure, atomically.

    `records` are the lines of metrics.jsonl; `baseline` is the accuracy of as many random real images, or None.
    """
    from matplotlib.figure import Figure  # slow to import, and only the commands draw

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    loss, lr, accuracy = figure.subplots(1, 3)
    steps = [record for record in records if record["kind"] == "step"]
    iterations = [record["iteration"] for record in steps]
    loss.plot(iterations, [record["loss"] for record in steps], linewidth=0.8)
    loss.set(title="loss", xlabel="iteration")
    lr.plot(iterations, [record["lr"] for record in steps], linewidth=1.2)
    lr.set(title="student's learning rate", xlabel="iteration")
    for kind, name in (("evaluation", "distilled"), ("ema_evaluation", "average over the iterations")):
        if evaluations := [record for record in records if record["kind"] == kind]:
            accuracy.errorbar(
                [record["iteration"] for record in evaluations],
                [record["accuracy_mean"] for record in evaluations],
                [record["accuracy_std"] for record in evaluations],
                marker="o",
                capsize=3,
                label=name,
            )
    if baseline is not None:
        accuracy.axhline(baseline, color="grey", linestyle="--", label="random real images")
    accuracy.set(title="test accuracy of fresh networks", xlabel="iteration")
    accuracy.legend(frameon=False)
    for axes in (loss, lr, accuracy):
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(path, figure)


def save_figure(path: str | os.PathLike[str], figure: Figure) -> None:
    """Write `figure` as PNG, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import

    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def plot_label(name: str) -> str:
    """Return `name` as a label in a plot.

    matplotlib leaves a label that begins with an underscore out of the legend, and reads a formula between dollar signs.
    """
    return (f" {name}" if name.startswith("_") else name).replace("$", r"\$")
