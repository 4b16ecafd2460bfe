"""Test image folders: exact pixels and order, one size or resized, and every mistake named."""

from __future__ import annotations

import io
import itertools
import logging
import os
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mtt_fast.data import ImageData, images, load
from mtt_fast.data.folder import image_source
from mtt_fast.data.images import decode, read_headers
from mtt_fast.data.packing import packed
from mtt_fast.errors import InputError

Array = np.ndarray[Any, np.dtype[np.uint8]]


def noise(seed: int, height: int = 6, width: int = 6, channels: int = 3) -> Array:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return pixels if channels > 1 else pixels[..., 0]


def write(path: Path, pixels: Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def folder(root: Path, test: str = "test", channels: int = 3, suffix: str = ".png") -> Path:
    """Make two classes of 3 + 2 training images and 1 + 1 test images; the pixels of each are `noise` of its number."""
    for number, place in enumerate(["train/b/2", "train/b/10", "train/a/x", "train/a/deep/er/y", "train/a/z"]):
        write(root / f"{place}{suffix}", noise(number, channels=channels))
    write(root / test / "a" / f"t{suffix}", noise(5, channels=channels))
    write(root / test / "b" / f"t{suffix}", noise(6, channels=channels))
    return root


def chw(pixels: Array) -> torch.Tensor:
    return torch.tensor(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".ppm", ".PNG"])
@pytest.mark.parametrize("test", ["test", "val", "valid"])
def test_pixels_labels_and_order(tmp_path: Path, suffix: str, test: str) -> None:
    data = load(str(folder(tmp_path / "pets", test, suffix=suffix)), data_path=tmp_path / "cache", progress=False)
    assert data.name == "folder-pets"
    assert data.class_names == ("a", "b")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.test.labels.tolist() == [0, 1]
    # sorted by path: a/deep/er/y, a/x, a/z, b/10, b/2
    assert torch.equal(data.train.images, torch.stack([chw(noise(number)) for number in (3, 2, 4, 1, 0)]))
    assert torch.equal(data.test.images, torch.stack([chw(noise(5)), chw(noise(6))]))
    assert data.path
    assert data.path.parent == tmp_path / "cache" / "packed"


def test_folder_means_the_data_path(tmp_path: Path) -> None:
    by_name = load("folder", data_path=folder(tmp_path / "pets"), progress=False)
    by_path = load(str(tmp_path / "pets"), data_path=tmp_path, progress=False)
    assert by_name.fingerprint == by_path.fingerprint
    assert by_name.class_names == ("a", "b"), "the packed/ folder is no class"


def test_test_images_follow_the_classes_of_training(tmp_path: Path) -> None:
    a, b = (str(write(tmp_path / f"{name}.png", noise(seed))) for seed, name in enumerate("ab"))
    source = image_source("x", tmp_path, {"a": [a], "b": [b]}, {"b": [b], "a": [a]}, resize=False)
    data = packed(source, tmp_path, progress=False)
    assert torch.equal(data.train.images, data.test.images)


def test_more_images_than_a_task_holds_keep_their_order(tmp_path: Path) -> None:
    for number in range(150):
        write(tmp_path / "train" / "a" / f"{number:03}.png", np.full((2, 2, 3), number, np.uint8))
    write(tmp_path / "test" / "a" / "0.png", noise(0, 2, 2))
    data = load("folder", data_path=tmp_path, progress=False)
    assert data.train.images[:, 0, 0, 0].tolist() == list(range(150))


@pytest.mark.parametrize(("side", "resize", "threads"), [(6, False, 1), (6, True, 8), (65, False, 8)])
def test_small_images_are_decoded_in_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, resize: bool, threads: int
) -> None:
    pools = Mock(side_effect=ThreadPoolExecutor)
    monkeypatch.setattr(images, "ThreadPoolExecutor", pools)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    path, pixels = str(write(tmp_path / "x.png", noise(0, side, side))), noise(0, side, side)
    (block,) = decode([path], (3, side, side), resize=resize)
    assert (pools.call_args.args, block[0].tolist()) == ((threads,), chw(pixels).tolist())


def test_jpeg_and_webp_are_read_as_pillow_reads_them(tmp_path: Path) -> None:
    folder(tmp_path, suffix=".jpg")
    photo = write(tmp_path / "train" / "a" / "w.webp", noise(9))
    data = load("folder", data_path=tmp_path, progress=False)
    with Image.open(tmp_path / "test" / "a" / "t.jpg") as picture:
        assert torch.equal(data.test.images[0], chw(np.asarray(picture.convert("RGB"))))
    with Image.open(photo) as picture:
        assert torch.equal(data.train.images[1], chw(np.asarray(picture.convert("RGB"))))


def test_all_grey_gives_one_channel_and_any_colour_three(tmp_path: Path) -> None:
    data = load("folder", data_path=folder(tmp_path / "grey", channels=1), progress=False)
    assert data.image_shape == (1, 6, 6)
    assert torch.equal(data.test.images[0], chw(noise(5, channels=1)))
    mixed = folder(tmp_path / "mixed", channels=1)
    write(mixed / "test" / "b" / "u.png", noise(7))
    data = load("folder", data_path=mixed, progress=False)
    assert data.image_shape == (3, 6, 6)
    assert torch.equal(data.test.images[0], chw(noise(5, channels=1)).expand(3, 6, 6))


def test_statistics_are_those_of_the_training_images(tmp_path: Path) -> None:
    data = load("folder", data_path=folder(tmp_path), progress=False)
    scaled = data.train.images.double() / 255
    assert data.mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert data.std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


@pytest.mark.parametrize(("height", "width"), [(12, 20), (20, 12), (9, 6), (3, 5), (6, 6), (7, 400)], ids=str)
def test_resize_covers_then_crops_the_centre(tmp_path: Path, height: int, width: int) -> None:
    pixels = noise(1, height, width)
    folder(tmp_path)
    write(tmp_path / "test" / "a" / "t.png", pixels)
    data = load("folder", data_path=tmp_path, res=6, progress=False)
    assert data.name.endswith("-6")
    high, wide = (6, 6 * width // height) if height <= width else (6 * height // width, 6)
    picture = Image.fromarray(pixels).resize((wide, high), Image.Resampling.BILINEAR)
    top, left = round((high - 6) / 2), round((wide - 6) / 2)
    expected = chw(np.asarray(picture)[top : top + 6, left : left + 6])
    assert torch.equal(data.test.images[0], expected)


def test_another_resolution_is_another_file(tmp_path: Path) -> None:
    folder(tmp_path)
    small, large = (load("folder", data_path=tmp_path, res=res, progress=False) for res in (4, 8))
    assert (small.image_shape, large.image_shape) == ((3, 4, 4), (3, 8, 8))
    assert small.path != large.path
    assert small.fingerprint != large.fingerprint


def test_two_folders_of_one_name_do_not_share_a_file(tmp_path: Path) -> None:
    paths = {
        load(str(folder(tmp_path / where / "pets")), data_path=tmp_path, progress=False).path for where in ("x", "y")
    }
    assert len(paths) == 2


def test_second_load_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load("folder", data_path=folder(tmp_path), progress=False)

    def never(*_: object) -> None:
        raise AssertionError("opened an image again")

    monkeypatch.setattr(Image, "open", never)
    again = load("folder", data_path=tmp_path, progress=False)
    assert torch.equal(first.train.images, again.train.images)
    monkeypatch.chdir(tmp_path)
    assert load("folder", data_path=".", progress=False).fingerprint == first.fingerprint, "however the path is written"


@pytest.mark.parametrize("change", ["edit", "add", "remove", "rename"])
def test_a_changed_source_is_packed_again(tmp_path: Path, change: str) -> None:
    first = load("folder", data_path=folder(tmp_path), progress=False)
    image = tmp_path / "train" / "a" / "z.png"
    match change:
        case "edit":
            write(image, noise(99))
            os.utime(image, ns=(1, 1))
        case "add":
            write(image.with_name("new.png"), noise(99))
        case "remove":
            image.unlink()
        case "rename":
            image.rename(image.parent.parent / "b" / "z.png")
    again = load("folder", data_path=tmp_path, progress=False)
    assert again.fingerprint != first.fingerprint
    assert len(again.train.images) == 5 + {"add": 1, "remove": -1}.get(change, 0)


def fails(tmp_path: Path, message: str, **options: Any) -> None:
    with pytest.raises(InputError, match=message) as raised:
        load("folder", data_path=tmp_path, progress=False, **options)
    assert "\n" not in str(raised.value)
    packed = tmp_path / "packed"
    assert not packed.exists() or not list(packed.iterdir())


def test_broken_image_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path) / "train" / "b" / "2.png"
    whole = path.read_bytes()
    for content in (b"", b"not a picture", whole[:20], whole[: len(whole) // 2]):
        path.write_bytes(content)
        fails(tmp_path, r"train/b/2\.png: expected an image, found a broken one")


def test_truncated_jpeg_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path, suffix=".jpg") / "test" / "b" / "t.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    fails(tmp_path, r"test/b/t\.jpg: expected an image, found a broken one")


def test_deep_grey_is_refused_not_clipped(tmp_path: Path) -> None:
    folder(tmp_path)
    Image.fromarray(np.full((6, 6), 40000, np.uint16)).save(tmp_path / "train" / "a" / "z.png")
    fails(tmp_path, r"z\.png: expected 8 bits a channel")


def test_sizes_that_differ_need_res(tmp_path: Path) -> None:
    folder(tmp_path)
    write(tmp_path / "train" / "b" / "2.png", noise(1, 6, 7))
    fails(tmp_path, r"b/2\.png: expected 6x6 pixels.*found 7x6; give `res`")
    assert load("folder", data_path=tmp_path, res=6, progress=False).image_shape == (3, 6, 6)


def test_classes_that_differ_are_named(tmp_path: Path) -> None:
    folder(tmp_path)
    write(tmp_path / "test" / "c" / "t.png", noise(1))
    fails(tmp_path, r"same classes.*found 1 in only one of them \(c\)")


@pytest.mark.parametrize(("split", "word"), [("train", "training"), ("test", "test")])
def test_empty_class_is_named(tmp_path: Path, split: str, word: str) -> None:
    for part in ("train", "test"):
        (folder(tmp_path) / part / "c").mkdir()
    write(tmp_path / ("test" if split == "train" else "train") / "c" / "t.png", noise(1))
    (tmp_path / split / "c" / "notes.txt").touch()
    (tmp_path / split / "c" / "._t.png").touch()
    fails(tmp_path, f"expected {word} images .* of every class, found none of 'c'")


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: expected an image folder"):
        load(str(tmp_path / "nowhere"), data_path=tmp_path)
    fails(tmp_path, r"expected train/ and one of test/, val/, valid/.*found nothing")
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    fails(tmp_path, r"train: expected a folder a class, found nothing")
    write(tmp_path / "train" / "loose.png", noise(0))
    fails(tmp_path, r"train: expected a folder a class, found loose\.png; move the images")


def test_dangling_link_is_named(tmp_path: Path) -> None:
    (folder(tmp_path) / "train" / "a" / "link.png").symlink_to(tmp_path / "gone.png")
    fails(tmp_path, r"link\.png: cannot be read")


def test_resolution_must_be_positive(tmp_path: Path) -> None:
    fails(folder(tmp_path), "`res`: expected a positive number", res=0)


def six(root: Path) -> Path:
    """Make two classes of two training images and one test image each."""
    for number, place in enumerate(["train/a/1", "train/a/2", "train/b/1", "train/b/2", "test/a/1", "test/b/1"]):
        write(root / f"{place}.png", noise(number))
    return root


def loaded(root: Path, tmp_path: Path) -> ImageData:
    return load(str(root), data_path=tmp_path / "cache", progress=False)


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
    root = six(tmp_path / "x")
    write(root / "train/a/deep/3.png", noise(9))
    before = loaded(root, tmp_path)
    place, target = LINKS[link]
    (root / place).symlink_to(target)
    with caplog.at_level(logging.INFO):
        after = loaded(root, tmp_path)
    assert after.fingerprint == before.fingerprint
    assert "not taken: 1 " in caplog.text


def test_hard_links_and_two_ways_count_once(tmp_path: Path) -> None:
    root = six(tmp_path / "x")
    before = loaded(root, tmp_path)
    os.link(root / "train/a/1.png", root / "train/a/zz.png")
    (root / "train/a/x").symlink_to("y")
    (root / "train/a/y").mkdir()
    (root / "train/a/y/x").symlink_to("..")
    assert loaded(root, tmp_path).fingerprint == before.fingerprint


@pytest.mark.parametrize(
    ("link", "target"),
    [("train/b/3.png", "../a/1.png"), ("train/b/all", "../a"), ("train/c", "a"), ("train/b/3.png", "")],
)
def test_an_image_under_two_labels_is_refused(tmp_path: Path, link: str, target: str) -> None:
    root = six(tmp_path)
    if target:
        (root / link).symlink_to(target)
    else:
        os.link(root / "train/a/1.png", root / link)
    fails(root, r"\.png: expected each image under one label, found it under 'a' too \(.*\.png\)")


def test_root_splits_and_classes_may_lie_elsewhere(tmp_path: Path) -> None:
    """Put links to other disks into a tree, as people do with ImageNet: of the root, a split, or a class."""
    real = six(tmp_path / "real")
    expected = loaded(real, tmp_path)
    (real / "train/a").rename(tmp_path / "a")
    (real / "train/a").symlink_to(tmp_path / "a")
    (real / "test").rename(tmp_path / "elsewhere")
    (real / "test").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a/3.png").symlink_to("1.png")
    (tmp_path / "linked").symlink_to(real)
    found = loaded(tmp_path / "linked", tmp_path)
    assert torch.equal(found.train.images, expected.train.images)
    assert torch.equal(found.test.images, expected.test.images)


def test_images_may_be_links_within_the_data_set(tmp_path: Path) -> None:
    root = six(tmp_path / "x")
    expected = loaded(root, tmp_path)
    (root / "pool").mkdir()
    (root / "train/a/1.png").rename(root / "pool/p.png")
    (root / "train/a/1.png").symlink_to("../../pool/p.png")
    assert torch.equal(loaded(root, tmp_path).train.images, expected.train.images)


@pytest.mark.parametrize("target", ["outside.png", "outside", "/dev/zero", "/dev", "/"])
def test_links_that_leave_the_data_set_are_refused(tmp_path: Path, target: str) -> None:
    write(tmp_path / "outside.png", noise(1))
    write(tmp_path / "outside" / "x.png", noise(1))
    root = six(tmp_path / "data")
    where = target if target.startswith("/") else tmp_path / target
    (root / "train/a/3.png").symlink_to(where)
    if target == "/":
        assert len(loaded(root, tmp_path).train.labels) == 4, "a folder around the data set is a loop"
        return
    fails(root, r"a/3\.png: expected links to files of the data set itself, found one to /")


@pytest.mark.parametrize("place", ["train/a/x.png", "train/c"])
def test_links_to_nothing_or_themselves_are_named(tmp_path: Path, place: str) -> None:
    for target in ("gone", Path(place).name):
        root = six(tmp_path / target)
        (root / place).symlink_to(target)
        fails(root, rf"{place}: cannot be read")


def test_what_is_no_file_is_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(six(tmp_path) / "train/a/x.png")
    fails(tmp_path, r"train/a/x\.png: expected an image, found no regular file")


def test_a_folder_may_end_as_an_image(tmp_path: Path) -> None:
    write(six(tmp_path / "x") / "train/a/odd.png/5.png", noise(8))
    assert len(loaded(tmp_path / "x", tmp_path).train.labels) == 5


def test_hidden_folders_and_other_files_are_told_and_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = six(tmp_path / "pets")
    expected = loaded(root, tmp_path).fingerprint
    write(root / "train/a/.ipynb_checkpoints/1-checkpoint.png", noise(1))
    write(root / "train/loose.png", noise(1))
    for name in ("train/a/._1.png", "train/a/notes.txt", "test/b/more.txt", "train/b/clip.mp4", "test/README"):
        (root / name).touch()
    with caplog.at_level(logging.INFO):
        assert loaded(root, tmp_path).fingerprint == expected
    (line,) = [record.getMessage() for record in caplog.records if "not taken" in record.getMessage()]
    for told in ("2 .txt", "1 .mp4", "2 hidden", "1 without a suffix", "1 outside the class folders"):
        assert told in line


@pytest.mark.parametrize("unlabelled", ["t.png", "unknown/t.png", "images/t.png", None])
def test_test_images_without_labels_do_not_hide_the_validation_images(
    tmp_path: Path, unlabelled: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    root = folder(tmp_path / "x", "val")
    expected = loaded(root, tmp_path)
    (root / "test").mkdir()
    if unlabelled:
        write(root / "test" / unlabelled, noise(77))
    with caplog.at_level(logging.INFO):
        data = loaded(root, tmp_path)
    assert data.fingerprint == expected.fingerprint
    assert "test: not used" in caplog.text


def test_a_labelled_test_goes_before_val(tmp_path: Path) -> None:
    root = folder(tmp_path / "x")
    write(root / "val/a/t.png", noise(70))
    write(root / "val/b/t.png", noise(71))
    assert torch.equal(loaded(root, tmp_path).test.images[0], chw(noise(5)))


def test_numbered_folders_are_classes_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(12):
        for split in ("train", "test"):
            write(tmp_path / split / str(number) / "x.png", np.full((2, 2, 3), number, np.uint8))
    data = load("folder", data_path=tmp_path, progress=False)
    assert data.class_names == tuple(map(str, range(12)))
    assert data.train.images[:, 0, 0, 0].tolist() == data.train.labels.tolist() == list(range(12))


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a\nb", b"tab\t"])
def test_class_folders_are_named_in_text(tmp_path: Path, name: bytes) -> None:
    root = six(tmp_path)
    for split in ("train", "test"):
        (root / split / "b").rename(root / split / os.fsdecode(name))
    fails(root, "train: expected class folders named in plain text")


def test_the_order_of_the_classes_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        loaded(six(tmp_path / "x"), tmp_path)
    assert caplog.text.count("2 classes in this order: a, b") == 1


def transparent(mode: str) -> Image.Image:
    """Make one opaque pixel, one half transparent, one wholly; grey value 100 or colour (100, 50, 200)."""
    image = Image.new(mode, (3, 1))
    for x, alpha in enumerate((255, 128, 0)):
        image.putpixel((x, 0), (100, alpha) if mode == "LA" else (100, 50, 200, alpha))
    return image


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "L"])
def test_transparency_is_composed_on_white_and_told(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    for split in ("train", "test"):
        write(tmp_path / split / "a/0.png", noise(1, 1, 3, channels=1 if kind in ("LA", "L") else 3))
    path = tmp_path / "train/a/1.png"
    match kind:
        case "RGBA" | "LA":
            transparent(kind).save(path)
            expected = [[100, 177, 255], [50, 152, 255], [200, 227, 255]]
        case "P":
            image = Image.new("P", (3, 1))
            image.putpalette([100, 50, 200, 1, 2, 3])
            image.putpixel((2, 0), 1)
            image.save(path, transparency=1)
            expected = [[100, 100, 255], [50, 50, 255], [200, 200, 255]]
        case _:
            image = Image.new("L", (3, 1), 100)
            image.putpixel((2, 0), 7)
            image.save(path, transparency=7)
            expected = [[100, 100, 255]]
    if kind == "LA":
        expected = expected[:1]
    with caplog.at_level(logging.INFO):
        data = load("folder", data_path=tmp_path, progress=False)
    assert data.image_shape[0] == len(expected)
    found = data.train.images[1, :, 0].int()
    assert (found - torch.tensor(expected)).abs().max() <= 1
    assert "1 transparent image(s) composed on white" in caplog.text


def test_an_opaque_alpha_channel_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    six(tmp_path)
    Image.fromarray(noise(0)).convert("RGBA").save(tmp_path / "train/a/1.png")
    with caplog.at_level(logging.INFO):
        data = load("folder", data_path=tmp_path, progress=False)
    assert torch.equal(data.train.images[0], chw(noise(0)))
    assert "composed" not in caplog.text


@pytest.mark.parametrize("suffix", [".JPEG", ".jpe", ".jfif", ".tif", ".TIFF", ".pgm"])
def test_other_suffixes_that_people_have(tmp_path: Path, suffix: str) -> None:
    channels = 1 if suffix == ".pgm" else 3
    six(tmp_path)
    pixels = noise(3, channels=channels)
    kind = {".tif": "TIFF", ".tiff": "TIFF", ".pgm": "PPM"}.get(suffix.lower(), "JPEG")
    path = tmp_path / f"train/a/0{suffix}"
    Image.fromarray(pixels).save(path, format=kind)
    data = load("folder", data_path=tmp_path, progress=False)
    with Image.open(path) as picture:
        assert torch.equal(data.train.images[0], chw(np.asarray(picture.convert("RGB"))))


def png(depth: int, colour: int, channels: int) -> bytes:
    """Return a 6x6 PNG of any depth and colour type."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = (b"\0" + b"\x12\x34" * (6 * channels * depth // 16)) * 6
    header = struct.pack(">IIBBBBB", 6, 6, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


DEEP = {
    "grey.png": png(16, 0, 1),
    "colour.png": png(16, 2, 3),
    "alpha.png": png(16, 6, 4),
    "grey and alpha.png": png(16, 4, 2),
    "colour.ppm": b"P6\n6 6\n65535\n" + bytes(216),
    "grey.pgm": b"P5\n6 6\n65535\n" + bytes(72),
    "text.ppm": b"P3\n6 6\n1023\n" + b"7 " * 108,
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_eight_bits_are_refused(tmp_path: Path, name: str) -> None:
    (six(tmp_path) / "train/a" / name).write_bytes(DEEP[name])
    fails(tmp_path, rf"{name}: expected 8 bits a channel")


def test_the_first_image_that_differs_is_named_before_any_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(six(tmp_path) / "train/b/0.png", noise(1, 6, 7))
    write(tmp_path / "test/b/0.png", noise(1, 9, 9))
    monkeypatch.setattr(Image.Image, "convert", None)
    fails(tmp_path, r"train/b/0\.png: expected 6x6 pixels as in the other images, found 7x6; give `res`")


def bomb(width: int, height: int) -> bytes:
    """Return a small PNG that claims to be large."""
    whole = bytearray(png(8, 2, 3))
    whole[16:24] = struct.pack(">II", width, height)
    whole[29:33] = struct.pack(">I", zlib.crc32(bytes(whole[12:29])))
    return bytes(whole)


@pytest.mark.parametrize(
    ("size", "res"),
    [
        *itertools.product([(9_500, 9_500), (14_000, 14_000), (2**31 - 1, 2**31 - 1)], [None, 6]),
        ((60_000, 1), None),
        ((60_000, 1), 2000),  # 6 x 360,000 pixels would do no harm
    ],
)
def test_pictures_that_are_too_large_are_refused_by_their_headers(
    tmp_path: Path, size: tuple[int, int], res: int | None
) -> None:
    (six(tmp_path) / "train/a/3.png").write_bytes(bomb(*size))
    fails(tmp_path, r"3\.png: expected (at most 89,478,485 pixels|6x6 pixels|an image that can be resized)", res=res)


def test_a_png_whose_text_unpacks_to_much_is_refused(tmp_path: Path) -> None:
    whole = png(8, 2, 3)
    content = b"k\0\0" + zlib.compress(bytes(200 << 20), 9)
    chunk = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    (six(tmp_path) / "train/a/0.png").write_bytes(whole[:33] + chunk + whole[33:])
    tracemalloc.start()
    fails(tmp_path, r"0\.png: expected an image, found a broken one")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


def test_a_sparse_file_is_refused_by_its_size(tmp_path: Path) -> None:
    with open(six(tmp_path) / "train/a/0.png", "wb") as file:
        file.write(png(8, 2, 3))
        file.truncate(1 << 40)
    fails(tmp_path, r"0\.png: expected at most [\d,]+ bytes, found 1,099,511,627,776")


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n", b"<svg/>", b"\0" * 100])
def test_other_kinds_of_pictures_are_not_even_tried(tmp_path: Path, content: bytes) -> None:
    """Check that Pillow gets no PostScript, which it would hand to another program."""
    (six(tmp_path) / "train/a/0.png").write_bytes(content)
    fails(tmp_path, r"0\.png: expected an image, found a broken one \(cannot identify")


@settings(max_examples=150)
@given(st.data())
def test_no_damage_to_a_picture_is_more_than_one_line(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM"]))
    file = io.BytesIO()
    Image.fromarray(noise(1, 8, 8)).save(file, format=kind)
    raw = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(len(raw) // 2, len(raw)))]
    path = tmp_path_factory.mktemp("damage") / "x.png"
    path.write_bytes(raw)
    lines = []
    for read in (
        lambda: read_headers([str(path)], None, resize=False),
        lambda: list(decode([str(path)], (3, 8, 8), resize=True)),
    ):
        try:
            read()
        except InputError as error:
            lines.append(str(error))
    assert all(line.startswith(f"{path}: expected ") and "\n" not in line for line in lines)
