"""A plugin of pytest that records each test as it ends: `pytest -p bench.suite --record FOLDER`.

The tests that took longest in the last record start first. A row has the outcome, the seconds, the output, and for a
failure the traceback, which pytest itself shows after the last test. A run of the suite that was cut off continues: tests that
passed at the same commit are not run again. The record is FOLDER/suite.json, and suite.partial.json until the last test has ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.records import partial_rows, read_record, write_record

NAME = "suite"
_BEFORE = Path(__file__).parent / "results" / "h200" / f"{NAME}.json"
_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends
_ENDED = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--record`."""
    parser.addoption("--record", required=True, help="folder of the record")


def pytest_configure(config: pytest.Config) -> None:
    """Record in the main process, which gets the reports of all tests; a worker of xdist gets only its own, and ends with it."""
    if hasattr(config, "workerinput"):
        # else its test runs on for seconds after a stage's limit, and takes the GPU from what is measured next
        with contextlib.suppress(AttributeError):  # only Linux has this call
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        folder, words = str(config.getoption("--record")), " ".join(map(str, config.invocation_params.args))
        config.pluginmanager.register(_Recorder(folder, partial_rows(folder, NAME), words))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what passed before, and order the rest by the seconds that the last record has."""
    rows = partial_rows(str(config.getoption("--record")), NAME)
    _leave_out({row["test"] for row in rows if row["outcome"] == "passed"}, config, items)
    # a file may have moved to another folder since
    before = {Path(row["test"]).name: row["seconds"] for row in read_record(_BEFORE)["rows"]}
    by_name = {item.nodeid: item for item in items}
    seconds = {name: before[Path(name).name] for name in by_name if Path(name).name in before}
    processes = getattr(config, "workerinput", {}).get("workercount", 1)
    items[:] = [by_name[name] for name in in_order(list(by_name), seconds, processes)]


def in_order(tests: Sequence[str], seconds: Mapping[str, float], processes: int) -> list[str]:
    """Return `tests` from the longest to the shortest, a test without known seconds before all others.

    pytest-xdist gives each process two tests at the start. So the first of each pair is long, and the second short.
    """
    longest = sorted(tests, key=lambda test: -seconds.get(test, math.inf))  # stable
    if processes == 1 or len(tests) < 2 * processes:
        return longest
    shortest = longest[-processes:]
    pairs = zip(longest[:processes], shortest, strict=True)
    return [*itertools.chain.from_iterable(pairs), *longest[processes:-processes]]


def _leave_out(names: set[str], config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take the tests of these names out of `items`, and tell pytest of it."""
    left_out = [item for item in items if item.nodeid in names]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in names]


class _Recorder:
    """Write the record after each test, and once more at the end."""

    def __init__(self, folder: str, before: list[dict[str, Any]], arguments: str) -> None:
        self._folder, self._arguments = folder, arguments
        self._rows = {row["test"]: row for row in before}
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "problem": None}
            if report.outcome != "passed":
                row |= {"problem": _in_a_line(report), "traceback": report.longreprtext}
            self._rows[report.nodeid] = row | {"output": report.capstdout}
            self._write(complete=False)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self._write(complete=exitstatus in _ENDED)

    def _write(self, *, complete: bool) -> None:
        rows = list(self._rows.values())
        outcomes = [row["outcome"] for row in rows]
        conditions = {outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")}
        command = f"python -m pytest {self._arguments}"
        write_record(self._folder, NAME, "suite", self._device, conditions, rows, command, complete=complete)


def _in_a_line(report: pytest.TestReport) -> str:
    """Return the error's message, or the last line of a report without a traceback."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = crash.message.splitlines()[:1] if crash else report.longreprtext.strip().splitlines()
    return lines[-1][:300] if lines else report.outcome


def arguments(record: Path) -> list[str]:
    """Return the arguments of pytest that have it write `record`."""
    # each process has at most one test waiting, so that few tests wait behind a long one
    return ["-p", "bench.suite", "--record", str(record.parent), "--dist", "load", "--maxschedchunk", "1"]
