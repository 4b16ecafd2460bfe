"""Run a baseline on the embedded digits at toy size, and read what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mtt_fast import SyntheticDataset
from mtt_fast.baselines.command import main
from mtt_fast.commands import cli

TOY = "--dataset digits --model ConvNetD1W4 --num_eval 2 --epoch_eval_train 2 --ipc 2".split()
SHORT = "--Iteration 2 --eval_it 2 --batch_real 32 --save_seconds 0".split()
LOOPS = "--outer_loop 2 --inner_loop 1".split()
WINDOW = "--window 2 --totwindow 4 --inner_lr 0.01".split()
WIDTH = "--d 1".split()
CHOSEN = ["random", "herding", "forgetting", "kmeans"]
LEARNED = ["dm", "dc", "dsa", "dd", "ld", "ratbptt", "atbptt"]


def flags(method: str, shared: Path) -> list[str]:
    words = [method, *TOY, "--data_path", str(shared / "data")]
    if method in ("herding", "forgetting", "kmeans"):
        words += ["--buffer_path", str(shared / "buffers"), "--train_epochs", "3"]
    if method in LEARNED:
        words += SHORT
    if method in ("ratbptt", "atbptt"):
        words += WINDOW
    return words + (LOOPS if method in ("dc", "dsa") else []) + (WIDTH if method == "atbptt" else [])


def run(*arguments: str) -> int:
    return cli.run(main, arguments)


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def set_of(folder: Path) -> SyntheticDataset:
    return SyntheticDataset.load(folder / "synthetic.safetensors")
