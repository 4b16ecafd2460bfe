"""CIFAR-10 and CIFAR-100: the official python and binary distributions, unpacked or not, or an image folder."""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mtt_fast.data.download import fetch
from mtt_fast.data.folder import find_splits, has_splits, image_source, list_classes
from mtt_fast.data.packing import Contents, Part, Source, key_of
from mtt_fast.errors import InputError

URL = "https://www.cs.toronto.edu/~kriz/"

# CIFAR-10's statistics; the public code of trajectory matching uses them for CIFAR-100 too.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32

_Images = np.ndarray[Any, np.dtype[np.uint8]]  # (n, 3, 32, 32)
_Labels = np.ndarray[Any, np.dtype[np.int64]]  # (n,)


@dataclass(frozen=True)
class _Distribution:
    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    labels: str | int  # key of the labels in a pickle; or the label bytes before an image, of which the last counts
    names_key: str = ""


@dataclass(frozen=True)
class _Facts:
    num_classes: int
    python: _Distribution
    binary: _Distribution
    md5: str  # of the python archive


FACTS = {
    "CIFAR10": _Facts(
        num_classes=10,
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
    ),
    "CIFAR100": _Facts(
        num_classes=100,
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
    ),
}


def source(name: str, data_path: Path, res: int | None, download: bool, progress: bool, url: str = URL) -> Source:
    """Describe CIFAR10 or CIFAR100 (`name`; fine labels), 3x32x32, below `data_path`; `url` holds the archives.

    Looked for in `data_path` and its sub-folder `name`: the python distribution, the binary one, their archives, and
    an image folder (train/CLASS/…, test/CLASS/…). An image folder of JPEGs is not the original data: compression has
    changed its pixels a little, which costs a little accuracy; class order, mean and std are the same.
    Raises `InputError` if there is none of them, or the first one found is broken.
    """
    facts = FACTS[name]
    found = _find(name, data_path, res)
    if found is None and download:
        fetch(url + facts.python.archive, data_path / facts.python.archive, md5=facts.md5, progress=progress)
        found = _find(name, data_path, res)
    if found is None:
        raise InputError(
            f"{name}: expected {facts.python.folder}/, {facts.binary.folder}/, {facts.python.archive}, "
            f"{facts.binary.archive} or an image folder (train/CLASS/, test/CLASS/) in {data_path} or "
            f"{data_path / name}, found none; add --download, or mend --data_path"
        )
    return found


def _find(name: str, data_path: Path, res: int | None) -> Source | None:
    facts = FACTS[name]
    roots = (data_path, data_path / name, data_path / name.lower())
    for root in roots:
        for kind in (facts.python, facts.binary):
            for folder in (root / kind.folder, root):
                if (folder / kind.train[0]).is_file():
                    return _unpacked(name, folder, kind)
    for root in roots:
        for kind in (facts.python, facts.binary):
            if (root / kind.archive).is_file():
                return _archived(name, root / kind.archive, kind)
    for root in roots:
        if has_splits(root):
            return _image_folder(name, root, res)
    return None


def _unpacked(name: str, folder: Path, kind: _Distribution) -> Source:
    files = [folder / file for file in (*kind.train, kind.test, kind.names)]

    def read_files() -> dict[str, bytes]:
        try:
            return {file.name: file.read_bytes() for file in files}
        except OSError as error:
            raise InputError(
                f"{error.filename}: cannot be read ({error.strerror}); unpack {kind.archive} again"
            ) from error

    return Source(
        name, name, key_of(folder, files, name, kind), lambda: _read(name, folder, kind, read_files), MEAN, STD
    )


def _archived(name: str, archive: Path, kind: _Distribution) -> Source:
    wanted = {*kind.train, kind.test, kind.names}

    def read_files() -> dict[str, bytes]:
        files = {}
        try:
            with tarfile.open(archive, "r:gz") as tar:
                for member in tar:
                    path = PurePosixPath(member.name)
                    if path.parent.name == kind.folder and path.name in wanted and (stream := tar.extractfile(member)):
                        files[path.name] = stream.read()
        except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
            raise InputError(
                f"{archive}: expected a whole .tar.gz, found a broken one ({error}); delete it and add --download"
            ) from error
        if missing := wanted - set(files):
            raise InputError(
                f"{archive}: expected {kind.folder}/{min(missing)} in it, found none; delete it and add --download"
            )
        return files

    return Source(
        name,
        name,
        key_of(archive.parent, [archive], name, kind),
        lambda: _read(name, archive, kind, read_files),
        MEAN,
        STD,
    )


def _image_folder(name: str, root: Path, res: int | None) -> Source:
    train, test = (list_classes(folder) for folder in find_splits(root))
    if len(train) != FACTS[name].num_classes:
        raise InputError(
            f"{root}: expected the {FACTS[name].num_classes} class folders of {name} in train/, found {len(train)}; "
            f"mend --data_path, or name the folder itself: --dataset {root}"
        )
    return image_source(name, root, train, test, channels=3, size=32, resize=res is not None, mean=MEAN, std=STD)


def _read(name: str, place: Path, kind: _Distribution, read_files: Callable[[], dict[str, bytes]]) -> Contents:
    files = read_files()
    decode = _from_pickle if kind.names_key else _from_records
    batches = {file: decode(files[file], kind.labels, place / file) for file in (*kind.train, kind.test)}
    names = _class_names(files[kind.names], kind, place / kind.names)
    if len(names) != FACTS[name].num_classes:
        raise InputError(
            f"{place / kind.names}: expected {FACTS[name].num_classes} class names, found {len(names)}; get "
            f"{kind.archive} again"
        )
    return Contents(names, _SHAPE, _part([batches[file] for file in kind.train]), _part([batches[kind.test]]))


def _part(batches: Sequence[tuple[_Images, _Labels]]) -> Part:
    return Part(np.concatenate([labels for _, labels in batches]), [images for images, _ in batches])


def _from_records(raw: bytes, label_bytes: Any, place: Path) -> tuple[_Images, _Labels]:
    """Read the binary form: for each image its label bytes (CIFAR-100: coarse, fine), then its pixels."""
    record = label_bytes + _PIXELS
    if not raw or len(raw) % record:
        raise InputError(f"{place}: expected a multiple of {record} bytes, found {len(raw)}; get its archive again")
    records = np.frombuffer(raw, np.uint8).reshape(-1, record)
    return records[:, label_bytes:].reshape(-1, *_SHAPE), records[:, label_bytes - 1].astype(np.int64)


def _from_pickle(raw: bytes, labels_key: Any, place: Path) -> tuple[_Images, _Labels]:
    """Read the python form: a dict with "data", uint8 (n, 3072), and a list of labels."""
    batch = unpickle(raw, place)
    pixels, labels = batch.get("data"), batch.get(labels_key)
    if not (
        isinstance(pixels, np.ndarray)
        and pixels.dtype == np.uint8
        and pixels.ndim == 2
        and pixels.shape[1] == _PIXELS
        and isinstance(labels, list)
        and len(labels) == len(pixels)
        and all(type(label) is int for label in labels)
    ):
        raise InputError(
            f"{place}: expected 'data' of bytes (n, {_PIXELS}) and a list of n {labels_key!r}, found "
            f"{sorted(map(str, batch))}; get its archive again"
        )
    return pixels.reshape(-1, *_SHAPE), np.array(labels, np.int64)


def _class_names(raw: bytes, kind: _Distribution, place: Path) -> tuple[str, ...]:
    if kind.names_key:
        names = unpickle(raw, place).get(kind.names_key, [])
        return tuple(map(str, names)) if isinstance(names, list) else ()
    return tuple(raw.decode(errors="replace").split())


def unpickle(raw: bytes, place: Path) -> dict[str, Any]:
    """Read a pickle such as CIFAR's: a dict of strings, numbers, lists, byte arrays. Nothing in it is executed.

    Raises `InputError` if it holds anything else or breaks off; `place` is for the message.
    """
    try:
        # Python 2 wrote the files: its strings are bytes, and "latin1" is the decoding that numpy can turn back.
        value = _Unpickler(io.BytesIO(raw), encoding="latin1").load()
    except Exception as error:  # a broken pickle raises nearly anything
        raise InputError(
            f"{place}: expected a pickle of CIFAR, found something else ({error}); get its archive again"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{place}: expected a pickled dict, found {type(value).__name__}; get its archive again")
    return value


class _Unpickler(pickle.Unpickler):
    """Admits the three names by which numpy pickles an array, and gives each the least that does the work."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _empty_array
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"  # only handed to _reconstruct
        if (module, name) == ("numpy", "dtype"):
            return _byte_dtype
        raise pickle.UnpicklingError(f"{module}.{name} is not admitted")


def _empty_array(*_: object) -> _Images:
    """What the pickle then fills by `__setstate__`."""
    return np.empty(0, np.uint8)


def _byte_dtype(code: object, *_: object) -> np.dtype[np.uint8]:
    if code not in ("u1", "|u1"):
        raise pickle.UnpicklingError(f"an array of {code!r} is not admitted")
    return np.dtype("u1", copy=True)
