"""Image files: their headers, and their pixels, decoded in parallel."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin
from torch import Tensor

from mtt_fast.errors import InputError
from mtt_fast.storage.foreign import complaint_of
from mtt_fast.storage.regular import check_regular, read_bytes

# Not all that Pillow can read: some of its readers start other programs, or are hardly ever used.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")

_CHUNK = 64  # images a task
_MAX_THREADS = 32
_SMALL = 64 * 64  # pixels; so small images take more Python than decoding
_GREY = ("1", "L", "LA")
_COLOUR = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_MAX_PIXELS = 89_478_485  # from here on Pillow warns of decompression bombs
_MAX_BYTES = 4 * _MAX_PIXELS + (1 << 20)  # as many, without compression
_REPLACE = "replace or delete it"

Fit = Literal["exact", "crop", "squeeze"]
"""How an image gets its size, see `decode`."""

_Picture = np.ndarray[Any, np.dtype[np.uint8]]
Result = TypeVar("Result")

log = logging.getLogger(__name__)


class Header(NamedTuple):
    """The kind and size of an image by its header; for several, whether all are grey, and the size of the first."""

    grey: bool
    size: tuple[int, int]  # (height, width)


def read_headers(paths: Sequence[str], size: tuple[int, int] | None, *, resize: bool) -> Header:
    """Return the kind and size of all images by their headers, decoding nothing.

    Without `resize` all must be of `size` (height, width), or of the first one's size; with it, reading ends where the
    answer is known. It takes 50 microseconds a file that is in the page cache.
    Raises `InputError`, which names the first file that is bad or differs.
    """
    grey, first = True, size
    with closing(_by_chunk(_read_chunk, paths, _MAX_THREADS)) as chunks:
        for chunk, headers in chunks:
            for path, header in zip(chunk, headers, strict=True):
                grey = grey and header.grey
                first = first or header.size
                if not resize:
                    _check_size(path, header.size, first)
            if resize and not grey:
                break  # the others cannot change what is returned
    return Header(grey, first or (0, 0))


def decode(paths: Sequence[str], shape: tuple[int, int, int], *, fit: Fit) -> Iterator[_Picture]:
    """Yield the images in the order of `paths`, in blocks uint8 (k, C, H, W) with `shape` = (C, H, W).

    C = 1 is grey, C = 3 is RGB; transparent images are composed on white. With `fit` "exact" an image must be of H x W. With
    "crop" it is resized so that it just covers H x W (bilinear, antialiased), and cropped about its centre; with "squeeze" it is
    resized to H x W, whatever its proportions.
    Raises `InputError`, which names the file, for a bad one.

    Threads, because Pillow decodes outside the interpreter's lock: on two cores they take 1.9 times the speed of one
    for 500x375 JPEGs. For 32x32 they lose by waiting for the lock: 100 microseconds an image in one thread, 190 in two,
    250 to 310 in 16. Two forked processes take half of one thread's time, but to fork under threads and CUDA is not safe.
    """
    transparent: list[str] = []
    most = 1 if fit == "exact" and shape[1] * shape[2] <= _SMALL else _MAX_THREADS
    with closing(_by_chunk(lambda chunk: _decode_chunk(chunk, shape, fit), paths, most)) as chunks:
        for _, (block, names) in chunks:
            transparent += names
            yield block
    if transparent:
        log.info("%d transparent image(s) composed on white, such as %s", len(transparent), transparent[0])


def read_header(content: bytes, name: str) -> Header:
    """Return the kind and size of an encoded image by its header. Raises `InputError`, which names it `name`, for a bad one."""
    with _quiet(), _opened(io.BytesIO(content), name) as image:
        return _header_of(image)


def decode_bytes(contents: Sequence[bytes], names: Sequence[str]) -> _Picture:
    """Return encoded images of one size as uint8 (n, C, H, W), C = 1 if all are grey; `names` are for messages.

    Raises `InputError` as `decode` does.
    """
    with _quiet():
        headers = [
            _header_of(_opened(io.BytesIO(content), name)) for content, name in zip(contents, names, strict=True)
        ]
        for name, header in zip(names, headers, strict=True):
            _check_size(name, header.size, headers[0].size)
        shape = (1 if all(header.grey for header in headers) else 3, *headers[0].size)
        return np.stack([
            _pixels(_opened(io.BytesIO(content), name), name, shape, "exact")[0]
            for content, name in zip(contents, names, strict=True)
        ])  # fmt: skip


def _by_chunk(
    work: Callable[[Sequence[str]], Result], paths: Sequence[str], most_threads: int
) -> Generator[tuple[Sequence[str], Result], None, None]:
    """Yield chunks of `paths`, in order, each with `work` of it, which is done in threads, never far ahead of the reader."""
    workers = min(os.cpu_count() or 1, most_threads)
    pending: deque[tuple[Sequence[str], Future[Result]]] = deque()
    with _quiet(), ThreadPoolExecutor(workers) as pool:
        try:
            for start in range(0, len(paths), _CHUNK):
                chunk = paths[start : start + _CHUNK]
                pending.append((chunk, pool.submit(work, chunk)))
                if len(pending) > 2 * workers:
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # a reader that stops early does not wait for the other images


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Pillow's warnings from the terminal: of broken EXIF data, which is not used, and of sizes that are refused."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _read_chunk(paths: Sequence[str]) -> list[Header]:
    headers = []
    for path in paths:
        check_regular(path, _MAX_BYTES, _REPLACE)
        with _opened(path, path) as image:
            headers.append(_header_of(image))
    return headers


def _header_of(image: Image.Image) -> Header:
    return Header(image.mode in _GREY, (image.height, image.width))


def _decode_chunk(paths: Sequence[str], shape: tuple[int, int, int], fit: Fit) -> tuple[_Picture, list[str]]:
    """Return the images, and which of them are transparent."""
    block, transparent = np.empty((len(paths), *shape), np.uint8), []
    for picture, path in zip(block, paths, strict=True):
        # read whole: Pillow would ask the system for it in many pieces
        content = read_bytes(path, _MAX_BYTES, _REPLACE)
        picture[:], is_transparent = _pixels(_opened(io.BytesIO(content), path), path, shape, fit)
        if is_transparent:
            transparent.append(path)
    return block, transparent


def _pixels(image: Image.Image, path: str, shape: tuple[int, int, int], fit: Fit) -> tuple[_Picture, bool]:
    """Return (the pixels uint8 of `shape`, whether they were transparent) of an image whose header was read."""
    channels, height, width = shape
    if fit == "exact":
        _check_size(path, (image.height, image.width), (height, width))
    wide, high = (width, height) if fit == "squeeze" else _covering(image.size, width, height)
    if wide * high > _MAX_PIXELS:
        raise InputError(
            f"{path}: expected an image that can be resized to cover {width}x{height} pixels, found {image.width}x"
            f"{image.height}, which is too long; crop or remove it"
        )
    try:
        picture, is_transparent = _flat(image, "RGB" if channels == 3 else "L")
        if (wide, high) != picture.size:
            picture = picture.resize((wide, high), Image.Resampling.BILINEAR)  # antialiased, as Pillow always does
        if picture.size != (width, height):
            left, top = round((wide - width) / 2), round((high - height) / 2)
            picture = picture.crop((left, top, left + width, top + height))
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise _broken(path, error) from error
    return np.asarray(picture).reshape(height, width, channels).transpose(2, 0, 1), is_transparent


def _flat(image: Image.Image, mode: str) -> tuple[Image.Image, bool]:
    """Return (the image in `mode`, "L" or "RGB", on white where it is transparent; whether it is so anywhere)."""
    if not image.has_transparency_data:
        return image.convert(mode), False
    layered = image.convert("LA" if mode == "L" else "RGBA")
    opacity = layered.getchannel("A")
    flat = Image.new(mode, image.size, "white")
    flat.paste(layered.convert(mode), mask=opacity)
    return flat, opacity.getextrema() != (255, 255)


def _covering(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """Return (width, height) of an image of `size` when it is scaled so that it just covers width x height; the longer side is rounded down."""
    if width * size[1] >= height * size[0]:
        return width, max(height, size[1] * width // size[0])
    return max(width, size[0] * height // size[1]), height


def _opened(source: str | io.BytesIO, name: str) -> Image.Image:
    """Open an image and read only its header. Raises `InputError` for a kind or a size that cannot be used."""
    try:
        image = Image.open(source, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(name, str(error)) from error
    except Exception as error:
        raise _broken(name, error) from error
    try:
        if image.width * image.height > _MAX_PIXELS:
            raise _too_large(name, f"{image.width}x{image.height}")
        if image.mode not in _GREY + _COLOUR or _is_deep(image):
            kind = f"mode {image.mode!r}" + (" with 16 bits" if _is_deep(image) else "")
            raise InputError(
                f"{name}: expected 8 bits a channel, grey or colour, found {kind}; convert it to 8-bit grey or RGB"
            )
    except InputError:
        image.close()
        raise
    return image


def _is_deep(image: Image.Image) -> bool:
    """Return whether the file has more than 8 bits a channel; Pillow would silently drop the others."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # where planes lie apart, its tiles do not tell
        return bool(max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) > 8)
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return False
    codec, _, _, arguments = image.tile[0]
    if codec.startswith("ppm"):  # (mode, greatest value)
        return isinstance(arguments, tuple) and arguments[1] > 255
    return image.format == "PNG" and ";16" in str(arguments)


def _check_size(path: str, found: tuple[int, int], expected: tuple[int, int]) -> None:
    if found != expected:
        raise InputError(
            f"{path}: expected {expected[1]}x{expected[0]} pixels as in the other images, found {found[1]}x{found[0]}; "
            "give `res` to resize them all"
        )


def _too_large(path: str, size: str) -> InputError:
    return InputError(f"{path}: expected at most {_MAX_PIXELS:,} pixels, found {size}; shrink or delete it")


def _broken(path: str, error: Exception) -> InputError:
    return InputError(f"{path}: expected an image, found a broken one ({complaint_of(error)}); {_REPLACE}")


def as_image(picture: Tensor) -> Image.Image:
    """Return one picture (C, H, W) in [0, 1], C 1 or 3, as an 8-bit image."""
    values = (picture.detach().cpu().clamp(0, 1) * 255).round().byte().numpy()
    return Image.fromarray(values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0)))
