"""The record that goes with 8-bit pictures of a distilled set, so that the set can be made from them again.

Pictures lose what lies outside [0, 1] and between 255ths: a set read from them has the same pictures, exactly, but not
the same images. Networks are trained on the tensors; pictures are for people, and for software that takes nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import torch
from torch import Tensor

from mtt_fast.augmentation.texture import Canvas
from mtt_fast.checks import shown
from mtt_fast.data import Normalisation
from mtt_fast.data.class_names import class_indices, relabelled
from mtt_fast.data.set_checks import check_normalisation, check_set
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.errors import InputError
from mtt_fast.interop.tensor_set import SourceInfo
from mtt_fast.runtime.tensor_bytes import bytes_of
from mtt_fast.storage.checksums import checksum_of
from mtt_fast.storage.foreign import as_tensor
from mtt_fast.storage.identity import check_same_data

_PLAIN = ("class_names", "mean", "std", "label_kind", "recipe", "versions")
_IDENTITY_FIELDS = ("dataset", "fingerprint")
_RECORDED = (*_PLAIN, *_IDENTITY_FIELDS, "lr", "lr_per_step", "canvas", "whitened")
_CHECKSUM = "checksum"
FORMAT = "mtt_fast pictures 2"
BEFORE_CHECKSUMS = "mtt_fast pictures 1"
"""The formats that a record of pictures may name."""
LARGEST_SIDE = 4096
"""Pixels of a distilled picture, canvases included: a larger one is refused before it is decoded."""


def as_bytes(synthetic: SyntheticDataset, where: str | os.PathLike[str]) -> Tensor:
    """Return the pictures of a set as uint8 (n, C, H, W), rounded to nearest.

    Raises `InputError`, which begins with `where`, if they have other channels than a grey or a colour picture.
    """
    channels = synthetic.images.shape[1]
    if channels not in (1, 3):
        raise InputError(
            f"{where}: expected images of 1 or 3 channels, as pictures have, found {channels}; use `to` mtt"
        )
    return (synthetic.to("cpu").pictures() * 255).round().byte()


def record_of(synthetic: SyntheticDataset, pictures: Tensor) -> dict[str, Any]:
    """Return the record, ready for JSON, that a reader needs besides the labels and the `pictures` that `as_bytes` returned."""
    info = {name: getattr(synthetic, name) for name in (*_PLAIN, *_IDENTITY_FIELDS)} | {
        "lr": synthetic.lr.tolist(),
        "lr_per_step": None if synthetic.lr_per_step is None else synthetic.lr_per_step.tolist(),
        "canvas": None if synthetic.canvas is None else dataclasses.asdict(synthetic.canvas),
        "whitened": synthetic.whitening is not None,
    }
    record: dict[str, Any] = json.loads(json.dumps(info))  # as it comes back
    return {"format": FORMAT, **record} | {_CHECKSUM: _checksum(record, synthetic.labels.detach().cpu(), pictures)}


def from_pictures(
    pictures: Tensor, labels: Any, record: Any, info: SourceInfo | None, where: str | os.PathLike[str]
) -> SyntheticDataset:
    """Return the set of `pictures` uint8 (n, C, H, W), with `labels`, lists, and the `record` that was written with them.

    The whitening of a set that was whitened comes from `info`, and so does the order of the classes: labels go by the
    names of the record's. Raises `InputError` if the whitening is not there, the properties are of other images, the names are
    those of other classes, or the record is broken or of other labels or pictures.
    """
    try:
        fields = _fields(record, labels)
        check_normalisation(fields["mean"], fields["std"], pictures.shape[1], "its pictures")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: expected the record of a distilled set, found it broken ({error})") from error
    whitening = info.whitening if info and record["whitened"] else None
    if record["whitened"] and whitening is None:
        raise InputError(
            f"{where}: the set was whitened, and pictures do not hold the whitening; give the real images with "
            "`dataset`, `data_path` and `zca`"
        )
    transform = whitening or Normalisation(fields["mean"], fields["std"])
    synthetic = SyntheticDataset(transform.apply(pictures.float() / 255), whitening=whitening, **fields)
    check_set(synthetic, where)
    recorded = {name: record[name] for name in _RECORDED if name in record}
    before = record.get("format") in (None, BEFORE_CHECKSUMS) and _CHECKSUM not in record
    if not before and record.get(_CHECKSUM) != _checksum(recorded, synthetic.labels, pictures):
        raise InputError(f"{where}: damaged: its checksum is of other labels or pictures; get or make the set again")
    if info is None:
        return synthetic
    if synthetic.class_names != info.class_names:
        synthetic = _in_classes_of(synthetic, info, where)
    check_same_data(synthetic.identity, info.identity, where)
    return synthetic


def _in_classes_of(synthetic: SyntheticDataset, info: SourceInfo, where: str | os.PathLike[str]) -> SyntheticDataset:
    """Return the set with its classes, and its images by class, in the order of `info`."""
    indices = class_indices(synthetic.class_names, info.class_names, where)
    labels = relabelled(synthetic.labels, indices, len(info.class_names), where)
    order = relabelled(synthetic.classes, indices, len(info.class_names), where).argsort(stable=True)
    return dataclasses.replace(
        synthetic, images=synthetic.images[order], labels=labels[order], class_names=info.class_names
    )


def _fields(record: Any, labels: Any) -> dict[str, Any]:
    """Return the fields of a set, except its images and whitening, from its record and lists of labels."""
    # older parquet files have none
    if record.get("format") not in (None, FORMAT, BEFORE_CHECKSUMS):
        raise ValueError(f"its format is {shown(record['format'])}, not {FORMAT!r}")
    fields = {name: record[name] for name in _PLAIN} | {name: str(record.get(name, "")) for name in _IDENTITY_FIELDS}
    for name in ("class_names", "mean", "std"):
        if not isinstance(fields[name], list):
            raise TypeError(f"{name} is no list")
        fields[name] = tuple(fields[name])
    if not isinstance(record["whitened"], bool):
        raise TypeError("whitened is neither true nor false")
    fields["labels"] = as_tensor(labels, torch.int64 if record["label_kind"] == "indices" else torch.float32)
    fields["lr"] = as_tensor([record["lr"]], torch.float32).reshape(())
    if record["lr_per_step"] is not None:
        fields["lr_per_step"] = as_tensor(record["lr_per_step"], torch.float32)
    if record.get("canvas") is not None:  # older files lack it
        fields["canvas"] = Canvas(**record["canvas"])
    return fields


def check_size(size: tuple[int, int], where: str | os.PathLike[str]) -> None:
    """Raise `InputError`, which begins with `where`, for a picture of a `size` larger than any distilled one."""
    if max(size) > LARGEST_SIDE:
        raise InputError(
            f"{where}: expected a distilled picture of at most {LARGEST_SIDE} pixels a side, found {size[1]}x{size[0]}; is it "
            "another file?"
        )


def _checksum(record: dict[str, Any], labels: Tensor, pictures: Tensor) -> str:
    """Return the checksum of everything that is written; it reveals a flipped bit or an exchanged picture."""
    text = json.dumps(record, sort_keys=True).encode()
    held = labels.contiguous(), pictures.contiguous()  # bytes are valid as long as their tensor lives
    return checksum_of(text, *map(bytes_of, held))
