"""Draw the curves of runs as SVG for the page."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mtt_fast.commands.plots import plot_label
from mtt_fast.report.runs import RecordedRun

_POINTS = 600  # of a curve: more cannot be told apart, and make the page heavy


def charts(runs: Sequence[RecordedRun]) -> dict[str, str]:
    """Return the curves of all `runs` by title, each an SVG element as text; curves that no run has are left out."""
    own = " (each method's own)" if len({run.method for run in runs}) > 1 else ""
    drawn = {
        f"Loss{own}": _chart(runs, "loss", _draw_lines("step", "loss")),
        "Learning rate of networks that train on the set": _chart(runs, "learning rate", _draw_lines("step", "lr")),
        "Test accuracy of fresh networks (%)": _chart(runs, "accuracy", draw_accuracy),
        "Cosine of the approximate gradient to the exact one": _chart(
            runs, "cosine", _draw_lines("gradient", "cosine")
        ),
    }
    return {title: svg for title, svg in drawn.items() if svg}


def _draw_lines(kind: str, key: str) -> Callable[[Any, RecordedRun, str], bool]:
    def draw(axes: Any, run: RecordedRun, colour: str) -> bool:
        steps = [record for record in run.records_of_kind(kind) if key in record]
        if not steps:
            return False
        x, y = thinned([step["iteration"] for step in steps], [step[key] for step in steps])
        axes.plot(x, y, color=colour, linewidth=1.6, label=plot_label(run.name))
        return True

    return draw


def draw_accuracy(axes: Any, run: RecordedRun, colour: str) -> bool:
    """Draw the accuracy of a run's evaluations, with its deviation, and return whether there is any."""
    name = plot_label(run.name)
    styles = {"evaluation": ("-", name), "ema_evaluation": ("--", f"{name}, average over the iterations")}
    for kind, (style, label) in styles.items():
        records = run.records_of_kind(kind)
        iterations = [record["iteration"] for record in records]
        mean, std = (np.array([100 * record[f"accuracy_{part}"] for record in records]) for part in ("mean", "std"))
        if records:
            axes.errorbar(
                iterations, mean, std, color=colour, linestyle=style, marker="o", capsize=4, linewidth=1.6, label=label
            )
    return bool(run.records_of_kind("evaluation"))


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return at most `_POINTS` points: means of neighbours, so that a noisy curve keeps its level."""
    size = -(-len(x) // _POINTS)
    blocks = [slice(begin, begin + size) for begin in range(0, len(x), size)]
    return [float(np.mean(x[block])) for block in blocks], [float(np.mean(y[block])) for block in blocks]


def _chart(runs: Sequence[RecordedRun], name: str, draw: Callable[[Any, RecordedRun, str], bool]) -> str:
    """Return one chart as an SVG element, or "" if no run has anything to draw."""
    from matplotlib import rc_context  # slow to import, and only drawing needs it
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # the text stays text, in the page's own font; the salt makes the same curves the same file
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 13}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        drawn = [draw(axes, run, f"C{number % 10}") for number, run in enumerate(runs)]
        if not any(drawn):
            return ""
        axes.set_xlabel("iteration")
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            figure.legend(loc="outside lower left", frameon=False, fontsize=11, ncols=2)
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
