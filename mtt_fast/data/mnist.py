"""MNIST and FashionMNIST: four idx files, plain or gzipped."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtt_fast.data import class_lists
from mtt_fast.data.archives import is_file_or_link, read_gzip
from mtt_fast.data.download import fetch
from mtt_fast.data.image_data import DatasetInfo
from mtt_fast.data.packing import Contents, Part, Source, key_of
from mtt_fast.errors import InputError, NotFound
from mtt_fast.storage.regular import read_bytes

# image and label file of the training split, then of the test split
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

_SIDE = 28
_MAX_IMAGES = (60_000, 10_000)  # of the training split, of the test split
_MAX_ARCHIVE_BYTES = 64 << 20  # bytes of a file that is downloaded
_SAME_MEAN = 0.01  # in [0, 1]; the means of MNIST and FashionMNIST are 0.16 apart
_FIX = "get it again"


@dataclass(frozen=True)
class DatasetSpec:
    """MNIST or FashionMNIST as it is published."""

    name: str
    url: str  # the mirror that torchvision names too
    md5: tuple[str, str, str, str]  # of the .gz files, in the order of FILES
    class_names: tuple[str, ...]
    mean: float  # these two: the public code's
    std: float

    @property
    def info(self) -> DatasetInfo:
        """Return the data set in numbers."""
        return DatasetInfo(self.name, (1, _SIDE, _SIDE), len(self.class_names), *_MAX_IMAGES)


_MNIST = DatasetSpec(
    name="MNIST",
    url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    md5=(
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    class_names=class_lists.MNIST,
    mean=0.1307,
    std=0.3081,
)
_FASHION_MNIST = DatasetSpec(
    name="FashionMNIST",
    url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    md5=(
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    class_names=class_lists.FASHION_MNIST,
    mean=0.2861,
    std=0.3530,
)
SPECS = {spec.name: spec for spec in (_MNIST, _FASHION_MNIST)}


def source(name: str, data_path: Path, *, download: bool, progress: bool, url: str | None = None) -> Source:
    """Describe MNIST or FashionMNIST (`name`) below `data_path`, 1x28x28; `url` takes the place of the official folder.

    Raises `InputError` if a file is missing, is not an idx file of the right kind, or is shorter than its header says.
    """
    spec = SPECS[name]
    files = _find(name, data_path)
    if files is None and download:
        for file, md5 in zip(FILES, spec.md5, strict=True):
            path = data_path / name / "raw" / f"{file}.gz"
            if not path.is_file():
                fetch(f"{url or spec.url}{file}.gz", path, md5=md5, most=_MAX_ARCHIVE_BYTES, progress=progress)
        files = _find(name, data_path)
    if files is None:
        raise NotFound(
            f"{name}: expected {FILES[0]} and the other three files (plain or .gz) in {data_path}, "
            f"{data_path / name} or {data_path / name / 'raw'}, found none of these places complete; add `download`, "
            "or correct `data_path`"
        )

    def read() -> Contents:
        images, labels = read_split(files[0], files[1], _MAX_IMAGES[0])
        _check_is(spec, images, files[0])
        test_images, test_labels = read_split(files[2], files[3], _MAX_IMAGES[1])
        return Contents(spec.class_names, (1, _SIDE, _SIDE), Part(labels, [images]), Part(test_labels, [test_images]))

    return Source(name, name, key_of(data_path, files, name), read, (spec.mean,), (spec.std,))


def _check_is(spec: DatasetSpec, images: np.ndarray[Any, np.dtype[np.uint8]], path: Path) -> None:
    """Raise `InputError` if the training images are those of another data set whose files have the same names."""
    mean = float(images.sum()) / (255 * max(1, images.size))
    for other in SPECS.values():
        if other is not spec and abs(mean - other.mean) < _SAME_MEAN:
            raise InputError(
                f"{path}: expected images of {spec.name}, found those of {other.name}, by their mean {mean:.4f}; correct `data_path`, or "
                f"give `dataset` {other.name}"
            )


def _find(name: str, data_path: Path) -> list[Path] | None:
    """Return the four files in the first likely folder that has them all, plain or gzipped, or None."""
    for folder in (data_path / name / "raw", data_path / name, data_path):  # the first is torchvision's
        files = [
            next((f for f in (folder / file, folder / f"{file}.gz") if is_file_or_link(f)), None) for file in FILES
        ]
        present = [file for file in files if file]
        if len(present) == len(FILES):
            return present
    return None


def read_split(
    images: Path, labels: Path, most: int
) -> tuple[np.ndarray[tuple[int, int, int, int], np.dtype[np.uint8]], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Return (images uint8 (n, 1, 28, 28), labels int64 (n,)), n at most `most`.

    Raises `InputError` for a file that is broken, longer than that, of another shape, or that does not fit the other.
    """
    pixels, classes = _read_idx(images, most, (_SIDE, _SIDE)), _read_idx(labels, most, ())
    if len(pixels) != len(classes):
        raise InputError(
            f"{labels}: expected {len(pixels)} labels as {images.name} has images, found {len(classes)}; get both again"
        )
    if len(classes) and np.max(classes) > 9:
        raise InputError(
            f"{labels}: expected labels in [0, 10), found {np.min(classes)} to {np.max(classes)}; get both again"
        )
    return pixels.reshape(len(pixels), 1, _SIDE, _SIDE), classes.reshape(len(classes)).astype(np.int64)


def _read_idx(path: Path, most: int, shape: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Read an idx file: 0, 0, 8 (unsigned bytes), number of dimensions, each side (4 bytes, big-endian), values.

    The values are at most `most` of `shape`.
    """
    dimensions = 1 + len(shape)
    begin = 4 + 4 * dimensions
    most_bytes = begin + most * int(np.prod(shape))
    raw = read_gzip(path, most_bytes, _FIX) if path.suffix == ".gz" else read_bytes(path, most_bytes, _FIX)
    magic = bytes((0, 0, 8, dimensions))
    if raw[:4] != magic or len(raw) < begin:
        raise InputError(f"{path}: expected an idx file that begins with {magic.hex()}, found {raw[:4].hex()}; {_FIX}")
    count, *sides = struct.unpack_from(f">{dimensions}I", raw, 4)
    if tuple(sides) != shape:
        raise InputError(f"{path}: expected images of {shape} pixels, found {tuple(sides)}; {_FIX}")
    expected = begin + count * int(np.prod(shape))
    if len(raw) != expected:
        raise InputError(
            f"{path}: expected {expected} bytes for its {(count, *sides)} values, found {len(raw)}; {_FIX}"
        )
    return np.frombuffer(raw, np.uint8, offset=begin).reshape(count, *shape)
