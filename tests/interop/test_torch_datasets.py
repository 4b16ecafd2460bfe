"""Test sets as datasets of torch, and datasets of torch as real images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from mtt_fast import InputError
from mtt_fast.interop import (
    SyntheticView,
    image_data_from,
)
from tests.interop.helpers import CLASSES, N, distilled


@pytest.mark.parametrize("labels", ["indices", "probabilities", "logits"])
def test_a_set_is_a_dataset_of_torch(labels: str) -> None:
    synthetic = distilled(labels)
    view = SyntheticView(synthetic)
    truth = synthetic.labels.softmax(1) if labels == "logits" else synthetic.labels
    images, targets = next(iter(DataLoader(view, batch_size=N)))
    assert torch.equal(images, synthetic.images)
    assert torch.equal(targets, truth)
    assert view.images.data_ptr() == synthetic.images.data_ptr()
    torch.nn.functional.cross_entropy(torch.randn(N, CLASSES), targets)


def test_any_map_style_dataset_becomes_real_images() -> None:
    pixels, labels = torch.randint(0, 256, (6, 3, 4, 5), dtype=torch.uint8), torch.arange(6) % 3
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    pairs = list(zip(pictures, labels.tolist(), strict=True))
    records = [{"img": image, "label": label} for image, label in pairs]
    floats, raw = TensorDataset(pixels / 255, labels), TensorDataset(pixels, labels)
    for dataset in (pairs, records, floats, raw):
        data = image_data_from(dataset, dataset)
        assert torch.equal(data.train.images, pixels)
        assert torch.equal(data.test.labels, labels)

    class Named(list[Any]):
        """A data set like torchvision's ImageFolder, whose classes are the sorted folders of one split."""

        def __init__(self, classes: list[str]) -> None:
            super().__init__(pairs)
            self.classes = classes

    mixed = image_data_from(Named(["ape", "bee", "cow"]), Named(["cow", "ape", "Bee"]))
    assert mixed.test.labels.tolist() == [2, 0, 1] * 2
    assert mixed.class_names == ("ape", "bee", "cow")
    assert image_data_from(Named(["ape", "bee", "cow"]), pairs).test.labels.tolist() == labels.tolist()
    with pytest.raises(InputError, match=r"test: expected the names of .* found 'dog'"):
        image_data_from(Named(["ape", "bee", "cow"]), Named(["cow", "ape", "dog"]))
    grey = [(Image.fromarray(np.full((4, 5), 7 + label, np.uint8)), label) for label in range(2)]
    assert image_data_from(grey, grey, class_names=["seven", "eight"]).train.images.shape == (2, 1, 4, 5)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "expected images, found none"),
        ([(torch.full((3, 4, 4), 1.5), 0)], r"expected values in \[0, 1\], found 1\.5 to 1\.5; leave Normalize out"),
        ([(torch.zeros(3, 4, 4), 0), (torch.zeros(3, 4, 5), 0)], "image 1: expected shape"),
        ([(torch.zeros(4, 4), 0)], r"expected \(C, H, W\)"),
        ([(torch.zeros(3, 4, 4).int(), 0)], "expected uint8 or floating point"),
        ([{"picture": 1}], r"expected image \(or img\) and label, found picture"),
        ([{"img": 1}], r"expected image \(or img\) and label, found img"),
        ([7], r"expected \(image, label\), found int"),
        (
            {"train": [], "test": []},
            "expected the images of one split, found a dictionary with train, test; give one of these",
        ),
    ],
)
def test_datasets_that_cannot_be_read_are_refused(dataset: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        image_data_from(dataset, dataset, name="mine")
