"""Read the content of run folders that a report needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtt_fast.baselines.catalogue import METHODS
from mtt_fast.commands.accuracies import accuracy_record
from mtt_fast.commands.pictures import snapshots_in
from mtt_fast.commands.run_loop import SET_NAMES
from mtt_fast.distill.method_names import marked_method
from mtt_fast.errors import InputError
from mtt_fast.recipes import recipe_about, recipe_names
from mtt_fast.storage.metrics import read_records
from mtt_fast.storage.run_files import METRICS, SUMMARY
from mtt_fast.storage.run_folder import read_config
from mtt_fast.storage.run_summary import read_summary


@dataclass(frozen=True)
class RecordedRun:
    """A run of any method, finished or unfinished."""

    name: str  # the folder's name, with the folders above where several runs have the same name
    options: dict[str, Any]
    summary: dict[str, Any]  # empty in an unfinished run
    records: list[dict[str, Any]]  # the lines of metrics.jsonl
    snapshots: dict[int, Path]  # by iteration

    @property
    def method(self) -> str:
        """Return the method's name, marked where its sets do not compare with those of papers."""
        return marked_method(str(self.summary.get("method") or _method_of(self.options)), self.options)

    @property
    def iterations(self) -> int:
        """Return the number of recorded iterations; 0 for a set that is chosen at once."""
        return max((record["iteration"] for record in self.records), default=int(self.summary.get("iterations", 0)))

    def records_of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl of one kind, such as "evaluation"."""
        return [record for record in self.records if record["kind"] == kind]

    @property
    def protocol(self) -> str:
        """Return the evaluation protocol in words, or "" where the summary has none."""
        return str(self.summary.get("protocol", {}).get("text", ""))

    @property
    def accuracies(self) -> dict[str, dict[str, Any]]:
        """Return mean, std and n of the test accuracies by name; of an unfinished run those of the last evaluation."""
        if self.summary:
            return dict(self.summary["accuracy"])
        last = {names.name: self.records_of_kind(kind)[-1:] for kind, names in SET_NAMES.items()}
        return {name: accuracy_record(lines[0]) for name, lines in last.items() if lines}

    @property
    def by_network(self) -> dict[str, dict[str, Any]]:
        """Return mean, std and n of the distilled set's test accuracy by network, if several were trained on the set."""
        accuracies: dict[str, dict[str, Any]] = self.summary.get("accuracy_by_network", {}).get("distilled", {})
        return accuracies if len(accuracies) > 1 else {}


def read_runs(folders: Sequence[Path]) -> list[RecordedRun]:
    """Return the runs in `folders`, each named by the shortest end of its path that is different from the others'.

    Raises `InputError` for a folder that is named twice, and as `read_run`.
    """
    paths = [folder.resolve() for folder in folders]
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise InputError(f"{folders[index]}: expected each run once, found it twice")
    return [dataclasses.replace(read_run(path), name=name) for path, name in zip(paths, _names(paths), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    names: list[str] = []
    length = 0
    while len(set(names)) < len(paths):
        length += 1
        names = ["/".join(path.parts[-length:]) for path in paths]
    return names


def read_run(folder: Path) -> RecordedRun:
    """Return the run in `folder`. Raises `InputError` if there is none, or its files are broken."""
    options = read_config(folder)
    summary = read_summary(folder) or {}
    if options is None and not summary:
        raise InputError(f"{folder}: expected a run's folder (config.toml or {SUMMARY}), found neither; check the path")
    return RecordedRun(
        folder.resolve().name,
        summary.get("options") or options or {},
        summary,
        read_records(folder / METRICS),
        snapshots_in(folder),
    )


def _method_of(options: Mapping[str, Any]) -> str:
    """Return the method's name, from the options of a run that has no summary yet."""
    if name := options.get("method"):
        return METHODS[name].title if name in METHODS else str(name)
    recipe = options.get("recipe")
    return recipe_about(recipe)["method"] if recipe in recipe_names() else "MTT"
