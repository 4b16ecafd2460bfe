"""Launch configurations, read from a checked-in table: nothing is tuned at run time."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import cast

Configuration = dict[str, int]  # block sizes in capitals, num_warps, num_stages


@cache
def configuration(operation: str, shape_class: str, architecture: str) -> Configuration:
    """Return the row of one operation, class of shapes and architecture; where it has none of its own, `default`."""
    rows = _table()[operation][shape_class]
    return rows.get(architecture, rows["default"])


@cache
def _table() -> dict[str, dict[str, dict[str, Configuration]]]:
    text = resources.files(__package__).joinpath("configurations.toml").read_text()
    return cast(dict[str, dict[str, dict[str, Configuration]]], tomllib.loads(text))
