"""Distilled sets as torch datasets, and torch datasets (torchvision's, the library `datasets`', your own) as real images."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtt_fast.checks import shown
from mtt_fast.data import ImageData, from_tensors
from mtt_fast.data.class_names import class_indices, relabelled
from mtt_fast.data.set_checks import MAX_CLASSES
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.errors import InputError
from mtt_fast.storage.foreign import plain_tensor


class SyntheticView(Dataset[tuple[Tensor, Tensor]]):
    """A distilled set as a map-style dataset of (image, label), for a DataLoader and your own training loops.

    An image (C, H, W) is in the networks' input space: transform test images in the same way (`synthetic.mean`, `.std`,
    or `.whitening`). A label is an index () int64 or a row of probabilities (classes,): logits are given as their
    softmax, so that torch's cross entropy takes all kinds. Nothing is copied.
    """

    def __init__(self, synthetic: SyntheticDataset) -> None:
        self.images = synthetic.images.detach()
        labels = synthetic.labels.detach()
        self.targets = labels.softmax(1) if synthetic.label_kind == "logits" else labels
        self.classes = list(synthetic.class_names)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.targets[index]


def image_data_from(
    train: Any,
    test: Any,
    *,
    name: str = "dataset",
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageData:
    """Return real images from two map-style datasets of (image, label), or of mappings with `image` (or `img`) and `label`.

    An image is one of PIL, a uint8 array (H, W) or (H, W, C), a uint8 tensor (C, H, W), or a floating-point tensor (C, H, W) in
    [0, 1], as torchvision's ToTensor gives it; leave Normalize out. All images are read, to one tensor. Without `class_names`
    those of `train.classes` are taken, or those of its feature `label`, if there are any; where `test` has them in another order,
    its labels are matched by name. Without `mean` and `std` they are computed. Raises `InputError` for images of other kinds,
    values or sizes, and for labels that are not indices.
    """
    (images, labels), (test_images, test_labels) = _tensors(train, f"{name}, train"), _tensors(test, f"{name}, test")
    names, test_names = _names(train), _names(test)
    if names and test_names and names != test_names:
        indices = class_indices(test_names, names, f"{name}, test")
        test_labels = relabelled(test_labels, indices, len(names), f"{name}, test")
    parts = (images, labels), (test_images, test_labels)
    return from_tensors(*parts, name=name, class_names=class_names or names, mean=mean, std=std)


def _names(dataset: Any) -> list[str] | None:
    """Return the names of the classes from an attribute of torchvision's datasets, or from the features of `datasets`."""
    features = getattr(dataset, "features", None)  # in a user's data set either attribute may be anything
    feature = features.get("label") if isinstance(features, Mapping) else None
    for names in (getattr(dataset, "classes", None), getattr(feature, "names", None)):
        listed = names.tolist() if isinstance(names, np.ndarray | Tensor) else names
        if isinstance(listed, Collection) and listed:
            return list(map(str, listed))
    return None


def _tensors(dataset: Any, where: str) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for index in range(_length(dataset, where)):
        image, label = _pair(dataset[index], where)
        images.append(_as_bytes(image, f"{where}, image {index}"))
        labels.append(_as_index(label, f"{where}, image {index}"))
        if images[-1].shape != images[0].shape:
            raise InputError(
                f"{where}, image {index}: expected shape {tuple(images[0].shape)} as in the first, found "
                f"{tuple(images[-1].shape)}; resize them in the dataset's transform"
            )
    if not images:
        raise InputError(f"{where}: expected images, found none")
    return torch.stack(images), torch.tensor(labels, device="cpu")


def _length(dataset: Any, where: str) -> int:
    if isinstance(dataset, Mapping) and 0 not in dataset:  # a DatasetDict
        raise InputError(f"{where}: expected the images of one split, found {shown(dataset)}; give one of these")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise InputError(f"{where}: expected a map-style dataset, with a length and items, found {shown(dataset)}")
    return len(dataset)


def _as_index(label: Any, where: str) -> int:
    """Return a label, a whole number of any kind, as an index."""
    try:
        value = np.asarray(label.detach().cpu() if isinstance(label, Tensor) else label)
    except (TypeError, ValueError, RuntimeError):
        value = np.asarray(None)
    whole = value.size == 1 and value.dtype.kind in "iuf" and 0 <= value.item() < MAX_CLASSES
    if not whole or value.item() != int(value.item()):
        raise InputError(f"{where}: expected a label that is a class index, counted from 0, found {shown(label)}")
    return int(value.item())


def _pair(item: Any, where: str) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        image = item.get("image", item.get("img"))
        if image is None or "label" not in item:
            raise InputError(f"{where}: expected image (or img) and label, found {', '.join(map(str, item))}")
        return image, item["label"]
    if not isinstance(item, Sequence) or len(item) < 2:
        raise InputError(f"{where}: expected (image, label), found {type(item).__name__}")
    return item[0], item[1]


def _as_bytes(item: Any, where: str) -> Tensor:
    """Return one image as uint8 (C, H, W)."""
    image = plain_tensor(item if isinstance(item, Tensor) else _from_array(item, where), where)
    if image.dim() != 3:
        raise InputError(f"{where}: expected (C, H, W), found {tuple(image.shape)}")
    if image.is_floating_point():
        if not bool(((image >= 0) & (image <= 1)).all()):
            raise InputError(
                f"{where}: expected values in [0, 1], found {float(image.min()):.3g} to {float(image.max()):.3g}; leave "
                "Normalize out of the dataset's transform"
            )
        return (image * 255).round().byte()
    if image.dtype != torch.uint8:
        raise InputError(f"{where}: expected uint8 or floating point in [0, 1], found {image.dtype}")
    return image.contiguous()


def _from_array(item: Any, where: str) -> Tensor:
    """Return an image of PIL, or an array as PIL gives it, channels first."""
    mode = getattr(item, "mode", "RGB")
    if isinstance(mode, str) and mode not in ("L", "RGB"):
        raise InputError(f'{where}: expected grey or RGB, found mode {mode!r}; convert it with image.convert("RGB")')
    values = np.array(item)
    if values.ndim not in (2, 3):
        raise InputError(f"{where}: expected an image (H, W) or (H, W, C), found {shown(item)}")
    try:
        image = torch.from_numpy(values)
    except TypeError as error:
        raise InputError(f"{where}: expected uint8 or floating point in [0, 1], found {values.dtype}") from error
    return image[None] if image.dim() == 2 else image.movedim(-1, 0)
