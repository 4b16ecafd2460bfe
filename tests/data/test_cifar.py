"""Test CIFAR-10 and CIFAR-100 from every distribution; what is missing, cut or of another shape is named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from mtt_fast.data import load
from mtt_fast.data.cifar import in_official_order
from mtt_fast.storage import regular
from tests.data.cifar_files import (
    NAMES10,
    archived,
    batch,
    binary_folder,
    check,
    check_refused,
    pickle_by_columns,
    python2_pickle,
    python3_pickle,
    python_folder,
)

PICKLES = {"python2": python2_pickle, "python3": python3_pickle, "columns": pickle_by_columns}


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
@pytest.mark.parametrize("pack", [False, True], ids=["folder", "archive"])
@pytest.mark.parametrize("form", [*PICKLES, "binary"])
def test_every_distribution_is_read_alike(tmp_path: Path, name: str, pack: bool, form: str) -> None:
    folder = binary_folder(tmp_path, name) if form == "binary" else python_folder(tmp_path, name, PICKLES[form])
    if pack:
        archived(folder)
    check(load(name, data_path=tmp_path, progress=False), name)


@pytest.mark.parametrize("below", ["CIFAR10", "cifar10", "."])
def test_both_the_folder_and_the_one_above_are_found(tmp_path: Path, below: str) -> None:
    check(load("cifar10", data_path=python_folder(tmp_path / below, "CIFAR10").parent, progress=False), "CIFAR10")
    check(load("CIFAR10", data_path=tmp_path / below / "cifar-10-batches-py", progress=False), "CIFAR10")


def test_second_load_reads_no_batch_and_a_touched_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = python_folder(tmp_path, "CIFAR10")
    load("CIFAR10", data_path=tmp_path, progress=False)
    reads: list[Path] = []
    open_regular = regular.open_regular

    def recorded(path: Path, most: int | None = None, *fix: str) -> BinaryIO:
        reads.append(path)
        return open_regular(path, most, *fix)

    monkeypatch.setattr(regular, "open_regular", recorded)
    load("CIFAR10", data_path=tmp_path, progress=False)
    assert reads == []
    os.utime(folder / "data_batch_3", ns=(1, 1))
    load("CIFAR10", data_path=tmp_path, progress=False)
    assert len(reads) == 7


def test_missing_says_what_was_looked_for(tmp_path: Path) -> None:
    check_refused(tmp_path, r"cifar-10-batches-py/.*cifar-10-batches-bin/.*cifar-10-python\.tar\.gz.*`download`")
    check_refused(tmp_path, r"cifar-100-python/.*cifar-100-binary\.tar\.gz.*`download`", "CIFAR100")


def test_a_missing_batch_is_named(tmp_path: Path) -> None:
    (python_folder(tmp_path, "CIFAR10") / "data_batch_4").unlink()
    check_refused(tmp_path, "data_batch_4: cannot be read")


def test_a_truncated_archive_is_named(tmp_path: Path) -> None:
    archive = archived(python_folder(tmp_path, "CIFAR10"))
    raw = archive.read_bytes()
    for content in (b"", raw[:9], raw[: len(raw) // 2], raw[:-2000], b"<html>not found</html>"):
        archive.write_bytes(content)
        check_refused(tmp_path, r"cifar-10-python\.tar\.gz: expected .*delete it and add `download`")


def test_an_archive_without_a_member_is_named(tmp_path: Path) -> None:
    folder = python_folder(tmp_path, "CIFAR10")
    (folder / "test_batch").unlink()
    archived(folder)
    check_refused(tmp_path, "expected cifar-10-batches-py/test_batch in it")


def test_truncated_batches_are_named(tmp_path: Path) -> None:
    path = python_folder(tmp_path, "CIFAR10") / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-50])
    check_refused(tmp_path, "data_batch_2: expected a pickle of CIFAR")
    path = binary_folder(tmp_path / "b", "CIFAR10") / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-50])
    check_refused(tmp_path / "b", r"data_batch_2\.bin: expected a multiple of 3073 bytes")


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
def test_a_batch_of_another_shape_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    pixels, labels = batch(10, 0)
    (python_folder(tmp_path, "CIFAR10") / "data_batch_1").write_bytes(
        python3_pickle({"data": pixels, "labels": labels} | change)
    )
    check_refused(tmp_path, "data_batch_1: expected 'data' of bytes")


def test_a_pickle_of_no_dictionary_is_named(tmp_path: Path) -> None:
    (python_folder(tmp_path, "CIFAR10") / "batches.meta").write_bytes(python3_pickle([1]))
    check_refused(tmp_path, r"batches\.meta: expected a pickled dict, found list")


def test_wrong_class_names_and_labels_are_named(tmp_path: Path) -> None:
    folder = python_folder(tmp_path, "CIFAR10")
    (folder / "batches.meta").write_bytes(python3_pickle({"label_names": ["a"]}))
    check_refused(tmp_path, r"batches\.meta: expected 10 class names, found 1")
    folder = python_folder(tmp_path / "b", "CIFAR10")
    (folder / "test_batch").write_bytes(python3_pickle({"data": batch(10, 0)[0], "labels": [10] * 20}))
    check_refused(tmp_path / "b", r"test labels in \[0, 10\)")


def test_binary_labels_beyond_the_classes_are_named(tmp_path: Path) -> None:
    path = binary_folder(tmp_path, "CIFAR10") / "data_batch_1.bin"
    raw = bytearray(path.read_bytes())
    raw[0] = 10
    path.write_bytes(raw)
    check_refused(tmp_path, r"training labels in \[0, 10\)")


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


def test_a_rotated_order_of_class_names_is_put_right() -> None:
    names, official_of = in_official_order(("b", "c", "a"), ("a", "b", "c"))
    assert names == ("a", "b", "c")
    assert official_of.tolist() == [1, 2, 0]
