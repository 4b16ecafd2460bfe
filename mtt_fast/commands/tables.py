"""Write Markdown tables, and accuracies in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtt_fast.commands.accuracies import remarks_on

MISSING = "—"
"""The cell of a table where nothing was measured, or nothing is known."""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, one line a row; a bar within a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def percent(accuracy: Mapping[str, Any] | None, digits: int = 1) -> str:
    """Return an accuracy in [0, 1], with its "std" if there is one, as "46.2 ± 0.8"; MISSING for None.

    A single network has no deviation; `remarks_on` adds the best epoch and the networks that diverged.
    """
    if accuracy is None:
        return MISSING
    spread = accuracy.get("std") if accuracy.get("n") != 1 else None
    values = [accuracy["mean"]] if spread is None else [accuracy["mean"], spread]
    return " ± ".join(f"{100 * value:.{digits}f}" for value in values) + remarks_on(accuracy)
