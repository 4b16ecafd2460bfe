"""What a report needs of a run, read from its folder."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtt_fast.errors import InputError
from mtt_fast.run_folder import HISTORY, METRICS, SUMMARY, read_config, read_records


@dataclass(frozen=True)
class Run:
    """A run of any method, finished or under way."""

    name: str  # of its folder, with those above where others are called the same
    options: dict[str, Any]
    summary: dict[str, Any]  # empty while it is under way
    records: list[dict[str, Any]]  # the lines of metrics.jsonl
    snapshots: dict[int, Path]  # by iteration

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.summary.get("method", "MTT"))

    @property
    def iterations(self) -> int:
        """How many are done, as far as is written down."""
        return max((record["iteration"] for record in self.records), default=int(self.summary.get("iterations", 0)))

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The records of its evaluations."""
        return [record for record in self.records if record["kind"] == "evaluation"]

    @property
    def accuracies(self) -> dict[str, dict[str, Any]]:
        """Mean, std and n of test accuracies by what was measured; of a run under way the last evaluation's."""
        if self.summary:
            found = self.summary["accuracy"]
            return {kind: value for kind, value in found.items() if isinstance(value, dict) and "mean" in value}
        if not self.evaluations:
            return {}
        last = self.evaluations[-1]
        return {"distilled": {"mean": last["accuracy_mean"], "std": last["accuracy_std"], "n": last["networks"]}}

    @property
    def by_network(self) -> dict[str, dict[str, Any]]:
        """Mean, std and n of the distilled set's test accuracy by network, if it was tested on several."""
        found: dict[str, dict[str, Any]] = self.summary.get("accuracy_by_network", {}).get("distilled", {})
        return found if len(found) > 1 else {}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs in `folders`, each called by as much of the end of its path as tells it from the others.

    Raises `InputError` for a folder that is there twice, and as `read_run`.
    """
    paths = [folder.resolve() for folder in folders]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise InputError(f"{folders[place]}: expected each run once, found it twice")
    return [dataclasses.replace(read_run(path), name=name) for path, name in zip(paths, _names(paths), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    names: list[str] = []
    length = 0
    while len(set(names)) < len(paths):
        length += 1
        names = ["/".join(path.parts[-length:]) for path in paths]
    return names


def read_run(folder: Path) -> Run:
    """Return the run in `folder`. Raises `InputError` if there is none, or its files are broken."""
    options = read_config(folder)
    summary = _summary(folder / SUMMARY)
    if options is None and not summary:
        raise InputError(f"{folder}: expected a run's folder (config.toml or {SUMMARY}), found neither; check the path")
    numbers = {path: re.fullmatch(r"iteration_(\d+)\.png", path.name) for path in (folder / HISTORY).glob("*.png")}
    snapshots = {int(found[1]): path for path, found in sorted(numbers.items()) if found}
    return Run(
        folder.resolve().name,
        summary.get("options") or options or {},
        summary,
        read_records(folder / METRICS),
        snapshots,
    )


def _summary(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["accuracy"], dict):
            raise TypeError("accuracy")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected a run's summary, found it broken ({error}); run the job again") from error
