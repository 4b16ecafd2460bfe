"""Test CIFAR-10 and CIFAR-100 from every form they come in; pickles that hold anything else are refused unread."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mtt_fast.data import ImageData, load
from mtt_fast.data.safe_pickle import unpickle
from mtt_fast.errors import InputError
from mtt_fast.storage import regular

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
    open_regular = regular.open_regular

    def recorded(path: Path, most: int | None = None, *mend: str) -> BinaryIO:
        reads.append(path)
        return open_regular(path, most, *mend)

    monkeypatch.setattr(regular, "open_regular", recorded)
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


def test_each_image_of_a_folder_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_image = Mock(side_effect=Image.open)
    monkeypatch.setattr(Image, "open", open_image)
    load("CIFAR10", data_path=jpeg_folder(tmp_path), progress=False)
    assert open_image.call_count == 30


def test_one_image_of_another_size_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (32, 31)).save(jpeg_folder(tmp_path) / "test" / "bird" / "0.jpg")
    fails(tmp_path, r"test/bird/0\.jpg: expected 32x32 pixels as in the other images, found 32x31; give `res`")


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
    fails(tmp_path, r"cifar-10-batches-py/.*cifar-10-batches-bin/.*cifar-10-python\.tar\.gz.*`download`")
    fails(tmp_path, r"cifar-100-python/.*cifar-100-binary\.tar\.gz.*`download`", "CIFAR100")


def test_a_missing_batch_is_named(tmp_path: Path) -> None:
    (python_folder(tmp_path, "CIFAR10") / "data_batch_4").unlink()
    fails(tmp_path, "data_batch_4: cannot be read")


def test_truncated_archive(tmp_path: Path) -> None:
    archive = archived(python_folder(tmp_path, "CIFAR10"))
    raw = archive.read_bytes()
    for content in (b"", raw[:9], raw[: len(raw) // 2], raw[:-2000], b"<html>not found</html>"):
        archive.write_bytes(content)
        fails(tmp_path, r"cifar-10-python\.tar\.gz: expected .*delete it and add `download`")


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
    """An object that makes a file when it is unpickled without a guard."""

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
    for number, name in enumerate(NAMES10):
        (root / "test" / name).rename(root / "test" / str(number))
    assert load("CIFAR10", data_path=root, progress=False).fingerprint == expected.fingerprint


@pytest.mark.parametrize("form", ["{}", "{:02d}", "class_{}"])
def test_cifar100_by_number(tmp_path: Path, form: str) -> None:
    for split in ("train", "test"):
        for label in range(100):
            path = tmp_path / split / form.format(label) / "0.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (32, 32), (label, 0, 0)).save(path)
    data = load("CIFAR100", data_path=tmp_path, progress=False)
    assert data.train.images[:, 0, 0, 0].tolist() == data.train.labels.tolist() == list(range(100))
    assert (data.class_names[9], data.class_names[10]) == ("bottle", "bowl")


@pytest.mark.parametrize("make", [python_folder, binary_folder])
def test_class_names_in_another_order_are_put_in_the_official_one(tmp_path: Path, make: Any) -> None:
    folder = make(tmp_path, "CIFAR10")
    if make is python_folder:
        (folder / "batches.meta").write_bytes(python2_pickle({"label_names": list(reversed(NAMES10))}))
    else:
        (folder / "batches.meta.txt").write_text("\n".join(reversed(NAMES10)))
    data = load("CIFAR10", data_path=tmp_path, progress=False)
    assert data.class_names == NAMES10
    assert data.test.labels.tolist() == [9 - label for label in batch(10, 5)[1]]


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
    fails(root, message)


def tar_of(members: list[tuple[str, bytes | str | None]], archive: Path) -> Path:
    """Write a .tar.gz of (name, content); a text is a link to it, None a device."""
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            match content:
                case bytes():
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                    continue
                case str():
                    member.type, member.linkname = tarfile.SYMTYPE, content
                case None:
                    member.type = tarfile.CHRTYPE
            tar.addfile(member)
    return archive


def members_of(root: Path) -> list[tuple[str, bytes | str | None]]:
    folder = python_folder(root, "CIFAR10")
    return [(f"{folder.name}/{path.name}", path.read_bytes()) for path in sorted(folder.iterdir())]


PLACE = "cifar-10-batches-py/data_batch_3"


@pytest.mark.parametrize(
    ("members", "message"),
    [  # of which some are much larger than a test's name should be
        ([(PLACE, "gone")], "data_batch_3 is no regular file in it"),
        ([(PLACE, "data_batch_3")], "data_batch_3 is no regular file in it"),
        ([(PLACE, "/etc/passwd")], "data_batch_3 is no regular file in it"),
        ([(PLACE, None)], "data_batch_3 is no regular file in it"),
        ([(f"/{PLACE}", b"x")], f"expected {PLACE} in it, found none"),
        ([(f"x/../{PLACE}", b"x")], f"expected {PLACE} in it, found none"),
        ([(PLACE, b"x"), (PLACE, b"y")], "data_batch_3 is in it twice"),
        ([(PLACE, bytes(33 << 20))], "data_batch_3 of 34,603,008 bytes, where at most"),
        ([(PLACE, b"x"), ("other", bytes(300 << 20))], "unpacks to more than the data set"),
        ([(f"{number}/x", b"") for number in range(1100)], "more than 1000 members"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_archives_of_other_things(tmp_path: Path, members: list[tuple[str, bytes | str | None]], message: str) -> None:
    honest = [(name, content) for name, content in members_of(tmp_path / "made") if name != PLACE]
    tar_of([*members, *honest], tmp_path / "cifar-10-python.tar.gz")
    tracemalloc.start()
    try:
        fails(tmp_path, rf"cifar-10-python\.tar\.gz: .*{message}")
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_a_link_beside_the_batches_does_no_harm(tmp_path: Path) -> None:
    members = [("cifar-10-batches-py/readme.html", "readme.html"), ("a", "gone"), *members_of(tmp_path / "made")]
    tar_of(members, tmp_path / "cifar-10-python.tar.gz")
    check(load("CIFAR10", data_path=tmp_path, progress=False), "CIFAR10")


def test_archives_are_read_to_their_checksum(tmp_path: Path) -> None:
    archive = archived(python_folder(tmp_path, "CIFAR10"))
    whole = archive.read_bytes()
    for place in (-8, -5, -1, -4):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        archive.write_bytes(damaged)
        fails(tmp_path, r"cifar-10-python\.tar\.gz: expected a whole \.tar\.gz, found a broken one")
    archive.write_bytes(whole)
    check(load("CIFAR10", data_path=tmp_path, progress=False), "CIFAR10")


@pytest.mark.parametrize("kind", ["fifo", "device", "dangling", "archive fifo", "archive folder"])
def test_what_is_no_file_is_named_unread(tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    if kind == "archive folder":
        archive.mkdir()
        fails(tmp_path, "found none; add `download`")
        return
    if kind == "archive fifo":
        os.mkfifo(archive)
        fails(tmp_path, r"cifar-10-python\.tar\.gz: expected a file, found a FIFO")
        return
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        path = python_folder(tmp_path / name, "CIFAR10") / name
        path.unlink()
        match kind:
            case "fifo":
                os.mkfifo(path)
            case "device":
                path.symlink_to("/dev/zero")
            case "dangling":
                path.symlink_to("gone")
        fails(tmp_path / name, f"{name}: (expected a file, found a|cannot be read)")


HOSTILE = {
    "a memo with gaps": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a memo with gaps, in text": b"}p2000000000\n.",
    "deep tuples as a key": b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",
    "deep lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "doubling": b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(60)) + b".",
    "a number without an end": b"}U\x06labelsI" + b"9" * 100_000 + b"\ns.",
    "a long number": b"}U\x06labels]\x8b\x00\x00\x01\x00" + b"\x7f" * 65_536 + b"as.",
    "copies": b"\x80\x02}U\x04data" + b"2" * 1_000_000 + b"s.",
    "an empty file": b"",
    "a length beyond the file": b"\x80\x02}T\xff\xff\xff\x7fabc",
    "a negative length": b"\x80\x02}T\xff\xff\xff\xffabc",
    "a frame beyond the file": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
    "another state of an array": python3_pickle({"data": np.zeros(3, np.uint8)}).replace(b"K\x01K\x03\x85", b"K\x01J\xff\xff\xff\x7f\x85"),
}  # fmt: skip


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_pickles_take_no_more_than_their_size(raw: bytes, tmp_path: Path) -> None:
    (python_folder(tmp_path, "CIFAR10") / "data_batch_1").write_bytes(raw)
    tracemalloc.start()
    try:
        fails(tmp_path, "data_batch_1: expected (a pickle of CIFAR|a pickled dict|'data' of bytes)")
        assert tracemalloc.get_traced_memory()[1] < 80 << 20
    finally:
        tracemalloc.stop()


def test_pickles_take_no_more_time_than_cifars() -> None:
    with pytest.raises(InputError, match="more objects than the images of CIFAR need"):
        unpickle(b"\x80\x02}(" + b"U\x04dataN" * 500_001 + b"u.", Path("x"))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (10**30, r"data_batch_1: expected training labels in \[0, 10\), found a number of 100 bits"),
        (10**5000, r"expected training labels in \[0, 10\), found a number of 16610 bits"),
        (-1, r"expected training labels in \[0, 10\), found -1"),
        (10, r"expected training labels in \[0, 10\), found 10"),
        (True, "expected 'data' of bytes"),
        (1.0, "expected 'data' of bytes"),
        (None, "expected 'data' of bytes"),
    ],
    ids=["30 digits", "5000 digits", "negative", "ten", "bool", "float", "none"],
)
def test_labels_that_are_none(tmp_path: Path, label: Any, message: str) -> None:
    pixels, labels = batch(10, 0)
    (python_folder(tmp_path, "CIFAR10") / "data_batch_1").write_bytes(
        python3_pickle({"data": pixels, "labels": [*labels[:-1], label]})
    )
    fails(tmp_path, message)


def test_keys_of_bytes_are_named(tmp_path: Path) -> None:
    pixels, labels = batch(10, 0)
    (python_folder(tmp_path, "CIFAR10") / "data_batch_1").write_bytes(
        python3_pickle({b"data": pixels, b"labels": labels, "two\nlines": 1})
    )
    fails(tmp_path, r"data_batch_1: expected 'data' of bytes .*, found b'data', b'labels', 'two\\nlines'")


def test_batches_longer_than_cifars_are_refused_unread(tmp_path: Path) -> None:
    for folder, name in ((python_folder(tmp_path / "a", "CIFAR10"), "data_batch_2"),
                         (binary_folder(tmp_path / "b", "CIFAR100"), "train.bin")):  # fmt: skip
        with open(folder / name, "ab") as file:
            file.truncate(1 << 40)
        fails(folder.parent, rf"{name}: expected at most [\d,]+ bytes", "CIFAR10" if name[0] == "d" else "CIFAR100")


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"a\0b", b"airplane\n" * 9 + b"x" * 20_000, b"x" * 70_000], ids=range(4))
def test_class_names_that_are_no_text(tmp_path: Path, raw: bytes) -> None:
    (binary_folder(tmp_path, "CIFAR10") / "batches.meta.txt").write_bytes(raw)
    fails(tmp_path, r"batches\.meta\.txt: expected (text|at most)")


@settings(max_examples=200)
@given(st.data())
def test_no_damage_to_a_pickle_raises_anything_else(data: Any) -> None:
    dump = data.draw(st.sampled_from([python2_pickle, python3_pickle]))
    raw = bytearray(dump({"labels": [1, 2], "data": np.zeros((2, 4), np.uint8), "filenames": ["a.png", "b.png"]}))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(raw[: data.draw(st.integers(1, len(raw)))])
    with contextlib.suppress(InputError):
        assert isinstance(unpickle(damaged, Path("x")), dict)
