"""Test CIFAR-10 and CIFAR-100 as folders of images: the classes' names and order."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image

from mtt_fast.data import load
from mtt_fast.errors import InputError
from tests.data.cifar_files import NAMES10, check, check_refused, python_folder


def jpeg_folder(root: Path, classes: tuple[str, ...] = NAMES10, side: int = 32) -> Path:
    for split, count in (("train", 2), ("test", 1)):
        for label, name in enumerate(classes):
            for number in range(count):
                path = root / split / name / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (side, side), (20 * label, 100, 10 * number)).save(path)
    return root


def test_an_image_folder_of_jpegs_is_read(tmp_path: Path) -> None:
    data = load("CIFAR10", data_path=jpeg_folder(tmp_path), progress=False)
    assert (data.name, data.class_names, data.image_shape) == ("CIFAR10", NAMES10, (3, 32, 32))
    assert data.mean == (0.4914, 0.4822, 0.4465)
    assert data.train.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert data.test.images[:, 0].float().mean((1, 2)).tolist() == pytest.approx([20 * n for n in range(10)], abs=3)


def test_each_image_of_a_folder_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_image = Mock(side_effect=Image.open)
    monkeypatch.setattr(Image, "open", open_image)
    load("CIFAR10", data_path=jpeg_folder(tmp_path), progress=False)
    assert open_image.call_count == 30


def test_one_image_of_another_size_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (32, 31)).save(jpeg_folder(tmp_path) / "test" / "bird" / "0.jpg")
    check_refused(tmp_path, r"test/bird/0\.jpg: expected 32x32 pixels as in the other images, found 32x31; give `res`")


def test_images_of_another_size_are_resized_where_that_is_asked_for(tmp_path: Path) -> None:
    data = load("CIFAR10", data_path=jpeg_folder(tmp_path, side=40), res=32, progress=False)
    assert data.image_shape == (3, 32, 32)
    assert data.test.images[:, 0].float().mean((1, 2)).tolist() == pytest.approx([20 * n for n in range(10)], abs=3)
    with pytest.raises(InputError, match="expected 32x32 pixels"):  # though they are packed already
        load("CIFAR10", data_path=tmp_path, progress=False)


def test_an_image_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    check_refused(
        jpeg_folder(tmp_path / "few", NAMES10[:4]), "expected the 10 class folders of CIFAR10 in train/, found 4"
    )
    check_refused(jpeg_folder(tmp_path / "large", side=40), "expected 32x32 pixels")


def test_originals_go_before_images(tmp_path: Path) -> None:
    python_folder(jpeg_folder(tmp_path), "CIFAR10")
    check(load("CIFAR10", data_path=tmp_path, progress=False), "CIFAR10")


@pytest.mark.parametrize(
    "spelt",
    [
        ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        ("Aeroplane", "AUTOMOBILE", "Bird", "Cat", "Deer", "Dog", "Frog", "Horse", "Boat", "Lorry"),
        tuple(map(str, range(10))),
        tuple(f"{i:03d}-{name}" for i, name in enumerate(sorted(NAMES10, reverse=True))),
    ],
    ids=["plane, car", "other words", "numbers", "other numbers beside the names"],
)
def test_an_image_folder_goes_by_names(tmp_path: Path, spelt: tuple[str, ...]) -> None:
    expected = load("CIFAR10", data_path=jpeg_folder(tmp_path / "official"), progress=False)
    jpeg_folder(tmp_path / "x")
    official = sorted(NAMES10, reverse=True) if spelt[0].startswith("000") else NAMES10
    for split in ("train", "test"):
        for name, other in zip(official, spelt, strict=True):
            (tmp_path / "x" / split / name).rename(tmp_path / "x" / split / other)
    data = load("CIFAR10", data_path=tmp_path / "x", progress=False)
    assert data.fingerprint == expected.fingerprint


def test_training_and_test_folders_may_be_spelt_differently(tmp_path: Path) -> None:
    expected = load("CIFAR10", data_path=jpeg_folder(tmp_path / "official"), progress=False)
    root = jpeg_folder(tmp_path / "x")
    (root / "val").mkdir()  # test/ will have no folders, and does not hide it
    for number, name in enumerate(NAMES10):
        (root / "test" / name).rename(root / "val" / str(number))
    assert load("CIFAR10", data_path=root, progress=False).fingerprint == expected.fingerprint


@pytest.mark.parametrize("form", ["{}", "{:02d}", "class_{}"])
def test_the_folders_of_cifar100_may_be_numbers(tmp_path: Path, form: str) -> None:
    for split in ("train", "test"):
        for label in range(100):
            path = tmp_path / split / form.format(label) / "0.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (32, 32), (label, 0, 0)).save(path)
    data = load("CIFAR100", data_path=tmp_path, progress=False)
    assert data.train.images[:, 0, 0, 0].tolist() == data.train.labels.tolist() == list(range(100))
    assert (data.class_names[9], data.class_names[10]) == ("bottle", "bowl")


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("deer", "elk", r"train: expected the names of the data set's 10 classes.*found 'elk'"),
        ("deer", "birds & bees", "found 'birds & bees'"),
        ("deer", "plane", "'airplane' and 'plane', which both mean 'airplane'; merge them"),
    ],
)
def test_folders_that_mean_no_class_are_refused(tmp_path: Path, name: str, other: str, message: str) -> None:
    root = jpeg_folder(tmp_path)
    for split in ("train", "test"):
        (root / split / name).rename(root / split / other)
    check_refused(root, message)
