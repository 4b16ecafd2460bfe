"""Distilled sets as parquet files, laid out as the library `datasets` and the hub lay out images.

Columns: `image` {bytes: PNG, path}, `label` (the class), and `soft_label` where labels are soft. `datasets` reads the
features from the schema: `load_dataset("parquet", data_files=…)` decodes images and names classes. See
picture_record.py for what pictures lose. Needs pyarrow: pip install 'mtt-fast[parquet]'.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtt_fast.data.class_names import class_indices, relabelled
from mtt_fast.data.images import decode_bytes
from mtt_fast.errors import InputError
from mtt_fast.files import atomic_path
from mtt_fast.interop.picture_record import as_bytes, from_pictures, record_of
from mtt_fast.interop.plain import Facts, as_plain, as_synthetic, plain_set
from mtt_fast.synthetic import SyntheticDataset

_RECORD = b"mtt_fast"


def write_parquet(path: str | os.PathLike[str], synthetic: SyntheticDataset) -> list[Path]:
    """Write the set to one file, atomically, and return it. Raises `InputError` if pyarrow is not installed."""
    arrow, parquet = _pyarrow(path)
    found = as_plain(synthetic)
    names = [f"{number:05d}.png" for number in range(len(found.labels))]
    encoded = [_encode(picture) for picture in as_bytes(synthetic)]
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    pairs = [{"bytes": content, "path": name} for content, name in zip(encoded, names, strict=True)]
    columns = {
        "image": arrow.array(pairs, image),
        "label": arrow.array(found.classes.tolist(), arrow.int64()),
    }
    if found.label_kind != "indices":
        columns["soft_label"] = arrow.array(found.labels.tolist(), arrow.list_(arrow.float32()))
    metadata = {
        b"huggingface": json.dumps({"info": {"features": _features(synthetic, "soft_label" in columns)}}),
        _RECORD: json.dumps(record_of(synthetic)),
    }
    with atomic_path(path) as temporary:
        parquet.write_table(arrow.table(columns).replace_schema_metadata(metadata), temporary)
    return [Path(path)]


def read_parquet(path: str | os.PathLike[str], facts: Facts | None = None, lr: float = 0.01) -> SyntheticDataset:
    """Read a distilled set from a parquet file with columns `image` and `label`, and perhaps `soft_label`.

    `facts` of the real images give the whitening of a whitened set; for a file that `write_parquet` did not write they
    give all the facts, and `lr` the learning rate; its labels go by the names of its classes, where it has such. Raises `InputError` for a broken or foreign file, where facts are
    needed and not given, and if pyarrow is not installed.
    """
    arrow, parquet = _pyarrow(path)
    try:
        table = parquet.read_table(path)
        pictures = _decode([row["bytes"] for row in table["image"].to_pylist()], path)
        labels, names = _labels(table)
        record = json.loads((table.schema.metadata or {}).get(_RECORD, "null"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); check the path") from error
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, arrow.ArrowException) as error:
        raise InputError(
            f"{path}: expected columns image (bytes, path) and label, found a broken or foreign file ({error})"
        ) from error
    if record is not None:
        return from_pictures(pictures, labels, record, facts, path)
    if facts is None:
        raise InputError(
            f"{path}: another program's file, which does not say how its pictures are normalised; name the real images "
            "with --dataset and --data_path"
        )
    if names:
        labels = relabelled(labels, class_indices(names, facts.class_names, path), len(facts.class_names), path)
    images = facts.transform.apply(pictures.float() / 255)
    return as_synthetic(plain_set(images, labels, None, str(path)), facts, lr, {}, {})


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
    from mtt_fast.pictures import as_image

    file = io.BytesIO()
    as_image(picture.float() / 255).save(file, format="PNG")
    return file.getvalue()


def _labels(table: Any) -> tuple[Tensor, list[str] | None]:
    """Return the labels, and the names of the classes that they count, where the file has them."""
    features = json.loads((table.schema.metadata or {}).get(b"huggingface", "{}")).get("info", {}).get("features", {})
    names = features.get("label", {}).get("names")
    classes = table["label"].to_pylist()
    if classes and all(isinstance(label, str) for label in classes):
        names = sorted(set(classes))
        classes = [names.index(label) for label in classes]
    if "soft_label" in table.column_names:
        return torch.tensor(table["soft_label"].to_pylist(), dtype=torch.float32), names
    return torch.tensor(classes, dtype=torch.int64), names


def _decode(contents: list[bytes], path: str | os.PathLike[str]) -> Tensor:
    """Return encoded images of one size as uint8 (n, C, H, W), C = 1 if all are grey."""
    return torch.from_numpy(decode_bytes(contents, [f"{path}, image {number}" for number in range(len(contents))]))
