"""MNIST and FashionMNIST: idx files, plain or gzipped, where torchvision puts them and elsewhere."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtt_fast.data import ImageData, load
from mtt_fast.data.mnist import FILES
from mtt_fast.errors import InputError

Array = np.ndarray[Any, np.dtype[np.uint8]]


def idx(values: Array) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def arrays(n: int, seed: int) -> tuple[Array, Array]:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 28, 28), np.uint8)
    return pixels, (np.arange(n) % 10).astype(np.uint8)


def files(folder: Path, zipped: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in zip(FILES, (*arrays(20, 0), *arrays(10, 1)), strict=True):
        raw = idx(values)
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(raw) if zipped else raw)
    return folder


def check(data: ImageData) -> None:
    for split, (pixels, labels) in ((data.train, arrays(20, 0)), (data.test, arrays(10, 1))):
        assert np.array_equal(split.images.numpy(), pixels[:, None])
        assert split.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("below", [".", "{name}", "{name}/raw"])
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_content_from_every_place(tmp_path: Path, name: str, below: str, zipped: bool) -> None:
    files(tmp_path / below.format(name=name), zipped)
    data = load(name.upper(), data_path=tmp_path, progress=False)
    check(data)
    assert data.image_shape == (1, 28, 28)
    assert data.name == name
    if name == "MNIST":
        assert (data.mean, data.std, data.class_names[3]) == ((0.1307,), (0.3081,), "3")
    else:
        assert (data.mean, data.std, data.class_names[-1]) == ((0.2861,), (0.3530,), "Ankle boot")


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    files(tmp_path)
    first = load("MNIST", data_path=tmp_path, progress=False)
    (tmp_path / FILES[0]).write_bytes(idx(255 - arrays(20, 0)[0]))
    again = load("MNIST", data_path=tmp_path, progress=False)
    assert np.array_equal(again.train.images.numpy(), 255 - arrays(20, 0)[0][:, None])
    assert again.fingerprint != first.fingerprint


def test_a_relative_path_finds_what_an_absolute_one_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load("MNIST", data_path=files(tmp_path), progress=False)
    assert first.path
    packed_at = first.path.stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    assert load("MNIST", data_path=".", progress=False).path == first.path
    assert first.path.stat().st_mtime_ns == packed_at


def fails(root: Path, message: str, **options: Any) -> None:
    with pytest.raises(InputError, match=message) as raised:
        load("MNIST", data_path=root, progress=False, **options)
    assert "\n" not in str(raised.value)
    assert not list(root.glob("packed/*"))


def test_missing_says_where_and_offers_the_download(tmp_path: Path) -> None:
    fails(tmp_path, r"train-images-idx3-ubyte.*MNIST/raw.*--download")
    (files(tmp_path) / FILES[3]).unlink()
    fails(tmp_path, "none of these places complete")


def test_another_resolution_is_refused(tmp_path: Path) -> None:
    fails(files(tmp_path), "--res: expected 28 or nothing", res=32)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (0, idx(arrays(20, 0)[1]), "begins with 00000803, found 00000801"),
        (1, idx(arrays(20, 0)[0]), "begins with 00000801, found 00000803"),
        (0, b"", "begins with 00000803, found ;"),
        (0, b"\0\0\x08\x03\0\0", "begins with 00000803"),
        (0, idx(arrays(20, 0)[0])[:-1], r"expected 15696 bytes for its \(20, 28, 28\) values, found 15695"),
        (0, idx(arrays(20, 0)[0]) + b"\0", "found 15697"),
        (1, idx(arrays(19, 0)[1]), "expected 20 labels"),
        (1, idx(arrays(20, 0)[1] + 1), r"labels in \[0, 10\), found 1 to 10"),
        (2, idx(np.zeros((10, 9, 9), np.uint8)), "expected images of"),
        (1, idx(np.zeros(20, np.uint8)), "none of '1'"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, file: int, content: bytes, message: str) -> None:
    (files(tmp_path) / FILES[file]).write_bytes(content)
    fails(tmp_path, message)


def test_truncated_gzip_is_named(tmp_path: Path) -> None:
    path = files(tmp_path, zipped=True) / f"{FILES[0]}.gz"
    raw = path.read_bytes()
    for content in (raw[:-200], raw[:5], b"<html>"):
        path.write_bytes(content)
        fails(tmp_path, r"train-images-idx3-ubyte\.gz: expected a whole")
