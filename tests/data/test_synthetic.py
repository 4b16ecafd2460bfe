"""Check what a distilled set says of its images: their classes, and how they look."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mtt_fast import InputError, SyntheticDataset
from mtt_fast.augmentation.texture import Canvas


@pytest.mark.parametrize("label_kind", ["probabilities", "logits"])
def test_the_class_of_an_image_with_a_soft_label_is_that_of_its_place(label_kind: str) -> None:
    labels = torch.tensor([[0.0, 1.0]] * 6)  # all of them favour the second class
    synthetic = SyntheticDataset(
        torch.randn(6, 1, 2, 2), labels, torch.tensor(0.1), ("a", "b"), (0.5,), (0.25,), label_kind=label_kind
    )
    assert synthetic.classes.tolist() == [0, 0, 0, 1, 1, 1]


def test_the_class_of_an_image_with_an_index_is_the_index() -> None:
    labels = torch.tensor([1, 0, 1])
    synthetic = SyntheticDataset(torch.randn(3, 1, 2, 2), labels, torch.tensor(0.1), ("a", "b"), (0.5,), (0.25,))
    assert synthetic.classes.tolist() == [1, 0, 1]


def test_a_set_is_saved_with_the_graph_of_its_tensors(tmp_path: Path) -> None:
    """Save what a loop of one's own has: images of a generator, and learned numbers that require a gradient."""
    images = torch.randn(2, 1, 2, 2, requires_grad=True) * 2
    labels, lr = torch.randn(2, 2, requires_grad=True), torch.tensor(-2.0, requires_grad=True).exp()
    rates = torch.full((3,), 0.1, requires_grad=True)
    made = SyntheticDataset(images, labels, lr, ("a", "b"), (0.5,), (0.25,), label_kind="logits", lr_per_step=rates)
    made.save(tmp_path / "set.safetensors")
    read = SyntheticDataset.load(tmp_path / "set.safetensors")
    for name in ("images", "labels", "lr", "lr_per_step"):
        assert torch.equal(getattr(read, name), getattr(made, name))
        assert not getattr(read, name).requires_grad


def test_textures_are_saved_with_their_canvas(tmp_path: Path) -> None:
    parts = (torch.zeros(1, 1, 4, 6), torch.tensor([0]), torch.tensor(0.1), ("a",), (0.5,), (0.25,))
    made = SyntheticDataset(*parts, canvas=Canvas(2, 3))
    made.save(tmp_path / "set.safetensors")
    assert SyntheticDataset.load(tmp_path / "set.safetensors").canvas == Canvas(2, 3)
    assert made.identity.image_shape == (1, 2, 3), "the shape of the crops, and of the real images"


def test_pictures_are_the_images_without_normalisation_clipped_to_what_can_be_shown() -> None:
    images = torch.tensor([-4.0, -1.0, 0.0, 1.0, 4.0, 0.5]).view(1, 1, 2, 3)
    synthetic = SyntheticDataset(images, torch.tensor([0]), torch.tensor(0.1), ("a",), (0.5,), (0.25,))
    assert synthetic.pictures().flatten().tolist() == [0.0, 0.25, 0.5, 0.75, 1.0, 0.625]


def test_a_negative_view_is_saved_with_its_sign(tmp_path: Path) -> None:
    """Save a rate that is the imaginary part of a conjugate, which torch keeps as a view with another sign."""
    lr = torch.tensor(-0.1j).conj().imag
    assert lr.is_neg()
    made = SyntheticDataset(torch.zeros(1, 1, 2, 2), torch.tensor([0]), lr, ("a",), (0.5,), (0.25,))
    made.save(tmp_path / "set.safetensors")
    assert SyntheticDataset.load(tmp_path / "set.safetensors").lr == lr


def test_what_json_cannot_hold_is_told(tmp_path: Path) -> None:
    """Save the numbers of NumPy and torch that a loop of one's own has."""
    parts = (torch.zeros(1, 1, 2, 2), torch.tensor([0]), torch.tensor(0.1), ("a",))
    recipe = {"lr_img": torch.tensor(100.0)}
    for made in (
        SyntheticDataset(*parts, np.array([0.5]), np.array([0.25])),  # type: ignore[arg-type]
        SyntheticDataset(*parts, (0.5,), (0.25,), recipe=recipe),
    ):
        with pytest.raises(InputError, match=r"not written: expected texts, numbers, .* use .tolist\(\) of an array"):
            made.save(tmp_path / "set.safetensors")
    assert not list(tmp_path.iterdir())
