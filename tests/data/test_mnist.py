"""Test MNIST and FashionMNIST: idx files, plain or gzipped, where torchvision puts them and elsewhere."""

from __future__ import annotations

import gzip
import os
import socket
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtt_fast.data import load
from mtt_fast.data.mnist import FILES
from mtt_fast.errors import InputError
from tests.data.mnist_files import arrays, check, files, idx


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("below", [".", "{name}", "{name}/raw"])
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_the_content_is_the_same_from_every_place(tmp_path: Path, name: str, below: str, zipped: bool) -> None:
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


def check_refused(root: Path, message: str, **options: Any) -> None:
    with pytest.raises(InputError, match=message) as raised:
        load("MNIST", data_path=root, progress=False, **options)
    assert "\n" not in str(raised.value)
    assert not list(root.glob("packed/*"))


def test_missing_says_where_and_offers_the_download(tmp_path: Path) -> None:
    check_refused(tmp_path, r"train-images-idx3-ubyte.*MNIST/raw.*`download`")
    (files(tmp_path) / FILES[3]).unlink()
    check_refused(tmp_path, "none of these places complete")


def test_another_resolution_is_refused(tmp_path: Path) -> None:
    check_refused(files(tmp_path), "`res`: expected 28 or nothing", res=32)


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
def test_wrong_files_are_named(tmp_path: Path, file: int, content: bytes, message: str) -> None:
    (files(tmp_path) / FILES[file]).write_bytes(content)
    check_refused(tmp_path, message)


def test_images_of_another_data_set_in_files_of_the_same_names_are_refused(tmp_path: Path) -> None:
    files(tmp_path)
    for name, level, other in (("MNIST", 73, "FashionMNIST"), ("FashionMNIST", 33, "MNIST")):  # the published means
        (tmp_path / FILES[0]).write_bytes(idx(np.full((20, 28, 28), level, np.uint8)))
        with pytest.raises(InputError, match=f"{FILES[0]}: expected images of {name}, found those of {other}"):
            load(name, data_path=tmp_path, progress=False)
        assert load(other, data_path=tmp_path, progress=False).name == other


def test_truncated_gzip_is_named(tmp_path: Path) -> None:
    path = files(tmp_path, zipped=True) / f"{FILES[0]}.gz"
    raw = path.read_bytes()
    for content in (raw[:-200], raw[:5], b"<html>"):
        path.write_bytes(content)
        check_refused(tmp_path, r"train-images-idx3-ubyte\.gz: expected a whole")


def check_refused_with(root: Path, file: int, content: bytes, message: str, zipped: bool = False) -> None:
    """Check that the file is refused in at most a few times its honest size of memory."""
    folder = files(root, zipped)
    (folder / (FILES[file] + ".gz" * zipped)).write_bytes(content)
    tracemalloc.start()
    try:
        check_refused(root, message)
        assert tracemalloc.get_traced_memory()[1] < 150 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (0, struct.pack(">IIII", 0x803, 2**32 - 1, 28, 28), r"images-idx3-ubyte: expected 3367\d+ bytes for its"),
        (0, struct.pack(">IIII", 0x803, 1, 2**32 - 1, 2**32 - 1), r"images-idx3-ubyte: expected images of \(28, 28\)"),
        (1, struct.pack(">II", 0x801, 2**32 - 1), "labels-idx1-ubyte: expected 4294967303 bytes"),
        (0, struct.pack(">IIII", 0x803, 0, 28, 28), "expected 0 labels|expected training images, found none"),
        (1, idx(np.full(20, 255, np.uint8)), r"labels-idx1-ubyte: expected labels in \[0, 10\), found 255 to 255"),
        (3, idx(arrays(10, 1)[1] + 1), r"t10k-labels-idx1-ubyte: expected labels in \[0, 10\)"),
        (3, bytes(20_000), "t10k-labels-idx1-ubyte: expected at most 10,008 bytes, found 20,000"),
        (1, bytes(60_009), "train-labels-idx1-ubyte: expected at most 60,008 bytes, found 60,009"),
    ],
)
def test_headers_that_promise_too_much_are_refused(tmp_path: Path, file: int, content: bytes, message: str) -> None:
    check_refused_with(tmp_path / "plain", file, content, message)
    zipped = message.replace("ubyte:", r"ubyte\.gz:").partition(" bytes, found")[0]
    check_refused_with(tmp_path / "gz", file, gzip.compress(content), zipped, zipped=True)


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    bomb = gzip.compress(idx(np.zeros((60_000, 28, 28), np.uint8))) + 64 * gzip.compress(bytes(16 << 20))
    check_refused_with(
        tmp_path, 0, bomb, r"images-idx3-ubyte\.gz: expected at most 47,040,016 bytes in it, found more", zipped=True
    )


@pytest.mark.parametrize("file", range(4))
def test_the_checksum_at_the_end_counts(tmp_path: Path, file: int) -> None:
    path = files(tmp_path, zipped=True) / f"{FILES[file]}.gz"
    whole = path.read_bytes()
    for place in (-8, -5, -1):  # of the checksum and the length
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        check_refused(tmp_path, rf"{FILES[file]}\.gz: expected a whole \(gzip\) file, found a broken one")


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "dangling", "loop", "socket"])
def test_what_is_no_file_is_named_unread(tmp_path: Path, kind: str) -> None:
    path = files(tmp_path) / FILES[1]
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
            check_refused(tmp_path, "none of these places complete")
            return
        case "device":
            path.symlink_to("/dev/zero")
        case "dangling":
            path.symlink_to("gone")
        case "loop":
            path.symlink_to(path.name)
        case "socket":
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(os.path.relpath(path))
    check_refused(tmp_path, f"{FILES[1]}: (expected a file, found|cannot be read)")


def test_a_pipe_in_place_of_a_gzip_file_is_not_waited_for(tmp_path: Path) -> None:
    path = files(tmp_path, zipped=True) / f"{FILES[1]}.gz"
    path.unlink()
    os.mkfifo(path)
    check_refused(tmp_path, rf"{FILES[1]}\.gz: expected a file, found")
