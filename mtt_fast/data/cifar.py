"""CIFAR-10 and CIFAR-100: the official python and binary distributions, unpacked or not, or an image folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtt_fast.data import class_lists
from mtt_fast.data.archives import is_file_or_link, read_tar
from mtt_fast.data.class_names import abbreviated
from mtt_fast.data.download import fetch
from mtt_fast.data.folder import by_class, find_splits, has_splits, image_source
from mtt_fast.data.image_data import DatasetInfo
from mtt_fast.data.images import Fit
from mtt_fast.data.listing import list_classes, log_skipped
from mtt_fast.data.packing import Contents, Part, Source, key_of
from mtt_fast.data.safe_pickle import unpickle
from mtt_fast.errors import InputError, NotFound
from mtt_fast.storage.regular import lines_of, read_bytes

URL = "https://www.cs.toronto.edu/~kriz/"

# CIFAR-10's statistics; the public code of trajectory matching uses them for CIFAR-100 too.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_MAX_OTHER_BYTES = 200  # bytes beside the pixels of an image
_MAX_ARCHIVE_BYTES = 200 << 20  # bytes of an archive that is downloaded
_MAX_NAMES_BYTES = 1 << 16  # bytes of the file of class names

_Images = np.ndarray[Any, np.dtype[np.uint8]]  # (n, 3, 32, 32)
_Labels = np.ndarray[Any, np.dtype[np.int64]]  # (n,)


@dataclass(frozen=True)
class _Distribution:
    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    # key of the labels in a pickle; or the number of label bytes before an image, of which the last is used
    labels: str | int
    names_key: str = ""


@dataclass(frozen=True)
class DatasetSpec:
    """CIFAR-10 or CIFAR-100 as it is published."""

    name: str
    class_names: tuple[str, ...]
    images: tuple[int, int]  # in a training file, and in the test file
    python: _Distribution
    binary: _Distribution
    md5: str  # of the python archive

    @property
    def info(self) -> DatasetInfo:
        """Return the sizes of the data set."""
        in_file, test = self.images
        return DatasetInfo(self.name, _SHAPE, len(self.class_names), len(self.python.train) * in_file, test)

    def most_bytes(self, kind: _Distribution) -> dict[str, int]:
        """Return the largest size of each file: pixels, labels, and in a pickle the names of the images."""
        train, test = (images * (_PIXELS + _MAX_OTHER_BYTES) for images in self.images)
        return {**dict.fromkeys(kind.train, train), kind.test: test, kind.names: _MAX_NAMES_BYTES}


_CIFAR10 = DatasetSpec(
    name="CIFAR10",
    class_names=class_lists.CIFAR10,
    images=(10_000, 10_000),
    python=_Distribution(
        archive="cifar-10-python.tar.gz",
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{n}" for n in range(1, 6)),
        test="test_batch",
        names="batches.meta",
        labels="labels",
        names_key="label_names",
    ),
    binary=_Distribution(
        archive="cifar-10-binary.tar.gz",
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{n}.bin" for n in range(1, 6)),
        test="test_batch.bin",
        names="batches.meta.txt",
        labels=1,
    ),
    md5="c58f30108f718f92721af3b95e74349a",
)
_CIFAR100 = DatasetSpec(
    name="CIFAR100",
    class_names=class_lists.CIFAR100,
    images=(50_000, 10_000),
    python=_Distribution(
        archive="cifar-100-python.tar.gz",
        folder="cifar-100-python",
        train=("train",),
        test="test",
        names="meta",
        labels="fine_labels",
        names_key="fine_label_names",
    ),
    binary=_Distribution(
        archive="cifar-100-binary.tar.gz",
        folder="cifar-100-binary",
        train=("train.bin",),
        test="test.bin",
        names="fine_label_names.txt",
        labels=2,
    ),
    md5="eb9058c3a382ffc7106e4002c42a8d85",
)
SPECS = {spec.name: spec for spec in (_CIFAR10, _CIFAR100)}


def source(name: str, data_path: Path, res: int | None, *, download: bool, progress: bool, url: str = URL) -> Source:
    """Describe CIFAR10 or CIFAR100 (`name`; fine labels), 3x32x32, below `data_path`; `url` holds the archives.

    In `data_path` and its sub-folder `name` are searched, in this order: the python distribution, the binary one, their archives,
    and an image folder (train/CLASS/, test/CLASS/). JPEGs in an image folder differ a little from the original pixels, which costs a
    little accuracy; class order, mean and std are the same. Raises `NotFound` if there is none of these, and `InputError` if the
    first one found is damaged.
    """
    spec = SPECS[name]
    copy = _find(spec, data_path, res)
    if copy is None and download:
        archive = spec.python.archive
        fetch(url + archive, data_path / archive, md5=spec.md5, most=_MAX_ARCHIVE_BYTES, progress=progress)
        copy = _find(spec, data_path, res)
    if copy is None:
        raise NotFound(
            f"{name}: expected {spec.python.folder}/, {spec.binary.folder}/, {spec.python.archive}, "
            f"{spec.binary.archive} or an image folder (train/CLASS/, test/CLASS/) in {data_path} or "
            f"{data_path / name}, found none; give `download`, or correct `data_path`"
        )
    return copy


def _find(spec: DatasetSpec, data_path: Path, res: int | None) -> Source | None:
    """Return the first copy in one of the usual places, or None."""
    roots = (data_path, data_path / spec.name, data_path / spec.name.lower())
    for root in roots:
        for kind in (spec.python, spec.binary):
            for folder in (root / kind.folder, root):
                if is_file_or_link(folder / kind.train[0]):
                    return _unpacked(spec, folder, kind)
    for root in roots:
        for kind in (spec.python, spec.binary):
            if is_file_or_link(root / kind.archive):
                return _archived(spec, root / kind.archive, kind)
    for root in roots:
        if has_splits(root):
            return _image_folder(spec, root, res)
    return None


def _unpacked(spec: DatasetSpec, folder: Path, kind: _Distribution) -> Source:
    most = spec.most_bytes(kind)
    fix = f"unpack {kind.archive} again"

    def read_files() -> dict[str, bytes]:
        return {file: read_bytes(folder / file, size, fix) for file, size in most.items()}

    key = key_of(folder, [folder / file for file in most], spec.name, kind)
    return Source(spec.name, spec.name, key, lambda: _read(spec, folder, kind, read_files), MEAN, STD)


def _archived(spec: DatasetSpec, archive: Path, kind: _Distribution) -> Source:
    most = {f"{kind.folder}/{file}": size for file, size in spec.most_bytes(kind).items()}

    def read_files() -> dict[str, bytes]:
        contents = read_tar(archive, most, "delete it and add `download`")
        return {path.rpartition("/")[2]: content for path, content in contents.items()}

    key = key_of(archive.parent, [archive], spec.name, kind)
    return Source(spec.name, spec.name, key, lambda: _read(spec, archive, kind, read_files), MEAN, STD)


def _image_folder(spec: DatasetSpec, root: Path, res: int | None) -> Source:
    folders = find_splits(root)
    listings = [list_classes(root, folder) for folder in folders]
    log_skipped(spec.name, *listings)
    train, test = (
        by_class(spec.name, folder, listing, spec.class_names)
        for folder, listing in zip(folders, listings, strict=True)
    )
    fit: Fit = "crop" if res else "exact"
    return image_source(spec.name, root, train, test, channels=3, size=32, fit=fit, mean=MEAN, std=STD)


def _read(
    spec: DatasetSpec, place: Path, kind: _Distribution, read_files: Callable[[], Mapping[str, bytes]]
) -> Contents:
    files, num_classes = read_files(), len(spec.class_names)
    decode = _from_pickle if kind.names_key else _from_records
    names = _class_names(files[kind.names], kind, place / kind.names)
    if len(names) != num_classes:
        raise InputError(
            f"{place / kind.names}: expected {num_classes} class names, found {len(names)}; get {kind.archive} again"
        )
    names, order = in_official_order(names, spec.class_names)
    batches = {}
    for file in (*kind.train, kind.test):
        images, labels = decode(files[file], kind.labels, place / file)
        _check_labels(labels, num_classes, place / file, "test" if file == kind.test else "training")
        batches[file] = images, order[np.array(labels, np.int64)]
    return Contents(names, _SHAPE, _part([batches[file] for file in kind.train]), _part([batches[kind.test]]))


def in_official_order(names: tuple[str, ...], official: tuple[str, ...]) -> tuple[tuple[str, ...], _Labels]:
    """Return the class names in the `official` order, and the official class of each; other names stay as they are."""
    if sorted(names) != sorted(official):
        return names, np.arange(len(names))
    return official, np.array([official.index(one) for one in names])


def _part(batches: Sequence[tuple[_Images, _Labels]]) -> Part:
    return Part(np.concatenate([labels for _, labels in batches]), [images for images, _ in batches])


def _check_labels(labels: Sequence[int], num_classes: int, place: Path, part: str) -> None:
    for label in labels:
        if not 0 <= label < num_classes:
            found = label if label.bit_length() < 64 else f"a number of {label.bit_length()} bits"
            raise InputError(
                f"{place}: expected {part} labels in [0, {num_classes}), found {found}; get its archive again"
            )


def _from_records(raw: bytes, label_bytes: Any, place: Path) -> tuple[_Images, list[int]]:
    """Read the binary form: for each image its label bytes (CIFAR-100: coarse, fine), then its pixels."""
    record = label_bytes + _PIXELS
    if not raw or len(raw) % record:
        raise InputError(f"{place}: expected a multiple of {record} bytes, found {len(raw)}; get its archive again")
    records = np.frombuffer(raw, np.uint8).reshape(-1, record)
    return records[:, label_bytes:].reshape(-1, *_SHAPE), records[:, label_bytes - 1].tolist()


def _from_pickle(raw: bytes, labels_key: Any, place: Path) -> tuple[_Images, list[int]]:
    """Read the python form: a dict with "data", uint8 (n, 3072), and a list of labels."""
    batch = unpickle(raw, place)
    pixels, labels = batch.get("data"), batch.get(labels_key)
    if not (
        isinstance(pixels, np.ndarray)
        and pixels.ndim == 2
        and pixels.shape[1] == _PIXELS
        and isinstance(labels, list)
        and len(labels) == len(pixels)
        and all(type(label) is int for label in labels)
    ):
        keys = abbreviated([repr(key)[:40] for key in batch if isinstance(key, str | bytes)])
        raise InputError(
            f"{place}: expected 'data' of bytes (n, {_PIXELS}) and a list of n {labels_key!r}, found {keys or 'neither'}; "
            "get its archive again"
        )
    return pixels.reshape(-1, *_SHAPE), labels


def _class_names(raw: bytes, kind: _Distribution, place: Path) -> tuple[str, ...]:
    if kind.names_key:
        names = unpickle(raw, place).get(kind.names_key, [])
        named = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return tuple(names) if named else ()
    return tuple(line.strip() for line in lines_of(raw, place, f"get {kind.archive} again") if line.strip())
