"""Write and read records of measurements with their device, versions and command; one JSON file each."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.measuring import driver_version
from bench.parsing import RecordOptions
from bench.tables import table
from mtt_fast.errors import InputError
from mtt_fast.runtime.provenance import device_name, versions
from mtt_fast.storage.text_files import write_json

log = logging.getLogger("mtt_fast")

TRACE = ".trace.json"
"""The suffix of traces, which are not records."""
PARTIAL = ".partial.json"
"""The suffix of records that are still being measured, or were cut off."""

_ROOT = Path(__file__).resolve().parents[1]


def write_record(
    folder: str,
    name: str,
    benchmark: str,
    device: torch.device,
    conditions: dict[str, Any],
    rows: list[dict[str, Any]],
    command: str,
    *,
    complete: bool = True,
) -> Path:
    """Write `rows`, with everything on which they depend, to FOLDER/NAME.json; return the path.

    `conditions` are the case's own; command, commit, device, versions and time are added here. Rows that are not `complete`
    go to NAME.partial.json, which the complete record replaces.
    """
    full, partial = Path(folder) / f"{name}.json", Path(folder) / f"{name}{PARTIAL}"
    path = full if complete else partial
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "name": name,
            "benchmark": benchmark,
            "conditions": conditions,
            "rows": rows,
            "command": command,
            "commit": commit(),
            "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
            "device": device_name(device),
            "driver": driver_version() if device.type == "cuda" else None,
            "versions": versions(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    if complete:
        partial.unlink(missing_ok=True)
        log.info("%s", path)
    return path


def publish(
    options: RecordOptions,
    benchmark: str,
    name: str,
    device: torch.device,
    conditions: dict[str, Any],
    rows: Iterable[dict[str, Any]],
    command: str,
) -> None:
    """Print the rows as a table, and write their record; it is called `name` if the options do not name it."""
    listed = list(rows)
    print(table(benchmark, conditions, listed))
    write_record(options.out, options.name or name, benchmark, device, conditions, listed, command)


def partial_rows(folder: str, name: str) -> list[dict[str, Any]]:
    """Return the rows of the record NAME that an earlier process measured before it was cut off, if it ran at this commit."""
    path = Path(folder) / f"{name}{PARTIAL}"
    if not path.exists():
        return []
    record = read_record(path)
    if record.get("commit") != commit():
        return []
    rows: list[dict[str, Any]] = record["rows"]
    return rows


def read_record(path: Path) -> dict[str, Any]:
    """Return the record in `path`. Raises `InputError` unless it is a record."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not {"name", "benchmark", "conditions", "rows", "device", "versions"} <= record.keys():
            raise ValueError("fields are missing")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: expected a record of a benchmark ({error}); delete it and measure again") from error
    return dict(record)


def commit() -> str | None:
    """Return the commit of this checkout; None where there is no git."""
    return _git("rev-parse", "HEAD")


def _git(*words: str) -> str | None:
    """Return the output of a git command in this checkout; None where there is no git."""
    try:
        result = subprocess.run(["git", "-C", str(_ROOT), *words], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
