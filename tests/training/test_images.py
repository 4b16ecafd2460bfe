"""Check the images that networks are trained on: distilled sets, and random subsets of real images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtt_fast import SyntheticDataset
from mtt_fast.augmentation.texture import Canvas
from mtt_fast.data import load
from mtt_fast.training.images import as_training_images, real_images
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
