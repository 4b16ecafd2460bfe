"""The distilled set: images, labels and learning rate, and what is needed to use them, in one file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtt_fast.augmentation.texture import Canvas
from mtt_fast.data import Normalisation
from mtt_fast.data.set_checks import check_set, distilled_in_class
from mtt_fast.data.whitening import Whitening
from mtt_fast.errors import InputError
from mtt_fast.storage.identity import NORMALISED, WHITENED, DatasetIdentity
from mtt_fast.storage.records import check_fields
from mtt_fast.storage.tensor_files import load_tensors, save_tensors
from mtt_fast.storage.text_files import MALFORMED, not_json_error, parse_json

_FORMAT = "mtt_fast.data.synthetic.2"
_BEFORE_CHECKSUMS = "mtt_fast.data.synthetic.1"


@dataclass(frozen=True)
class SyntheticDataset:
    """A distilled set, sorted by class, with the same number of images of each class.

    `images` (n, C, H, W) float32 are inputs of networks: whitened if `whitening` is given, else normalised with `mean` and `std`.
    `labels` are class indices (n,) or soft labels (n, classes), of `label_kind` "indices", "probabilities", "logits", or "weights":
    targets of the cross-entropy that are at least 0 and whose rows need not sum to 1, so that a row's sum weighs its image.
    `lr` () is the learned learning rate, with which networks are trained. If one was learned for each of the N student steps, these
    are `lr_per_step` (N,), and `lr` is their mean. With a `canvas` the images are textures, and networks are trained on random crops
    of them (mtt_fast/augmentation/texture.py).
    `parameters` are the learned parameters of a parametrisation by name, if pixels were not learned (`--parametrisation`).
    `recipe` holds the options that the set was made with, `versions` the versions of the software. `dataset` and `fingerprint` are
    the name and the fingerprint of the real images that the set was made from (`ImageData`), or "" if not known.
    `python -m mtt_fast.evaluate` takes the options in `recipe` as its defaults. With `dataset` and `model` there, it needs no others.

    Example:
        ```python
        from mtt_fast.data import load, transform_for

        data = load("digits")
        images = transform_for(data, zca=False).apply(data.train.images[:10] / 255)  # then distil them in your own loop
        distilled = mtt_fast.SyntheticDataset(
            images, data.train.labels[:10], torch.tensor(0.02), data.class_names, data.mean, data.std,
            recipe={"dataset": "digits", "model": "ConvNetD2W16"}, dataset=data.name, fingerprint=data.fingerprint,
        )
        distilled.save("set.safetensors")
        ```
    """

    images: Tensor
    labels: Tensor
    lr: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    whitening: Whitening | None = None
    label_kind: str = "indices"
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    lr_per_step: Tensor | None = None
    canvas: Canvas | None = None
    dataset: str = ""
    fingerprint: str = ""
    parameters: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def identity(self) -> DatasetIdentity:
        """Return the identity of the real images that the set was made from, as far as it is recorded."""
        channels, height, width = self.images.shape[1:]
        side = 1 if self.canvas is None else self.canvas.size
        whitening = NORMALISED if self.whitening is None else WHITENED
        return DatasetIdentity(
            self.dataset, self.class_names, (channels, height // side, width // side), self.mean, self.std, whitening,
            self.fingerprint,
        )  # fmt: skip

    @property
    def transform(self) -> Normalisation | Whitening:
        """Return the transform from images in [0, 1] to inputs of networks, which also has the inverse."""
        return self.whitening or Normalisation(self.mean, self.std)

    @property
    def classes(self) -> Tensor:
        """Return the class of each image, (n,) int64. With soft labels it follows from the image's position, not from its label."""
        return self.labels if self.label_kind == "indices" else classes_by_position(self.labels, len(self.class_names))

    @property
    def real(self) -> Tensor | None:
        """Return a mask (n,) bool on the CPU of the images that are real and were not distilled (SelMatch), or None if there are none."""
        return real_mask(len(self.labels), len(self.class_names), self.recipe.get("distilled_share", 1.0))

    def pictures(self) -> Tensor:
        """Return the images (n, C, H, W) in [0, 1] for display: normalisation or whitening is undone, and the result clipped."""
        return self.transform.invert(self.images).clamp(0, 1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the set to one safetensors file, atomically.

        Raises `InputError`, before anything is written, for a set that fails `mtt_fast.data.set_checks.check_set`, and for a
        `recipe` that JSON cannot hold.
        """
        check_set(self, f"{os.fspath(path)}: not written")
        tensors = {"images": self.images, "labels": self.labels, "lr": self.lr}
        if self.lr_per_step is not None:
            tensors["lr_per_step"] = self.lr_per_step
        tensors |= {f"parameters.{name}": value for name, value in self.parameters.items()}
        if self.whitening:
            tensors |= {f"whitening.{name}": value for name, value in vars(self.whitening).items()}
        record = {name: getattr(self, name) for name in _RECORD}
        if self.canvas:
            record["canvas"] = dataclasses.asdict(self.canvas)
        try:
            text = json.dumps(record)
        except (TypeError, ValueError) as error:
            raise not_json_error(path, error) from error
        save_tensors(path, tensors, {"format": _FORMAT, "record": text})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SyntheticDataset:
        """Return the set that `save` wrote. Raises `InputError` if the file is missing, broken, or holds something else."""
        tensors, metadata = load_tensors(path)
        form = metadata.get("format")
        if form not in (_FORMAT, _BEFORE_CHECKSUMS):
            what = "another file" if form is None else repr(form)
            raise InputError(f"{path}: expected a distilled set ({_FORMAT}), found {what}; name another file")
        before = {} if form == _FORMAT else {"dataset": "", "fingerprint": ""}
        try:
            synthetic = _from_parts(tensors, before | parse_json(metadata["record"]))
        except MALFORMED as error:
            raise InputError(
                f"{path}: expected a distilled set with all its parts, found another ({type(error).__name__}: {error}); "
                "use the version that wrote it, or make it again"
            ) from error
        check_set(synthetic, path)
        return synthetic

    def export(self, kind: str, folder: str | os.PathLike[str]) -> list[Path]:
        """Write the set for other software and return the files.

        kind "mtt": images_best.pt, labels_best.pt and lr_best.pt, as the public code and its successors read them;
        "png": CLASS/NNNNN.png, the pictures, with labels.json; and the other kinds of `mtt_fast.interop.SET_KINDS`.
        Raises `InputError` for another kind, and for a set that the kind cannot hold.
        """
        from mtt_fast.interop import write_set  # here, as it imports this module

        return write_set(folder, self, kind)

    def to(self, device: torch.device | str) -> SyntheticDataset:
        """Return the set with images, labels and learning rates on `device`."""
        names = ("images", "labels", "lr", "lr_per_step")
        moved = {name: getattr(self, name).to(device) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(self, **moved)


_RECORD = {
    "class_names": list, "mean": list, "std": list, "label_kind": str, "recipe": dict, "versions": dict, "dataset": str,
    "fingerprint": str,
}  # fmt: skip
"""The fields of a set's record, and their types."""


def real_mask(
    count: int, num_classes: int, distilled_share: float, device: torch.device | str = "cpu"
) -> Tensor | None:
    """Return a mask (count,) bool on `device` of the real images in a set sorted by class, or None if there are none (SelMatch)."""
    ipc = count // num_classes
    distilled = distilled_in_class(ipc, distilled_share)
    return torch.arange(count, device=device) % ipc >= distilled if distilled < ipc else None


def classes_by_position(labels: Tensor, num_classes: int) -> Tensor:
    """Return the class of each image, (n,) int64, of a set that is sorted by class and has as many images of each."""
    return torch.arange(len(labels), device=labels.device) * num_classes // len(labels)


def _from_parts(tensors: Mapping[str, Tensor], record: dict[str, Any]) -> SyntheticDataset:
    """Return the set from a file's tensors and record. Raises one of `MALFORMED` if a part is missing, unknown or of another type."""
    canvas = record.pop("canvas", None)
    check_fields(record, _RECORD)
    for name in ("class_names", "mean", "std"):
        record[name] = tuple(record[name])
    white, parameters = (
        {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
        for start in ("whitening.", "parameters.")
    )
    return SyntheticDataset(
        tensors["images"],
        tensors["labels"],
        tensors["lr"],
        whitening=Whitening(**white) if white else None,
        lr_per_step=tensors.get("lr_per_step"),
        canvas=Canvas(**canvas) if canvas is not None else None,
        parameters=parameters,
        **record,
    )
