"""What goes with 8-bit pictures of a distilled set, so that the set can be made from them again.

Pictures lose what lies outside [0, 1] and between 255ths: a set read from them has the same pictures, exactly, but not
the same images. Networks are trained on the tensors; pictures are for people, and for software that takes nothing else.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from mtt_fast.data.class_names import class_indices, relabelled
from mtt_fast.errors import InputError
from mtt_fast.interop.plain import LABEL_KINDS, Facts
from mtt_fast.synthetic import SyntheticDataset

_PLAIN = ("class_names", "mean", "std", "label_kind", "recipe", "versions")


def as_bytes(synthetic: SyntheticDataset) -> Tensor:
    """Return the pictures of a set as uint8 (n, C, H, W), rounded to nearest."""
    return (synthetic.to("cpu").pictures() * 255).round().byte()


def record_of(synthetic: SyntheticDataset) -> dict[str, Any]:
    """Return what a reader of the pictures needs besides them and the labels, ready for JSON."""
    return {name: getattr(synthetic, name) for name in _PLAIN} | {
        "lr": synthetic.lr.tolist(),
        "lr_per_step": None if synthetic.lr_per_step is None else synthetic.lr_per_step.tolist(),
        "whitened": synthetic.whitening is not None,
    }


def from_pictures(
    pictures: Tensor, labels: Tensor, record: dict[str, Any], facts: Facts | None, where: str | os.PathLike[str]
) -> SyntheticDataset:
    """Return the set of `pictures` uint8 (n, C, H, W), with `labels` and the `record` that was written with them.

    The whitening of a set that was whitened comes from `facts`, and so does the order of the classes: labels go by the
    names of the record's. Raises `InputError` if the whitening is not there, the names are those of other classes, or the
    record is broken.
    """
    try:
        fields = {name: record[name] for name in _PLAIN}
        lr, whitened = torch.tensor(record["lr"], dtype=torch.float32), record["whitened"]
        if record["lr_per_step"] is not None:
            fields["lr_per_step"] = torch.tensor(record["lr_per_step"], dtype=torch.float32)
        for name in ("class_names", "mean", "std"):
            fields[name] = tuple(fields[name])
        _check_fit(pictures, labels, fields)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: expected the record of a distilled set, found it broken ({error})") from error
    if whitened and (facts is None or facts.whitening is None):
        raise InputError(
            f"{where}: the set was whitened, and pictures do not hold the whitening; give the real images with "
            "--dataset, --data_path and --zca"
        )
    if facts is not None and fields["class_names"] != facts.class_names:
        indices = class_indices(fields["class_names"], facts.class_names, where)
        labels = relabelled(labels, indices, len(facts.class_names), where)
        fields["class_names"] = facts.class_names
    own = Facts(fields["class_names"], fields["mean"], fields["std"], facts.whitening if facts and whitened else None)
    images = own.transform.apply(pictures.float() / 255)
    return SyntheticDataset(images, labels, lr, whitening=own.whitening, **fields)


def _check_fit(pictures: Tensor, labels: Tensor, fields: dict[str, Any]) -> None:
    """Raise `ValueError` unless the labels are of the kind, and of the classes, that the record tells of."""
    kind, classes, channels = fields["label_kind"], len(fields["class_names"]), len(fields["mean"])
    indices = labels.dim() == 1 and 0 <= int(labels.min()) <= int(labels.max()) < classes
    soft = labels.dim() == 2 and labels.shape[1] == classes
    if not (indices if kind == "indices" else soft and kind in LABEL_KINDS):
        raise ValueError(f"labels {tuple(labels.shape)} that are no {kind} of {classes} classes")
    if not channels == len(fields["std"]) == pictures.shape[1]:
        raise ValueError(f"mean and std of {channels} channels for pictures of {pictures.shape[1]}")
