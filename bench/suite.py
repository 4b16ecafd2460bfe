"""A plugin of pytest that records each test as it ends: `pytest -p bench.suite --record FOLDER`.

The comparisons of kernels come first, since they take longest. A row has the outcome, the seconds, what was printed, and of a
failure the traceback, which pytest itself shows after the last test. A run of the suite that was cut off goes on: what passed, at
the same commit, is not run again. The record is FOLDER/suite.json, and suite.partial.json until the last test has ended.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.records import partial_rows, write_record

NAME = "suite"
_LONGEST = "test_triton_equals", "test_equals_the_generic_student", "test_the_meta_gradient"
"""Beginnings of the names of tests that compile many kernels."""
_ENDED = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--record`."""
    parser.addoption("--record", required=True, help="folder of the record")


def pytest_configure(config: pytest.Config) -> None:
    """Leave out what passed before; record in the process that hears of all tests, which no worker of xdist is."""
    folder = str(config.getoption("--record"))
    rows = {row["test"]: row for row in partial_rows(folder, NAME)}
    config.pluginmanager.register(_Order({name for name, row in rows.items() if row["outcome"] == "passed"}))
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(folder, rows, " ".join(map(str, config.invocation_params.args))))


class _Order:
    """Leave out the tests of these names, and put the longest first."""

    def __init__(self, names: set[str]) -> None:
        self._names = names

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: not item.name.startswith(_LONGEST))  # stable
        left_out = [item for item in items if item.nodeid in self._names]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item.nodeid not in self._names]


class _Recorder:
    """Write the record after each test, and once more at the end."""

    def __init__(self, folder: str, rows: dict[str, dict[str, Any]], arguments: str) -> None:
        self._folder, self._rows, self._arguments = folder, rows, arguments
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
    """Return what was raised; of a test that tells it without a traceback, the last line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = crash.message.splitlines()[:1] if crash else report.longreprtext.strip().splitlines()
    return lines[-1][:300] if lines else report.outcome


def arguments(record: Path) -> list[str]:
    """Return the arguments of pytest that have it write `record`."""
    # a process gets its next test when only one is left to it, so at most one waits behind a long one
    return ["-p", "bench.suite", "--record", str(record.parent), "--dist", "load", "--maxschedchunk", "1"]
