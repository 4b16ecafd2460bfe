"""Test tensors and datasets of one's own that hold no images or labels: refused in one line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtt_fast import InputError
from mtt_fast.data import from_tensors
from mtt_fast.interop import (
    image_data_from,
)
from tests.interop.hostile import refused

pytestmark = pytest.mark.usefixtures("bounded")


PIXELS, TARGETS = torch.zeros(6, 1, 4, 4).byte(), torch.arange(6) % 3


@pytest.mark.parametrize(
    ("images", "labels", "options"),
    [
        (PIXELS.float(), TARGETS, {}), (PIXELS.numpy(), TARGETS, {}), (PIXELS, TARGETS.tolist(), {}), (PIXELS, TARGETS.bool(), {}),
        (PIXELS, TARGETS.float(), {}), (PIXELS, torch.full((6,), 2**62), {}), (PIXELS, -TARGETS, {}), (PIXELS, TARGETS[:5], {}),
        (PIXELS.to_sparse(), TARGETS, {}), (torch.zeros(1).byte().expand(10**6, 3, 1000, 1000), torch.zeros(10**6).long(), {}),
        (PIXELS[:0], TARGETS[:0], {}), (PIXELS, TARGETS, {"class_names": ["a", "a", "b"]}), (PIXELS, TARGETS, {"class_names": ["a"]}),
        (PIXELS, TARGETS, {"class_names": [1, 2, 3]}), (PIXELS, TARGETS, {"mean": [float("nan")], "std": [1.0]}),
        (PIXELS, TARGETS, {"mean": [0.5], "std": [float("nan")]}), (PIXELS, TARGETS, {"mean": [0.5], "std": [float("inf")]}),
    ],
)  # fmt: skip
def test_wrong_tensors_are_no_data_set(images: Any, labels: Any, options: Any) -> None:
    with pytest.raises(InputError) as found:
        from_tensors((images, labels), (images, labels), **options)
    assert str(found.value).isprintable()


@pytest.mark.parametrize(
    "label", [1.5, -1, float("nan"), None, "a", [1, 0], True, 10**30, torch.tensor([1, 2]), np.zeros(2), {}]
)
def test_wrong_labels_of_datasets_are_refused(label: Any) -> None:
    dataset = [(torch.zeros(1, 4, 4).byte(), label)]
    refused(lambda: image_data_from(dataset, dataset, name="mine"), "mine, train, image 0")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_label_is_refused_without_a_look_at_its_shape() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    refused(lambda: image_data_from([(torch.zeros(1, 4, 4), nested)], []), "found a nested Tensor")


@pytest.mark.parametrize("label", [1, 1.0, np.int32(1), np.uint8(1), torch.tensor(1), torch.tensor([1]), np.array([1])])
def test_right_labels_of_datasets_are_read(label: Any) -> None:
    dataset = [(torch.zeros(1, 4, 4).byte(), 0), (torch.zeros(1, 4, 4).byte(), label)]
    assert image_data_from(dataset, dataset).train.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    "image",
    [
        None, "x", 5, [[1]], object(), np.array(None), np.zeros((2, 2), complex), np.zeros(3), np.zeros((2, 2), "M8[s]"),
        Image.new("P", (4, 4)), Image.new("I;16", (4, 4)), Image.new("RGBA", (4, 4)), torch.zeros(1, 4, 4).to_sparse(),
        torch.full((1, 4, 4), float("nan")), torch.zeros(1, 4, 4, dtype=torch.complex64), torch.zeros(1, 4, 4, device="meta"),
    ],
)  # fmt: skip
def test_wrong_images_of_datasets_are_refused(image: Any) -> None:
    dataset = [(image, 0)]
    refused(lambda: image_data_from(dataset, dataset, name="mine"), "mine, train, image 0")


@pytest.mark.parametrize(
    ("attributes", "names"),
    [
        ({"features": torch.ones(6, 2)}, "0 1"), ({"features": ["a", "b"]}, "0 1"), ({"classes": 2}, "0 1"),
        ({"classes": np.array(["ape", "bee"])}, "ape bee"), ({"classes": torch.tensor([3, 4])}, "3 4"),
    ],
)  # fmt: skip
def test_attributes_of_datasets_of_ones_own_may_be_anything(attributes: dict[str, Any], names: str) -> None:
    class Own(list[Any]):
        pass

    dataset = Own((torch.zeros(1, 4, 4).byte(), label) for label in range(2))
    vars(dataset).update(attributes)
    assert image_data_from(dataset, dataset).class_names == tuple(names.split())


@pytest.mark.parametrize("dataset", [iter([]), None, 5, "", {}])
def test_objects_that_are_no_datasets_are_refused(dataset: Any) -> None:
    refused(lambda: image_data_from(dataset, dataset, name="mine"), "mine, train")
