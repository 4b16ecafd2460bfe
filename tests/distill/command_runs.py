"""Run a distillation of the embedded digits at toy size, and read what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mtt_fast import SyntheticDataset
from mtt_fast.commands import cli
from mtt_fast.distill.command import main

TOY = (
    "--dataset digits --model ConvNetD1W4 --num_experts 2 --train_epochs 3 --max_start_epoch 2 --expert_epochs 1 "
    "--syn_steps 3 --Iteration 6 --eval_it 3 --num_eval 2 --epoch_eval_train 2 --batch_real 512 --lr_img 10 "
    "--save_seconds 0"
).split()

TOY_OF_THREE = (
    "--dataset digits --model ConvNetD1W4 --num_experts 3 --train_epochs 6 --max_start_epoch 4 --expert_epochs 1 "
    "--syn_steps 2 --Iteration 4 --eval_it 2 --num_eval 2 --epoch_eval_train 1 --batch_real 64 --expert_lr 0.05 "
    "--lr_img 10 --save_seconds 0"
).split()
"""A run from three experts, which train for longer."""


def run(*arguments: str) -> int:
    return cli.run(main, arguments)


def images_of(folder: Path) -> torch.Tensor:
    return SyntheticDataset.load(folder / "synthetic.safetensors").images


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def records_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in metrics_of(folder) if record["kind"] == kind]


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary
