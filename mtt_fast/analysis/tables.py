"""Write the paper's tables with the numbers measured here beside the paper's: `python -m mtt_fast.analysis tables RUN…`.

Reads the summary.json of finished runs, distillations and baselines alike. Table 1 compares methods on CIFAR-10,
CIFAR-100 and Tiny ImageNet, Table 2 with kernel inducing points by the width of the network, Table 3 networks that the
sets were not made with (runs evaluated with --eval_mode M; `mtt_fast.cross` measures such networks afterwards), Table 4 is
of the ImageNet subsets. Settings that the paper does not have are listed too. Runs that differ only in the seed are
averaged; runs that differ in more than that and the images per class have a line each, except those of the recipes of one name
(cifar10-ipc1, cifar10-ipc50). MTT with options of its successors is another method. A note says where the paper's text or a
later paper has other numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from mtt_fast.analysis.measured import Measured, Setting, finished_runs, measurements
from mtt_fast.commands import parsing
from mtt_fast.commands.option_fields import Checked
from mtt_fast.commands.published import Paper, Published, published_numbers
from mtt_fast.commands.tables import MISSING, markdown_table, percent
from mtt_fast.errors import InputError
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.records import write_record
from mtt_fast.storage.run_files import last_name
from mtt_fast.storage.text_files import write_text

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
"""Table, data set, network, method: common to the sources of one row."""


@dataclass(frozen=True)
class TablesOptions:
    """Write the paper's tables with your measured numbers beside the paper's."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[RUN …]")] = ()
    """run folders, or folders that contain run folders"""
    out: Annotated[str, Checked(check_output_folder)] = "runs/tables"
    """folder for tables.md and tables.json"""


class Row(NamedTuple):
    """A line of a table: one method on one data set with one network."""

    dataset: str
    method: str
    model: str
    published: tuple[Published, ...]
    """the numbers of each source, the paper's own table first if it has this row"""
    measured: dict[str, Measured]
    """the numbers measured here, by images per class"""

    def record(self) -> dict[str, Any]:
        """Return the row as JSON holds it, accuracies in [0, 1]."""
        records = [
            {"accuracy": source.accuracy, "source": source.source, "quoted": source.quoted}
            | {"whitened": sorted(source.whitened), "of_paper": source.of_paper}
            for source in self.published
        ]
        return {
            "dataset": self.dataset,
            "method": self.method,
            "model": self.model,
            "measured": {ipc: value.record() for ipc, value in self.measured.items()},
            "paper": next((record for record in records if record["of_paper"]), None),
            "elsewhere": [record for record in records if not record["of_paper"]],
        }

    def published_at(self, ipc: str) -> Published | None:
        """Return the first source that has a number, or a dash, at `ipc` images per class."""
        return next((source for source in self.published if ipc in source.accuracy or ipc in source.dashes), None)


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    options = parsing.parse(TablesOptions, argv, PROGRAM)
    if not options.runs:
        raise InputError(f"expected run folders; see {PROGRAM} --help")
    paper = published_numbers()
    tables = rows_by_table(measurements(finished_runs(options.runs)), paper.rows, list(paper.titles))
    folder = Path(options.out)
    text = "\n".join(
        [*(_section(number, paper.titles[number], rows) for number, rows in tables.items()), _costs_and_shares(paper)]
    )
    write_text(folder / "tables.md", text)
    record = {
        number: {"title": paper.titles[number], "rows": [row.record() for row in rows]}
        for number, rows in tables.items()
    }
    write_record(folder / "tables.json", record)  # last: with it everything is there
    log.info("%s\n%s", folder / "tables.md", text)


def rows_by_table(
    measured: Mapping[Setting, Sequence[Measured]], rows: Sequence[Published], numbers: Sequence[str]
) -> dict[str, list[Row]]:
    """Return the rows of each table: the paper's with the numbers `measured` here, then settings that the paper lacks."""
    tables: dict[str, list[Row]] = {number: [] for number in numbers}
    not_in_paper = set(measured)
    sources: dict[_Key, list[Published]] = {}
    for line in rows:
        sources.setdefault((line.table, line.dataset, line.model, line.method), []).append(line)
    for (table, dataset, model, method), lines in sources.items():
        row_measurements = {setting: measured[setting] for setting in measured if _fits(setting, lines[0])}
        not_in_paper -= set(row_measurements)
        tables[table] += _rows(dataset, method, model, lines, row_measurements)
    others: dict[tuple[str, str, str], dict[Setting, Sequence[Measured]]] = {}
    for setting in measured:
        if setting in not_in_paper:
            others.setdefault((setting.dataset, setting.method, setting.model), {})[setting] = measured[setting]
    subsets = {line.dataset for line in rows if line.table == "4"}
    for (dataset, method, model), row_measurements in sorted(others.items()):
        tables["4" if dataset in subsets else "1"] += _rows(dataset, method, model, (), row_measurements)
    return tables


def _fits(setting: Setting, line: Published) -> bool:
    ours, theirs = ((side.dataset, side.model, side.method) for side in (setting, line))
    return [name.casefold() for name in ours] == [name.casefold() for name in theirs]


def _rows(
    dataset: str, method: str, model: str, lines: Sequence[Published], measured: Mapping[Setting, Sequence[Measured]]
) -> list[Row]:
    """Return a row for each choice of options that was measured, at least one; the first has the published `lines`."""
    choices = dict.fromkeys(value.choice for values in measured.values() for value in values) or {"": None}
    return [
        Row(
            dataset, method, model, () if number else tuple(lines),
            {setting.ipc: value for setting, values in measured.items() for value in values if value.choice == choice},
        )
        for number, choice in enumerate(choices)
    ]  # fmt: skip


def _section(number: str, title: str, rows: Sequence[Row]) -> str:
    """Return one table in Markdown, with its notes."""
    known = {
        ipc for row in rows for ipc in (*row.measured, *(ipc for source in row.published for ipc in source.accuracy))
    }
    columns = sorted(known, key=lambda ipc: (not ipc.isdigit(), int(ipc) if ipc.isdigit() else 0))
    header = ["data set", "method", "network", *(text for ipc in columns for text in (f"{ipc}: here", "paper"))]
    lines = [
        [
            row.dataset, _name(row), row.model,
            *(text for ipc in columns for text in (_measured(row, ipc), _paper(row, ipc))),
        ]
        for row in rows
    ]  # fmt: skip
    table = markdown_table(header, lines)
    parts = [f"## Table {number}: {title}\n\nTest accuracy in %, by images per class.\n\n{table}"]
    legend = [f"{mark}: {meaning}" for mark, meaning in _LEGEND.items() if mark in table]
    parts += ["; ".join(legend) + ".\n"] if legend else []
    notes = {
        "Sources of the paper's column:": _sources(rows),
        "Where other sources differ, or know the deviation:": [line for row in rows for line in _otherwise(row)],
        "Measured in:": [
            f"- {row.dataset}, {row.method}, {row.model}, {ipc}: {', '.join(value.runs)}"
            for row in rows
            for ipc, value in sorted(row.measured.items())
        ],
    }
    parts += [f"{heading}\n\n" + "\n".join(texts) + "\n" for heading, texts in notes.items() if texts]
    return "\n".join(parts)


def _sources(rows: Sequence[Row]) -> list[str]:
    """Return a line for each method and source of the numbers that are shown, with the data sets of these numbers."""
    datasets_of: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        for ipc in {ipc: None for source in row.published for ipc in source.accuracy}:
            shown = row.published_at(ipc)
            if shown is not None:
                datasets_of.setdefault((row.method, shown.source), {})[row.dataset] = None
    return [f"- {method} ({', '.join(datasets)}): {source}" for (method, source), datasets in datasets_of.items()]


def _otherwise(row: Row) -> list[str]:
    """Return a line for each number of another source that differs from the number that the row shows."""
    return [
        f"- {row.dataset}, {row.method}, {row.model}, {ipc}: {percent(accuracy)} in {source.source}"
        for source in row.published
        for ipc, accuracy in source.accuracy.items()
        if (shown := row.published_at(ipc)) is not None and not _is_contained(accuracy, shown, ipc)
    ]


def _is_contained(accuracy: Mapping[str, float], shown: Published, ipc: str) -> bool:
    """Return whether every field of `accuracy` has the same value in `shown`."""
    return accuracy.items() <= shown.accuracy.get(ipc, {}).items()


def _costs_and_shares(paper: Paper) -> str:
    """Return the paper's further numbers: the sizes of the sets, and the costs of the authors' experts."""
    sizes = [
        f"- {dataset}: " + ", ".join(f"{share:g} % at {ipc}" for ipc, share in shares.items())
        for dataset, shares in paper.shares.items()
    ]
    costs = [
        f"- {dataset}: {cost['seconds_per_epoch']:g} s an epoch, {cost['gpu_hours']:g} GPU hours for "
        f"{cost['experts']:g}, {cost['megabytes_per_expert']:g} MB each"
        for dataset, cost in paper.costs.items()
    ]
    shares = "\n".join(["Distilled images as a share of the real ones, by images per class:\n", *sizes])
    experts = "\n".join(["Its experts:\n", *costs])
    return f"## Besides, in the paper\n\n{shares}\n\n{experts}\n"


def _name(row: Row) -> str:
    """Return the method, with the runs in a row that is not the paper's, so that such rows can be told apart."""
    runs = {last_name(run): None for value in row.measured.values() for run in value.runs}
    return row.method if row.published else f"{row.method} ({', '.join(runs)})"


def _measured(row: Row, ipc: str) -> str:
    value = row.measured.get(ipc)
    if value is None:
        return MISSING
    return percent(value.record()) + (f" ({len(value.runs)} runs)" if len(value.runs) > 1 else "")


def _paper(row: Row, ipc: str) -> str:
    shown = row.published_at(ipc)
    if shown is None:
        return MISSING
    if ipc in shown.dashes:
        return _DASH
    marks = {_QUOTED: shown.quoted, _WHITENED: ipc in shown.whitened, _LATER: not shown.of_paper}
    return percent(shown.accuracy[ipc]) + "".join(mark for mark, holds in marks.items() if holds)
