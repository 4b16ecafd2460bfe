"""Image files: which there are in a folder, and their pixels, decoded in parallel."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mtt_fast.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")

_CHUNK = 64  # images a task
_GREY = ("1", "L", "LA")
_COLOUR = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def list_images(folder: Path) -> list[str]:
    """Return the image files in `folder` and below, sorted; hidden ones are left out."""
    return sorted(  # of strings: a million `Path`s would take seconds to make and to sort
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )


def is_grey(path: str) -> bool:
    """Whether the file holds one channel of grey; reads its header only."""
    with _opened(path) as image:
        return image.mode in _GREY


def size_of(path: str) -> tuple[int, int]:
    """Return (height, width); reads the file's header only."""
    with _opened(path) as image:
        return image.height, image.width


def decode(
    paths: Sequence[str], shape: tuple[int, int, int], resize: bool
) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Yield the images in the order of `paths`, in blocks uint8 (k, C, H, W) with `shape` = (C, H, W).

    C = 1 is grey, C = 3 is RGB. With `resize` an image is resized so that it just covers H x W (bilinear, antialiased)
    and cropped about its centre; without, it must have that size. Raises `InputError`, which names the file, for a bad
    one.

    Threads, because Pillow decodes outside the interpreter's lock: on two cores they take 1.9 times the speed of one
    for 500x375 JPEGs and neither gain nor lose for 32x32, where processes lose (2 % to 40 %, more with every start-up).
    """
    workers = min(os.cpu_count() or 1, 32)
    pending: deque[Future[np.ndarray[Any, np.dtype[np.uint8]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(paths), _CHUNK):
            pending.append(pool.submit(_decode_chunk, paths[start : start + _CHUNK], shape, resize))
            if len(pending) > 2 * workers:  # no further ahead of the writer than this
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _decode_chunk(
    paths: Sequence[str], shape: tuple[int, int, int], resize: bool
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    block = np.empty((len(paths), *shape), np.uint8)
    for image, path in zip(block, paths, strict=True):
        image[:] = _decode_one(path, shape, resize)
    return block


def _decode_one(path: str, shape: tuple[int, int, int], resize: bool) -> np.ndarray[Any, np.dtype[np.uint8]]:
    channels, height, width = shape
    with _opened(path) as image:
        try:
            picture = image.convert("RGB" if channels == 3 else "L")
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            raise _broken(path, error) from error
    if picture.size != (width, height):
        if not resize:
            raise InputError(
                f"{path}: expected {width}x{height} pixels as in the other images, "
                f"found {picture.width}x{picture.height}; give --res to resize them all"
            )
        picture = _cover(picture, width, height)
    return np.asarray(picture).reshape(height, width, channels).transpose(2, 0, 1)


def _cover(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Resize `picture` so that it just covers width x height, then crop it about its centre."""
    scale = max(width / picture.width, height / picture.height)
    wide, high = max(width, int(picture.width * scale)), max(height, int(picture.height * scale))
    picture = picture.resize((wide, high), Image.Resampling.BILINEAR)  # antialiased, as Pillow always does
    left, top = round((wide - width) / 2), round((high - height) / 2)
    return picture.crop((left, top, left + width, top + height))


def _opened(path: str) -> Image.Image:
    try:
        image = Image.open(path)
    except Exception as error:
        raise _broken(path, error) from error
    if image.mode not in _GREY + _COLOUR:
        image.close()
        raise InputError(
            f"{path}: expected 8 bits a channel, found mode {image.mode!r}; convert it to 8-bit grey or RGB"
        )
    return image


def _broken(path: str, error: Exception) -> InputError:
    return InputError(f"{path}: expected an image, found a broken one ({error}); replace or delete it")


def as_image(picture: Tensor) -> Image.Image:
    """Return one picture (C, H, W) in [0, 1], C 1 or 3, as an 8-bit image."""
    values = (picture.detach().cpu().clamp(0, 1) * 255).round().byte().numpy()
    return Image.fromarray(values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0)))
