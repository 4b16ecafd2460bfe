"""Test the files of NCFM: read, written, recognised by name, and refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from mtt_fast import InputError
from mtt_fast.interop import SourceInfo, read_set, set_kind_of
from tests.interop.helpers import distilled

INFO = SourceInfo(
    ("cat", "dog / wolf", "owl"), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), None, "CIFAR10", image_shape=(3, 4, 5)
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("data_init.pt", "ncfm"),
        ("data_20000.pt", "ncfm"),
        ("CIFAR10_ipc10.pt", "ncfm"),
        ("TinyImageNet_ipc1.pt", "ncfm"),
        ("CIFAR10_IPC10_images.pt", "mtt"),
        ("res_DM_CIFAR10_ConvNet_ipc1.pt", "dc"),
        ("data.pt", None),
    ],
)
def test_files_are_recognised_by_name(tmp_path: Path, name: str, kind: str | None) -> None:
    (tmp_path / name).touch()
    assert set_kind_of(tmp_path / name) == set_kind_of(tmp_path) == kind


def test_a_file_has_pictures_that_are_normalised(tmp_path: Path) -> None:
    """Read a list as NCFM's code saves it: pictures that may require a gradient, in any order."""
    pictures, labels = torch.rand(6, 3, 4, 5, requires_grad=True), torch.tensor([0, 2, 1, 0, 1, 2])
    torch.save([pictures, labels], tmp_path / "data_100.pt")
    found = read_set(tmp_path / "data_100.pt", info=INFO)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (INFO.mean, INFO.std))
    assert torch.equal(found.images, (pictures.detach() - mean) / std)
    assert torch.equal(found.labels, labels)
    assert (found.lr, found.label_kind) == (None, "indices")


def test_a_set_that_is_written_is_read_again(tmp_path: Path) -> None:
    synthetic = distilled()
    (file,) = synthetic.export("ncfm", tmp_path)
    pictures, _ = torch.load(file, weights_only=True)
    assert file.name == "data_ipc2.pt"
    torch.testing.assert_close(pictures.clamp(0, 1), synthetic.pictures())
    found = read_set(tmp_path, info=INFO)
    torch.testing.assert_close(found.images, synthetic.images)
    assert torch.equal(found.labels, synthetic.labels)
    with pytest.raises(InputError, match=r"expected class indices, .* found logits; give `hard_labels`"):
        distilled("logits").export("ncfm", tmp_path / "soft")


@pytest.mark.parametrize(
    ("content", "info", "message"),
    [
        (torch.rand(2), INFO, "expected a list of images and labels, as NCFM saves it, found Tensor float32"),
        ([torch.rand(3, 3, 4, 5)], INFO, "expected a list of images and labels"),
        (
            [torch.rand(3, 3, 4, 4), torch.arange(3)],
            INFO,
            r"expected images \(3, 4, 5\) of CIFAR10, found \(3, 4, 4\); name",
        ),
        (
            [torch.rand(3, 1, 4, 5), torch.arange(3)],
            dataclasses.replace(INFO, image_shape=()),
            "expected images of 3 channels",
        ),
        ([torch.rand(3, 3, 4, 5), torch.arange(2)], INFO, "with n labels"),
        (
            [torch.rand(3, 3, 4, 5), torch.arange(3)],
            None,
            "which its pictures are normalised; name them with `dataset`",
        ),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: Any, info: SourceInfo | None, message: str) -> None:
    torch.save(content, tmp_path / "data_1.pt")
    with pytest.raises(InputError, match=message):
        read_set(tmp_path / "data_1.pt", info=info)
