"""Tables and plots from the records: `python -m bench render`.

In the documents, the text between `<!-- bench:NAME -->` and `<!-- /bench -->` becomes the table of the record NAME.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from bench.parsing import RecordOptions
from bench.records import PARTIAL, TRACE, read_record, write_record
from mtt_fast.commands.option_fields import MAY_BE_EMPTY
from mtt_fast.errors import InputError
from mtt_fast.storage.text_files import write_text

log = logging.getLogger("mtt_fast")

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]
"""A title, and the cell of a row under it."""

_MARKED = re.compile(r"(<!-- bench:(?P<name>\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


@dataclass(frozen=True)
class Options:
    """Make Markdown tables and PNG plots of the records, and update the documents that quote them."""

    results: str = "bench/results"
    """folder of the records; NAME.md and NAME.png are written beside NAME.json"""
    documents: Annotated[str, MAY_BE_EMPTY] = "docs/performance.md,docs/gpu-measurements.md,docs/precision.md"
    """files with markers to fill in, joined by commas; "" for none"""


def main(options: Options, command: str) -> None:
    """Render every record, then fill in the marked places of the documents."""
    folder = Path(options.results)
    paths = sorted(path for path in folder.glob("*.json") if not path.name.endswith((TRACE, PARTIAL)))
    if not paths:
        raise InputError(f"{folder}: holds no records; make one, e.g. with python -m bench meta_step")
    tables = {}
    for path in paths:
        record = read_record(path)
        tables[path.stem] = rendered(record)
        write_text(path.with_suffix(".md"), tables[path.stem])
        if record["benchmark"] in DRAWN:
            draw(record, path.with_suffix(".png"))
    for document in map(Path, filter(None, options.documents.split(","))):
        write_text(document, filled_in(document.read_text(encoding="utf-8"), tables, document))
    log.info("%s: %d records", folder, len(paths))


def filled_in(text: str, tables: dict[str, str], where: Path) -> str:
    """Return `text` with each marked place holding its record's table. Raises `InputError` for an unknown record."""

    def replaced(match: re.Match[str]) -> str:
        if match["name"] not in tables:
            raise InputError(f"{where}: marker bench:{match['name']}: no such record; there are {', '.join(tables)}")
        return f"{match[1]}{tables[match['name']]}{match[3]}"

    return _MARKED.sub(replaced, text)


def rendered(record: dict[str, Any]) -> str:
    """Return a record's table, with the conditions under it."""
    versions = record["versions"]
    dirty = " with changes" if record.get("dirty") else ""
    return (
        f"{table(record['benchmark'], record['conditions'], record['rows'])}\n"
        f"{record['device']}, torch {versions.get('torch')}, {str(record.get('time'))[:10]}, "
        f"commit {str(record.get('commit'))[:8]}{dirty}: `{record.get('command')}`\n"
    )


def publish(
    options: RecordOptions,
    benchmark: str,
    name: str,
    device: torch.device,
    conditions: dict[str, Any],
    rows: Iterable[Row],
    command: str,
) -> None:
    """Print the rows as a table, and write their record; it is called `name` if the options do not name it."""
    listed = list(rows)
    print(table(benchmark, conditions, listed))
    write_record(options.out, options.name or name, benchmark, device, conditions, listed, command)


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
        ("default", lambda row: f"{1e3 * row['default_seconds']['median']:.3g} ms"),
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
