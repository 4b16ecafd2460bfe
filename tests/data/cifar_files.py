"""Make small copies of CIFAR-10 and CIFAR-100 in their distributions' forms, for the tests of several topics."""

from __future__ import annotations

import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtt_fast.data import ImageData, load
from mtt_fast.errors import InputError

Array = np.ndarray[Any, Any]

NAMES10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NAMES100 = tuple(f"class_{number:02}" for number in range(100))


def batch(classes: int, seed: int) -> tuple[Array, list[int]]:
    """Return (pixels uint8 (n, 3072), labels), each class twice."""
    pixels = np.random.default_rng(seed).integers(0, 256, (2 * classes, 3072), np.uint8)
    return pixels, np.random.default_rng(seed).permutation(2 * classes).__mod__(classes).tolist()


def python2_pickle(value: Any) -> bytes:
    """Pickle as Python 2 and its numpy did, opcode by opcode: what the official files hold."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(value)) + value

    def item(value: Any) -> bytes:
        match value:
            case dict():
                return b"}(" + b"".join(text(key.encode()) + item(held) for key, held in value.items()) + b"u"
            case list():
                return b"](" + b"".join(map(item, value)) + b"e"
            case str():
                return text(value.encode())
            case int():
                return b"J" + struct.pack("<i", value)
            case _:
                empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tU\x01btR"
                dtype = b"cnumpy\ndtype\n(U\x02u1K\0K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
                shape = b"(" + b"".join(map(item, value.shape)) + b"t"
                return empty + b"(K\x01" + shape + dtype + b"\x89" + text(value.tobytes()) + b"tb"

    return b"\x80\x02" + item(value) + b"."


def python3_pickle(value: Any) -> bytes:
    return pickle.dumps(value, protocol=3)


def pickle_by_columns(value: dict[str, Any]) -> bytes:
    """Pickle with arrays whose columns lie one after another, as those of Fortran."""
    return python3_pickle({key: np.asarray(held, order="F") if key == "data" else held for key, held in value.items()})


Dump = Callable[[Any], bytes]


def python_folder(root: Path, name: str, dump: Dump = python2_pickle) -> Path:
    ten = name == "CIFAR10"
    root = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    root.mkdir(parents=True)
    names = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    for seed, file in enumerate(names):
        pixels, labels = batch(10 if ten else 100, seed)
        kind = {"labels": labels} if ten else {"coarse_labels": [7] * len(labels), "fine_labels": labels}
        (root / file).write_bytes(dump({"batch_label": file, **kind, "data": pixels, "filenames": ["a.png"]}))
    meta = {"num_vis": 3072, "label_names": list(NAMES10)} if ten else {"fine_label_names": list(NAMES100)}
    (root / ("batches.meta" if ten else "meta")).write_bytes(dump(meta))
    return root


def binary_folder(root: Path, name: str) -> Path:
    ten = name == "CIFAR10"
    root = root / ("cifar-10-batches-bin" if ten else "cifar-100-binary")
    root.mkdir(parents=True)
    names = [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"] if ten else ["train.bin", "test.bin"]
    for seed, file in enumerate(names):
        pixels, labels = batch(10 if ten else 100, seed)
        fine = np.array(labels, np.uint8)[:, None]
        columns = [fine, pixels] if ten else [np.full_like(fine, 7), fine, pixels]
        (root / file).write_bytes(np.concatenate(columns, 1).tobytes())
    text = "\n".join(NAMES10 if ten else NAMES100) + "\n\n"
    (root / ("batches.meta.txt" if ten else "fine_label_names.txt")).write_text(text)
    return root


def archived(folder: Path) -> Path:
    """Replace `folder` by the .tar.gz of its official name."""
    names = {"cifar-10-batches-py": "cifar-10-python", "cifar-10-batches-bin": "cifar-10-binary"}
    archive = folder.parent / f"{names.get(folder.name, folder.name)}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return archive


def check(data: ImageData, name: str) -> None:
    classes, train = (10, range(5)) if name == "CIFAR10" else (100, range(1))
    assert data.name == name
    assert data.class_names == (NAMES10 if classes == 10 else NAMES100)
    assert data.image_shape == (3, 32, 32)
    assert (data.mean, data.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)), "CIFAR-10's for both"
    pixels = np.concatenate([batch(classes, seed)[0] for seed in train]).reshape(-1, 3, 32, 32)
    assert np.array_equal(data.train.images.numpy(), pixels)
    assert data.train.labels.tolist() == [label for seed in train for label in batch(classes, seed)[1]]
    pixels, labels = batch(classes, len(train))
    assert np.array_equal(data.test.images.numpy(), pixels.reshape(-1, 3, 32, 32))
    assert data.test.labels.tolist() == labels


def check_refused(root: Path, message: str, name: str = "CIFAR10") -> None:
    with pytest.raises(InputError, match=message) as raised:
        load(name, data_path=root, progress=False)
    assert "\n" not in str(raised.value)
    assert not list(root.glob("packed/*"))
