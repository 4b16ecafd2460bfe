"""Check experts against those that the public codes trained (public_code/README.md)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mtt_fast import ConvNet
from mtt_fast.testing import assert_close
from mtt_fast.training.experts import ExpertTraining, expert_job
from mtt_fast.training.images import Images, RealImages
from tests.training.jobs import finished

CASES = load_file(Path(__file__).parent / "public_code" / "experts.safetensors")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mtt", {"mom": 0.5, "l2": 1e-2, "decay": True}),
        ("ftd", {"mom": 0.3, "l2": 1e-3, "rho_max": 0.2, "rho_min": 0.2, "alpha": 0.4, "adaptive": True}),
    ],
)
def test_experts_are_those_of_the_public_code(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    permutations = iter(CASES["permutations"])

    def batches(indices: Tensor, size: int, generator: torch.Generator, epochs: int) -> Iterator[Tensor]:
        for _ in range(epochs):
            yield from next(permutations).split(size)

    monkeypatch.setattr("mtt_fast.training.sgd._batches", batches)
    monkeypatch.setattr(ConvNet, "init", lambda *_: CASES["start"])
    images = Images(CASES["images"], CASES["labels"])
    real = RealImages(None, None, images, images)  # type: ignore[arg-type]
    training = ExpertTraining(train_epochs=6, lr=0.1, batch_size=8, augment="none", **options)
    job = expert_job(real, ConvNet(num_classes=3, image_size=8, width=4, depth=2), training, seed=0, index=0)
    rows, _ = finished(job)
    for row, expected in zip(rows[1:].double(), CASES[name][1:], strict=True):
        assert_close("path", row - CASES["start"], expected - CASES["start"], 1e-5)
