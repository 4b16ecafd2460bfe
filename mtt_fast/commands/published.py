"""Read the numbers of the paper, and of later papers about the same settings, from published.toml, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

from mtt_fast.storage.text_files import read_toml


class Published(NamedTuple):
    """One method on one data set with one network, as one source reports it."""

    table: str
    """number of the paper's table"""
    dataset: str
    """as --dataset spells it; of ImageNet, the subset"""
    model: str
    """the network that is tested, as --model spells it"""
    method: str
    source: str
    of_paper: bool
    """whether the source is the paper's own table"""
    quoted: bool
    """whether the numbers are those of the method's authors"""
    accuracy: dict[str, dict[str, float]]
    """by images per class ("all" for the whole data set): mean and, where it is known, std, in [0, 1]"""
    dashes: frozenset[str]
    """images per class at which the table says that there is no number"""
    whitened: frozenset[str]
    """images per class at which the images were ZCA-whitened"""


class Paper(NamedTuple):
    """The numbers of the paper."""

    titles: dict[str, str]
    """of the tables, by number"""
    rows: list[Published]
    shares: dict[str, dict[str, float]]
    """distilled images as a share of the real ones in per cent, by data set and images per class"""
    costs: dict[str, dict[str, float]]
    """of the authors' experts, by data set: seconds_per_epoch; gpu_hours of so many experts; megabytes_per_expert"""


def published_numbers() -> Paper:
    """Return the content of published.toml."""
    with resources.as_file(resources.files(__package__) / "published.toml") as path:
        content = read_toml(path)
    rows = [_row(table, row, content["sources"]) for table, rows in content["rows"].items() for row in rows]
    return Paper(content["tables"], rows, content["shares"], content["costs"])


def _row(table: str, row: Mapping[str, Any], sources: Mapping[str, str]) -> Published:
    source = row.get("source")
    return Published(
        table=table,
        dataset=row["dataset"],
        model=row["model"],
        method=row["method"],
        source=f"Table {table} of the paper" if source is None else sources[source],
        of_paper=source is None,
        quoted=row.get("quoted", False),
        accuracy={ipc: _record(values) for ipc, values in row["accuracy"].items() if values},
        dashes=frozenset(ipc for ipc, values in row["accuracy"].items() if not values),
        whitened=frozenset(map(str, row.get("zca", ()))),
    )


def _record(values: list[float]) -> dict[str, float]:
    return {name: value / 100 for name, value in zip(("mean", "std"), values, strict=False)}
