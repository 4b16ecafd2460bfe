"""Test the augmentation of IDC and NCFM: the order of its operations, and their draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtt_fast import SiameseAugment
from mtt_fast.augmentation.flip_and_color import FlipAndColorAugment
from mtt_fast.augmentation.operations import Draws
from mtt_fast.augmentation.warp import augment_with
from mtt_fast.kernels import WARP_PARAMETERS
from mtt_fast.testing import assert_close


@pytest.mark.parametrize("operation", ["crop", "scale", "rotate"])
def test_images_are_flipped_before_the_other_operations(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images, seen, draw = torch.rand(30, 3, 8, 8, dtype=torch.float64), {}, SiameseAugment.draw

    def watched(augment: SiameseAugment, images: Tensor, generator: torch.Generator | None = None) -> Draws:
        seen[augment.strategy] = draw(augment, images, generator)
        return seen[augment.strategy]

    monkeypatch.setattr(SiameseAugment, "draw", watched)
    parameters = FlipAndColorAugment(f"{operation}_color_cutout_flip").draw_parameters([images])
    expected = images
    for name in ("flip", "color", operation):
        expected = SiameseAugment(name)(expected, seen.pop(name))
    assert_close(operation, augment_with(images, parameters), expected, 1e-12)
    assert not seen


def test_all_images_have_flips_and_colors_and_one_other_operation_in_each_step() -> None:
    batches = torch.rand(3000, 3, 16, 16).split(10)
    parameters = FlipAndColorAugment().draw_parameters(batches, torch.Generator().manual_seed(3))
    of = dict(zip(WARP_PARAMETERS, parameters.view(300, 10, -1).unbind(2), strict=True))
    for name in ("brightness", "saturation", "contrast"):
        assert of[name].all()
    assert 0.45 < float((of["column_by_column"] < -0.5).float().mean()) < 0.55
    assert not of["bottom"].any()
    rotated, cropped = of["row_by_column"].any(1), of["row_shift"].any(1)
    scaled = of["row_by_row"].any(1) & ~rotated
    assert bool((rotated.long() + cropped + scaled == 1).all())
    assert all(0.25 < float(steps.float().mean()) < 0.42 for steps in (rotated, cropped, scaled))


@pytest.mark.parametrize("strategy", ["color_crop_cutout_flip_scale_rotate", "flip", "crop", "cutout"])
def test_parameters_do_not_depend_on_how_many_steps_are_drawn_together(strategy: str) -> None:
    images, augment = torch.rand(50, 1, 8, 8), FlipAndColorAugment(strategy)
    together = augment.draw_parameters(images.split(12), torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    apart = [augment.draw_parameters([batch], generator) for batch in images.split(12)]
    assert torch.equal(together, torch.cat(apart))
    assert together.any() == (strategy != "cutout")
