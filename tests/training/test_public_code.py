"""Check experts, and a network trained on a distilled set, against those that the public codes trained (public_code/README.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mtt_fast import ConvNet, SiameseAugment
from mtt_fast.augmentation.operations import Draws
from mtt_fast.data import Normalisation
from mtt_fast.testing import assert_close
from mtt_fast.training.evaluation import training_job
from mtt_fast.training.experts import ExpertTraining, expert_job
from mtt_fast.training.images import Images, RealImages, parts_of
from mtt_fast.training.protocols import PROTOCOLS
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

    monkeypatch.setattr("mtt_fast.training.epochs._batches", batches)
    monkeypatch.setattr(ConvNet, "init", lambda *_: CASES["start"])
    images = Images(CASES["images"], CASES["labels"])
    real = RealImages(None, None, images, images)  # type: ignore[arg-type]
    training = ExpertTraining(train_epochs=6, lr=0.1, batch_size=8, augment="none", **options)
    job = expert_job(real, ConvNet(num_classes=3, image_size=8, width=4, depth=2), training, seed=0, index=0)
    rows, _ = finished(job)
    for row, expected in zip(rows[1:].double(), CASES[name][1:], strict=True):
        assert_close("path", row - CASES["start"], expected - CASES["start"], 1e-5)


def test_an_evaluation_is_that_of_ncfms_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start from the set's pictures, and go through all epochs with the recorded random numbers."""
    case = load_file(Path(__file__).parent / "public_code" / "ncfm.safetensors")
    pictures = Normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)).apply(case["pictures"])
    images = parts_of(Images(pictures, case["targets"]), 2)
    by_class = torch.arange(12).view(4, 3).T.flatten()  # of each class all parts, as NCFM's code has them
    images = Images(images.pixels[by_class], images.labels[by_class])
    assert_close("images", images.pixels, case["decoded"], 1e-12)

    lengths = [5, 5, 2] * 10
    flips, colors, spatial = (iter(case[name].split(lengths)) for name in ("flip", "color", "spatial"))
    operations, orders, centres = iter(case["operation"]), iter(case["order"]), iter(case["centre"].flatten())
    mixing = case["mixed"] < 0.5
    partners = iter(case["partner"].split([length for length, mixes in zip(lengths, mixing, strict=True) if mixes]))
    lams = iter(case["lam"])
    uniform = (torch.stack([drawn, 1 - next(lams) if drawn < 0.5 else drawn]) for drawn in case["mixed"])

    def draw(augment: SiameseAugment, *_: object) -> Draws:
        if augment.strategy == "flip":
            return Draws("flip", (next(flips),))
        if augment.strategy == "color":
            return Draws("color", next(colors).unbind(1))
        numbers, operation = next(spatial).unbind(1), augment.operations[int(next(operations))]
        return Draws(operation, numbers[:1] if operation == "rotate" else numbers)

    def batches(indices: Tensor, size: int, generator: torch.Generator, epochs: int) -> Iterator[Tensor]:
        for _ in range(epochs):
            yield from next(orders).split(size)

    monkeypatch.setattr("mtt_fast.training.epochs._batches", batches)
    monkeypatch.setattr(SiameseAugment, "draw", draw)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: next(uniform))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: next(centres))
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: next(partners))

    path = []
    protocol = dataclasses.replace(PROTOCOLS["ncfm"], epochs=10, batch_size=5)
    net, start = ConvNet(num_classes=3, image_size=8, width=4, depth=2), case["path"][0]
    job = training_job(
        net, start, images, 0.02, protocol, torch.Generator(), test=lambda network, theta, _: path.append(theta)
    )
    finished(job)
    for theta, expected in zip(path, case["path"][1:], strict=True):
        # autograd gives the biases before a norm the size of rounding errors, which AdamW divides by
        assert_close("path", theta - start, expected - start, 1e-7)
    for numbers in (flips, colors, spatial, operations, orders, centres, partners, lams, uniform):
        assert next(numbers, None) is None
