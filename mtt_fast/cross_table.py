"""The cross-architecture table as people read it: Markdown and a plot, with the numbers of the papers beside."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from mtt_fast.analysis.output import markdown_table, save_figure
from mtt_fast.evaluation_records import label_of


class Quoted(NamedTuple):
    """Accuracies in per cent that a paper reports; nobody measured them here."""

    text: str
    dataset: str
    ipc: int
    accuracies: dict[str, float]


_ORDER = ("ConvNet", "ResNet18", "VGG11", "AlexNet")
QUOTED = tuple(
    Quoted(f"{method}, {ipc} a class (quoted)", "CIFAR10", ipc, dict(zip(_ORDER, values, strict=True)))
    for method, ipc, values in (
        ("MTT", 10, (64.3, 46.4, 50.3, 34.2)),
        ("ATT", 10, (67.7, 54.5, 54.2, 43.6)),
        ("MTT", 50, (71.6, 61.9, 55.4, 48.2)),
        ("FTD", 50, (73.8, 65.7, 58.4, 53.8)),
        ("ATT", 50, (74.5, 66.3, 61.7, 60.0)),
    )
)
"""CIFAR-10: MTT with 10 images a class from its own Table 3, the others from the papers of FTD and ATT."""


def quoted_for(cells: Sequence[dict[str, Any]]) -> list[Quoted]:
    """Return what papers report of the data sets and numbers of images that `cells` have."""
    settings = {(cell["question"]["dataset"], cell["question"]["ipc"]) for cell in cells}
    return [quoted for quoted in QUOTED if (quoted.dataset, quoted.ipc) in settings]


def markdown(cells: Sequence[dict[str, Any]], quoted: Sequence[Quoted], protocol: str) -> str:
    """Return the table: a row a set, a column a network, mean ± std of the test accuracy in per cent.

    Each cell is a record of cross.json, with the "set" that it is of.
    """
    networks = list(dict.fromkeys(cell["question"]["network"] for cell in cells))
    rows = []
    for name in dict.fromkeys(cell["set"] for cell in cells):
        own = {cell["question"]["network"]: cell for cell in cells if cell["set"] == name}
        ipc = next(iter(own.values()))["question"]["ipc"]
        rows.append([name, str(ipc), *(_percent(own[network]) if network in own else "" for network in networks)])
    for row in quoted:
        numbers = (row.accuracies.get(network) for network in networks)
        rows.append([row.text, str(row.ipc), *("" if number is None else f"{number:.1f}" for number in numbers)])
    counts = sorted({cell["accuracy"]["n"] for cell in cells})
    notes = [
        f"Test accuracy in per cent, mean ± standard deviation over {' or '.join(map(str, counts))} networks; {protocol}."
    ]
    if quoted:
        notes.append(
            "Rows marked as quoted are the papers' own numbers, under their own protocols: they were not measured here."
        )
    return "\n".join([markdown_table(["set", "images a class", *networks], rows), *notes, ""])


def save_plot(path: str | os.PathLike[str], cells: Sequence[dict[str, Any]], quoted: Sequence[Quoted]) -> None:
    """Write the table as bars with standard deviations, networks side by side, quoted numbers as crosses, atomically."""
    from matplotlib.figure import Figure  # slow to import

    networks = list(dict.fromkeys(cell["question"]["network"] for cell in cells))
    sets = list(dict.fromkeys(cell["set"] for cell in cells))
    figure = Figure(figsize=(2 + 1.6 * len(networks), 3.8), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(sets)
    for place, name in enumerate(sets):
        own = [cell for cell in cells if cell["set"] == name]
        axes.bar(
            [networks.index(cell["question"]["network"]) + (place - (len(sets) - 1) / 2) * width for cell in own],
            [100 * cell["accuracy"]["mean"] for cell in own],
            width,
            yerr=[100 * cell["accuracy"]["std"] for cell in own],
            capsize=3,
            label=name.replace("$", r"\$"),  # no formula
        )
    for row, marker in zip(quoted, "x+*1234", strict=False):
        known = [network for network in networks if network in row.accuracies]
        axes.scatter(
            [networks.index(network) for network in known],
            [row.accuracies[network] for network in known],
            marker=marker,
            color="black",
            zorder=3,
            label=row.text,
        )
    axes.set_xticks(range(len(networks)), networks)
    axes.set(ylabel="test accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    save_figure(path, figure)


def _percent(cell: dict[str, Any]) -> str:
    accuracy = cell["accuracy"]
    return f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f}{label_of(accuracy)}"
