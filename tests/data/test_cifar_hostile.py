"""Test that CIFAR's pickles and archives that hold anything else are refused, unread, without harm."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtt_fast.data import load
from mtt_fast.data.safe_pickle import unpickle
from mtt_fast.errors import InputError
from tests.data.cifar_files import (
    archived,
    batch,
    binary_folder,
    check,
    check_refused,
    python2_pickle,
    python3_pickle,
    python_folder,
)


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
    check_refused(tmp_path / "data", "data_batch_1: expected a pickle of CIFAR.*mkdir is not admitted")
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
def test_archives_of_other_things_are_refused(
    tmp_path: Path, members: list[tuple[str, bytes | str | None]], message: str
) -> None:
    honest = [(name, content) for name, content in members_of(tmp_path / "made") if name != PLACE]
    tar_of([*members, *honest], tmp_path / "cifar-10-python.tar.gz")
    tracemalloc.start()
    try:
        check_refused(tmp_path, rf"cifar-10-python\.tar\.gz: .*{message}")
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
        check_refused(tmp_path, r"cifar-10-python\.tar\.gz: expected a whole \.tar\.gz, found a broken one")
    archive.write_bytes(whole)
    check(load("CIFAR10", data_path=tmp_path, progress=False), "CIFAR10")


@pytest.mark.parametrize("kind", ["fifo", "device", "dangling", "archive fifo", "archive folder"])
def test_what_is_no_file_is_named_unread(tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    if kind == "archive folder":
        archive.mkdir()
        check_refused(tmp_path, "found none; give `download`")
        return
    if kind == "archive fifo":
        os.mkfifo(archive)
        check_refused(tmp_path, r"cifar-10-python\.tar\.gz: expected a file, found a FIFO")
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
        check_refused(tmp_path / name, f"{name}: (expected a file, found a|cannot be read)")


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
        check_refused(tmp_path, "data_batch_1: expected (a pickle of CIFAR|a pickled dict|'data' of bytes)")
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
def test_values_that_are_no_labels_are_refused(tmp_path: Path, label: Any, message: str) -> None:
    pixels, labels = batch(10, 0)
    (python_folder(tmp_path, "CIFAR10") / "data_batch_1").write_bytes(
        python3_pickle({"data": pixels, "labels": [*labels[:-1], label]})
    )
    check_refused(tmp_path, message)


def test_keys_of_bytes_are_named(tmp_path: Path) -> None:
    pixels, labels = batch(10, 0)
    (python_folder(tmp_path, "CIFAR10") / "data_batch_1").write_bytes(
        python3_pickle({b"data": pixels, b"labels": labels, "two\nlines": 1})
    )
    check_refused(tmp_path, r"data_batch_1: expected 'data' of bytes .*, found b'data', b'labels', 'two\\nlines'")


def test_batches_longer_than_cifars_are_refused_unread(tmp_path: Path) -> None:
    for folder, name in ((python_folder(tmp_path / "a", "CIFAR10"), "data_batch_2"),
                         (binary_folder(tmp_path / "b", "CIFAR100"), "train.bin")):  # fmt: skip
        with open(folder / name, "ab") as file:
            file.truncate(1 << 40)
        check_refused(
            folder.parent, rf"{name}: expected at most [\d,]+ bytes", "CIFAR10" if name[0] == "d" else "CIFAR100"
        )


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"a\0b", b"airplane\n" * 9 + b"x" * 20_000, b"x" * 70_000], ids=range(4))
def test_class_names_that_are_no_text_are_refused(tmp_path: Path, raw: bytes) -> None:
    (binary_folder(tmp_path, "CIFAR10") / "batches.meta.txt").write_bytes(raw)
    check_refused(tmp_path, r"batches\.meta\.txt: expected (text|at most)")


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
