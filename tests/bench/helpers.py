"""Run a benchmark at toy size, and read its record."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.settings import Setting
from mtt_fast import ConvNet
from mtt_fast.commands import cli

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SHAPE = "--size 16 --depth 2 --width 4 --device cpu".split()
TOY = [*SHAPE, "--repetitions", "2"]  # of a benchmark that repeats
STEP = "--steps 2 --batch 3".split()
TINY = Setting(ConvNet(3, 10, 16, width=4, depth=2), images=10, steps=2, batch=3)

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from Linux's /proc")


def bench(*words: str) -> None:
    assert cli.run(main, words) == 0


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    record = json.loads((folder / f"{name}.json").read_text())
    assert {"commit", "dirty", "versions", "device", "command", "time"} <= record.keys()
    assert record["versions"]["torch"] == torch.__version__
    rows: list[dict[str, Any]] = record["rows"]
    return rows
