"""Tables 1, 2 and 4 of the paper, what was measured here beside what it says: `python -m mtt_fast.analysis tables RUN…`.

Reads the summary.json of finished runs, distillations and baselines alike. Table 1 compares methods on CIFAR-10,
CIFAR-100 and Tiny ImageNet, Table 2 with kernel inducing points by the width of the network, Table 4 is of the ImageNet
subsets. Settings that the paper does not have are listed too. Runs that differ in the seed alone are averaged; those
that differ in more each have a line.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from mtt_fast import cli
from mtt_fast.analysis.measured import Measured, Setting, measured
from mtt_fast.analysis.output import MISSING, markdown_table, percent
from mtt_fast.analysis.published import Published, published
from mtt_fast.analysis.runs import finished_runs
from mtt_fast.errors import InputError
from mtt_fast.files import write_text
from mtt_fast.records import write_record

log = logging.getLogger(__name__)

PROGRAM = "python -m mtt_fast.analysis tables"
_QUOTED = "†"


@dataclass(frozen=True)
class TablesOptions:
    """Write the paper's Tables 1, 2 and 4 with what was measured beside what the paper says."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """run folders, or folders that hold some"""
    out: str = "runs/tables"
    """folder for tables.md and tables.json"""


class Row(NamedTuple):
    """A line of a table: one method on one data set with one network."""

    dataset: str
    method: str
    model: str
    of_paper: Published | None
    here: dict[str, Measured]
    """by images a class"""

    def record(self) -> dict[str, Any]:
        """Return the row as JSON holds it, accuracies in [0, 1]."""
        paper = self.of_paper
        return {
            "dataset": self.dataset,
            "method": self.method,
            "model": self.model,
            "measured": {ipc: value.record() for ipc, value in self.here.items()},
            "paper": None
            if paper is None
            else {"accuracy": paper.accuracy, "source": paper.source, "quoted": paper.quoted},
        }


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    options = cli.parse(TablesOptions, argv, PROGRAM)
    if not options.runs:
        raise InputError(f"expected run folders; see {PROGRAM} --help")
    titles, of_paper = published()
    tables = beside(measured(finished_runs(options.runs)), of_paper, list(titles))
    folder = Path(options.out)
    text = "\n".join(_section(number, titles[number], rows) for number, rows in tables.items())
    write_text(folder / "tables.md", text)
    record = {
        number: {"title": titles[number], "rows": [row.record() for row in rows]} for number, rows in tables.items()
    }
    write_record(folder / "tables.json", record)  # last: it says that all is there
    log.info("%s\n%s", folder / "tables.md", text)


def beside(
    here: Mapping[Setting, Sequence[Measured]], of_paper: Sequence[Published], numbers: Sequence[str]
) -> dict[str, list[Row]]:
    """Return the rows of each table: those of the paper with what was measured `here`, then what it does not have."""
    tables: dict[str, list[Row]] = {number: [] for number in numbers}
    left = set(here)
    for line in of_paper:
        mine = {setting: here[setting] for setting in here if _fits(setting, line)}
        left -= set(mine)
        tables[line.table] += _rows(line.dataset, line.method, line.model, line, mine)
    others: dict[tuple[str, str, str], dict[Setting, Sequence[Measured]]] = {}
    for setting in here:
        if setting in left:
            others.setdefault((setting.dataset, setting.method, setting.model), {})[setting] = here[setting]
    subsets = {line.dataset for line in of_paper if line.table == "4"}
    for (dataset, method, model), mine in sorted(others.items()):
        tables["4" if dataset in subsets else "1"] += _rows(dataset, method, model, None, mine)
    return tables


def _fits(setting: Setting, line: Published) -> bool:
    ours, theirs = ((of.dataset, of.model, of.method) for of in (setting, line))
    return [name.casefold() for name in ours] == [name.casefold() for name in theirs]


def _rows(
    dataset: str, method: str, model: str, line: Published | None, mine: Mapping[Setting, Sequence[Measured]]
) -> list[Row]:
    """Return one row, or as many as the setting with most choices of options needs."""
    count = max((len(values) for values in mine.values()), default=1)
    return [
        Row(
            dataset, method, model, line if place == 0 else None,
            {setting.ipc: values[place] for setting, values in mine.items() if place < len(values)},
        )
        for place in range(count)
    ]  # fmt: skip


def _section(number: str, title: str, rows: Sequence[Row]) -> str:
    """Return one table in Markdown, with its notes."""
    known = {ipc for row in rows for ipc in (*row.here, *(row.of_paper.accuracy if row.of_paper else ()))}
    columns = sorted(known, key=lambda ipc: (not ipc.isdigit(), int(ipc) if ipc.isdigit() else 0))
    header = ["data set", "method", "network", *(text for ipc in columns for text in (f"{ipc}: here", "paper"))]
    lines, notes = [], []
    for row in rows:
        cells = [text for ipc in columns for text in (_here(row, ipc), _paper(row, ipc))]
        lines.append([row.dataset, _name(row), row.model, *cells])
        notes += [
            f"- {row.dataset}, {row.method}, {row.model}, {ipc}: {', '.join(value.runs)}"
            for ipc, value in sorted(row.here.items())
        ]
    text = f"## Table {number}: {title}\n\nTest accuracy in %, by images a class.\n\n{markdown_table(header, lines)}"
    if any(row.of_paper and row.of_paper.quoted for row in rows):
        text += f"\n{_QUOTED} quoted: the method's authors' own number.\n"
    text += "\nThe paper's numbers, as repeated in:\n\n" + "\n".join(_sources(rows)) + "\n"
    return text + ("\nMeasured in:\n\n" + "\n".join(notes) + "\n" if notes else "")


def _sources(rows: Sequence[Row]) -> list[str]:
    """Return a line for each method and source of the paper's numbers, with the data sets that it is of."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.of_paper:
            found.setdefault((row.method, row.of_paper.source), []).append(row.dataset)
    return [f"- {method} ({', '.join(datasets)}): {source}" for (method, source), datasets in found.items()]


def _name(row: Row) -> str:
    """Return the method, and where it is not on the paper's line the runs too, for lines that look alike."""
    runs = {Path(run).name: None for value in row.here.values() for run in value.runs}
    return row.method if row.of_paper else f"{row.method} ({', '.join(runs)})"


def _here(row: Row, ipc: str) -> str:
    value = row.here.get(ipc)
    if value is None:
        return MISSING
    return percent(value.record()) + (f" ({len(value.runs)} runs)" if len(value.runs) > 1 else "")


def _paper(row: Row, ipc: str) -> str:
    if row.of_paper is None or ipc not in row.of_paper.accuracy:
        return MISSING
    return percent(row.of_paper.accuracy[ipc]) + (_QUOTED if row.of_paper.quoted else "")
