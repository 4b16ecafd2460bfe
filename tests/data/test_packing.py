"""Test the packed file: exact content, made once, made again only when it must be, never half-written."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtt_fast.data import from_tensors
from mtt_fast.data.image_data import channel_statistics
from mtt_fast.data.packing import Contents, Part, Source, key_of, packed
from mtt_fast.errors import InputError
from mtt_fast.storage.tensor_files import load_tensors, read_header, save_tensors


def images(n: int, shape: tuple[int, int, int] = (3, 4, 5), seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def labels(n: int, classes: int = 2) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(n, dtype=np.int64) % classes


def contents(n: int = 7, test: int = 3, shape: tuple[int, int, int] = (3, 4, 5), seed: int = 0) -> Contents:
    train, other = images(n, shape, seed), images(test, shape, seed + 1)
    return Contents(
        ("cat", "dög"), shape, Part(labels(n), [train[:2], train[2:]]), Part(labels(test), iter([other[:1], other[1:]]))
    )


def source(read: Callable[[], Contents] = contents, key: str = "k") -> Source:
    return Source("pets", "pets", key, read)


def never() -> Contents:
    raise AssertionError("read again")


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 8, 8), (1, 1, 1)], ids=str)
def test_content_is_exact_and_facts_are_kept(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    data = packed(source(lambda: contents(shape=shape)), tmp_path, progress=False)
    assert (data.name, data.class_names, data.num_classes, data.image_shape) == ("pets", ("cat", "dög"), 2, shape)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert np.array_equal(data.train.images.numpy(), images(7, shape))
    assert np.array_equal(data.test.images.numpy(), images(3, shape, 1))
    assert data.train.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert data.test.labels.tolist() == [0, 1, 0]
    assert data.path == tmp_path / "pets.safetensors"
    scaled = torch.from_numpy(images(7, shape)).double() / 255
    torch.testing.assert_close(torch.tensor(data.mean).double(), scaled.mean((0, 2, 3)).float().double())
    torch.testing.assert_close(torch.tensor(data.std).double(), scaled.std((0, 2, 3), correction=0).float().double())


def test_given_statistics_are_used(tmp_path: Path) -> None:
    data = packed(replace(source(), mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)), tmp_path, progress=False)
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))


def test_other_readers_of_safetensors_accept_the_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    data = packed(source(), tmp_path, progress=False)
    assert data.path
    assert torch.equal(load_file(data.path)["test.images"], data.test.images)
    entries, metadata = read_header(data.path)
    assert max(entry.end for entry in entries.values()) == data.path.stat().st_size
    assert all(entry.begin % 8 == 0 for name, entry in entries.items() if name.endswith("labels"))
    assert metadata["fingerprint"] == data.fingerprint


def test_second_load_maps_and_reads_nothing(tmp_path: Path) -> None:
    first = packed(source(), tmp_path, progress=False)
    (tmp_path / ".pets.safetensors.0a_1b2c3.partial").mkdir()  # of a job that was killed while it packed
    again = packed(source(never), tmp_path, progress=False)
    assert again.fingerprint == first.fingerprint
    assert torch.equal(again.train.images, first.train.images)
    assert leftovers(tmp_path) == ["pets.safetensors"]


def test_images_are_memory_mapped(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc/self/maps to see what is mapped")
    data = packed(source(), tmp_path, progress=False)
    address = data.train.images.data_ptr()
    for line in maps.read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            assert line.endswith(str(data.path))
            return
    raise AssertionError("the images lie nowhere")


def test_changed_key_packs_again_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = packed(source(), tmp_path, progress=False)
    with caplog.at_level(logging.WARNING):
        new = packed(source(lambda: contents(seed=5), "other"), tmp_path, progress=False)
    assert "have changed" in caplog.text
    assert new.fingerprint != old.fingerprint
    assert np.array_equal(new.train.images.numpy(), images(7, seed=5))
    assert np.array_equal(old.train.images.numpy(), images(7)), "whoever has the old file mapped keeps it"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def foreign(path: Path) -> None:
    save_tensors(path, {"x": torch.zeros(3)})


@pytest.mark.parametrize("damage", [truncate, empty, foreign])
def test_damaged_file_is_packed_again_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    first = packed(source(), tmp_path, progress=False)
    assert first.path
    damage(first.path)
    with caplog.at_level(logging.WARNING):
        again = packed(source(), tmp_path, progress=False)
    (line,) = caplog.messages
    assert line.startswith(f"{first.path}: ")
    assert "packing its source again" in line
    assert "InputError" not in line
    assert np.array_equal(again.train.images.numpy(), images(7))
    assert leftovers(tmp_path) == ["pets.safetensors"]


@pytest.mark.parametrize(
    ("tensors", "fields"),
    [
        ({"train.images": torch.from_numpy(images(7)).float()}, {}),
        ({"train.images": torch.from_numpy(images(7))[:, :, :2]}, {}),
        ({"train.labels": torch.from_numpy(labels(6))}, {}),
        ({"test.labels": torch.tensor([0, 1, 2])}, {}),
        ({"train.labels": torch.from_numpy(labels(7)) - 1}, {}),
        ({"train.labels": torch.from_numpy(labels(7)).double()}, {}),
        ({}, {"class_names": '["cat", "cat"]'}),
        ({}, {"mean": "[0.5, 0.5]"}),
        ({}, {"std": "[0.5, 0.5, NaN]"}),
        ({}, {"std": "0.5"}),
    ],
    ids=[
        "floating",
        "other images",
        "fewer labels",
        "a class more",
        "negative",
        "floating labels",
        "names",
        "mean",
        "NaN",
        "a number",
    ],
)
def test_a_file_of_other_content_is_packed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tensors: dict[str, Tensor], fields: dict[str, str]
) -> None:
    """Check what the checksums cannot find: parts that do not fit each other, or the arithmetic."""
    first = packed(source(), tmp_path, progress=False)
    assert first.path
    content, metadata = load_tensors(first.path)
    save_tensors(first.path, content | tensors, metadata | fields)
    with caplog.at_level(logging.WARNING):
        again = packed(source(), tmp_path, progress=False)
    assert "packing its source again" in caplog.text
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.train.images.numpy(), images(7))


def test_reader_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    def blocks() -> Iterator[Any]:
        yield images(2)
        raise InputError("image 3 is broken")

    bad = replace(contents(), train=Part(labels(7), blocks()))
    with pytest.raises(InputError, match="image 3 is broken"):
        packed(source(lambda: bad), tmp_path, progress=False)
    assert leftovers(tmp_path) == []


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = Contents(
        ("a", "b"), (3, 64, 64), Part(labels(64), [images(64, (3, 64, 64))]), Part(labels(2), [images(2, (3, 64, 64))])
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))  # stands in for a disk with 256 KiB left
    try:
        with pytest.raises(InputError, match="cannot be written") as raised:
            packed(source(lambda: big), tmp_path, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(raised.value)
    assert leftovers(tmp_path) == []


def test_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "packed").touch()
    with pytest.raises(InputError, match="packed"):
        packed(source(), tmp_path / "packed", progress=False)


@pytest.mark.parametrize("fails", [False, True], ids=["", "the first one fails"])
def test_of_two_processes_one_packs_and_the_other_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fails: bool
) -> None:
    """Take threads for processes: a lock keeps out both."""
    caplog.set_level("INFO")
    begun, waits = threading.Event(), threading.Event()
    results: list[Tensor] = []

    def read() -> Contents:
        begun.set()
        assert waits.wait(20)
        if fails:
            raise InputError("broken")
        return contents()

    def first() -> None:
        with contextlib.suppress(InputError):
            packed(source(read), tmp_path / "new", progress=False)

    def second() -> None:
        results.append(packed(source(contents if fails else never), tmp_path / "new", progress=False).train.images)

    workers = [threading.Thread(target=work) for work in (first, second)]
    workers[0].start()
    assert begun.wait(20)
    workers[1].start()
    while "waiting for another process, which packs it" not in caplog.text:
        time.sleep(0.01)
    waits.set()
    for worker in workers:
        worker.join()
    assert np.array_equal(results[0].numpy(), images(7))
    assert leftovers(tmp_path / "new") == ["pets.safetensors"]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("train", Part(labels(0), []), "expected training images, found none"),
        ("test", Part(labels(0), []), "expected test images, found none"),
        ("train", Part(labels(4, 3), [images(4)]), r"training labels in \[0, 2\), found 0 to 2"),
        ("test", Part(labels(4) - 1, [images(4)]), r"test labels in \[0, 2\), found -1 to 0"),
        ("train", Part(labels(4, 1), [images(4)]), "every class, found none of 'dög'"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, part: str, change: Part, message: str) -> None:
    with pytest.raises(InputError, match=message):
        packed(source(lambda: replace(contents(), **{part: change})), tmp_path, progress=False)  # type: ignore[arg-type]
    assert leftovers(tmp_path) == []


def test_key_sees_name_size_time_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"12")
    os.utime(file, ns=(0, 10))
    key = key_of(tmp_path, [file], 1)
    assert key == key_of(tmp_path, [file], 1)
    for name in ("one", "two"):  # in other folders
        (tmp_path / name).mkdir()
        copy = tmp_path / name / "a"
        copy.write_bytes(b"12")
        os.utime(copy, ns=(0, 10))
        assert key == key_of(tmp_path / name, [copy], 1)
    assert key != key_of(tmp_path, [file], 2)
    os.utime(file, ns=(0, 11))
    assert key != key_of(tmp_path, [file], 1)
    file.write_bytes(b"123")
    os.utime(file, ns=(0, 10))
    assert key != key_of(tmp_path, [file], 1)
    moved = file.rename(tmp_path / "b")
    moved.write_bytes(b"12")
    os.utime(moved, ns=(0, 10))
    assert key != key_of(tmp_path, [moved], 1)
    odd = tmp_path / os.fsdecode(b"\xff")  # a name that is not UTF-8
    moved.rename(odd)
    assert key_of(tmp_path, [odd], 1) not in (key, key_of(tmp_path, [odd], 2))
    with pytest.raises(InputError, match="cannot be read"):
        key_of(tmp_path, [file], 1)


def tensors(n: int = 6, classes: int = 2, shape: tuple[int, int, int] = (3, 4, 5)) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(images(n, shape)), torch.from_numpy(labels(n, classes))


def test_from_tensors_has_the_fingerprint_of_the_same_packed_data(tmp_path: Path) -> None:
    on_disk = packed(source(), tmp_path, progress=False)
    data = from_tensors(
        (torch.from_numpy(images(7)), torch.from_numpy(labels(7))),
        (torch.from_numpy(images(3, seed=1)), torch.from_numpy(labels(3)).int()),
        class_names=["cat", "dög"],
    )
    assert (data.fingerprint, data.mean, data.std, data.path) == (on_disk.fingerprint, on_disk.mean, on_disk.std, None)


def test_fingerprint_sees_every_part() -> None:
    base = from_tensors(tensors(), tensors(4))
    pixels, classes = tensors()
    other = pixels.clone()
    other[-1, -1, -1, -1] ^= 1
    swapped = classes.flip(0)
    prints = {
        base.fingerprint,
        from_tensors((other, classes), tensors(4), mean=base.mean, std=base.std).fingerprint,
        from_tensors((pixels, swapped), tensors(4)).fingerprint,
        from_tensors(tensors(), (tensors(4)[0].flip(0), tensors(4)[1])).fingerprint,
        from_tensors(tensors(), tensors(4), class_names=["a", "b"]).fingerprint,
        from_tensors(tensors(), tensors(4), mean=(0, 0, 0)).fingerprint,
    }
    assert len(prints) == 6
    assert base.fingerprint == from_tensors(tensors(), tensors(4), name="renamed").fingerprint


def test_from_tensors_names_classes_by_number() -> None:
    assert from_tensors(tensors(6, 3), tensors(2)).class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("train", "test", "info", "message"),
    [
        ((tensors()[0].float(), tensors()[1]), tensors(), {}, "train images: expected uint8"),
        ((tensors()[0][0], tensors()[1]), tensors(), {}, "train images: expected uint8"),
        (tensors(shape=(5, 5, 3)), tensors(shape=(5, 5, 3)), {}, r"channels last; use images\.permute\(0, 3, 1, 2\)"),
        (tensors(shape=(5, 5, 1)), tensors(shape=(5, 5, 1)), {}, "channels last"),
        (tensors(), (tensors()[0], tensors()[1][:-1]), {}, "test labels: expected 6 integers"),
        (tensors(), (tensors()[0], tensors()[1].float()), {}, "test labels: expected 6 integers"),
        (
            (tensors()[0], tensors()[1] - 1),
            tensors(),
            {},
            "train labels: expected class indices of at least 0, found -1",
        ),
        (tensors(), (tensors()[0], -tensors()[1]), {}, "test labels: expected class indices of at least 0, found -1"),
        (tensors()[0], tensors(), {}, r"train: expected images and labels, .*, found Tensor uint8 \(6, 3, 4, 5\)"),
        (tensors(), (*tensors(), None), {}, "test: expected images and labels, .*, found a tuple of 3"),
        (tensors(), tensors(shape=(3, 5, 5)), {}, "test images: expected shape"),
        (tensors(classes=3), tensors(), {"class_names": ("a", "b")}, "training labels"),
        (tensors(), tensors(classes=3), {}, "test labels"),
        (tensors(), tensors(), {"mean": (0.5,)}, "mean: expected a finite number of each of 3 channels"),
        (tensors(), tensors(), {"mean": 0.5}, "mean: expected a number of each channel, found 0.5"),
        (tensors(), tensors(), {"std": ("a", "b", "c")}, "std: expected a number of each channel, found a tuple of 3"),
        (tensors(), tensors(), {"std": (1.0, 0.0, 1.0)}, "std: expected a finite number above 0 of each of 3"),
    ],
)
def test_from_tensors_refuses_wrong_tensors(train: Any, test: Any, info: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        from_tensors(train, test, **info)
    assert "\n" not in str(raised.value)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), channels=st.integers(1, 3), seed=st.integers(0, 99))
def test_statistics_equal_the_plain_formula(n: int, channels: int, seed: int) -> None:
    pixels = torch.from_numpy(images(n, (channels, 3, 5), seed))
    mean, std = channel_statistics(pixels)
    scaled = pixels.double() / 255
    torch.testing.assert_close(torch.tensor(mean, dtype=torch.float64), scaled.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(std, dtype=torch.float64), scaled.std((0, 2, 3), correction=0))


def test_constant_channel_is_not_divided_by_zero() -> None:
    assert channel_statistics(torch.full((2, 1, 2, 2), 51, dtype=torch.uint8)) == ((0.2,), (1.0,))
