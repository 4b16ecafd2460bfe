"""Test pictures in image folders: transparency, other suffixes, and what is too deep, too large or damaged."""

from __future__ import annotations

import io
import itertools
import logging
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from mtt_fast.data import load
from mtt_fast.data.images import decode, read_headers
from mtt_fast.errors import InputError
from tests.data.folders import check_refused, chw, folder_of_six_images, noise, write


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
    for place in ("train/a", "train/b", "test/a", "test/b"):
        write(tmp_path / place / "0.png", noise(1, 1, 3, channels=1 if kind in ("LA", "L") else 3))
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
    pixels = data.train.images[1, :, 0].int()
    assert (pixels - torch.tensor(expected)).abs().max() <= 1
    assert "1 transparent image(s) composed on white" in caplog.text


def test_an_opaque_alpha_channel_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder_of_six_images(tmp_path)
    Image.fromarray(noise(0)).convert("RGBA").save(tmp_path / "train/a/1.png")
    with caplog.at_level(logging.INFO):
        data = load("folder", data_path=tmp_path, progress=False)
    assert torch.equal(data.train.images[0], chw(noise(0)))
    assert "composed" not in caplog.text


@pytest.mark.parametrize("suffix", [".JPEG", ".jpe", ".jfif", ".tif", ".TIFF", ".pgm"])
def test_other_suffixes_of_images_are_read(tmp_path: Path, suffix: str) -> None:
    channels = 1 if suffix == ".pgm" else 3
    folder_of_six_images(tmp_path)
    pixels = noise(3, channels=channels)
    kind = {".tif": "TIFF", ".tiff": "TIFF", ".pgm": "PPM"}.get(suffix.lower(), "JPEG")
    path = tmp_path / f"train/a/0{suffix}"
    Image.fromarray(pixels).save(path, format=kind)
    data = load("folder", data_path=tmp_path, progress=False)
    with Image.open(path) as picture:
        assert torch.equal(data.train.images[0], chw(np.asarray(picture.convert("RGB"))))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_the_exif_orientation_counts_only_where_pillow_obeys_it(tmp_path: Path, suffix: str) -> None:
    """Take what Pillow decodes, as torchvision does, so that experts see the same pixels."""
    path = folder_of_six_images(tmp_path) / f"train/a/0{suffix}"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by a quarter
    Image.fromarray(noise(3)).save(path, exif=exif)
    data = load("folder", data_path=tmp_path, progress=False)
    with Image.open(path) as picture:
        assert picture.getexif()[ExifTags.Base.Orientation] == 6
        assert torch.equal(data.train.images[0], chw(np.asarray(picture.convert("RGB"))))


def png(depth: int, colour: int, channels: int) -> bytes:
    """Return a 6x6 PNG of any depth and colour type."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = (b"\0" + b"\x12\x34" * (6 * channels * depth // 16)) * 6
    header = struct.pack(">IIBBBBB", 6, 6, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(image: Image.Image, changes: dict[bytes, bytes] | None = None) -> bytes:
    """Return a TIFF, with `changes` of its header: Pillow writes neither 16 bits of colour nor planes that lie apart."""
    file = io.BytesIO()
    image.save(file, format="TIFF")
    content = file.getvalue()
    for old, new in (changes or {}).items():
        assert content.count(old) == 1
        content = content.replace(old, new)
    return content


SIXTEEN_BITS = {struct.pack("<3H", 8, 8, 8): struct.pack("<3H", 16, 16, 16)}
PLANES_APART = {struct.pack("<HHIHH", 284, 3, 1, 1, 0): struct.pack("<HHIHH", 284, 3, 1, 2, 0)}

DEEP = {
    "grey.png": png(16, 0, 1),
    "colour.png": png(16, 2, 3),
    "alpha.png": png(16, 6, 4),
    "grey and alpha.png": png(16, 4, 2),
    "colour.ppm": b"P6\n6 6\n65535\n" + bytes(216),
    "grey.pgm": b"P5\n6 6\n65535\n" + bytes(72),
    "text.ppm": b"P3\n6 6\n1023\n" + b"7 " * 108,
    "floating.tif": tiff(Image.new("F", (6, 6))),
    "colour.tif": tiff(Image.new("RGB", (6, 6)), SIXTEEN_BITS),
    "planes.tif": tiff(Image.new("RGB", (6, 6)), SIXTEEN_BITS | PLANES_APART),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_eight_bits_are_refused(tmp_path: Path, name: str) -> None:
    (folder_of_six_images(tmp_path) / "train/a" / name).write_bytes(DEEP[name])
    check_refused(tmp_path, rf"{name}: expected 8 bits a channel")


def test_the_first_image_that_differs_is_named_before_any_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder_of_six_images(tmp_path) / "train/b/0.png", noise(1, 6, 7))
    write(tmp_path / "test/b/0.png", noise(1, 9, 9))
    monkeypatch.setattr(Image.Image, "convert", None)
    check_refused(tmp_path, r"train/b/0\.png: expected 6x6 pixels as in the other images, found 7x6; give `res`")


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
    (folder_of_six_images(tmp_path) / "train/a/3.png").write_bytes(bomb(*size))
    check_refused(
        tmp_path, r"3\.png: expected (at most 89,478,485 pixels|6x6 pixels|an image that can be resized)", res=res
    )


def test_a_png_whose_text_unpacks_to_much_is_refused(tmp_path: Path) -> None:
    whole = png(8, 2, 3)
    content = b"k\0\0" + zlib.compress(bytes(200 << 20), 9)
    chunk = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    (folder_of_six_images(tmp_path) / "train/a/0.png").write_bytes(whole[:33] + chunk + whole[33:])
    tracemalloc.start()
    check_refused(tmp_path, r"0\.png: expected an image, found a broken one")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


def test_a_sparse_file_is_refused_by_its_size(tmp_path: Path) -> None:
    with open(folder_of_six_images(tmp_path) / "train/a/0.png", "wb") as file:
        file.write(png(8, 2, 3))
        file.truncate(1 << 40)
    check_refused(tmp_path, r"0\.png: expected at most [\d,]+ bytes, found 1,099,511,627,776")


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n", b"<svg/>", b"\0" * 100])
def test_other_kinds_of_pictures_are_not_even_tried(tmp_path: Path, content: bytes) -> None:
    """Check that Pillow gets no PostScript, which it would hand to another program."""
    (folder_of_six_images(tmp_path) / "train/a/0.png").write_bytes(content)
    check_refused(tmp_path, r"0\.png: expected an image, found a broken one \(cannot identify")


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
        lambda: list(decode([str(path)], (3, 8, 8), fit="crop")),
    ):
        try:
            read()
        except InputError as error:
            lines.append(str(error))
    assert all(line.startswith(f"{path}: expected ") and "\n" not in line for line in lines)
