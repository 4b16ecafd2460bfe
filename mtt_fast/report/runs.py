"""What a report needs of a run, read from its folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtt_fast.baselines.catalogue import METHODS
from mtt_fast.commands.accuracies import accuracy_record
from mtt_fast.errors import InputError
from mtt_fast.recipes import recipe_about, recipe_names
from mtt_fast.storage.metrics import read_records
from mtt_fast.storage.run_folder import HISTORY, METRICS, SUMMARY, read_config, read_summary

_EVALUATIONS = {"distilled": "evaluation", "ema": "ema_evaluation"}


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
        """The method's name; textures are told from images."""
        name = str(self.summary.get("method") or _method_of(self.options))
        return f"{name}, textures" if self.options.get("texture") else name

    @property
    def iterations(self) -> int:
        """Return how many are done, as far as is written down; 0 of a set that is chosen at once."""
        return max((record["iteration"] for record in self.records), default=int(self.summary.get("iterations", 0)))

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl of one kind, such as "evaluation"."""
        return [record for record in self.records if record["kind"] == kind]

    @property
    def protocol(self) -> str:
        """Return how its networks are evaluated, in words, where that is written down."""
        return str(self.summary.get("protocol", {}).get("text", ""))

    @property
    def accuracies(self) -> dict[str, dict[str, Any]]:
        """Mean, std and n of test accuracies by what was measured; of a run under way the last evaluation's."""
        if self.summary:
            found = self.summary["accuracy"]
            return {kind: value for kind, value in found.items() if isinstance(value, dict) and "mean" in value}
        last = {name: self.of_kind(kind)[-1:] for name, kind in _EVALUATIONS.items()}
        return {name: accuracy_record(lines[0]) for name, lines in last.items() if lines}

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
    summary = read_summary(folder) or {}
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


def _method_of(options: Mapping[str, Any]) -> str:
    """Return the method's name by the options of a run that has no summary yet."""
    if name := options.get("method"):
        return METHODS[name].title if name in METHODS else str(name)
    recipe = options.get("recipe")
    return recipe_about(recipe)["method"] if recipe in recipe_names() else "MTT"
