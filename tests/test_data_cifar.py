"""CIFAR-10 and CIFAR-100 from every form they come in; pickles that hold anything else are refused unread."""

from __future__ import annotations

import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtt_fast.data import ImageData, load
from mtt_fast.data.safe_pickle import unpickle
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


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
@pytest.mark.parametrize("pack", [False, True], ids=["folder", "archive"])
@pytest.mark.parametrize("form", ["python2", "python3", "binary"])
def test_every_distribution(tmp_path: Path, name: str, pack: bool, form: str) -> None:
    if form == "binary":
        folder = binary_folder(tmp_path, name)
    else:
        folder = python_folder(tmp_path, name, python2_pickle if form == "python2" else python3_pickle)
    if pack:
        archived(folder)
    check(load(name, data_path=tmp_path, progress=False), name)


@pytest.mark.parametrize("below", ["CIFAR10", "cifar10", "."])
def test_sub_folder_and_the_folder_itself(tmp_path: Path, below: str) -> None:
    check(load("cifar10", data_path=python_folder(tmp_path / below, "CIFAR10").parent, progress=False), "CIFAR10")
    check(load("CIFAR10", data_path=tmp_path / below / "cifar-10-batches-py", progress=False), "CIFAR10")


def test_second_load_reads_no_batch_and_a_touched_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = python_folder(tmp_path, "CIFAR10")
    load("CIFAR10", data_path=tmp_path, progress=False)
    reads: list[Path] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or read_bytes(path))  # type: ignore[func-returns-value]
    load("CIFAR10", data_path=tmp_path, progress=False)
    assert reads == []
    os.utime(folder / "data_batch_3", ns=(1, 1))
    load("CIFAR10", data_path=tmp_path, progress=False)
    assert len(reads) == 7


def jpeg_folder(root: Path, classes: tuple[str, ...] = NAMES10, side: int = 32) -> Path:
    for split, count in (("train", 2), ("test", 1)):
        for label, name in enumerate(classes):
            for number in range(count):
                path = root / split / name / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (side, side), (20 * label, 100, 10 * number)).save(path)
    return root


def test_an_image_folder_of_jpegs(tmp_path: Path) -> None:
    data = load("CIFAR10", data_path=jpeg_folder(tmp_path), progress=False)
    assert (data.name, data.class_names, data.image_shape) == ("CIFAR10", NAMES10, (3, 32, 32))
    assert data.mean == (0.4914, 0.4822, 0.4465)
    assert data.train.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert data.test.images[:, 0].float().mean((1, 2)).tolist() == pytest.approx([20 * n for n in range(10)], abs=3)


def test_an_image_folder_of_something_else(tmp_path: Path) -> None:
    fails(jpeg_folder(tmp_path / "few", NAMES10[:4]), "expected the 10 class folders of CIFAR10 in train/, found 4")
    fails(jpeg_folder(tmp_path / "large", side=40), "expected 32x32 pixels")


def test_originals_go_before_images(tmp_path: Path) -> None:
    python_folder(jpeg_folder(tmp_path), "CIFAR10")
    check(load("CIFAR10", data_path=tmp_path, progress=False), "CIFAR10")


def fails(root: Path, message: str, name: str = "CIFAR10") -> None:
    with pytest.raises(InputError, match=message) as raised:
        load(name, data_path=root, progress=False)
    assert "\n" not in str(raised.value)
    assert not list(root.glob("packed/*"))


def test_missing_says_what_was_looked_for(tmp_path: Path) -> None:
    fails(tmp_path, r"cifar-10-batches-py/.*cifar-10-batches-bin/.*cifar-10-python\.tar\.gz.*--download")
    fails(tmp_path, r"cifar-100-python/.*cifar-100-binary\.tar\.gz.*--download", "CIFAR100")


def test_a_missing_batch_is_named(tmp_path: Path) -> None:
    (python_folder(tmp_path, "CIFAR10") / "data_batch_4").unlink()
    fails(tmp_path, "data_batch_4: cannot be read")


def test_truncated_archive(tmp_path: Path) -> None:
    archive = archived(python_folder(tmp_path, "CIFAR10"))
    raw = archive.read_bytes()
    for content in (b"", raw[:9], raw[: len(raw) // 2], raw[:-2000], b"<html>not found</html>"):
        archive.write_bytes(content)
        fails(tmp_path, r"cifar-10-python\.tar\.gz: expected .*delete it and add --download")


def test_archive_without_a_member(tmp_path: Path) -> None:
    folder = python_folder(tmp_path, "CIFAR10")
    (folder / "test_batch").unlink()
    archived(folder)
    fails(tmp_path, "expected cifar-10-batches-py/test_batch in it")


def test_truncated_batches(tmp_path: Path) -> None:
    path = python_folder(tmp_path, "CIFAR10") / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-50])
    fails(tmp_path, "data_batch_2: expected a pickle of CIFAR")
    path = binary_folder(tmp_path / "b", "CIFAR10") / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-50])
    fails(tmp_path / "b", r"data_batch_2\.bin: expected a multiple of 3073 bytes")


@pytest.mark.parametrize(
    "change",
    [
        {"data": np.zeros((20, 10), np.uint8)},
        {"data": [1, 2]},
        {"labels": [0] * 19},
        {"labels": ["0"] * 20},
        {"labels": 3},
    ],
    ids=["few columns", "no array", "few labels", "text labels", "no labels"],
)
def test_a_batch_of_another_shape(tmp_path: Path, change: dict[str, Any]) -> None:
    pixels, labels = batch(10, 0)
    (python_folder(tmp_path, "CIFAR10") / "data_batch_1").write_bytes(
        python3_pickle({"data": pixels, "labels": labels} | change)
    )
    fails(tmp_path, "data_batch_1: expected 'data' of bytes")


def test_a_pickle_of_no_dict(tmp_path: Path) -> None:
    (python_folder(tmp_path, "CIFAR10") / "batches.meta").write_bytes(python3_pickle([1]))
    fails(tmp_path, r"batches\.meta: expected a pickled dict, found list")


def test_wrong_class_names_and_labels(tmp_path: Path) -> None:
    folder = python_folder(tmp_path, "CIFAR10")
    (folder / "batches.meta").write_bytes(python3_pickle({"label_names": ["a"]}))
    fails(tmp_path, r"batches\.meta: expected 10 class names, found 1")
    folder = python_folder(tmp_path / "b", "CIFAR10")
    (folder / "test_batch").write_bytes(python3_pickle({"data": batch(10, 0)[0], "labels": [10] * 20}))
    fails(tmp_path / "b", r"test labels in \[0, 10\)")


class Runs:
    """Unpickled without a guard, it makes a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_does_not_run(tmp_path: Path, protocol: int) -> None:
    victim = tmp_path / "victim"
    pickle.loads(pickle.dumps(Runs(tmp_path / "control"), protocol))
    assert (tmp_path / "control").is_dir(), "the attack works where nobody guards"
    folder = python_folder(tmp_path / "data", "CIFAR10")
    (folder / "data_batch_1").write_bytes(pickle.dumps({"data": Runs(victim)}, protocol))
    fails(tmp_path / "data", "data_batch_1: expected a pickle of CIFAR.*mkdir is not admitted")
    assert not victim.exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"ccodecs\nencode\n.",
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"cnumpy\nndarray\n((K\x03ttR.",  # ndarray is admitted as an argument, not to be called
        b"cnumpy\ndtype\n(S'O'\ntR.",
        b"\x80\x02\x82\x01.",  # an extension code
        b"P7\n.",  # a persistent id
    ],
)
def test_nothing_else_is_admitted(raw: bytes) -> None:
    with pytest.raises(InputError, match="expected a pickle of CIFAR"):
        unpickle(raw, Path("x"))


def test_object_arrays_are_refused() -> None:
    with pytest.raises(InputError, match="not admitted"):
        unpickle(python3_pickle({"data": np.array([{}, None])}), Path("x"))


def test_binary_labels_beyond_the_classes(tmp_path: Path) -> None:
    path = binary_folder(tmp_path, "CIFAR10") / "data_batch_1.bin"
    raw = bytearray(path.read_bytes())
    raw[0] = 10
    path.write_bytes(raw)
    fails(tmp_path, r"training labels in \[0, 10\)")
