"""Write and read records of measurements with their device, versions and command; one JSON file each."""

from __future__ import annotations

import json
import logging
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.measuring import driver_version
from mtt_fast.errors import InputError
from mtt_fast.runtime.provenance import device_name, versions
from mtt_fast.storage.files import write_json

log = logging.getLogger("mtt_fast")

TRACE = ".trace.json"
"""The suffix of traces, which are no records."""

_ROOT = Path(__file__).resolve().parents[1]


def write_record(
    folder: str,
    name: str,
    benchmark: str,
    device: torch.device,
    conditions: dict[str, Any],
    rows: list[dict[str, Any]],
    command: str,
) -> Path:
    """Write `rows`, with everything on which they depend, to FOLDER/NAME.json; return the path.

    `conditions` are the case's own; command, commit, device, versions and time are added here.
    """
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "name": name,
            "benchmark": benchmark,
            "conditions": conditions,
            "rows": rows,
            "command": command,
            "commit": _git("rev-parse", "HEAD"),
            "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
            "device": device_name(device),
            "driver": driver_version() if device.type == "cuda" else None,
            "versions": versions(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    log.info("%s", path)
    return path


def read_record(path: Path) -> dict[str, Any]:
    """Return the record in `path`. Raises `InputError` if the file is no record."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not {"name", "benchmark", "conditions", "rows", "device", "versions"} <= record.keys():
            raise ValueError("fields are missing")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: expected a record of a benchmark ({error}); delete it and measure again") from error
    return dict(record)


def _git(*words: str) -> str | None:
    """Return the output of a git command in this checkout; None where there is no git."""
    try:
        result = subprocess.run(["git", "-C", str(_ROOT), *words], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
