"""Run a distillation of the digits from three experts, and read what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mtt_fast.commands import cli
from mtt_fast.distill.command import main

TOY = (
    "--dataset digits --model ConvNetD1W4 --num_experts 3 --train_epochs 6 --max_start_epoch 4 --expert_epochs 1 "
    "--syn_steps 2 --Iteration 4 --eval_it 2 --num_eval 2 --epoch_eval_train 1 --batch_real 64 --expert_lr 0.05 "
    "--lr_img 10 --save_seconds 0"
).split()


def run(*arguments: str) -> int:
    return cli.run(main, arguments)


def records_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary
