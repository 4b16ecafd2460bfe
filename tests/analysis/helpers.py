"""Run an analysis on a toy run, and read what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mtt_fast.analysis.__main__ import main
from mtt_fast.commands import cli

TOY = (
    "--dataset digits --model ConvNetD1W4 --num_experts 2 --train_epochs 4 --max_start_epoch 2 --Iteration 2 --eval_it 1 "
    "--num_eval 1 --epoch_eval_train 1 --batch_real 512 --lr_img 10 --save_seconds 0"
).split()


def run(*arguments: str) -> int:
    return cli.run(main, arguments)


def folders(folder: Path) -> list[str]:
    return ["--data_path", str(folder / "data"), "--buffer_path", str(folder / "buffers")]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def summary(mean: float, *, method: str | None = None, random: float | None = None, **options: Any) -> dict[str, Any]:
    accuracy = {"distilled": {"mean": mean, "std": 0.01, "n": 5}}
    if random is not None:
        accuracy["random_real_images"] = {"mean": random, "std": 0.02, "n": 5}
    settings = {"dataset": "CIFAR10", "model": "ConvNet", "ipc": 1, "seed": 0} | options
    return {"accuracy": accuracy, "options": settings} | ({} if method is None else {"method": method})
