"""Run commands on a folder of toy runs and image folders, and return their refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from mtt_fast.commands import cli

Main = Callable[[Sequence[str]], None]
MODEL = "--model ConvNetD1W4".split()
EVALUATED = "--num_eval 1 --epoch_eval_train 1".split()
TRAINED = "--train_epochs 3 --batch_real 128".split()
DISTILLED = (
    "--max_start_epoch 2 --expert_epochs 1 --syn_steps 2 --Iteration 2 --eval_it 2 --lr_img 10 --num_experts 2"
).split()


def save_folder(root: Path, seed: int, names: Sequence[str] = tuple("0123456789")) -> Path:
    """Write an image folder of 8×8 grey images of ten classes, as the digits have."""
    generator = torch.Generator().manual_seed(seed)
    for split, count in (("train", 4), ("test", 1)):
        for name in names:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (8, 8), generator=generator, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def refused(capsys: pytest.CaptureFixture[str], main: Main, *words: str) -> str:
    """Return the one line that the command ends with, having said that it cannot be."""
    capsys.readouterr()
    assert cli.run(main, words) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ")
    return error


def distil(*flags: str, data: Sequence[str] = ("--dataset", "digits"), out: str = "new") -> list[str]:
    return [*data, *MODEL, *DISTILLED, *EVALUATED, "--out", out, *flags]


EXPERTS = Path("buffers/digits/ConvNetD1W4")
