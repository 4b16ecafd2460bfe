"""Test the curves of a run: each number is where its label says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from mtt_fast.commands.plots import save_curves


def test_curves_show_what_their_titles_say(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr("mtt_fast.commands.plots.save_figure", lambda path, figure: figures.append(figure))
    records: list[dict[str, Any]] = [{"kind": "step", "iteration": i, "loss": 1 / i, "lr": i / 100} for i in (1, 2, 4)]
    records.insert(2, {"kind": "skip", "iteration": 3})
    for kind, mean in (("evaluation", 0.5), ("ema_evaluation", 0.6), ("baseline", 0.2)):
        records.append({"kind": kind, "iteration": 4, "accuracy_mean": mean, "accuracy_std": mean / 10, "networks": 2})
    save_curves("curves.png", records, 0.2)
    loss, rate, accuracy = figures[0].axes
    for axes, name in ((loss, "loss"), (rate, "lr")):
        (line,) = axes.lines
        steps = [record for record in records if record["kind"] == "step"]
        assert np.asarray(line.get_xydata()).tolist() == [[record["iteration"], record[name]] for record in steps]
    assert (loss.get_title(), rate.get_title()) == ("loss", "student's learning rate")
    drawn = {}
    for bars in (each for each in accuracy.containers if isinstance(each, ErrorbarContainer)):
        points, _, (spreads,) = bars.lines
        (low, high), *_ = spreads.get_segments()
        drawn[bars.get_label()] = (*np.asarray(points.get_xydata()).tolist(), high[1] - low[1])
    assert drawn == {
        "distilled": ([4, 0.5], pytest.approx(0.1)),
        "average over the iterations": ([4, 0.6], pytest.approx(0.12)),
    }
    legend = accuracy.get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == {*drawn, "random real images"}
    (baseline,) = (line for line in accuracy.lines if line.get_label() == "random real images")
    assert [height for _, height in np.asarray(baseline.get_xydata()).tolist()] == [0.2, 0.2]
