"""Test data sets by name, the digits of scikit-learn, and the real images where they are."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtt_fast.data import NAMES, catalogue, load
from mtt_fast.data.catalogue import dataset_info, published
from mtt_fast.data.image_data import DatasetInfo
from mtt_fast.errors import InputError
from tests.data.folders import folder

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("cifar11", {}, r"`dataset`: expected one of .*CIFAR10.*folder.*'cifar11'; did you mean CIFAR10\?"),
        ("Imagenett", {}, r"did you mean imagenette\?"),
        ("zzz", {}, "choose one of these"),
        ("no/such/place", {}, "no/such/place: expected an image folder"),
        ("CIFAR10", {"subset": "imagenette"}, "`subset`: expected only with `dataset` ImageNet, found with CIFAR10"),
        ("CIFAR10", {"res": 64}, "`res`: expected 32 or nothing, the size of CIFAR10, found 64"),
        ("digits", {"res": 32}, "`res`: expected 8 or nothing"),
        ("imagenette", {"res": -1}, "`res`: expected a positive number"),
        ("imagenette", {"res": 32.0}, "`res`: expected a positive number of pixels, found 32.0"),
        ("imagenette", {"res": "32"}, "`res`: expected a positive number of pixels, found '32'"),
        (None, {}, "`dataset`: expected a name or the path of an image folder, found None"),
        (Path("digits"), {}, "digits: expected an image folder"),
    ],
)
def test_wrong_words_are_explained(tmp_path: Path, dataset: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        load(dataset, data_path=tmp_path, **options)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_path_is_that_of_an_image_folder(tmp_path: Path) -> None:
    root = folder(tmp_path / "digits")  # whatever its name
    data, expected = (load(each, data_path=tmp_path / "data", progress=False) for each in (root, str(root)))
    assert torch.equal(data.train.images, expected.train.images)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "digits"])
def test_every_name_says_what_it_looked_for(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=str(tmp_path)):
        load(name, data_path=tmp_path)


def test_the_digits_are_those_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    data = load("digits", data_path=tmp_path, progress=False)
    original = load_digits()
    assert (data.image_shape, data.num_classes) == ((1, 8, 8), 10)
    assert published("digits") == DatasetInfo("digits", (1, 8, 8), 10, len(data.train.labels), len(data.test.labels))
    counts = torch.bincount(torch.from_numpy(original.target))
    assert torch.bincount(data.test.labels).tolist() == (counts // 5).tolist()
    assert (data.train.labels.bincount() + data.test.labels.bincount()).tolist() == counts.tolist()
    # In their first order: the pixels of all, told apart by the split, are the original's.
    pixels = {label: list((original.images[original.target == label] / 16 * 255).round()) for label in range(10)}
    for label in range(10):
        train, test = (s.images[s.labels == label, 0].double() for s in (data.train, data.test))
        expected = torch.from_numpy(np.stack(pixels[label]))
        test_places = torch.arange(len(expected)) % 5 == 4
        assert torch.equal(train, expected[~test_places])
        assert torch.equal(test, expected[test_places])
    assert data.train.images.max() == 255


def test_packed_files_may_lie_elsewhere(tmp_path: Path) -> None:
    data = load("digits", data_path=tmp_path / "originals", packed_path=tmp_path / "packed", progress=False)
    assert data.path == tmp_path / "packed" / "digits.safetensors"
    assert not (tmp_path / "originals").exists()


def test_digits_need_scikit_learn_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"digits: expected scikit-learn.*pip install 'mtt-fast\[demo\]'"):
        load("digits", data_path=tmp_path)
    monkeypatch.undo()
    first = load("digits", data_path=tmp_path, progress=False)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert load("digits", data_path=tmp_path).fingerprint == first.fingerprint


def test_progress_is_quiet_where_nobody_watches(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load("digits", data_path=tmp_path, progress=True)
    assert capfd.readouterr() == ("", "")


def unpacked(archive: str, root: Path, count: int) -> list[Path]:
    """Unpack the first `wanted` images of every class and split of a shared archive."""
    if not (SHARED / archive).is_file():
        pytest.skip(f"needs the real images: no file {SHARED / archive}")
    counts: dict[str, int] = {}
    paths = []
    with tarfile.open(SHARED / archive, "r:xz") as tar:
        for member in tar:
            place = member.name.rpartition("/")[0]
            if member.isfile() and counts.setdefault(place, 0) < count:
                counts[place] += 1
                tar.extract(member, root, filter="data")
                paths.append(root / member.name)
    return paths


@pytest.mark.data
def test_real_cifar_jpegs_are_read(tmp_path: Path) -> None:
    paths = unpacked("cifar10.tar.xz", tmp_path, 20)
    data = load("CIFAR10", data_path=tmp_path, progress=False)
    assert len(paths) == 400
    assert data.class_names == (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    assert data.train.labels.bincount().tolist() == data.test.labels.bincount().tolist() == [20] * 10
    scaled = data.train.images.double() / 255
    assert scaled.mean((0, 2, 3)).tolist() == pytest.approx(data.mean, abs=0.05), "CIFAR-10's statistics are true"
    first = min((tmp_path / "train" / "frog").iterdir())
    with Image.open(first) as picture:
        assert data.train.images[6 * 20, :, 5, 9].tolist() == list(picture.convert("RGB").getpixel((9, 5)))  # type: ignore[arg-type]
    same = load(str(tmp_path), data_path=tmp_path, progress=False)
    assert torch.equal(same.train.images, data.train.images)
    assert same.mean == pytest.approx(scaled.mean((0, 2, 3)).tolist())


@pytest.mark.data
def test_real_imagenette_is_read(tmp_path: Path) -> None:
    unpacked("imagenette128.tar.xz", tmp_path, 5)
    data = load("imagenette", data_path=tmp_path, progress=False)
    assert data.image_shape == (3, 128, 128)
    assert data.train.labels.bincount().tolist() == [5] * 10
    small = load("ImageNet", subset="imagenette", data_path=tmp_path, res=64, progress=False)
    first = min((tmp_path / "train" / "n01440764").iterdir())
    with Image.open(first) as picture:
        expected = picture.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
    assert torch.equal(small.train.images[0].permute(1, 2, 0), torch.tensor(np.asarray(expected)))


def test_a_name_without_a_module_is_not_taken_for_a_subset_of_imagenet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "NAMES", (*catalogue.NAMES, "stripes"))
    with pytest.raises(AssertionError, match="stripes is one of NAMES"):
        catalogue.find("stripes", data_path=tmp_path)
    with pytest.raises(AssertionError, match="stripes is one of NAMES"):
        dataset_info("stripes", data_path=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "shape", "classes", "train", "test"),
    [
        ("MNIST", (1, 28, 28), 10, 60_000, 10_000),
        ("FashionMNIST", (1, 28, 28), 10, 60_000, 10_000),
        ("CIFAR10", (3, 32, 32), 10, 50_000, 10_000),
        ("CIFAR100", (3, 32, 32), 100, 50_000, 10_000),
        ("Tiny", (3, 64, 64), 200, 100_000, 10_000),
        ("ImageNet-128", (3, 128, 128), 1000, 1_281_167, 50_000),
        ("imagenette-128", (3, 128, 128), 10, 13_000, 500),
    ],
)
def test_the_published_sizes(name: str, shape: tuple[int, int, int], classes: int, train: int, test: int) -> None:
    info = published(name.partition("-")[0])
    assert info == DatasetInfo(name, shape, classes, train, test)
    assert info.packed_bytes == (train + test) * (shape[0] * shape[1] * shape[2] + 8)


def test_the_published_sizes_are_those_of_a_known_subset() -> None:
    assert published("imagenet", "ImageWoof", 64) == published("imagewoof", res=64)
    with pytest.raises(InputError, match=r"`subset`: expected one of .*, found 'imagewof'; did you mean imagewoof\?"):
        published("ImageNet", "imagewof")
