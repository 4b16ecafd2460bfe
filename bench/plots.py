"""Draw records as bars, and memory against what was varied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_LABELS = {
    "meta_step": "engine",
    "modules": "engine",
    "first_block": "way",
    "kernels": "operation",
    "training": "loop",
    "trajectories": "reader",
    "tune": "operation",
}

_TIMES_OF = {"trajectories": "first", "modules": "cpu_seconds"}
"""The name of the time that is drawn, where it is not `seconds`."""

DRAWN = (*_LABELS, "memory_scaling", "methods")


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw a record: memory against the varied number, or a bar of accuracy or of time for each row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    {"memory_scaling": _draw_memory, "methods": _draw_accuracies}.get(record["benchmark"], _draw_times)(figure, record)
    figure.suptitle(str(record["conditions"].get("case", record["name"])), fontsize=9)
    figure.savefig(path, dpi=120)


def _draw_times(figure: Any, record: dict[str, Any]) -> None:
    axes, label = figure.subplots(), _LABELS[record["benchmark"]]
    key = _TIMES_OF.get(record["benchmark"], "seconds")
    rows = [row for row in record["rows"] if row.get(key)][::-1]
    names = [" ".join(str(row[part]) for part in ("network", "sweep", label, "shape") if row.get(part)) for row in rows]
    middles = [row[key]["median"] for row in rows]
    around = [
        [row[key]["median"] - row[key]["least"] for row in rows],
        [row[key]["most"] - row[key]["median"] for row in rows],
    ]
    axes.barh(range(len(rows)), middles, xerr=around, color="#4477aa", ecolor="#222222")
    axes.set_yticks(range(len(rows)), names, fontsize=8 if len(rows) < 15 else 5)
    axes.set_xlabel("seconds: median, least and most")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_accuracies(figure: Any, record: dict[str, Any]) -> None:
    axes = figure.subplots()
    rows = [row for row in record["rows"] if row.get("accuracy")][::-1]
    mean, std = ([100 * row["accuracy"][part] for row in rows] for part in ("mean", "std"))
    axes.barh(range(len(rows)), mean, xerr=std, color="#4477aa", ecolor="#222222")
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows], fontsize=8)
    axes.set_xlabel("test accuracy, %: mean ± standard deviation over networks")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_memory(figure: Any, record: dict[str, Any]) -> None:
    rows = [row for row in record["rows"] if row.get("peak")]
    varied = list(dict.fromkeys(row["varied"] for row in rows))
    for axes, name in zip(figure.subplots(1, max(1, len(varied)), squeeze=False)[0], varied, strict=False):
        points = sorted((row for row in rows if row["varied"] == name), key=lambda row: int(row[name]))
        values = [row[name] for row in points]
        axes.plot(values, [row["peak"]["bytes"] / 2**20 for row in points], "o-", label="measured")
        axes.plot(values, [row["planned"] / 2**20 for row in points], "s--", label="planned")
        axes.set(xlabel=name, ylabel="peak memory, MiB", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7)
