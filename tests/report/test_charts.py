"""Test the charts of a report: each accuracy at its iteration, every run in the legends."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from mtt_fast.report.charts import charts, draw_accuracy, thinned
from mtt_fast.report.runs import RecordedRun


def test_evaluations_and_those_of_the_average_are_told_apart() -> None:
    means = {"evaluation": (0.1, 0.3), "ema_evaluation": (0.2, 0.4)}
    records = [
        {"kind": kind, "iteration": iteration, "accuracy_mean": mean, "accuracy_std": mean / 10, "networks": 2}
        for kind, both in means.items()
        for iteration, mean in enumerate(both)
    ]
    unfinished = RecordedRun("run", {}, {}, records, {})
    assert {name: accuracy["mean"] for name, accuracy in unfinished.accuracies.items()} == {
        "distilled": 0.3,
        "ema": 0.4,
    }
    axes = Figure().subplots()
    draw_accuracy(axes, unfinished, "C0")
    for curve, both in zip(axes.containers, means.values(), strict=True):
        assert isinstance(curve, ErrorbarContainer)
        line, _, (spreads,) = curve.lines
        assert np.asarray(line.get_xydata()).tolist() == [
            [iteration, pytest.approx(100 * mean)] for iteration, mean in enumerate(both)
        ]
        assert [high - low for (_, low), (_, high) in spreads.get_segments()] == pytest.approx(
            [20 * mean for mean in both]
        )


def test_a_run_whose_name_begins_with_an_underscore_is_in_the_legends() -> None:
    record = {"kind": "evaluation", "iteration": 0, "accuracy_mean": 0.5, "accuracy_std": 0.1, "networks": 2}
    runs = [
        RecordedRun(name, {}, {}, [record, {"kind": "step", "iteration": 0, "loss": 1.0}], {})
        for name in ("_old", "_new")
    ]
    for svg in charts(runs).values():
        assert "_old" in svg
        assert "_new" in svg


def test_thinned_keeps_the_level() -> None:
    x, y = thinned(range(10_000), [float(i % 2) for i in range(10_000)])
    assert 300 <= len(x) <= 600
    assert max(abs(value - 0.5) for value in y[:-1]) < 0.04
    assert thinned([1, 2], [3.0, 4.0]) == ([1.0, 2.0], [3.0, 4.0])
    x, y = thinned(range(10_000), range(10_000))
    assert x == y  # the means stand over the middles of their blocks
