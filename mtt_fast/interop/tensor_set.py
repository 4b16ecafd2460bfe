"""A distilled set as other software stores it: only images, labels and learning rate. Order and kinds of labels."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtt_fast.checks import shown
from mtt_fast.data import ImageData, Normalisation
from mtt_fast.data.set_checks import LABEL_KINDS, are_probabilities, check_images_and_labels, check_lr, check_set
from mtt_fast.data.synthetic import SyntheticDataset, classes_by_position
from mtt_fast.data.whitening import Whitening
from mtt_fast.errors import InputError
from mtt_fast.storage.foreign import plain_tensor
from mtt_fast.storage.identity import NORMALISED, WHITENED, DatasetIdentity


@dataclass(frozen=True)
class SourceInfo:
    """The known properties of the real images that a set was distilled from; "" and () where one is not known."""

    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    whitening: Whitening | None
    dataset: str = ""
    fingerprint: str = ""
    image_shape: tuple[int, ...] = ()

    @property
    def identity(self) -> DatasetIdentity:
        """Return the identity of the real images, as far as it is known."""
        whitening = NORMALISED if self.whitening is None else WHITENED
        return DatasetIdentity(
            self.dataset, self.class_names, self.image_shape, self.mean, self.std, whitening, self.fingerprint
        )

    @property
    def transform(self) -> Normalisation | Whitening:
        """Return the map from pictures in [0, 1] to the networks' input space, and back."""
        return self.whitening or Normalisation(self.mean, self.std)


def source_info(data: ImageData, transform: Normalisation | Whitening) -> SourceInfo:
    """Return the properties of real images and of how networks see them."""
    whitening = transform if isinstance(transform, Whitening) else None
    return SourceInfo(data.class_names, data.mean, data.std, whitening, data.name, data.fingerprint, data.image_shape)


@dataclass(frozen=True)
class TensorSet:
    """A distilled set without the properties that undo its normalisation.

    `images` (n, C, H, W) float32 are in the networks' input space; `labels` are indices (n,) int64 or soft labels
    (n, classes) float32, of `label_kind` "indices", "probabilities", "weights" or "logits" (`SyntheticDataset`);
    `lr` () float32, or None where the software that wrote the set kept no learning rate.
    """

    images: Tensor
    labels: Tensor
    lr: Tensor | None
    label_kind: str

    @property
    def classes(self) -> Tensor:
        """Return the class of each image (n,); with soft labels by its position, since learned labels may favour another class."""
        return self.labels if self.label_kind == "indices" else self.places

    @property
    def places(self) -> Tensor:
        """Return the class of each image (n,) in class-major order, whatever its label."""
        return classes_by_position(self.labels, self.num_classes)

    @property
    def num_classes(self) -> int:
        """Return the number of classes that the labels have room for."""
        return int(self.labels.max()) + 1 if self.label_kind == "indices" else self.labels.shape[1]

    def ipc(self, where: str) -> int:
        """Return the images per class. Raises `InputError`, which names `where`, if the classes differ in number."""
        count, classes = len(self.labels), self.num_classes
        evenly = count % classes == 0  # looked at first: a label may be a large number
        if evenly and self.label_kind == "indices":
            evenly = bool((torch.bincount(self.labels) == count // classes).all())
        if not evenly:
            raise InputError(
                f"{where}: expected the same number of images of every class, found {count} of {classes} classes; remove some, or choose "
                "a kind of files that takes any number, as `to` mtt does"
            )
        return count // classes


def tensor_set(images: Any, labels: Any, lr: Any, where: str, label_kind: str | None = None) -> TensorSet:
    """Return a set of tensors that `where` (a file) held. Soft labels are of `label_kind`, or of the kind that they look like.

    Images and labels may be of any width of number and still require a gradient; whole floating-point numbers (n,) are indices.
    Raises `InputError` if they are not dense tensors, or shapes or values do not fit together.
    """
    if label_kind not in (None, *LABEL_KINDS):
        raise InputError(f"`label_kind` {label_kind}: expected one of {', '.join(LABEL_KINDS)}")
    images, labels = plain_tensor(images, f"{where}: images"), plain_tensor(labels, f"{where}: labels")
    if not images.is_floating_point():
        raise InputError(
            f"{where}: expected images of floating-point numbers, as networks see them, found {images.dtype} "
            f"{tuple(images.shape)}; scale pictures to [0, 1] and normalise them"
        )
    if images.dim() != 4 or not images.numel() or labels.shape[:1] != images.shape[:1]:
        raise InputError(
            f"{where}: expected images (n, C, H, W) with n labels, found {tuple(images.shape)} and labels "
            f"{tuple(labels.shape)}"
        )
    if labels.dim() == 2 and labels.is_floating_point():
        kind, labels = label_kind or guess_label_kind(labels), labels.float()
    else:
        kind, labels = "indices", _as_indices(labels, where)
    if label_kind not in (None, kind):
        raise InputError(
            f"`label_kind` {label_kind}: has no effect on labels that are classes, as those of {where}; leave it out"
        )
    distilled = TensorSet(images.float(), labels, None if lr is None else _checked_lr(lr, where), kind)
    check_tensor_set(distilled, where)
    return distilled


def check_tensor_set(distilled: TensorSet, where: str | os.PathLike[str]) -> None:
    """Raise `InputError` unless the tensors and the learning rate of a set are valid; the message begins with `where`."""
    check_images_and_labels(distilled.images, distilled.labels, distilled.label_kind, where)
    if distilled.lr is not None:
        check_lr(distilled.lr, where)


def _as_indices(labels: Tensor, where: str) -> Tensor:
    """Return labels (n,) of any width, or whole floating-point numbers, as int64."""
    if labels.dim() != 1 or labels.dtype == torch.bool or not bool((labels == labels.double().round()).all()):
        raise InputError(
            f"{where}: expected labels that are class indices (n,) or soft labels (n, classes), found {labels.dtype} "
            f"{tuple(labels.shape)} that are neither; save the labels of its images beside it"
        )
    return labels.double().clamp(-_EXACT, _EXACT).long() if labels.is_floating_point() else labels.long()


_EXACT = 2.0**53  # whole numbers in float64


def guess_label_kind(labels: Tensor) -> str:
    """Return "probabilities" if each row of `labels` (n, classes) is a distribution, else "logits".

    Both lie in files of one name: TESLA and MCT write probabilities, DATM and its successors logits.
    """
    return "probabilities" if are_probabilities(labels) else "logits"


def label_warnings(source: str | os.PathLike[str], distilled: TensorSet) -> Iterator[str]:
    """Yield reasons to doubt the kind of the labels of the set at `source`, which does not say it."""
    if distilled.label_kind == "logits" and bool((distilled.labels >= 0).all()):
        yield (
            f"{source}: labels taken as logits are at least 0; are they weights, as of cross-entropy, whose sums are not 1? "
            "Then give the `label_kind` weights"
        )


def class_major(distilled: TensorSet, *, reorder_soft: bool = False) -> TensorSet:
    """Return the set in the order of its classes; images of one class keep theirs.

    Sets with soft labels stay as they are, as the largest of an image's learned labels need not be its class, unless
    `reorder_soft` orders them by it. Raises `InputError` if it is asked for and the largest labels name some classes more often
    than others: the places of the images would no longer tell their classes.
    """
    soft = distilled.label_kind != "indices"
    if soft and not reorder_soft:
        return distilled
    order = _largest(distilled).argsort(stable=True)
    ordered = dataclasses.replace(distilled, images=distilled.images[order], labels=distilled.labels[order])
    if soft and count_in_class_order(ordered) < len(order):
        fewest, most = largest_label_counts(distilled)
        raise InputError(
            f"`reorder`: expected every class to be the largest label of as many images, found {fewest} to {most}; leave it out: "
            "the order of a set with learned labels tells the classes of its images"
        )
    return ordered


def largest_label_counts(distilled: TensorSet) -> tuple[int, int]:
    """Return how many images have the same class as their largest label: for the rarest class, and for the most frequent."""
    counts = torch.bincount(_largest(distilled), minlength=distilled.num_classes)
    return int(counts.min()), int(counts.max())


def count_in_class_order(distilled: TensorSet) -> int:
    """Return the number of images whose (largest) label is the class that class-major order gives them."""
    return int((_largest(distilled) == distilled.places).sum())


def hardened(distilled: TensorSet) -> TensorSet:
    """Return a class-major set with class indices for its soft labels, which its order tells.

    Raises `InputError` if the number of images is not a multiple of the number of classes.
    """
    if distilled.label_kind == "indices":
        return distilled
    distilled.ipc("`hard_labels`")
    return dataclasses.replace(distilled, labels=distilled.classes, label_kind="indices")


def _largest(distilled: TensorSet) -> Tensor:
    return distilled.labels if distilled.label_kind == "indices" else distilled.labels.argmax(1)


def as_tensor_set(distilled: SyntheticDataset | TensorSet) -> TensorSet:
    """Return the tensors of a distilled set, on the CPU; a set of tensors as it is."""
    if isinstance(distilled, TensorSet):
        return distilled
    moved = distilled.to("cpu")
    return TensorSet(moved.images.detach(), moved.labels.detach(), moved.lr.detach(), moved.label_kind)


def as_synthetic(
    distilled: TensorSet,
    info: SourceInfo,
    lr: float,
    recipe: dict[str, Any],
    versions: dict[str, str],
    where: str = "the set",
) -> SyntheticDataset:
    """Return the set with the `info` of the real images that it was distilled from; with `lr` where it brings none.

    `where` names its origin in messages. Class indices may leave classes out. Raises `InputError` if it cannot be distilled
    from such images.
    """
    shape, fewer = tuple(distilled.images.shape[1:]), distilled.label_kind == "indices"
    classes, known = distilled.num_classes, len(info.class_names)
    if shape[0] != len(info.mean) or classes > known or (classes < known and not fewer):
        raise InputError(
            f"{where}: expected images of {len(info.mean)} channels and {known} classes, found "
            f"{shape} of {classes} classes; name with `dataset` the data set that it was distilled from"
        )
    if info.image_shape and shape != info.image_shape:
        raise InputError(
            f"`dataset`: expected images {info.image_shape} of {info.dataset}, found {shape}; name the data set that the "
            "source was distilled from, and its `res`"
        )
    synthetic = SyntheticDataset(
        distilled.images,
        distilled.labels,
        torch.tensor(lr, dtype=torch.float32, device="cpu") if distilled.lr is None else distilled.lr,
        label_kind=distilled.label_kind,
        recipe=recipe,
        versions=versions,
        **{name: value for name, value in vars(info).items() if name != "image_shape"},
    )
    check_set(synthetic, where)
    return synthetic


def _checked_lr(lr: Any, where: str) -> Tensor:
    tensor = plain_tensor(lr, f"{where}: lr")
    if tensor.numel() != 1 or tensor.dtype == torch.bool:
        raise InputError(f"{where}: expected one learning rate above 0, found {shown(tensor)}")
    return tensor.float().reshape(())
