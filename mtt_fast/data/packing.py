"""One data set, one file: decoded once into safetensors, afterwards only memory-mapped, and checked at each opening.

A reader (cifar.py, folder.py, …) describes its data set as a `Source`: a key that is cheap to compute from the files it
would read, and a function that reads them. `packed` opens the file if it was made from that key, or makes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from tqdm import tqdm

from mtt_fast.data.image_data import DatasetInfo, ImageData, Split, channel_statistics, check_labels, fingerprint
from mtt_fast.errors import InputError, reason_of, remedy_for
from mtt_fast.storage.files import MALFORMED, atomic_path, header_of, load_tensors, parse_json
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.temporaries import remove_leftovers

VERSION = 1  # of the packed files; raise it when the same source packs to something else
_FORMAT = "mtt_fast data set 2"  # those from before there were checksums say nothing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One split while it is read: all labels, and the images in blocks, decoded as they are asked for."""

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
    """A data set whose files are known, but not read yet.

    `stem` names its packed file; `key` tells its content from any other. `mean` and `std` None: computed from the training
    images. `info` counts the images, decoding nothing; without it their numbers are the published ones.
    """

    name: str
    stem: str
    key: str
    read: Callable[[], Contents]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    info: Callable[[], DatasetInfo] | None = None


def key_of(root: Path, files: Iterable[str | Path], *settings: object) -> str:
    """Return a digest of the names (below `root`), sizes and modification times of `files`, and of `settings`.

    No file is opened. Raises `InputError` if one cannot be found.
    """
    digest = hashlib.blake2b(json.dumps([VERSION, *map(str, settings)]).encode(), digest_size=16)
    prefix = len(str(root)) + 1
    for file in files:
        try:
            status = os.stat(file)
        except OSError as error:
            remedy = remedy_for(error, "restore it, or remove its link")
            raise InputError(f"{file}: cannot be read ({reason_of(error)}); {remedy}") from error
        digest.update(
            f"{str(file)[prefix:]}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape")
        )
    return digest.hexdigest()


def packed(source: Source, folder: Path, *, progress: bool) -> ImageData:
    """Return the data set of `source` from its packed file in `folder`, made first if it is missing, broken or out of date.

    Two processes may do so at once: each writes a file of its own, and the last to finish gives it the name.
    Raises `InputError` if the source is bad or the file cannot be written; then nothing is left half-written.
    """
    path = folder / f"{source.stem}.safetensors"
    remove_leftovers(folder)
    if (data := _open(path, source.key)) is not None:
        return data
    _pack(source, path, progress=progress)
    data = _open(path, source.key)
    if data is None:
        raise InputError(
            f"{path}: expected the file just packed, found another; is a second job packing from other files?"
        )
    return data


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
        return ImageData(
            name=metadata["name"],
            class_names=tuple(parse_json(metadata["class_names"])),
            mean=tuple(parse_json(metadata["mean"])),
            std=tuple(parse_json(metadata["std"])),
            train=Split(tensors["train.images"], tensors["train.labels"]),
            test=Split(tensors["test.images"], tensors["test.labels"]),
            fingerprint=metadata["fingerprint"],
            path=path,
        )
    except InputError as error:
        log.warning("%s; packing its source again", error)
    except MALFORMED as error:
        log.warning("%s: no packed data set (%s: %s); packing its source again", path, type(error).__name__, error)
    return None


def _pack(source: Source, path: Path, *, progress: bool) -> None:
    """Stream the source into a safetensors file: labels, then images, then the header, for which room was left.

    The checksums are of what was given to be written, so that an error of the disk shows when the file is opened.
    Nothing but a few blocks is ever in memory, so the 63 GB of ImageNet at 128 pixels need no more of it than MNIST.
    """
    check_output_folder(path.parent, "choose another `packed_path`")  # the source may take long to read
    contents = source.read()
    parts = {"train": contents.train, "test": contents.test}
    labels = {name: torch.from_numpy(part.labels) for name, part in parts.items()}
    check_labels(source.name, labels["train"], labels["test"], contents.class_names)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{name}.labels": ("I64", (len(part.labels),)) for name, part in parts.items()
    } | {f"{name}.images": ("U8", (len(part.labels), *contents.image_shape)) for name, part in parts.items()}
    info = {
        "format": _FORMAT, "name": source.name, "key": source.key, "class_names": json.dumps(contents.class_names)
    }  # fmt: skip
    digests = {name: xxhash.xxh3_128() for name in shapes}
    # mean, std, fingerprint are known last; a multiple of 8, as the format wants aligned data
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
    text = header[8:].ljust(room - 8)  # the format allows spaces after the JSON
    file.seek(0)
    file.write(struct.pack("<Q", len(text)) + text)


def _splits(path: Path, offset: int, shapes: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Split]:
    """Return the splits, memory-mapped, of a file whose header is still to be written."""
    arrays = {}
    for name, (dtype, shape) in shapes.items():
        arrays[name] = torch.from_numpy(np.memmap(path, "<i8" if dtype == "I64" else np.uint8, "c", offset, shape))
        offset += arrays[name].nbytes
    return {name: Split(arrays[f"{name}.images"], arrays[f"{name}.labels"]) for name in ("train", "test")}


def stack_labels(counts: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the labels of images sorted by class: 0 `counts[0]` times, 1 `counts[1]` times, …"""
    return np.repeat(np.arange(len(counts), dtype=np.int64), counts)
