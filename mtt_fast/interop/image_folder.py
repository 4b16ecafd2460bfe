"""Distilled sets as image folders: CLASS/NNNNN.png and labels.json. See picture_record.py for what pictures lose.

labels.json holds `files`, `labels` in the same order (class indices or soft labels), and the properties of the set. A folder
without it, as other methods write them, has hard labels: the classes that its folders are named after, in any of the
spellings that `class_indices` knows.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtt_fast.checks import shown
from mtt_fast.data.class_names import abbreviated, class_indices
from mtt_fast.data.images import as_image, decode, read_headers
from mtt_fast.data.listing import list_classes, log_skipped
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.errors import InputError
from mtt_fast.interop.picture_record import BEFORE_CHECKSUMS, FORMAT, as_bytes, check_size, from_pictures, record_of
from mtt_fast.interop.tensor_set import SourceInfo, as_synthetic, tensor_set
from mtt_fast.storage.atomic import atomic_folder
from mtt_fast.storage.foreign import LARGEST_TEXT, names_in, read_json
from mtt_fast.storage.text_files import write_json

log = logging.getLogger(__name__)

LABELS = "labels.json"
_MAX_NAME = 500  # letters of CLASS/NNNNN.png


def write_image_folder(folder: str | os.PathLike[str], synthetic: SyntheticDataset) -> list[Path]:
    """Write each image as CLASS/NNNNN.png, NNNNN its place in the set, then labels.json, and return the files.

    Raises `InputError` for soft labels that are too many for labels.json, and where other pictures are already.
    """
    pictures, files = as_bytes(synthetic, folder), []
    digits = max(3, len(str(len(synthetic.class_names) - 1)))  # readers number the classes in the order of their names
    with atomic_folder(folder, last=LABELS) as content:
        for number, (picture, label) in enumerate(zip(pictures, synthetic.classes.tolist(), strict=True)):
            files.append(f"{label:0{digits}d}-{_file_name(synthetic.class_names[label])}/{number:05d}.png")
            (content / files[-1]).parent.mkdir(exist_ok=True)
            as_image(picture.float() / 255).save(content / files[-1], format="PNG")
        if others := {str(path.relative_to(folder)) for path in Path(folder).glob("*/*.png")}.difference(files):
            raise InputError(
                f"{folder}: expected no other pictures, which readers would take for the set's, found {min(others)}; choose another folder, "
                "or delete them"
            )
        kept = {"files": files, "labels": synthetic.labels.tolist()}
        write_json(content / LABELS, record_of(synthetic, pictures) | kept)
        if (size := (content / LABELS).stat().st_size) > LARGEST_TEXT:
            raise InputError(
                f"{folder}: not written: expected labels that take at most {LARGEST_TEXT:,} bytes of {LABELS}, found {size:,}; use `to` parquet"
            )
    return [Path(folder) / name for name in (*files, LABELS)]


def read_image_folder(
    folder: str | os.PathLike[str], info: SourceInfo | None = None, lr: float = 0.01
) -> SyntheticDataset:
    """Read the pictures in `folder` as a distilled set.

    `info` of the real images gives the whitening of a whitened set. For a folder without labels.json it gives all the
    properties, and `lr` is the learning rate. Raises `InputError` for a folder that holds no set, or needs properties that are not given.
    """
    folder = Path(folder)
    if LABELS not in names_in(folder):
        return _read_classes(folder, info, lr)
    files, labels, record = _read_record(folder / LABELS)
    return from_pictures(_pictures([str(folder / name) for name in files]), labels, record, info, folder / LABELS)


def _read_record(path: Path) -> tuple[list[str], list[Any], dict[str, Any]]:
    """Return the files, their labels, and the record that they are in. Raises `InputError` for a broken one."""
    record = read_json(path)
    try:
        form, files, labels = record["format"], record["files"], record["labels"]
        are_names = isinstance(files, list) and all(isinstance(name, str) for name in files)
        if not are_names or not isinstance(labels, list):
            raise TypeError("its files are no list of names, or its labels no list")
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: expected the labels of pictures, found a broken file ({error})") from error
    if form not in (FORMAT, BEFORE_CHECKSUMS):
        raise InputError(
            f"{path}: expected the format {FORMAT!r}, found {shown(form)}; write it again with this version"
        )
    if not files or len(files) != len(labels):
        raise InputError(f"{path}: expected a label for each file, found {len(files)} and {len(labels)}")
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts or len(name) > _MAX_NAME:
            raise InputError(
                f"{path}: expected files in its own folder, found {shown(name)[1:-1]}; it is not from mtt_fast, or damaged"
            )
    return files, labels, record


def _read_classes(folder: Path, info: SourceInfo | None, lr: float) -> SyntheticDataset:
    if info is None:
        raise InputError(
            f"{folder}: expected {LABELS}, which says how its pictures are normalised, found none; name the real images "
            "with `dataset` and `data_path`"
        )
    listing = list_classes(folder, folder)
    log_skipped(str(folder), listing)
    classes = {name: files for name, files in listing.classes.items() if files}
    files = [file for files in classes.values() for file in files]
    if not files:
        raise InputError(f"{folder}: expected images in a folder a class, found none; check the path")
    indices = class_indices(list(classes), info.class_names, folder)
    if missing := [name for index, name in enumerate(info.class_names) if index not in indices]:
        log.warning("%s: no pictures of %d classes: %s", folder, len(missing), abbreviated(missing))
    counts = torch.tensor([len(files) for files in classes.values()], device="cpu")
    labels = torch.tensor(indices, device="cpu").repeat_interleave(counts)
    images = info.transform.apply(_pictures(files).float() / 255)
    return as_synthetic(tensor_set(images, labels, None, str(folder)), info, lr, {}, {}, str(folder))


def _pictures(files: list[str]) -> Tensor:
    """Return image files of one size as uint8 (n, C, H, W), C = 1 if all are grey."""
    header = read_headers(files, None, resize=False)
    check_size(header.size, files[0])
    shape = (1 if header.grey else 3, *header.size)
    return torch.from_numpy(np.concatenate(list(decode(files, shape, fit="exact"))))


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)
