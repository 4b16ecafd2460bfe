"""Test SelMatch's augmentation of a set of distilled and real images, by itself and in a training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast import ConvNet, SiameseAugment
from mtt_fast.augmentation.combined import CombinedAugment
from mtt_fast.augmentation.texture import Canvas
from mtt_fast.augmentation.warp import augment_with
from mtt_fast.engine.students.generic import GenericStudent
from mtt_fast.engine.students.protocol import StepGradient
from mtt_fast.kernels import WARP_PARAMETERS
from mtt_fast.training.epochs import Epochs
from mtt_fast.training.images import Images
from mtt_fast.training.optimizers import Sgd


def test_each_distilled_image_has_an_operation_of_its_own() -> None:
    """Tell the operations apart by the parameters that they use, and compare the range of these with a batch's of one operation."""
    images, generator = torch.rand(3000, 3, 16, 20, dtype=torch.float64), torch.Generator().manual_seed(3)
    combined = CombinedAugment("color_crop_cutout_flip_scale_rotate").draw_parameters(images.split(700), generator)
    assert combined.dtype == torch.float64
    remaining = torch.ones(len(images), dtype=torch.bool)
    telling = {  # parameters that are not zero, once the operations before are gone
        "rotate": ["row_by_column"],
        "scale": ["row_by_row"],
        "cutout": ["bottom"],
        "crop": ["row_shift", "column_shift"],
        "color": ["brightness", "saturation", "contrast"],
    }
    for operation, names in telling.items():
        alone = SiameseAugment(operation).draw_parameters([images], generator)
        rows = combined[:, [WARP_PARAMETERS.index(name) for name in names]].any(1) & remaining
        assert 0.12 < rows.double().mean() < 0.22
        for values, of_one in zip(combined[rows].T, alone.T, strict=True):
            spread = float(of_one.max() - of_one.min())
            assert abs(float(values.min() - of_one.min())) <= 0.05 * spread
            assert abs(float(values.max() - of_one.max())) <= 0.05 * spread
        remaining &= ~rows
    flipped = combined[remaining].any(1)
    assert (combined[remaining][flipped].sum(1) == -2).all()
    assert 0.4 < flipped.double().mean() < 0.6


def test_combined_parameters_do_not_depend_on_how_many_steps_are_drawn_together() -> None:
    images, augment = torch.rand(50, 1, 8, 8), CombinedAugment()
    for draw in (augment.draw_parameters, augment.draw_both):
        together = draw(images.split(12), torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(1)
        apart = [draw([batch], generator) for batch in images.split(12)]
        assert torch.equal(together, torch.cat(apart))


def test_real_images_are_cropped_out_of_a_border_of_zeros_and_flipped() -> None:
    height, width, count = 10, 13, 600
    images = torch.rand(count, 2, height, width) + 1
    augment = CombinedAugment()
    parameters = augment.draw_both(images.split(100), torch.Generator().manual_seed(0))
    results = augment_with(images, augment.select(parameters, torch.ones(count, dtype=torch.bool)))
    seen = set()
    for framed, result in zip(F.pad(images, (4, 4, 4, 4)), results, strict=True):
        crops = {
            (row, column): framed[:, row : row + height, column : column + width]
            for row in range(9)
            for column in range(9)
        }
        fits = [(*place, False) for place, crop in crops.items() if torch.equal(result, crop)]
        fits += [(*place, True) for place, crop in crops.items() if torch.equal(result, crop.flip(2))]
        assert len(fits) == 1
        seen |= set(fits)
    assert len(seen) > 0.9 * 2 * 81  # of all crops, flipped or not


def test_a_training_crops_the_real_images_and_no_others() -> None:
    """Tell the two kinds apart by their pixels: the operation brightness keeps zeros nowhere, a crop makes some."""
    net, seen = ConvNet(1, 3, 8, width=4, depth=1), []

    class Watched(GenericStudent):
        def gradient(self, theta: Tensor, images: Any, labels: Tensor, save: bool = False) -> StepGradient:
            seen.append((images, labels))
            return super().gradient(theta, images, labels, save)

    labels = torch.arange(30) % 3
    images = Images(torch.full((30, 1, 8, 8), 5.0), labels, lambda pixels: pixels * 255, real=labels == 1)
    epochs = Epochs(Watched(net), images, Sgd(0.01, batch_size=7), CombinedAugment("brightness"))
    theta = net.init(torch.Generator().manual_seed(0))
    epochs(theta, torch.zeros_like(theta), torch.Generator().manual_seed(1), epochs=3)
    inputs, classes = (torch.cat(each) for each in zip(*seen, strict=True))
    assert len(inputs) == 90
    of_real, distilled = inputs[classes == 1], inputs[classes != 1]
    assert set(of_real.unique().tolist()) == {0.0, 5.0}
    assert (distilled.amax((1, 2, 3)) == distilled.amin((1, 2, 3))).all()
    assert len(distilled[:, 0, 0, 0].unique()) == len(distilled)


def test_the_crops_of_textures_have_an_operation_of_their_own() -> None:
    canvases, augment = torch.full((60, 1, 16, 16), 5.0), Canvas(2).crops(CombinedAugment("brightness_cutout"))
    crops = augment(canvases, augment.draw_parameters(canvases.split(20), torch.Generator().manual_seed(0)))
    for of_step in crops.split(20):
        cut = (of_step == 0).flatten(1).any(1)
        assert cut.any()
        assert not cut.all()
