"""The tables of the paper, what was measured here beside what it says: `python -m mtt_fast.analysis tables RUN…`.

Reads the summary.json of finished runs, distillations and baselines alike. Table 1 compares methods on CIFAR-10,
CIFAR-100 and Tiny ImageNet, Table 2 with kernel inducing points by the width of the network, Table 3 networks that the
sets were not made with (runs evaluated with --eval_mode M; `mtt_fast.cross` measures them afterwards), Table 4 is of the
ImageNet subsets. Settings that the paper does not have are listed too. Runs that differ in the seed alone are averaged;
those that differ in more each have a line. Where the paper's text or a later paper says otherwise, that is told as well.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from mtt_fast.analysis.measured import Measured, Setting, measured
from mtt_fast.analysis.published import Paper, Published, published
from mtt_fast.analysis.runs import finished_runs
from mtt_fast.commands import parsing
from mtt_fast.commands.tables import MISSING, markdown_table, percent
from mtt_fast.errors import InputError
from mtt_fast.storage.files import write_text
from mtt_fast.storage.records import write_record

log = logging.getLogger(__name__)

PROGRAM = "python -m mtt_fast.analysis tables"
_QUOTED, _WHITENED, _LATER, _DASH = "†", "*", "‡", "none"
_LEGEND = {
    _QUOTED: "the method's authors' own number",
    _WHITENED: "with ZCA-whitened images",
    _LATER: "not in the paper's table, or not legible there; from another source, see below",
    _DASH: "the paper's table has a dash",
}
_Key = tuple[str, str, str, str]
"""Table, data set, network, method: what the sources of one row have in common."""


@dataclass(frozen=True)
class TablesOptions:
    """Write the paper's tables with what was measured beside what the paper says."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """run folders, or folders that hold some"""
    out: str = "runs/tables"
    """folder for tables.md and tables.json"""


class Row(NamedTuple):
    """A line of a table: one method on one data set with one network."""

    dataset: str
    method: str
    model: str
    published: tuple[Published, ...]
    """what the sources say of it, the paper's own table first if it has it"""
    here: dict[str, Measured]
    """by images a class"""

    def record(self) -> dict[str, Any]:
        """Return the row as JSON holds it, accuracies in [0, 1]."""
        said = [
            {"accuracy": source.accuracy, "source": source.source, "quoted": source.quoted}
            | {"whitened": sorted(source.whitened), "of_paper": source.of_paper}
            for source in self.published
        ]
        return {
            "dataset": self.dataset,
            "method": self.method,
            "model": self.model,
            "measured": {ipc: value.record() for ipc, value in self.here.items()},
            "paper": next((record for record in said if record["of_paper"]), None),
            "elsewhere": [record for record in said if not record["of_paper"]],
        }

    def shown(self, ipc: str) -> Published | None:
        """Return the first source that has a number, or a dash, at `ipc` images a class."""
        return next((source for source in self.published if ipc in source.accuracy or ipc in source.dashes), None)


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    options = parsing.parse(TablesOptions, argv, PROGRAM)
    if not options.runs:
        raise InputError(f"expected run folders; see {PROGRAM} --help")
    paper = published()
    tables = beside(measured(finished_runs(options.runs)), paper.rows, list(paper.titles))
    folder = Path(options.out)
    text = "\n".join(
        [*(_section(number, paper.titles[number], rows) for number, rows in tables.items()), _costs_and_shares(paper)]
    )
    write_text(folder / "tables.md", text)
    record = {
        number: {"title": paper.titles[number], "rows": [row.record() for row in rows]}
        for number, rows in tables.items()
    }
    write_record(folder / "tables.json", record)  # last: it says that all is there
    log.info("%s\n%s", folder / "tables.md", text)


def beside(
    here: Mapping[Setting, Sequence[Measured]], rows: Sequence[Published], numbers: Sequence[str]
) -> dict[str, list[Row]]:
    """Return the rows of each table: those of the paper with what was measured `here`, then what it does not have."""
    tables: dict[str, list[Row]] = {number: [] for number in numbers}
    left = set(here)
    sources: dict[_Key, list[Published]] = {}
    for line in rows:
        sources.setdefault((line.table, line.dataset, line.model, line.method), []).append(line)
    for (table, dataset, model, method), lines in sources.items():
        mine = {setting: here[setting] for setting in here if _fits(setting, lines[0])}
        left -= set(mine)
        tables[table] += _rows(dataset, method, model, lines, mine)
    others: dict[tuple[str, str, str], dict[Setting, Sequence[Measured]]] = {}
    for setting in here:
        if setting in left:
            others.setdefault((setting.dataset, setting.method, setting.model), {})[setting] = here[setting]
    subsets = {line.dataset for line in rows if line.table == "4"}
    for (dataset, method, model), mine in sorted(others.items()):
        tables["4" if dataset in subsets else "1"] += _rows(dataset, method, model, (), mine)
    return tables


def _fits(setting: Setting, line: Published) -> bool:
    ours, theirs = ((of.dataset, of.model, of.method) for of in (setting, line))
    return [name.casefold() for name in ours] == [name.casefold() for name in theirs]


def _rows(
    dataset: str, method: str, model: str, lines: Sequence[Published], mine: Mapping[Setting, Sequence[Measured]]
) -> list[Row]:
    """Return one row, or as many as the setting with most choices of options needs."""
    count = max((len(values) for values in mine.values()), default=1)
    return [
        Row(
            dataset, method, model, tuple(lines) if place == 0 else (),
            {setting.ipc: values[place] for setting, values in mine.items() if place < len(values)},
        )
        for place in range(count)
    ]  # fmt: skip


def _section(number: str, title: str, rows: Sequence[Row]) -> str:
    """Return one table in Markdown, with its notes."""
    known = {ipc for row in rows for ipc in (*row.here, *(ipc for said in row.published for ipc in said.accuracy))}
    columns = sorted(known, key=lambda ipc: (not ipc.isdigit(), int(ipc) if ipc.isdigit() else 0))
    header = ["data set", "method", "network", *(text for ipc in columns for text in (f"{ipc}: here", "paper"))]
    lines = [
        [row.dataset, _name(row), row.model, *(text for ipc in columns for text in (_here(row, ipc), _paper(row, ipc)))]
        for row in rows
    ]
    table = markdown_table(header, lines)
    parts = [f"## Table {number}: {title}\n\nTest accuracy in %, by images a class.\n\n{table}"]
    legend = [f"{mark}: {meaning}" for mark, meaning in _LEGEND.items() if mark in table]
    parts += ["; ".join(legend) + ".\n"] if legend else []
    notes = {
        "Sources of the paper's column:": _sources(rows),
        "Where other sources differ, or know the deviation:": [line for row in rows for line in _otherwise(row)],
        "Measured in:": [
            f"- {row.dataset}, {row.method}, {row.model}, {ipc}: {', '.join(value.runs)}"
            for row in rows
            for ipc, value in sorted(row.here.items())
        ],
    }
    parts += [f"{heading}\n\n" + "\n".join(texts) + "\n" for heading, texts in notes.items() if texts]
    return "\n".join(parts)


def _sources(rows: Sequence[Row]) -> list[str]:
    """Return a line for each method and source of the numbers that are shown, with the data sets that it is of."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        for ipc in {ipc: None for said in row.published for ipc in said.accuracy}:
            shown = row.shown(ipc)
            if shown is not None:
                found.setdefault((row.method, shown.source), {})[row.dataset] = None
    return [f"- {method} ({', '.join(datasets)}): {source}" for (method, source), datasets in found.items()]


def _otherwise(row: Row) -> list[str]:
    """Return a line for each number that is not shown, and is not the one that is."""
    return [
        f"- {row.dataset}, {row.method}, {row.model}, {ipc}: {percent(accuracy)} in {said.source}"
        for said in row.published
        for ipc, accuracy in said.accuracy.items()
        if (shown := row.shown(ipc)) is not None and shown is not said and not _says_no_more(accuracy, shown, ipc)
    ]


def _says_no_more(accuracy: Mapping[str, float], shown: Published, ipc: str) -> bool:
    """Return whether all of `accuracy` is what `shown` says."""
    return accuracy.items() <= shown.accuracy.get(ipc, {}).items()


def _costs_and_shares(paper: Paper) -> str:
    """Return what the paper says besides: the sizes of the sets, and what experts cost its authors."""
    sizes = [
        f"- {dataset}: " + ", ".join(f"{share:g} % at {ipc}" for ipc, share in shares.items())
        for dataset, shares in paper.shares.items()
    ]
    costs = [
        f"- {dataset}: {cost['seconds_per_epoch']:g} s an epoch, {cost['gpu_hours']:g} GPU hours for "
        f"{cost['experts']:g}, {cost['megabytes_per_expert']:g} MB each"
        for dataset, cost in paper.costs.items()
    ]
    shares = "\n".join(["Distilled images as a share of the real ones, by images a class:\n", *sizes])
    experts = "\n".join(["Its experts:\n", *costs])
    return f"## Besides, in the paper\n\n{shares}\n\n{experts}\n"


def _name(row: Row) -> str:
    """Return the method, and where it is not on the paper's line the runs too, for lines that look alike."""
    runs = {Path(run).name: None for value in row.here.values() for run in value.runs}
    return row.method if row.published else f"{row.method} ({', '.join(runs)})"


def _here(row: Row, ipc: str) -> str:
    value = row.here.get(ipc)
    if value is None:
        return MISSING
    return percent(value.record()) + (f" ({len(value.runs)} runs)" if len(value.runs) > 1 else "")


def _paper(row: Row, ipc: str) -> str:
    shown = row.shown(ipc)
    if shown is None:
        return MISSING
    if ipc in shown.dashes:
        return _DASH
    marks = {_QUOTED: shown.quoted, _WHITENED: ipc in shown.whitened, _LATER: not shown.of_paper}
    return percent(shown.accuracy[ipc]) + "".join(mark for mark, holds in marks.items() if holds)
