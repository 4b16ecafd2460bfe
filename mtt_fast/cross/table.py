"""Write the cross-architecture table as Markdown and as a plot, with the papers' numbers beside the measured ones."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mtt_fast.commands.plots import plot_label, save_figure
from mtt_fast.commands.published import published_numbers
from mtt_fast.commands.tables import markdown_table, percent


class Quoted(NamedTuple):
    """Accuracies by network that a paper reports of one set; nobody measured them here."""

    method: str
    dataset: str
    ipc: int
    source: str
    accuracies: dict[str, dict[str, float]]
    """mean and, where it is known, std, in [0, 1]"""

    @property
    def name(self) -> str:
        """Return the set in words."""
        return f"{self.method}, {self.ipc} per class"

    @property
    def text(self) -> str:
        """Return the set's name in a table."""
        return f"{self.name} (quoted)"


def quoted_for(cells: Sequence[dict[str, Any]]) -> list[Quoted]:
    """Return the accuracies that Table 3, and later tables like it, report for the data sets and numbers of images in `cells`."""
    settings = {(cell["question"]["dataset"], f"{cell['question']['ipc']:g}") for cell in cells}
    accuracies_by_set: dict[tuple[str, str, str, str], dict[str, dict[str, float]]] = {}
    for row in published_numbers().rows:
        for ipc, accuracy in row.accuracy.items():
            if row.table == "3" and (row.dataset, ipc) in settings:
                accuracies_by_set.setdefault((row.method, row.dataset, ipc, row.source), {})[row.model] = accuracy
    return [
        Quoted(method, dataset, int(ipc), source, accuracies)
        for (method, dataset, ipc, source), accuracies in accuracies_by_set.items()
    ]


def markdown(cells: Sequence[dict[str, Any]], quoted: Sequence[Quoted], protocol: str) -> str:
    """Return the table: a row a set, with its data set, a column a network, mean ± std of the test accuracy in per cent.

    Each cell is a record of cross.json, with the name of its "set".
    """
    networks = list(dict.fromkeys(cell["question"]["network"] for cell in cells))
    rows = []

    def add_row(title: str, dataset: str, ipc: float, accuracies: Mapping[str, Mapping[str, Any]]) -> None:
        known = (accuracies.get(network) for network in networks)
        rows.append(
            [title, dataset, f"{ipc:g}", *("" if accuracy is None else percent(accuracy) for accuracy in known)]
        )

    for name in dict.fromkeys(cell["set"] for cell in cells):
        own = [cell for cell in cells if cell["set"] == name]
        accuracies = {cell["question"]["network"]: cell["accuracy"] for cell in own}
        add_row(name, own[0]["question"]["dataset"], own[0]["question"]["ipc"], accuracies)
    for row in quoted:
        add_row(row.text, row.dataset, row.ipc, row.accuracies)
    counts = sorted({cell["accuracy"]["n"] for cell in cells})
    notes = [
        f"Test accuracy in per cent, mean ± standard deviation over {' or '.join(map(str, counts))} networks; {protocol}."
    ]
    if quoted:
        sources = "; ".join(f"{row.name}: {row.source}" for row in quoted)
        notes.append(
            "Rows marked as quoted are the papers' own numbers, under their own protocols: they were not measured here. "
            f"{sources}."
        )
    return "\n".join([markdown_table(["set", "data set", "images per class", *networks], rows), *notes, ""])


def save_plot(path: str | os.PathLike[str], cells: Sequence[dict[str, Any]], quoted: Sequence[Quoted]) -> None:
    """Write the table as bars with standard deviations, networks side by side, quoted numbers as crosses, atomically."""
    from matplotlib.figure import Figure  # slow to import

    networks = list(dict.fromkeys(cell["question"]["network"] for cell in cells))
    sets = list(dict.fromkeys(cell["set"] for cell in cells))
    figure = Figure(figsize=(2 + 1.6 * len(networks), 3.8), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(sets)
    for position, name in enumerate(sets):
        own = [cell for cell in cells if cell["set"] == name]
        axes.bar(
            [networks.index(cell["question"]["network"]) + (position - (len(sets) - 1) / 2) * width for cell in own],
            [100 * cell["accuracy"]["mean"] for cell in own],
            width,
            yerr=[100 * cell["accuracy"]["std"] for cell in own],
            capsize=3,
            label=plot_label(name),
        )
    for row, marker in zip(quoted, itertools.cycle("x+*1234"), strict=False):
        known = [network for network in networks if network in row.accuracies]
        axes.errorbar(
            [networks.index(network) for network in known],
            [100 * row.accuracies[network]["mean"] for network in known],
            yerr=[100 * row.accuracies[network].get("std", 0.0) for network in known],
            fmt=marker,
            color="black",
            elinewidth=0.8,
            zorder=3,
            label=row.text,
        )
    axes.set_xticks(range(len(networks)), [plot_label(network) for network in networks])
    axes.set(ylabel="test accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    save_figure(path, figure)
