"""Test image folders with links, and with files and folders that are no images."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from tests.data.folders import check_refused, folder_of_six_images, load_folder, noise, write

LINKS = {
    "to its own folder": ("train/a/loop", "."),
    "to the split": ("train/a/loop", ".."),
    "to the root": ("train/a/deep/loop", "../../.."),
    "to itself, with a suffix that is none": ("train/a/loop.txt", "loop.txt"),
    "a class folder that is the split": ("train/loop", "."),
    "a class folder that is the root": ("train/loop", ".."),
    "an image again": ("train/a/again.png", "1.png"),
    "a link that is called in the middle": ("train/a/0.png", "2.png"),
    "a folder again": ("train/a/again", "../a/deep"),
}


@pytest.mark.parametrize("link", LINKS)
def test_links_add_no_images(tmp_path: Path, link: str, caplog: pytest.LogCaptureFixture) -> None:
    root = folder_of_six_images(tmp_path / "x")
    write(root / "train/a/deep/3.png", noise(9))
    before = load_folder(root, tmp_path)
    place, target = LINKS[link]
    (root / place).symlink_to(target)
    with caplog.at_level(logging.INFO):
        after = load_folder(root, tmp_path)
    assert after.fingerprint == before.fingerprint
    assert "skipped besides the images: 1 " in caplog.text


def test_hard_links_and_two_ways_count_once(tmp_path: Path) -> None:
    root = folder_of_six_images(tmp_path / "x")
    before = load_folder(root, tmp_path)
    os.link(root / "train/a/1.png", root / "train/a/zz.png")
    (root / "train/a/x").symlink_to("y")
    (root / "train/a/y").mkdir()
    (root / "train/a/y/x").symlink_to("..")
    assert load_folder(root, tmp_path).fingerprint == before.fingerprint


@pytest.mark.parametrize(
    ("link", "target"),
    [("train/b/3.png", "../a/1.png"), ("train/b/all", "../a"), ("train/c", "a"), ("train/b/3.png", "")],
)
def test_an_image_under_two_labels_is_refused(tmp_path: Path, link: str, target: str) -> None:
    root = folder_of_six_images(tmp_path)
    if target:
        (root / link).symlink_to(target)
    else:
        os.link(root / "train/a/1.png", root / link)
    check_refused(root, r"\.png: expected each image under one label, found it under 'a' too \(.*\.png\)")


def test_root_splits_and_classes_may_lie_elsewhere(tmp_path: Path) -> None:
    """Put links to other disks into a tree, as people do with ImageNet: of the root, a split, or a class."""
    real = folder_of_six_images(tmp_path / "real")
    expected = load_folder(real, tmp_path)
    (real / "train/a").rename(tmp_path / "a")
    (real / "train/a").symlink_to(tmp_path / "a")
    (real / "test").rename(tmp_path / "elsewhere")
    (real / "test").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a/3.png").symlink_to("1.png")
    (tmp_path / "linked").symlink_to(real)
    data = load_folder(tmp_path / "linked", tmp_path)
    assert torch.equal(data.train.images, expected.train.images)
    assert torch.equal(data.test.images, expected.test.images)


def test_images_may_be_links_within_the_data_set(tmp_path: Path) -> None:
    root = folder_of_six_images(tmp_path / "x")
    expected = load_folder(root, tmp_path)
    (root / "pool").mkdir()
    (root / "train/a/1.png").rename(root / "pool/p.png")
    (root / "train/a/1.png").symlink_to("../../pool/p.png")
    assert torch.equal(load_folder(root, tmp_path).train.images, expected.train.images)


@pytest.mark.parametrize("target", ["outside.png", "outside", "/dev/zero", "/dev", "/"])
def test_links_that_leave_the_data_set_are_refused(tmp_path: Path, target: str) -> None:
    write(tmp_path / "outside.png", noise(1))
    write(tmp_path / "outside" / "x.png", noise(1))
    root = folder_of_six_images(tmp_path / "data")
    where = target if target.startswith("/") else tmp_path / target
    (root / "train/a/3.png").symlink_to(where)
    if target == "/":
        assert len(load_folder(root, tmp_path).train.labels) == 4, "a folder around the data set is a loop"
        return
    check_refused(root, r"a/3\.png: expected links to files of the data set itself, found one to /")


@pytest.mark.parametrize("place", ["train/a/x.png", "train/c"])
def test_links_to_nothing_or_themselves_are_named(tmp_path: Path, place: str) -> None:
    for target in ("gone", Path(place).name):
        root = folder_of_six_images(tmp_path / target)
        (root / place).symlink_to(target)
        check_refused(root, rf"{place}: cannot be read")


def test_what_is_no_file_is_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(folder_of_six_images(tmp_path) / "train/a/x.png")
    check_refused(tmp_path, r"train/a/x\.png: expected an image, found no regular file")


def test_a_folder_may_end_as_an_image(tmp_path: Path) -> None:
    write(folder_of_six_images(tmp_path / "x") / "train/a/odd.png/5.png", noise(8))
    assert len(load_folder(tmp_path / "x", tmp_path).train.labels) == 5


def test_hidden_folders_and_other_files_are_told_and_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = folder_of_six_images(tmp_path / "pets")
    expected = load_folder(root, tmp_path).fingerprint
    for place in ("train/a", "train", "test"):
        write(root / place / ".ipynb_checkpoints/1-checkpoint.png", noise(1))
    write(root / "train/loose.png", noise(1))
    for name in ("train/a/._1.png", "train/a/notes.txt", "test/b/more.txt", "train/b/clip.mp4", "test/README"):
        (root / name).touch()
    with caplog.at_level(logging.INFO):
        assert load_folder(root, tmp_path).fingerprint == expected
    (line,) = [record.getMessage() for record in caplog.records if "skipped besides" in record.getMessage()]
    for told in ("2 .txt", "1 .mp4", "4 hidden", "1 without a suffix", "1 outside the class folders"):
        assert told in line
