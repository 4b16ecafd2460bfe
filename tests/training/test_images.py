"""Check the images that networks are trained on: distilled sets, and random subsets of real images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtt_fast import InputError, SyntheticDataset
from mtt_fast.augmentation.texture import Canvas
from mtt_fast.data import load
from mtt_fast.training.images import Images, as_training_images, parts_of, real_images
from mtt_fast.training.subsets import shuffled_classes

CPU = torch.device("cpu")


@pytest.mark.parametrize("label_kind", ["indices", "probabilities", "logits"])
def test_label_logits_become_probabilities_and_other_labels_stay(label_kind: str) -> None:
    labels = torch.tensor([2, 0]) if label_kind == "indices" else torch.tensor([[0.25, 0.5, 0.25], [0.0, 1.0, 0.0]])
    synthetic = SyntheticDataset(
        torch.randn(2, 1, 4, 4), labels, torch.tensor(0.1), ("a", "b", "c"), (0.0,), (1.0,), label_kind=label_kind
    )
    images = as_training_images(synthetic, CPU)
    expected = labels.exp() / labels.exp().sum(1, keepdim=True) if label_kind == "logits" else labels
    assert images.labels.dtype == labels.dtype
    torch.testing.assert_close(images.labels, expected)
    assert torch.equal(images.pixels, synthetic.images)


def test_a_set_of_canvases_is_trained_on_as_canvases() -> None:
    canvas = Canvas(2, samples=3)
    synthetic = SyntheticDataset(
        torch.randn(2, 1, 8, 8), torch.arange(2), torch.tensor(0.1), ("a", "b"), (0.0,), (1.0,), canvas=canvas
    )
    images = as_training_images(synthetic, CPU)
    assert images.canvas == canvas
    assert images.input_shape == (1, 4, 4)


def test_each_class_is_in_an_order_that_follows_from_the_generator(tmp_path: Path) -> None:
    real = real_images(load("digits", data_path=str(tmp_path), progress=False), CPU, zca=False)
    first, again, other = (shuffled_classes(real, 1, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    for label in range(10):
        members = (real.train.labels == label).nonzero()[:, 0].tolist()
        assert sorted(first[label].tolist()) == members
        assert first[label].tolist() != members
        assert torch.equal(first[label], again[label])
        assert not torch.equal(first[label], other[label])


def test_the_parts_of_an_image_are_scaled_up() -> None:
    """Cut images of two by two parts, each of one color, which stay of one color."""
    colors = torch.rand(2, 3, 2, 2)
    pixels = colors.repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = Images(pixels, torch.tensor([4, 7]), real=torch.tensor([False, True]))
    parts = parts_of(images, 2)
    torch.testing.assert_close(parts.pixels, colors.permute(2, 3, 0, 1).reshape(8, 3, 1, 1).expand(8, 3, 8, 8))
    assert parts.labels.tolist() == [4, 7] * 4
    assert parts.real is not None
    assert parts.real.tolist() == [False, True] * 4
    soft = parts_of(Images(pixels, torch.tensor([[0.2, 0.8], [0.6, 0.4]])), 2).labels
    assert torch.equal(soft, torch.tensor([[0.2, 0.8], [0.6, 0.4]] * 4))
    assert parts_of(images, 1) is images


def test_images_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(
        InputError,
        match=r"`factor` 3: expected images that can be cut into 3 × 3 parts, found images of 8 × 8; give a divisor",
    ):
        parts_of(Images(torch.rand(1, 1, 8, 8), torch.zeros(1)), 3)
    with pytest.raises(InputError, match="found canvases of `texture`; give `factor` 1"):
        parts_of(Images(torch.rand(1, 1, 8, 8), torch.zeros(1), canvas=Canvas(2)), 2)
