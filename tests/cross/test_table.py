"""Test the table and the plot of a comparison, with the numbers of the papers beside them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from PIL import Image

from mtt_fast.cross.table import Quoted, markdown, quoted_for, save_plot


def test_numbers_of_the_papers_stand_beside_and_are_marked(tmp_path: Path) -> None:
    def cell(network: str) -> dict[str, Any]:
        question = {"dataset": "CIFAR10", "ipc": 10, "network": network}
        return {"set": "mine", "question": question, "accuracy": {"mean": 0.651, "std": 0.004, "n": 5, "epoch": "best"}}

    cells = [cell("ConvNet"), cell("VGG11"), cell("MLP")]
    quoted = quoted_for(cells)
    assert [row.text for row in quoted] == [f"{name}, 10 per class (quoted)" for name in ("MTT", "DSA", "KIP", "ATT")]
    assert quoted[0].accuracies["AlexNet"] == pytest.approx({"mean": 0.342, "std": 0.026})
    lines = markdown(cells, quoted, "protocol x").splitlines()
    assert lines[2] == "| mine | CIFAR10 | 10 |" + " 65.1 ± 0.4 (best epoch) |" * 3
    assert lines[3] == "| MTT, 10 per class (quoted) | CIFAR10 | 10 | 64.3 ± 0.7 | 50.3 ± 0.8 |  |"
    assert lines[6] == "| ATT, 10 per class (quoted) | CIFAR10 | 10 | 67.7 | 54.2 |  |"
    assert "they were not measured here. MTT, 10 per class: Table 3 of the paper; DSA" in lines[-1]
    assert lines[-1].endswith("ATT, 10 per class: the cross-architecture table of ATT (arXiv 2407.14245).")
    at_50 = [cell("ConvNet") | {"question": {"dataset": "CIFAR10", "ipc": 50, "network": "ConvNet"}}]
    assert {row.method: row.accuracies["VGG11"]["mean"] for row in quoted_for(at_50)} == pytest.approx(
        {"MTT": 0.554, "FTD": 0.584, "ATT": 0.617}
    )
    save_plot(tmp_path / "plot.png", cells, quoted)
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 300
    both = markdown([*cells, at_50[0] | {"set": "larger"}], [], "x").splitlines()
    assert both[3] == "| larger | CIFAR10 | 50 | 65.1 ± 0.4 (best epoch) |  |  |"
    (line,) = [line for line in markdown([cells[0] | {"set": "a|b"}], [], "x").splitlines() if "65.1" in line]
    assert line == r"| a\|b | CIFAR10 | 10 | 65.1 ± 0.4 (best epoch) |"
    assert quoted_for([cell("ConvNet") | {"question": {"dataset": "digits", "ipc": 10}}]) == []


def test_the_plot_has_quoted_numbers_at_their_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("mtt_fast.cross.table.save_figure", lambda path, figure: figures.append(figure))
    cells = [
        {"set": "a", "question": {"network": network}, "accuracy": {"mean": 0.1, "std": 0.0}}
        for network in ("X", "Y", "Z")
    ]
    accuracies = {"Z": {"mean": 0.3, "std": 0.02}, "Y": {"mean": 0.2}, "elsewhere": {"mean": 0.9}}
    save_plot("plot.png", cells, [Quoted("MTT", "CIFAR10", ipc, "a paper", accuracies) for ipc in range(1, 10)])
    labels = [each.get_label() for each in figures[0].axes[0].containers]
    assert labels[-9:] == [f"MTT, {ipc} per class (quoted)" for ipc in range(1, 10)]
    crosses = [each for each in figures[0].axes[0].containers if each.get_label() == "MTT, 1 per class (quoted)"]
    assert isinstance(crosses[0], ErrorbarContainer)
    points, _, (spreads,) = crosses[0].lines
    assert np.asarray(points.get_xydata()).tolist() == [[1, 20], [2, 30]]
    assert [high - low for (_, low), (_, high) in spreads.get_segments()] == [0, pytest.approx(4)]


def test_names_with_dollar_signs_are_no_formulas(tmp_path: Path) -> None:
    name = "folder$_{$/nets.py:Net"
    cell = {"set": name, "question": {"network": name}, "accuracy": {"mean": 0.1, "std": 0.0}}
    save_plot(tmp_path / "plot.png", [cell], [])
    assert (tmp_path / "plot.png").exists()


def test_the_plot_has_each_accuracy_at_its_network(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("mtt_fast.cross.table.save_figure", lambda path, figure: figures.append(figure))
    means = {("a", "X"): 0.1, ("a", "Y"): 0.2, ("b", "Y"): 0.4}
    cells = [
        {"set": name, "question": {"network": network}, "accuracy": {"mean": mean, "std": mean / 10}}
        for (name, network), mean in means.items()
    ]
    save_plot("plot.png", cells, [])
    (axes,) = figures[0].axes
    drawn = []
    for bars in (each for each in axes.containers if isinstance(each, BarContainer)):
        assert bars.errorbar is not None
        spreads = [high - low for (_, low), (_, high) in bars.errorbar.lines[2][0].get_segments()]
        for bar, spread in zip(bars, spreads, strict=True):
            place = axes.get_xticklabels()[round(bar.get_x() + bar.get_width() / 2)].get_text()
            drawn.append((bars.get_label(), place, bar.get_height(), spread))
    assert drawn == [(*key, pytest.approx(100 * mean), pytest.approx(20 * mean)) for key, mean in means.items()]


def test_a_set_whose_name_begins_with_an_underscore_is_in_the_legend(tmp_path: Path) -> None:
    """Check that matplotlib has a label to show: it warns where it leaves all out."""
    cell = {"set": "_old", "question": {"network": "MLP"}, "accuracy": {"mean": 0.5, "std": 0.1}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_plot(tmp_path / "cross.png", [cell], [])
