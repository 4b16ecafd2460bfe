"""Test CutMix: its draws against the formula with numpy's numbers, its images and labels against slices."""

from __future__ import annotations

import numpy as np
import torch

from mtt_fast.testing import assert_close
from mtt_fast.training.cutmix import draw_box, mixed


def box_of_numpy(random: np.random.Generator, height: int, width: int) -> list[int]:
    """Return a box as NCFM's code draws it, in half the steps; zeros in the others."""
    if random.random() >= 0.5:
        return [0, 0, 0, 0]
    cut, sides = np.sqrt(1 - random.beta(1, 1)), []
    for size in (height, width):
        centre, half = random.integers(size), int(size * cut) // 2
        sides += [int(np.clip(edge, 0, size)) for edge in (centre - half, centre + half)]
    return sides


def test_boxes_have_the_distribution_of_the_formula() -> None:
    generator, random = torch.Generator().manual_seed(0), np.random.default_rng(0)
    ours = torch.stack([draw_box(1, torch.Size((3, 8, 12)), generator)[0, :4] for _ in range(20_000)])
    theirs = torch.tensor(np.array([box_of_numpy(random, 8, 12) for _ in range(20_000)]), dtype=torch.float32)
    for column, expected in zip(ours.T, theirs.T, strict=True):
        counts, expected_counts = (each.long().bincount(minlength=13) / 20_000 for each in (column, expected))
        assert float((counts - expected_counts).abs().max()) < 0.015
    areas = [(each[:, 1] - each[:, 0]) * (each[:, 3] - each[:, 2]) for each in (ours, theirs)]
    assert abs(float(areas[0].mean() - areas[1].mean())) < 0.4
    assert abs(float(areas[0].std() - areas[1].std())) < 0.4


def test_partners_are_a_permutation_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    with_box = [draws for _ in range(40) if (draws := draw_box(7, torch.Size((1, 8, 8)), generator)).any()]
    assert len(with_box) > 9
    for draws in with_box:
        assert sorted(draws[:, 4].tolist()) == list(range(7))
        assert bool((draws[:, :4] == draws[0, :4]).all())


def test_the_box_and_its_share_of_the_label_come_from_the_partner() -> None:
    images, labels = torch.rand(4, 3, 6, 8, dtype=torch.float64), torch.rand(4, 5, dtype=torch.float64).softmax(1)
    partner = torch.tensor([2, 0, 3, 1])
    draws = torch.cat([torch.tensor([1.0, 4.0, 2.0, 8.0]).expand(4, 4), partner[:, None].float()], 1)
    expected = images.clone()
    expected[:, :, 1:4, 2:8] = images[partner, :, 1:4, 2:8]
    mixed_images, mixed_labels = mixed(images, labels, draws)
    assert torch.equal(mixed_images, expected)
    assert_close("labels", mixed_labels, labels * (1 - 18 / 48) + labels[partner] * 18 / 48, 1e-12)
    for same, before in zip(mixed(images, labels, torch.zeros(4, 5)), (images, labels), strict=True):
        assert torch.equal(same, before)
