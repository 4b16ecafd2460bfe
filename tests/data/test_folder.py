"""Test image folders: exact pixels and order, one size or resized, packed once, and every mistake named."""

from __future__ import annotations

import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import mtt_fast.distill.command as distill
from mtt_fast import evaluate
from mtt_fast.commands import cli
from mtt_fast.data import from_tensors, images, load
from mtt_fast.data.folder import image_source
from mtt_fast.data.images import decode, read_headers
from mtt_fast.data.packing import packed
from mtt_fast.errors import InputError
from mtt_fast.experts import command as experts
from tests.data.folders import check_refused, chw, folder, folder_of_six_images, load_folder, noise, write


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".ppm", ".PNG"])
@pytest.mark.parametrize("test", ["test", "val", "valid"])
def test_a_folder_has_its_pixels_labels_and_order(tmp_path: Path, suffix: str, test: str) -> None:
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
    source = image_source("x", tmp_path, {"a": [a], "b": [b]}, {"b": [b], "a": [a]}, fit="exact")
    data = packed(source, tmp_path, progress=False)
    assert torch.equal(data.train.images, data.test.images)


def test_more_images_than_a_task_holds_keep_their_order(tmp_path: Path) -> None:
    for number in range(150):
        write(tmp_path / "train" / "a" / f"{number:03}.png", np.full((2, 2, 3), number, np.uint8))
    write(tmp_path / "train" / "b" / "0.png", np.full((2, 2, 3), 150, np.uint8))
    for label in "ab":
        write(tmp_path / "test" / label / "0.png", noise(0, 2, 2))
    data = load("folder", data_path=tmp_path, progress=False)
    assert data.train.images[:, 0, 0, 0].tolist() == list(range(151))


@pytest.mark.parametrize(
    ("side", "fit", "threads"), [(6, "exact", 1), (6, "crop", 8), (6, "squeeze", 8), (65, "exact", 8)]
)
def test_small_images_are_decoded_in_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, fit: images.Fit, threads: int
) -> None:
    pools = Mock(side_effect=ThreadPoolExecutor)
    monkeypatch.setattr(images, "ThreadPoolExecutor", pools)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    path, pixels = str(write(tmp_path / "x.png", noise(0, side, side))), noise(0, side, side)
    (block,) = decode([path], (3, side, side), fit=fit)
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
    paths = [str(mixed / "test/b/t.png")] * 64 + [str(mixed / "test/b/u.png")]  # in another thread's task
    assert not read_headers(paths, None, resize=True).grey


def test_statistics_are_those_of_the_training_images(tmp_path: Path) -> None:
    data = load("folder", data_path=folder(tmp_path), progress=False)
    scaled = data.train.images.double() / 255
    assert data.mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert data.std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


@pytest.mark.parametrize(
    ("height", "width"), [(12, 20), (20, 12), (9, 6), (3, 5), (6, 6), (7, 400), (47, 94), (94, 47)], ids=str
)
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


def test_broken_image_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path) / "train" / "b" / "2.png"
    whole = path.read_bytes()
    for content in (b"", b"not a picture", whole[:20], whole[: len(whole) // 2]):
        path.write_bytes(content)
        check_refused(tmp_path, r"train/b/2\.png: expected an image, found a broken one")


def test_truncated_jpeg_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path, suffix=".jpg") / "test" / "b" / "t.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    check_refused(tmp_path, r"test/b/t\.jpg: expected an image, found a broken one")


def test_deep_grey_is_refused_not_clipped(tmp_path: Path) -> None:
    folder(tmp_path)
    Image.fromarray(np.full((6, 6), 40000, np.uint16)).save(tmp_path / "train" / "a" / "z.png")
    check_refused(tmp_path, r"z\.png: expected 8 bits a channel")


def test_sizes_that_differ_need_res(tmp_path: Path) -> None:
    folder(tmp_path)
    write(tmp_path / "train" / "b" / "2.png", noise(1, 6, 7))
    check_refused(tmp_path, r"b/2\.png: expected 6x6 pixels.*found 7x6; give `res`")
    assert load("folder", data_path=tmp_path, res=6, progress=False).image_shape == (3, 6, 6)


def test_classes_that_differ_are_named(tmp_path: Path) -> None:
    folder(tmp_path)
    write(tmp_path / "test" / "c" / "t.png", noise(1))
    check_refused(tmp_path, r"same classes.*found 1 in only one of them \(c\)")


@pytest.mark.parametrize(("split", "word"), [("train", "training"), ("test", "test")])
def test_empty_class_is_named(tmp_path: Path, split: str, word: str) -> None:
    for part in ("train", "test"):
        (folder(tmp_path) / part / "c").mkdir()
    write(tmp_path / ("test" if split == "train" else "train") / "c" / "t.png", noise(1))
    (tmp_path / split / "c" / "notes.txt").touch()
    (tmp_path / split / "c" / "._t.png").touch()
    check_refused(tmp_path, f"expected {word} images .* of every class, found none of 'c'")


def test_a_single_class_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = folder(tmp_path / "pets"), tmp_path / "out"
    for split in ("train", "test"):
        shutil.rmtree(root / split / "b")
    check_refused(root, r"pets: expected at least two classes, found one \('a'\); add the images of another class")
    data = f"--dataset {root} --data_path {tmp_path} --model ConvNetD1W4".split()
    for command, arguments in (
        (experts.main, [*data, "--buffer_path", str(out)]),
        (distill.main, [*data, "--buffer_path", str(out), "--out", str(out)]),
        (distill.main, [*data, "--buffer_path", str(out), "--out", str(out), "--dry_run"]),
        (evaluate.main, ["random", *data]),
    ):
        assert cli.run(command, arguments) == 2
        assert re.match("error: .*pets: expected at least two classes, found one[^\n]*\n$", capsys.readouterr().err)
    assert not out.exists()
    pixels = torch.from_numpy(noise(0)).permute(2, 0, 1)[None]
    with pytest.raises(InputError, match=r"^mine: expected at least two classes, found one \('0'\)"):
        from_tensors((pixels, torch.tensor([0])), (pixels, torch.tensor([0])), name="mine")


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: expected an image folder"):
        load(str(tmp_path / "nowhere"), data_path=tmp_path)
    check_refused(tmp_path, r"expected train/ and one of test/, val/, valid/.*found nothing")
    (tmp_path / "train").mkdir()
    check_refused(tmp_path, r"expected train/ and one of test/, val/, valid/.*found train")
    (tmp_path / "val").mkdir()
    check_refused(tmp_path, r"train: expected a folder a class, found nothing")
    write(tmp_path / "train" / "loose.png", noise(0))
    check_refused(tmp_path, r"train: expected a folder a class, found loose\.png; move the images")


def test_dangling_link_is_named(tmp_path: Path) -> None:
    (folder(tmp_path) / "train" / "a" / "link.png").symlink_to(tmp_path / "gone.png")
    check_refused(tmp_path, r"link\.png: cannot be read")


def test_resolution_must_be_positive(tmp_path: Path) -> None:
    check_refused(folder(tmp_path), "`res`: expected a positive number", res=0)


@pytest.mark.parametrize("unlabelled", ["t.png", "unknown/t.png", "images/t.png", None])
def test_test_images_without_labels_do_not_hide_the_validation_images(
    tmp_path: Path, unlabelled: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    root = folder(tmp_path / "x", "val")
    expected = load_folder(root, tmp_path)
    (root / "test").mkdir()
    for split in ("train", "test"):  # which are no classes
        (root / split / "README").touch()
        (root / split / ".cache").mkdir()
    if unlabelled:
        write(root / "test" / unlabelled, noise(77))
    with caplog.at_level(logging.INFO):
        data = load_folder(root, tmp_path)
    assert data.fingerprint == expected.fingerprint
    assert "test: not used" in caplog.text


def test_a_labelled_test_goes_before_val(tmp_path: Path) -> None:
    root = folder(tmp_path / "x")
    write(root / "val/a/t.png", noise(70))
    write(root / "val/b/t.png", noise(71))
    assert torch.equal(load_folder(root, tmp_path).test.images[0], chw(noise(5)))


def test_numbered_folders_are_classes_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(12):
        for split in ("train", "test"):
            write(tmp_path / split / str(number) / "x.png", np.full((2, 2, 3), number, np.uint8))
    data = load("folder", data_path=tmp_path, progress=False)
    assert data.class_names == tuple(map(str, range(12)))
    assert data.train.images[:, 0, 0, 0].tolist() == data.train.labels.tolist() == list(range(12))


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a\nb", b"tab\t"])
def test_class_folders_are_named_in_text(tmp_path: Path, name: bytes) -> None:
    root = folder_of_six_images(tmp_path)
    for split in ("train", "test"):
        (root / split / "b").rename(root / split / os.fsdecode(name))
    check_refused(root, "train: expected class folders named in plain text")


def test_the_order_of_the_classes_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load_folder(folder_of_six_images(tmp_path / "x"), tmp_path)
    assert caplog.text.count("2 classes in this order: a, b") == 1
