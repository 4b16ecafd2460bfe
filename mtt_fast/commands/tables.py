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


def legend_label(name: str) -> str:
    """Return a name as a label of a plot; matplotlib leaves those that begin with an underscore out of the legend."""
    return f" {name}" if name.startswith("_") else name


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, one line a row; a bar within a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def marked_method(name: str, options: Mapping[str, Any]) -> str:
    """Return the `name` of a method, marked where its sets do not compare with those of papers.

    These are textures, frequencies (FreD) and parametrised images (SPEED, DDiF), of which --ipc does not count images of all pixels, and chosen
    images with the experts' labels; and those of MTT with changes of its successors.
    """
    if name.partition(",")[0] == "MTT" and (changes := _changes_of_successors(options)):
        name = f"{name}, with {' '.join(changes)}"
    if options.get("texture"):
        return f"{name}, textures"
    if options.get("labels") == "experts":
        return f"{name}, labels of experts"
    if parametrisation := options.get("parametrisation"):
        return f"{name}, images by {parametrisation}"
    frequencies = options.get("msz_per_channel")
    return name if frequencies is None else f"{name}, {frequencies} frequencies"


WITHOUT_SUCCESSORS: dict[str, Any] = {
    "rho_max": 0.0, "gradient": "exact", "match_step": "last", "loss_ratio": 0.0, "depth_ratio": 0.0, "cam_model": None, "lr_y": None,
    "teacher_label": False, "threshold": None, "min_start_epoch": 0, "current_max_start_epoch": None, "continuous_start": False,
    "noise_start": 0.0, "num_interpolation": None, "num_trajectories": 1, "lr_per_step": False, "student_mom": 0.0, "student_l2": 0.0,
    "distilled_share": 1.0,
}  # fmt: skip
"""The options of MTT's successors that make another method of it, with the values that leave it as it is."""


def _changes_of_successors(options: Mapping[str, Any]) -> list[str]:
    """Return the flags of a distillation that MTT itself does not have."""
    values = {name: options.get(name, plain) for name, plain in WITHOUT_SUCCESSORS.items()}
    return [
        f"--{name}" if value is True else f"--{name} {value}"
        for name, value in values.items()
        if value != WITHOUT_SUCCESSORS[name]
    ]


def percent(accuracy: Mapping[str, Any] | None, digits: int = 1) -> str:
    """Return an accuracy in [0, 1], with its "std" if there is one, as "46.2 ± 0.8"; MISSING for None.

    A single network has no deviation; `remarks_on` adds the best epoch and the networks that diverged.
    """
    if accuracy is None:
        return MISSING
    spread = accuracy.get("std") if accuracy.get("n") != 1 else None
    values = [accuracy["mean"]] if spread is None else [accuracy["mean"], spread]
    return " ± ".join(f"{100 * value:.{digits}f}" for value in values) + remarks_on(accuracy)
