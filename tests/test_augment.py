"""DSA against golden cases, draw for draw; its draws; its derivatives."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mtt_fast.augment as operations
from mtt_fast import InputError, SiameseAugment
from mtt_fast.augment import augment_by_strategy
from mtt_fast.testing import assert_close

NAMES = ["brightness", "saturation", "contrast", "crop", "cutout", "flip", "scale", "rotate"]
COMPUTED_IN_FLOAT32 = {"flip", "scale", "rotate"}


@pytest.mark.parametrize("name", NAMES)
def test_golden(golden: Path, name: str) -> None:
    case = load_file(golden / "dsa-32.safetensors")
    dtype = torch.float32 if name in COMPUTED_IN_FLOAT32 else torch.float64
    images = case["images"].to(dtype).requires_grad_()
    draws = [case[key] for key in sorted(case) if key.startswith(f"{name}.draw")]
    output = getattr(operations, name)(images, *draws)
    (gradient,) = torch.autograd.grad(output, images, case["cotangent"].to(dtype))
    assert_close("output", output, case[f"{name}.output"], 1e-7)
    assert_close("gradient", gradient, case[f"{name}.grad_images"], 1e-7)


@pytest.mark.parametrize("name", ["color", *NAMES])
def test_derivative_and_repetition(name: str) -> None:
    augment = SiameseAugment(name)
    images = torch.randn(3, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    draws = augment.draw(images, torch.Generator().manual_seed(1))
    assert torch.equal(augment(images, draws), augment(images, draws))
    assert torch.autograd.gradcheck(lambda x: augment(x, draws), (images,))


def test_one_operation_a_step_chosen_uniformly() -> None:
    augment, generator = SiameseAugment(), torch.Generator().manual_seed(0)
    images = torch.zeros(1, 3, 8, 8)
    counts = Counter(augment.draw(images, generator).operation for _ in range(1200))
    assert set(counts) == {"color", "crop", "cutout", "flip", "scale", "rotate"}
    assert all(150 < count < 250 for count in counts.values())


def test_draws_cover_the_ranges_of_the_public_code() -> None:
    images, generator = torch.zeros(4000, 3, 32, 32), torch.Generator().manual_seed(0)
    down, right = SiameseAugment("crop").draw(images, generator).numbers
    assert (int(down.min()), int(down.max()), int(right.min()), int(right.max())) == (-4, 4, -4, 4)
    row, column = SiameseAugment("cutout").draw(images, generator).numbers
    assert (int(row.min()), int(row.max()), int(column.min()), int(column.max())) == (0, 32, 0, 32)
    (u,) = SiameseAugment("rotate").draw(images, generator).numbers
    assert 0 <= float(u.min()) < 0.01 < 0.99 < float(u.max()) < 1


def test_same_generator_same_draws() -> None:
    augment, images = SiameseAugment(), torch.zeros(4, 3, 8, 8)
    first, second = (augment.draw(images, torch.Generator().manual_seed(4)) for _ in range(2))
    assert first.operation == second.operation
    assert all(torch.equal(a, b) for a, b in zip(first.numbers, second.numbers, strict=True))


def test_unknown_operation() -> None:
    with pytest.raises(InputError, match="found 'blur'"):
        SiameseAugment("color_blur")
    assert augment_by_strategy("none") is None
