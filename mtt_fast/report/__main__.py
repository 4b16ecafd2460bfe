"""Write a report of runs: `python -m mtt_fast.report RUN…`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mtt_fast.commands import cli, parsing
from mtt_fast.commands.option_fields import Checked
from mtt_fast.errors import InputError
from mtt_fast.report.page import render
from mtt_fast.report.runs import read_runs
from mtt_fast.storage.outputs import check_output_file
from mtt_fast.storage.text_files import write_text

PROGRAM = "python -m mtt_fast.report"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReportOptions:
    """Write a self-contained HTML page about one or more runs, finished or not."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN …")] = ()
    """run folders, of distillations or baselines"""
    out: Annotated[str | None, Checked(check_output_file)] = None
    """file to write; if not given, RUN/report.html for one run, ./report.html for several"""


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    options = parsing.parse(ReportOptions, argv, PROGRAM)
    if not options.runs:
        raise InputError(f"expected the folder of a run; see {PROGRAM} --help")
    folders = [Path(run) for run in options.runs]
    alone = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    path, runs = Path(options.out) if options.out else alone, read_runs(folders)
    check_output_file(path, "choose another `out`")
    write_text(path, render(runs))
    log.info("%s", path)


if __name__ == "__main__":
    sys.exit(cli.run(main))
