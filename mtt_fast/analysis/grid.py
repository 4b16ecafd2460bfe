"""Measure accuracy over a grid of M, the expert epochs to match, and N, the student's steps: `python -m mtt_fast.analysis grid`.

The left of Figure 5 of the paper. Each cell is a distillation with its own run folder, OUT/M2-N20, so that it can be
looked at, continued or evaluated like any other. A finished run is not repeated, and a stopped run is continued.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from mtt_fast.commands import parsing
from mtt_fast.commands.earlier_run import check_comparable
from mtt_fast.commands.option_fields import Checked, Remark
from mtt_fast.commands.plots import save_figure
from mtt_fast.commands.tables import MISSING, markdown_table, percent
from mtt_fast.distill import command as distill
from mtt_fast.distill.command_line import parse_options
from mtt_fast.errors import Diverged
from mtt_fast.runtime.interrupts import stopped_with
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.records import write_record
from mtt_fast.storage.run_summary import read_summary
from mtt_fast.storage.text_files import write_text

log = logging.getLogger(__name__)

PROGRAM = "python -m mtt_fast.analysis grid"

Accuracies = Mapping[tuple[int, int], Mapping[str, Any] | None]
"""The distilled set's accuracy at the end, {"mean", "std", "n"}, by (M, N); None where there is none."""


@dataclass(frozen=True)
class GridOptions:
    """Distil with every number of expert epochs (M) and of student steps (N), and draw the accuracy over both.

    Options of python -m mtt_fast.distill apply to every cell.
    """

    expert_epochs: str = "1,2,3"
    """values of M, the expert epochs that the student must match, joined by commas"""
    syn_steps: str = "10,20,30"
    """values of N, the student steps per iteration, joined by commas"""
    out: Annotated[str, Checked(check_output_folder)] = "runs/grid"
    """folder for grid.png, grid.md, grid.json, and a run folder per cell"""
    resume: Annotated[bool, Remark("not needed: a repeated command always continues")] = False
    """not needed: a repeated command always continues"""


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    options, others = parsing.parse_part(GridOptions, argv, PROGRAM)
    epochs = sorted(set(parsing.integers(options.expert_epochs, "--expert_epochs")))
    steps = sorted(set(parsing.integers(options.syn_steps, "--syn_steps")))
    folder = Path(options.out)
    # the longest segments first, so that experts too short for them are refused before hours have passed
    cells = {(m, n): folder / f"M{m}-N{n}" for m in reversed(epochs) for n in steps}
    commands = {
        (m, n): [*others, "--expert_epochs", str(m), "--syn_steps", str(n), "--out", str(run)]
        for (m, n), run in cells.items()
    }
    parsed = {cell: parse_options(command) for cell, command in commands.items()}  # all, before the first cell is run
    for cell, run in cells.items():
        check_comparable(run, parsed[cell])
    if next(iter(parsed.values())).dry_run:
        for command in commands.values():
            distill.main(command)
        return
    accuracies: dict[tuple[int, int], Mapping[str, Any] | None] = dict.fromkeys(cells)
    for number, (cell, command) in enumerate(commands.items(), 1):
        log.info("cell %d of %d: M = %d, N = %d, in %s", number, len(cells), *cell, cells[cell])
        accuracies[cell] = _accuracy_of(cells[cell], command)
        check_comparable(cells[cell], parsed[cell])
        write(folder, epochs, steps, accuracies, others)
    log.info("%s\n%s", folder / "grid.png", as_markdown(epochs, steps, accuracies))


def _accuracy_of(folder: Path, command: Sequence[str]) -> Mapping[str, Any] | None:
    """Run the distillation to its end, unless it is finished, and return its accuracy; None if it diverged."""
    try:
        with stopped_with(f"stopped in {folder}, everything is saved; the same command continues"):
            distill.main(command)
    except Diverged as error:
        log.warning("no accuracy for this cell: %s", error)
        return None
    summary = read_summary(folder)
    return None if summary is None else summary["accuracy"].get("distilled")


def write(
    folder: Path, epochs: Sequence[int], steps: Sequence[int], accuracies: Accuracies, flags: Sequence[str]
) -> None:
    """Write grid.json, grid.md and grid.png: rows M from `epochs`, columns N from `steps`."""
    cells = [
        {"expert_epochs": m, "syn_steps": n, "run": f"M{m}-N{n}", "accuracy": accuracies[m, n]}
        for m in epochs
        for n in steps
    ]
    write_text(folder / "grid.md", as_markdown(epochs, steps, accuracies))
    _draw(folder / "grid.png", epochs, steps, accuracies)
    write_record(folder / "grid.json", {"options": list(flags), "cells": cells})  # last: with it everything is there


def as_markdown(epochs: Sequence[int], steps: Sequence[int], accuracies: Accuracies) -> str:
    """Return the grid as a table of test accuracies in per cent."""
    rows = [[f"M = {m}", *(percent(accuracies[m, n]) for n in steps)] for m in epochs]
    return markdown_table(["accuracy in %", *(f"N = {n}" for n in steps)], rows)


def _draw(path: Path, epochs: Sequence[int], steps: Sequence[int], accuracies: Accuracies) -> None:
    from matplotlib.figure import Figure  # slow to import

    means = {cell: 100 * accuracy["mean"] for cell, accuracy in accuracies.items() if accuracy is not None}
    lowest, highest = (min(means.values()), max(means.values())) if means else (0.0, 100.0)
    values = [[means.get((m, n), float("nan")) for n in steps] for m in epochs]
    figure = Figure(figsize=(2 + 0.9 * len(steps), 1.6 + 0.7 * len(epochs)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, origin="lower", cmap="viridis", aspect="auto", vmin=lowest, vmax=highest)
    for row, m in enumerate(epochs):
        for column, n in enumerate(steps):
            value = means.get((m, n))
            dark = value is not None and value < (lowest + highest) / 2
            text = MISSING if value is None else f"{value:.1f}"
            axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(steps)), [str(n) for n in steps])
    axes.set_yticks(range(len(epochs)), [str(m) for m in epochs])
    axes.set(xlabel="student steps N", ylabel="expert epochs M", title="test accuracy, %")
    figure.colorbar(image)
    save_figure(path, figure)
