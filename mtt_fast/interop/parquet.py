"""Distilled sets as parquet files, laid out as the library `datasets` and the hub lay out images.

Columns: `image` {bytes: PNG, path}, `label` (the class), and `soft_label` where labels are soft. `datasets` reads the
features from the schema: `load_dataset("parquet", data_files=…)` decodes images and names classes. Files that it writes
itself lack the record of the set. See picture_record.py for what pictures lose. Needs pyarrow: pip install 'mtt-fast[parquet]'.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtt_fast.data.class_names import class_indices, relabelled
from mtt_fast.data.images import as_image, decode_bytes, read_header
from mtt_fast.data.set_checks import LABEL_KINDS
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.errors import InputError
from mtt_fast.interop.picture_record import as_bytes, check_size, from_pictures, record_of
from mtt_fast.interop.tensor_set import SourceInfo, as_synthetic, label_warnings, tensor_set
from mtt_fast.storage.atomic import atomic_path
from mtt_fast.storage.foreign import LARGEST_FILE, as_tensor, complaint_of, largest_unpacked
from mtt_fast.storage.regular import check_regular
from mtt_fast.storage.text_files import parse_json

log = logging.getLogger(__name__)

_RECORD = b"mtt_fast"
_COLUMNS = ("image", "label", "soft_label")
_BATCH = 1024  # rows


def write_parquet(path: str | os.PathLike[str], synthetic: SyntheticDataset) -> list[Path]:
    """Write the set to one file, atomically, and return it. Raises `InputError` if pyarrow is not installed."""
    arrow, parquet = _pyarrow(path)
    pictures = as_bytes(synthetic, path)
    names = [f"{number:05d}.png" for number in range(len(pictures))]
    encoded = [_encode(picture) for picture in pictures]
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    pairs = [{"bytes": content, "path": name} for content, name in zip(encoded, names, strict=True)]
    columns = {
        "image": arrow.array(pairs, image),
        "label": arrow.array(synthetic.classes.tolist(), arrow.int64()),
    }
    if synthetic.label_kind != "indices":
        columns["soft_label"] = arrow.array(synthetic.labels.tolist(), arrow.list_(arrow.float32()))
    metadata = {
        b"huggingface": json.dumps({"info": {"features": _features(synthetic, "soft_label" in columns)}}),
        _RECORD: json.dumps(record_of(synthetic, pictures)),
    }
    with atomic_path(path) as temporary:
        table = arrow.table(columns).replace_schema_metadata(metadata)
        parquet.write_table(table, temporary, write_page_checksum=True)
    return [Path(path)]


def read_parquet(
    path: str | os.PathLike[str], info: SourceInfo | None = None, lr: float = 0.01, label_kind: str | None = None
) -> SyntheticDataset:
    """Read a distilled set from a parquet file with columns `image` and `label`, and perhaps `soft_label`.

    `info` of the real images gives the whitening of a whitened set; for a file that `write_parquet` did not write it
    gives all the properties, and `lr` the learning rate; its labels are matched by the names of its classes, if it has any,
    and its soft labels are of `label_kind`, or of the kind that they look like.
    Raises `InputError` for a broken or foreign file, where properties are needed and not given, and if pyarrow is not installed.
    """
    arrow, parquet = _pyarrow(path)
    path = Path(path)
    check_regular(path, LARGEST_FILE)
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _check_columns(file, path)
            contents, classes, soft = _columns(file, path)
            metadata = file.schema_arrow.metadata or {}
        record = parse_json(metadata.get(_RECORD, b"null"))
        labels, names = _labels(classes, parse_json(metadata.get(b"huggingface", b"{}")))
    except InputError:
        raise
    except (OSError, arrow.ArrowException, ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(
            f"{path}: expected columns image (bytes, path) and label, found a broken or foreign file ({complaint_of(error)}); get it "
            "again"
        ) from error
    if record is not None:
        if label_kind is not None:
            _check_kind_unknown(record, label_kind, path)
        return from_pictures(_decode(contents, path), labels if soft is None else soft, record, info, path)
    if info is None:
        raise InputError(
            f"{path}: another program's file, which does not say how its pictures are normalised; name the real images "
            "with `dataset` and `data_path`"
        )
    try:
        places = as_tensor(labels, torch.int64)
        targets = places if soft is None else as_tensor(soft, torch.float32)
    except ValueError as error:
        raise InputError(
            f"{path}: expected a label for each image, found others ({error}); correct the column"
        ) from error
    if names:
        indices = class_indices(names, info.class_names, path)
        places, targets = (relabelled(each, indices, len(info.class_names), path) for each in (places, targets))
    if soft is not None:  # then the order of a set tells the classes of its images
        order = places.argsort(stable=True)
        contents, targets = [contents[place] for place in order.tolist()], targets[order]
    images = info.transform.apply(_decode(contents, path).float() / 255)
    distilled = tensor_set(images, targets, None, str(path), label_kind)
    for line in label_warnings(path, distilled):
        log.warning("%s", line)
    return as_synthetic(distilled, info, lr, {}, {}, str(path))


def _check_columns(file: Any, path: Path) -> None:
    """Raise `InputError` unless the file has the columns, and claims no more than it may decode to."""
    size = _claimed_bytes(file)
    if file.metadata.num_rows < 1 or size > largest_unpacked(path.stat().st_size):
        raise InputError(
            f"{path}: expected images with labels, found {file.metadata.num_rows:,} rows that claim {size:,} bytes in a file of "
            f"{path.stat().st_size:,}; it is empty or damaged"
        )
    leaves = {file.schema.column(place).path for place in range(len(file.schema))}
    if not {"image.bytes", "label"} <= leaves:
        raise InputError(
            f"{path}: expected columns image (bytes, path) and label, found {', '.join(sorted(leaves)[:4]) or 'none'}; it is "
            "another file"
        )


def _claimed_bytes(file: Any) -> int:
    """Return the number of bytes to which the file says that it decodes."""
    return sum(file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))


def _columns(file: Any, path: Path) -> tuple[list[bytes], list[Any], list[Any] | None]:
    """Return the encoded images, their classes, and their soft labels if there are any."""
    columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
    rows = list(_rows(file, columns, path))
    if len(rows) != file.metadata.num_rows:
        raise ValueError(f"{len(rows)} rows, not {file.metadata.num_rows}")
    soft = [row["soft_label"] for row in rows] if "soft_label" in columns else None
    return [row["image"]["bytes"] for row in rows], [row["label"] for row in rows], soft


def _rows(file: Any, columns: list[str], path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows, each with the bytes of an image. Raises `InputError` once they take more than a file may unpack to.

    With a dictionary each row may be as large as the whole file says to be, so the rows that are decoded at once are few
    enough to fit even then.
    """
    most = largest_unpacked(path.stat().st_size)
    total = number = 0
    for batch in file.iter_batches(min(_BATCH, max(1, most // max(1, _claimed_bytes(file)))), columns=columns):
        for row in batch.to_pylist():
            content = row["image"]["bytes"] if isinstance(row["image"], dict) else None
            if not isinstance(content, bytes):
                raise InputError(
                    f"{path}: row {number}: expected the bytes of an image, found none; put the images into the file, or "
                    "name their folder itself"
                )
            total, number = total + len(content), number + 1
            if total > most:
                raise InputError(f"{path}: expected at most {most:,} bytes of images, found more; it is damaged")
            yield row


def _pyarrow(path: str | os.PathLike[str]) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"{path}: expected pyarrow, which parquet files need; pip install 'mtt-fast[parquet]'"
        ) from error
    return pyarrow, pyarrow.parquet


def _features(synthetic: SyntheticDataset, soft: bool) -> dict[str, Any]:
    """Describe the columns as `datasets` does."""
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": list(synthetic.class_names), "_type": "ClassLabel"},
    }
    if soft:
        features["soft_label"] = {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"}
    return features


def _encode(picture: Tensor) -> bytes:
    file = io.BytesIO()
    as_image(picture.float() / 255).save(file, format="PNG")
    return file.getvalue()


def _labels(classes: list[Any], described: Any) -> tuple[list[Any], list[str] | None]:
    """Return the labels, and the names of the classes that they count, where they are names or are `described` by such."""
    if all(isinstance(label, str) for label in classes):
        names = sorted(set(classes))
        places = {name: place for place, name in enumerate(names)}
        return [places[label] for label in classes], names
    names = described.get("info", {}).get("features", {}).get("label", {}).get("names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise TypeError("the names of its classes are no list of names")
    return classes, names


def _check_kind_unknown(record: Any, label_kind: str, path: Path) -> None:
    """Raise `InputError` if the record says of which kind the labels are. A record that says nothing valid is left to its reader."""
    known = record.get("label_kind") if isinstance(record, dict) else None
    if known in LABEL_KINDS:
        raise InputError(
            f"`label_kind` {label_kind}: has no effect on {path}, whose labels are known to be {known}; leave it out"
        )


def _decode(contents: list[bytes], path: Path) -> Tensor:
    """Return encoded images of one size as uint8 (n, C, H, W), C = 1 if all are grey."""
    names = [f"{path}, image {number}" for number in range(len(contents))]
    check_size(read_header(contents[0], names[0]).size, names[0])  # all others must have it, too
    return torch.from_numpy(decode_bytes(contents, names))
