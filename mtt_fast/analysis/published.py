"""The paper's numbers (published.toml), as later papers repeat them, by table, data set, method and images a class."""

from __future__ import annotations

from importlib import resources
from typing import Any, NamedTuple

from mtt_fast.storage.files import read_toml


class Published(NamedTuple):
    """One row of a table of the paper."""

    table: str
    dataset: str
    """as --dataset spells it; of ImageNet, the subset"""
    model: str
    """the network that is tested"""
    method: str
    source: str
    quoted: bool
    """whether they are the method's authors' own numbers"""
    accuracy: dict[str, dict[str, float]]
    """by images a class ("all" for the whole data set): mean and, where it is known, std, in [0, 1]"""


def published() -> tuple[dict[str, str], list[Published]]:
    """Return the tables' titles by number, and their rows."""
    with resources.as_file(resources.files(__package__) / "published.toml") as path:
        content = read_toml(path)
    rows = [
        Published(
            str(row["table"]), row["dataset"], row["model"], row["method"], content["sources"][row["source"]],
            row.get("quoted", False), {ipc: _record(values) for ipc, values in row["accuracy"].items()},
        )
        for row in content["rows"]
    ]  # fmt: skip
    return {number: table["title"] for number, table in content["tables"].items()}, rows


def _record(values: list[Any]) -> dict[str, float]:
    return {name: value / 100 for name, value in zip(("mean", "std"), values, strict=False)}
