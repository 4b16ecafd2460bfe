"""Read launch configurations from the table configurations.toml. Nothing is tuned at run time."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, cast

Configuration = dict[str, int]  # block sizes in capitals, num_warps, num_stages
Row = dict[str, Any]  # a configuration, the back end, and the time that was measured, if any
Table = dict[str, dict[str, dict[str, Row]]]  # rows by operation, class of shapes, and architecture

NOT_KERNEL_ARGUMENTS = ("backend", "microseconds", "prototype_microseconds", "tma")


def configuration(operation: str, architecture: str, *classes: str) -> Configuration:
    """Return a new copy of the configuration of one operation for an architecture; see `row_of`."""
    row = row_of(operation, architecture, *classes)
    return {name: value for name, value in row.items() if name not in NOT_KERNEL_ARGUMENTS}


BATCHES = (16, 64, 256, 1024)
"""Batch sizes that separate the classes of shapes. The last class has all larger batches too."""


def rounded_up(number: int, sizes: tuple[int, ...]) -> int:
    """Return the smallest of the ascending `sizes` that is at least `number`, or the largest size."""
    return next(size for size in sizes if number <= size or size == sizes[-1])


def box_configuration(operation: str, architecture: str, *classes: str) -> Configuration:
    """Return the configuration of a convolution with TMA loads, from the closest of `classes` that has one.

    Raises `KeyError` if no class has one for `architecture`.
    """
    for rows in (table()[operation].get(name, {}) for name in classes):
        if "tma" in rows.get(architecture, {}):
            return cast(Configuration, rows[architecture]["tma"])
    raise KeyError(f"{operation}: no boxes for {classes[0]} on {architecture} in configurations.toml")


def backend_of(operation: str, architecture: str, *classes: str) -> str:
    """Return the back end that the table names for `operation`: `triton`, `tma` or `cudnn`."""
    return cast(str, row_of(operation, architecture, *classes)["backend"])


@cache
def row_of(operation: str, architecture: str, *classes: str) -> Row:
    """Return the row for `architecture` from the first of the classes of shapes that has one, else the first `default` row.

    Classes go from the closest to the loosest. An operation without classes has the class "". Raises `KeyError` if no class has
    either row.
    """
    row = closest_row(table()[operation], architecture, classes)
    if row is None:
        raise KeyError(f"{operation}: no row for {classes[0]} in configurations.toml")
    return row


def closest_row(rows: dict[str, dict[str, Row]], architecture: str, classes: Sequence[str]) -> Row | None:
    """Return the row of an operation that `row_of` describes, from its `rows` by class and architecture, or None."""
    of_classes = [rows.get(name, {}) for name in classes]
    return next((each[name] for name in (architecture, "default") for each in of_classes if name in each), None)


@cache
def table() -> Table:
    """Return the whole table."""
    text = resources.files(__package__).joinpath("configurations.toml").read_text(encoding="utf-8")
    return cast(Table, tomllib.loads(text))
