"""The metrics of a run: lines of JSON, and TensorBoard events."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtt_fast.storage.checkpoint import other_checkpoint
from mtt_fast.storage.events import EventLog
from mtt_fast.storage.records import NUMBER, check_form, verified, with_checksum
from mtt_fast.storage.regular import open_regular
from mtt_fast.storage.run_files import CHECKPOINT, EVALUATIONS, METRICS
from mtt_fast.storage.tensor_files import read_header
from mtt_fast.storage.text_files import MALFORMED, parse_json, write_text

log = logging.getLogger(__name__)


_STEPS = ("step", "skip", "above_threshold")
"""Kinds of records in metrics.jsonl, one for each iteration."""
_EVALUATION_FIELDS = ("accuracy_mean", "accuracy_std", "networks")
_FIELDS = {
    "step": ("loss", "lr"), "evaluation": _EVALUATION_FIELDS, "ema_evaluation": _EVALUATION_FIELDS, "baseline": _EVALUATION_FIELDS,
    "soft_baseline": _EVALUATION_FIELDS, "gradient": ("cosine",),
}  # fmt: skip
"""The fields of records of a kind, all numbers, besides their kind and iteration."""
_NO_NUMBERS = ("kind", "checksum")
_MAX_LINE, _MAX_METRICS_BYTES = 1 << 16, 1 << 30  # bytes


class MetricsLog:
    """metrics.jsonl and TensorBoard events of a run, from a given iteration on.

    Records of later iterations, which a killed run wrote after its last checkpoint, are dropped first. Damaged records of
    evaluations are restored from the checkpoint.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        self._path = folder / METRICS
        recorded = [record for record in read_records(self._path) if record["iteration"] <= iteration]
        saved = _evaluations_in(folder / CHECKPOINT)
        steps = [record for record in recorded if record["kind"] in _STEPS]
        others = saved + [record for record in recorded if record["kind"] not in _STEPS and record not in saved]
        self.records = sorted(steps + others, key=lambda record: int(record["iteration"]))
        write_text(self._path, "".join(_as_line(record) for record in self.records))
        self._events = EventLog(folder / "events", iteration + 1)
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed by close()

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Return all records except those of iterations."""
        return [record for record in self.records if record["kind"] not in _STEPS]

    def write(self, kind: str, iteration: int, **values: float | int) -> None:
        """Append one record, or nothing of it if the write fails. Raises `OSError` where the disk is full.

        `kind` is "step", "skip" or "above_threshold" of an iteration, "evaluation", "ema_evaluation", "gradient",
        "baseline" (random real images) or "soft_baseline" (with soft labels).
        """
        record = {"kind": kind, "iteration": iteration, **values}
        line = _as_line(record).encode()
        before = self._file.tell()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except OSError:
            self._file.truncate(before)
            raise
        self.records.append(record)
        self._events.write({f"{kind}/{name}": value for name, value in values.items()}, iteration)

    def find(self, kind: str, iteration: int | None = None) -> dict[str, Any] | None:
        """Return the first record of `kind` (at `iteration`, if given), or None."""
        for record in self.records:
            if record["kind"] == kind and iteration in (None, record["iteration"]):
                return record
        return None

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        self._events.close()


def _as_line(record: Mapping[str, Any]) -> str:
    return json.dumps(with_checksum(record)) + "\n"


def _evaluations_in(checkpoint: Path) -> list[dict[str, Any]]:
    """Return the records of evaluations in a checkpoint; [] if there is no checkpoint, or it is too old to have them."""
    if not checkpoint.exists():
        return []
    _, metadata = read_header(checkpoint)
    try:
        return [_as_record(value) for value in parse_json(metadata.get(EVALUATIONS, "[]"))]
    except MALFORMED as error:
        raise other_checkpoint(checkpoint) from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records in a metrics.jsonl; none if there is no such file. Damaged lines are left out, with a warning.

    Raises `InputError` if it cannot be read.
    """
    if not path.exists():
        return []
    with io.BufferedReader(open_regular(path, _MAX_METRICS_BYTES)) as file:  # type: ignore[type-var]
        lines = [_record_in(line) for line in iter(lambda: file.readline(_MAX_LINE), b"")]
    records = [record for record in lines if record is not None]
    if len(records) < len(lines):
        log.warning("%s: %d damaged lines are left out", path, len(lines) - len(records))
    return records


def _record_in(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line of metrics.jsonl; None if there is none, or it is damaged."""
    with contextlib.suppress(*MALFORMED):
        return verified(_as_record(parse_json(line)))
    return None


def _as_record(value: Any) -> dict[str, Any]:
    """Return the record in a line of metrics.jsonl. Raises one of `MALFORMED` for anything else."""
    check_form(value, {"kind": str, "iteration": int})
    check_form(value, {name: NUMBER for name in (*_FIELDS.get(value["kind"], ()), *value) if name not in _NO_NUMBERS})
    return dict(value)
