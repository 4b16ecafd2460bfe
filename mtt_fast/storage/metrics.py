"""The metrics of a run: lines of JSON, and TensorBoard events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mtt_fast.storage.files import write_text
from mtt_fast.storage.run_folder import METRICS


class MetricsLog:
    """metrics.jsonl and TensorBoard events of a run, from a given iteration on.

    What was written after that iteration, by a run that was killed before its next checkpoint, is dropped first.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only this job writes events

        self._path = folder / METRICS
        self.records = [record for record in read_records(self._path) if record["iteration"] <= iteration]
        write_text(self._path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._events = SummaryWriter(str(folder / "events"), purge_step=iteration + 1)

    def write(self, kind: str, iteration: int, **values: float | int) -> None:
        """Append one record.

        `kind` is "step", "skip" or "above_threshold" of an iteration, "evaluation", "ema_evaluation", "gradient" or
        "baseline".
        """
        record = {"kind": kind, "iteration": iteration, **values}
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", value, iteration)

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


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; none if it is not there, and none from a broken line on."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # the line under way when the process was killed
            break
    return records
