"""Write figures, Markdown tables, and accuracies in words, for the analyses."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mtt_fast.commands.accuracies import remarks_on
from mtt_fast.storage.atomic import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = "—"
"""The cell of a table where nothing was measured, or nothing is known."""


def save_figure(path: str | os.PathLike[str], figure: Figure) -> None:
    """Write `figure` as PNG, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import

    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def plot_label(name: str) -> str:
    """Return a name as a label of a plot. matplotlib would leave those that begin with an underscore out of the legend, and read formulas
    between dollar signs.
    """
    return (f" {name}" if name.startswith("_") else name).replace("$", r"\$")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, one line a row; a bar within a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def percent(accuracy: Mapping[str, Any] | None, digits: int = 1) -> str:
    """Return an accuracy in [0, 1], with its "std" if there is one, as "46.2 ± 0.8"; MISSING for None.

    A single network has no deviation; `remarks_on` adds the best epoch and the networks that diverged.
    """
    if accuracy is None:
        return MISSING
    spread = accuracy.get("std") if accuracy.get("n") != 1 else None
    values = [accuracy["mean"]] if spread is None else [accuracy["mean"], spread]
    return " ± ".join(f"{100 * value:.{digits}f}" for value in values) + remarks_on(accuracy)
