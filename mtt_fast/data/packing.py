"""Pack a data set into one safetensors file: it is decoded once, and then memory-mapped, with its checksums checked.

A reader (cifar.py, folder.py, …) describes its data set as a `Source`: a function that reads its files, and a key that changes if
they do and is cheap to compute. `packed` opens the packed file if it has this key, and packs the source otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from filelock import FileLock, Timeout
from tqdm import tqdm

from mtt_fast.data.image_data import (
    DatasetInfo,
    ImageData,
    Split,
    channel_statistics,
    check_split_labels,
    checked_splits,
    fingerprint,
)
from mtt_fast.data.listing import RESTORE
from mtt_fast.data.set_checks import check_names, check_normalisation
from mtt_fast.errors import InputError
from mtt_fast.storage.atomic import atomic_path, naming_errors
from mtt_fast.storage.file_locks import acquire, remove
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.regular import unreadable
from mtt_fast.storage.temporaries import made_folder, remove_leftovers
from mtt_fast.storage.tensor_files import header_of, load_tensors
from mtt_fast.storage.text_files import MALFORMED, parse_json

VERSION = 2  # of the packed content; raise it when the same source is packed differently
_FORMAT = "mtt_fast data set 2"  # files without checksums have no format field

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One split while it is read: all labels, and the images in blocks, which are decoded lazily."""

    labels: np.ndarray[Any, np.dtype[np.int64]]  # (n,)
    blocks: Iterable[np.ndarray[Any, np.dtype[np.uint8]]]  # (k, C, H, W) each, n images in all


@dataclass(frozen=True)
class Contents:
    """A whole data set while it is read."""

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # (C, H, W)
    train: Part
    test: Part


@dataclass(frozen=True)
class Source:
    """A data set whose files are found, but not read yet.

    `stem` is the name of its packed file without suffix. `key` identifies its content. If `mean` and `std` are None, they are
    computed from the training images. `info` counts the images without decoding them; without it the published numbers hold.
    """

    name: str
    stem: str
    key: str
    read: Callable[[], Contents]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    info: Callable[[], DatasetInfo] | None = None


def key_of(root: Path, files: Iterable[str | Path], *settings: object) -> str:
    """Return a digest of the names (relative to `root`), sizes and modification times of `files`, and of `settings`.

    No file is opened. Raises `InputError` if one is missing.
    """
    digest = hashlib.blake2b(json.dumps([VERSION, *map(str, settings)]).encode(), digest_size=16)
    prefix = len(str(root)) + 1
    for file in files:
        try:
            status = os.stat(file)
        except OSError as error:
            raise unreadable(file, error, RESTORE) from error
        digest.update(
            f"{str(file)[prefix:]}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape")
        )
    return digest.hexdigest()


def packed(source: Source, folder: Path, *, progress: bool) -> ImageData:
    """Return the data set of `source` from its packed file in `folder`, which is written first if missing, damaged or out of date.

    One process packs, and others wait for it. Raises `InputError` if the source is damaged or the file cannot be written; then no
    partial file is left.
    """
    path = folder / f"{source.stem}.safetensors"
    remove_leftovers(folder)
    if (data := _open(path, source.key)) is not None:
        return data
    check_output_folder(folder, "choose another `packed_path`")  # before the source is read, which may take long
    with naming_errors(path), made_folder(folder), _locked(path) as has_waited:
        if has_waited and (data := _open(path, source.key)) is not None:
            return data
        _pack(source, path, progress=progress)
        data = _open(path, source.key)
    if data is None:
        raise InputError(
            f"{path}: expected the file just packed, found another; is a second job packing from other files?"
        )
    return data


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Keep other processes from packing `path` within the block; yield whether another one did so before."""
    lock, has_waited = FileLock(path.with_name(f".{path.name}.lock")), False
    try:
        acquire(lock, timeout=0)
    except Timeout:
        log.info("%s: waiting for another process, which packs it", path)
        acquire(lock)
        has_waited = True
    try:
        yield has_waited
    finally:
        remove(lock)


def _open(path: Path, key: str) -> ImageData | None:
    """Return the data set in the packed file, memory-mapped; None, with a warning, if the file cannot be used."""
    if not path.exists():
        return None
    try:
        tensors, metadata = load_tensors(path)
        if metadata.get("format") != _FORMAT:
            log.warning("%s: no packed data set of this version; packing its source again", path)
            return None
        if metadata["key"] != key:
            log.warning("%s: its source files or settings have changed; packing them again", path)
            return None
        train, test = checked_splits(
            (tensors["train.images"], tensors["train.labels"]), (tensors["test.images"], tensors["test.labels"])
        )
        class_names, mean, std = (tuple(parse_json(metadata[name])) for name in ("class_names", "mean", "std"))
        check_names(class_names, path)
        check_split_labels(str(path), train.labels, test.labels, class_names)
        check_normalisation(mean, std, train.images.shape[1], path)
        return ImageData(metadata["name"], class_names, mean, std, train, test, metadata["fingerprint"], path)
    except InputError as error:
        log.warning("%s; packing its source again", error)
    except MALFORMED as error:
        log.warning("%s: no packed data set (%s: %s); packing its source again", path, type(error).__name__, error)
    return None


def _pack(source: Source, path: Path, *, progress: bool) -> None:
    """Stream the source into a safetensors file: labels, images, and at last the header, for which space is reserved.

    The checksums are computed before writing, so that an error of the disk is found when the file is opened. Only a few blocks are
    in memory at once: ImageNet at 128 pixels (63 GB) needs no more memory than MNIST.
    """
    contents = source.read()
    parts = {"train": contents.train, "test": contents.test}
    labels = {name: torch.from_numpy(part.labels) for name, part in parts.items()}
    check_split_labels(source.name, labels["train"], labels["test"], contents.class_names)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{name}.labels": ("I64", (len(part.labels),)) for name, part in parts.items()
    } | {f"{name}.images": ("U8", (len(part.labels), *contents.image_shape)) for name, part in parts.items()}
    info = {
        "format": _FORMAT, "name": source.name, "key": source.key, "class_names": json.dumps(contents.class_names)
    }  # fmt: skip
    digests = {name: xxhash.xxh3_128() for name in shapes}
    # with space for mean, std and fingerprint, which are known last; a multiple of 8, as the format requires
    room = len(header_of(shapes, info, _checksums(digests))) + 1024 + 64 * contents.image_shape[0]

    total = sum(len(part.labels) for part in parts.values())
    with (
        atomic_path(path) as temporary,
        open(temporary, "rb+") as file,
        tqdm(total=total, desc=f"packing {source.name}", unit="image", disable=None if progress else True) as bar,
    ):
        file.seek(room)
        for name, part in parts.items():
            _write(file, digests[f"{name}.labels"], part.labels.astype("<i8"))
        for name, part in parts.items():
            for block in part.blocks:
                _write(file, digests[f"{name}.images"], block)
                bar.update(len(block))
        file.flush()
        splits = _splits(temporary, room, shapes)
        mean, std = source.mean, source.std
        if mean is None or std is None:
            mean, std = channel_statistics(splits["train"].images)
        info["mean"], info["std"] = json.dumps(mean), json.dumps(std)
        info["fingerprint"] = fingerprint(splits["train"], splits["test"], contents.class_names, mean, std)
        _write_header(file, header_of(shapes, info, _checksums(digests)), room)


def _write(file: BinaryIO, digest: xxhash.xxh3_128, values: np.ndarray[Any, Any]) -> None:
    content = np.ascontiguousarray(values).data
    file.write(content)
    digest.update(content)


def _checksums(digests: Mapping[str, xxhash.xxh3_128]) -> dict[str, list[str]]:
    return {name: [digest.hexdigest()] for name, digest in digests.items()}


def _write_header(file: BinaryIO, header: bytes, room: int) -> None:
    text = header[8:].ljust(room - 8)  # the format allows trailing spaces
    file.seek(0)
    file.write(struct.pack("<Q", len(text)) + text)


def _splits(path: Path, offset: int, shapes: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Split]:
    """Return the memory-mapped splits of a file whose header is not written yet; `offset` is the size of the header."""
    arrays = {}
    for name, (dtype, shape) in shapes.items():
        arrays[name] = torch.from_numpy(np.memmap(path, "<i8" if dtype == "I64" else np.uint8, "c", offset, shape))
        offset += arrays[name].nbytes
    return {name: Split(arrays[f"{name}.images"], arrays[f"{name}.labels"]) for name in ("train", "test")}


def stack_labels(counts: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the labels of images sorted by class: 0 `counts[0]` times, 1 `counts[1]` times, …"""
    return np.repeat(np.arange(len(counts), dtype=np.int64), counts)
