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


def run(*arguments: str) -> int:
    return cli.run(main, arguments)


def images_of(folder: Path) -> torch.Tensor:
    return SyntheticDataset.load(folder / "synthetic.safetensors").images


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
