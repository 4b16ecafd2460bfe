"""Make Markdown tables of the rows of records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]
"""A title, and the cell of a row under it."""


def table(benchmark: str, conditions: dict[str, Any], rows: list[Row]) -> str:
    """Return the rows of a benchmark as a Markdown table; columns that are empty in all rows are left out."""
    cells = [[title, *(_cell(show, row) for row in rows)] for title, show in TABLES[benchmark]]
    cells = [column for column in cells if any(column[1:])]
    widths = [max(map(len, column)) for column in cells]
    lines = [
        "| " + " | ".join(column[i].ljust(width) for column, width in zip(cells, widths, strict=True)) + " |"
        for i in range(len(rows) + 1)
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    about = "; ".join(f"{name.replace('_', ' ')} {_condition(name, value)}" for name, value in conditions.items())
    return "\n".join([lines[0], rule, *lines[1:], "", about]) + "\n"


def _cell(show: Callable[[Row], str], row: Row) -> str:
    try:
        return show(row)
    except (KeyError, TypeError):  # the row has no such number: it failed, or was not measured
        return ""


def _condition(name: str, value: Any) -> str:
    if name.endswith("_flops"):
        return f"{value / 1e9:.0f} GFLOP/s"
    if name.endswith("_bytes_per_second"):
        return f"{value / 1e9:.1f} GB/s"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _seconds(key: str = "seconds") -> Callable[[Row], str]:
    def show(row: Row) -> str:
        times = row[key]
        unit, scale = ("s", 1.0) if times["median"] >= 1 else ("ms", 1e3)
        low, middle, high = (f"{times[name] * scale:.3g}" for name in ("least", "median", "most"))
        return f"{middle} {unit} ({low} to {high}, n = {times['n']})"

    return show


def _mebibytes(key: str) -> Callable[[Row], str]:
    return lambda row: f"{_at(row, key) / 2**20:,.0f} MiB"


def percent(accuracy: dict[str, Any]) -> str:
    """Return a test accuracy with its deviation and the number of networks, as "88.9 % ± 0.7 (n = 5)"."""
    best = ", best epoch" if accuracy.get("epoch") == "best" else ""
    return f"{100 * accuracy['mean']:.1f} % ± {100 * accuracy['std']:.1f} (n = {accuracy['n']}{best})"


def _number(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: form.format(_at(row, key))


def _at(row: Row, key: str) -> Any:
    for part in key.split("."):
        row = row[part]
    if row is None:
        raise KeyError(key)
    return row


def _text(key: str) -> Callable[[Row], str]:
    return lambda row: str(row[key] or "")


def _engine(row: Row) -> str:
    return f"{row['engine']}{'' if row['exact'] else ' (approximate)'}"


_TIMES: list[Column] = [("time (least to most)", _seconds())]

TABLES: dict[str, list[Column]] = {
    "meta_step": [
        ("engine", _engine),
        *_TIMES,
        ("faster than whole_graph", _number("speedup", "{:.2f}×")),
        ("than whole_graph-tuned", _number("speedup_tuned", "{:.2f}×")),
        ("peak memory", _mebibytes("peak.bytes")),
        ("on the device", _mebibytes("peak.device")),
        ("image gradient's error", _number("error", "{:.1e}")),
        ("allowed", _number("allowed_error", "{:.1e}")),
        ("error in float64", _number("error_float64", "{:.0e}")),
        ("TFLOP", lambda row: f"{row['flops'] / 1e12:.2f}"),
        ("of peak", _number("share_of_peak", "{:.0%}")),
        ("torch's convolutions alone", _number("floor_share", "{:.0%}")),
        ("own convolutions", _number("shares.convolutions", "{:.0%}")),
        ("other operations", _number("shares.other operations", "{:.0%}")),
        ("rest", _number("shares.rest", "{:.0%}")),
        ("not timed because", _text("problem")),
    ],
    "modules": [
        ("network", _text("network")),
        ("engine", _text("engine")),
        ("CPU seconds (least to most)", _seconds("cpu_seconds")),
        ("least, of whole_graph's", _number("cpu_of_whole_graph", "{:.2f}")),
        ("time", _seconds()),
        ("peak memory", _mebibytes("peak.bytes")),
        ("on the device", _mebibytes("peak.device")),
        ("error in float64", _number("error_float64", "{:.0e}")),
        ("not timed because", _text("problem")),
    ],
    "memory_scaling": [
        ("varied", _text("varied")),
        ("N", _text("steps")),
        ("b", _text("batch")),
        ("pixels", _text("size")),
        ("peak memory", _mebibytes("peak.bytes")),
        ("on the device", _mebibytes("peak.device")),
        ("planned", _mebibytes("planned")),
        ("measured / planned", _number("ratio", "{:.2f}")),
        ("not measured because", _text("problem")),
    ],
    "kernels": [
        ("operation", _text("operation")),
        ("shape", _text("shape")),
        *_TIMES,
        ("GB/s", lambda row: f"{row['bytes_per_second'] / 1e9:.1f}"),
        ("of copy", _number("share_of_copy", "{:.0%}")),
        ("GFLOP/s", lambda row: f"{row['flops_per_second'] / 1e9:.0f}"),
        ("of product", _number("share_of_product", "{:.0%}")),
        ("error", _number("error", "{:.1e}")),
        ("error in float64", _number("error_float64", "{:.0e}")),
        ("not timed because", _text("problem")),
    ],
    "tune": [
        ("block", _text("block")),
        ("operation", _text("operation")),
        ("class", _text("class")),
        ("chosen", _text("chosen")),
        ("compiled", _number("compiled", "{}")),
        ("in", _number("compile_seconds", "{:.1f} s")),
        *_TIMES,
        ("in place", lambda row: f"{1e3 * row['in_place_seconds']['median']:.3g} ms"),
        (
            "other back ends",
            lambda row: ", ".join(f"{name} {1e3 * taken:.3g} ms" for name, taken in row["others"].items()),
        ),
        ("error", _number("error", "{:.1e}")),
        ("left out", _text("problem")),
    ],
    "methods": [
        ("method", _text("method")),
        ("options", lambda row: f"`{row['options']}`" if row["options"] else ""),
        ("test accuracy", lambda row: percent(row["accuracy"])),
        ("seconds", _number("seconds", "{:.1f}")),
        ("of evaluations", _number("seconds_evaluations", "{:.1f}")),
        ("peak memory", _mebibytes("peak")),
        ("not measured because", _text("problem")),
    ],
    "first_block": [
        ("sweep", _text("sweep")),
        ("first block", _text("way")),
        *_TIMES,
        ("not timed because", _text("problem")),
    ],
    "precision": [
        ("case", _text("case")),
        *((f"error in {each}", _number(f"{each}.images", "{:.1e}")) for each in ("fp32", "tf32", "fp16", "bf16")),
        ("fp16 / tf32", _number("of_tf32.fp16", "{:.2f}")),
        ("bf16 / tf32", _number("of_tf32.bf16", "{:.2f}")),
    ],
    "distillation": [
        ("iterations in", _text("precision")),
        ("test accuracy", lambda row: percent(row["accuracy"])),
        ("random real images", lambda row: percent(row["random"])),
        ("loss, mean of the last tenth", _number("loss", "{:.4f}")),
        ("skipped", _number("skipped", "{}")),
        ("repeated in tf32", _number("repeated", "{}")),
    ],
    "training": [
        ("loop", _text("loop")),
        *_TIMES,
        ("images/s", _number("images_per_second", "{:,.0f}")),
        ("an epoch of 50,000", _number("epoch_seconds", "{:.3g} s")),
        ("faster than plain", _number("speedup", "{:.2f}×")),
        ("than plain-tuned", _number("speedup_tuned", "{:.2f}×")),
        ("peak memory", _mebibytes("peak.bytes")),
        ("error in float64", _number("error_float64", "{:.0e}")),
        ("not timed because", _text("problem")),
    ],
    "suite": [
        ("test", _text("test")),
        ("outcome", _text("outcome")),
        ("seconds", _number("seconds", "{:.1f}")),
        ("because", _text("problem")),
    ],
    "gpu": [
        ("task", _text("task")),
        ("status", _text("status")),
        ("seconds", _number("seconds", "{:.0f}")),
        ("because", _text("problem")),
    ],
    "trajectories": [
        ("reader", _text("reader")),
        ("to the first sample (least to most)", _seconds("first")),
        ("each further sample", _seconds("further")),
        ("its checksums", _seconds("checksums")),
        ("of an iteration", _number("share", "{:.4%}")),
        ("resident memory", _mebibytes("resident")),
        ("on disk", _mebibytes("disk")),
        ("not timed because", _text("problem")),
    ],
}
