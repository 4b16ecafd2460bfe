"""Images, labels and learning rate alone, as other code bases keep a distilled set; order and kinds of labels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtt_fast.data import ImageData, Normalisation
from mtt_fast.errors import InputError
from mtt_fast.identity import NORMALISED, WHITENED, DatasetIdentity
from mtt_fast.synthetic import SyntheticDataset
from mtt_fast.whitening import Whitening

LABEL_KINDS = ("indices", "probabilities", "logits")


@dataclass(frozen=True)
class Facts:
    """What is known of the real images that a set was distilled from; "" and () where it is not."""

    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    whitening: Whitening | None
    dataset: str = ""
    fingerprint: str = ""
    image_shape: tuple[int, ...] = ()

    @property
    def identity(self) -> DatasetIdentity:
        """What tells the images from others."""
        whitening = NORMALISED if self.whitening is None else WHITENED
        return DatasetIdentity(
            self.dataset, self.class_names, self.image_shape, self.mean, self.std, whitening, self.fingerprint
        )

    @property
    def transform(self) -> Normalisation | Whitening:
        """From pictures in [0, 1] to the networks' input space, and back."""
        return self.whitening or Normalisation(self.mean, self.std)


def facts_of(data: ImageData, transform: Normalisation | Whitening) -> Facts:
    """Return the facts of real images and of how networks see them."""
    whitening = transform if isinstance(transform, Whitening) else None
    return Facts(
        data.class_names, data.mean, data.std, whitening, data.name, data.fingerprint, data.image_shape
    )  # fmt: skip


@dataclass(frozen=True)
class PlainSet:
    """A distilled set without the facts that undo its normalisation.

    `images` (n, C, H, W) float32 are in the networks' input space; `labels` are indices (n,) int64 or soft labels
    (n, classes) float32, of `label_kind` "indices", "probabilities" or "logits"; `lr` () float32, or None where the
    software that wrote the set kept no learning rate.
    """

    images: Tensor
    labels: Tensor
    lr: Tensor | None
    label_kind: str

    @property
    def classes(self) -> Tensor:
        """The class of each image (n,). That of soft labels is its place: learned ones may favour another."""
        if self.label_kind == "indices":
            return self.labels
        return torch.arange(len(self.labels)) * self.num_classes // len(self.labels)

    @property
    def num_classes(self) -> int:
        """How many classes the labels tell of."""
        return int(self.labels.max()) + 1 if self.label_kind == "indices" else self.labels.shape[1]

    def ipc(self, where: str) -> int:
        """Return the images a class. Raises `InputError`, which names `where`, if the classes differ in number."""
        count, classes = len(self.labels), self.num_classes
        counts = torch.bincount(self.labels, minlength=classes) if self.label_kind == "indices" else None
        if count % classes or (counts is not None and bool((counts != counts[0]).any())):
            raise InputError(f"{where}: expected as many images of every class, found {count} of {classes} classes")
        return count // classes


def plain_set(images: Tensor, labels: Tensor, lr: Tensor | None, where: str, label_kind: str | None = None) -> PlainSet:
    """Return a set of tensors that `where` (a file) held. Soft labels are of `label_kind`, or of the kind they look.

    Labels may still require a gradient; whole floating-point numbers (n,) are indices.
    Raises `InputError` if shapes or values do not fit together.
    """
    images, labels = images.detach(), labels.detach()
    if images.dim() != 4 or not images.is_floating_point() or not len(images) or len(images) != len(labels):
        raise InputError(
            f"{where}: expected images (n, C, H, W) with n labels, found {tuple(images.shape)} and labels "
            f"{tuple(labels.shape)}"
        )
    if not images.isfinite().all() or not labels.isfinite().all():
        raise InputError(f"{where}: expected finite images and labels, found infinite ones or NaN")
    if label_kind not in (None, *LABEL_KINDS):
        raise InputError(f"--label_kind {label_kind}: expected one of {', '.join(LABEL_KINDS)}")
    if labels.dim() == 2 and labels.is_floating_point():
        kind = label_kind or guess_label_kind(labels)
        labels = labels.float()
    elif labels.dim() == 1 and bool((labels == labels.long()).all()) and int(labels.min()) >= 0:
        kind, labels = "indices", labels.long()
    else:
        raise InputError(
            f"{where}: expected labels that are class indices (n,) or soft labels (n, classes), found {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    if label_kind not in (None, kind):
        raise InputError(f"--label_kind {label_kind}: found labels of {where} that are {kind}; leave it out")
    return PlainSet(images.float(), labels, None if lr is None else _rate(lr, where), kind)


def guess_label_kind(labels: Tensor) -> str:
    """Return "probabilities" if all rows of `labels` (n, classes) are such, else "logits".

    Both lie in files of one name: TESLA and MCT write probabilities, DATM and its successors logits.
    """
    sums_to_one = bool(((labels.sum(dim=1) - 1).abs() < 1e-3).all() and (labels >= 0).all())
    return "probabilities" if sums_to_one else "logits"


def class_major(found: PlainSet, reorder_soft: bool = False) -> PlainSet:
    """Return the set in the order of its classes; images of one class keep theirs.

    Sets with soft labels stay as they are, as the largest of an image's learned labels need not be its class, unless
    `reorder_soft` orders them by it.
    """
    if found.label_kind != "indices" and not reorder_soft:
        return found
    order = _largest(found).argsort(stable=True)
    return dataclasses.replace(found, images=found.images[order], labels=found.labels[order])


def in_place(found: PlainSet) -> int:
    """Return how many images are labelled, or most strongly labelled, with the class that class-major order gives them."""
    places = torch.arange(len(found.labels)) * found.num_classes // len(found.labels)
    return int((_largest(found) == places).sum())


def hardened(found: PlainSet) -> PlainSet:
    """Return a class-major set with class indices for its soft labels, which its order tells.

    Raises `InputError` if the number of images is no multiple of the number of classes.
    """
    if found.label_kind == "indices":
        return found
    found.ipc("--hard_labels")
    return dataclasses.replace(found, labels=found.classes, label_kind="indices")


def _largest(found: PlainSet) -> Tensor:
    return found.labels if found.label_kind == "indices" else found.labels.argmax(1)


def as_plain(synthetic: SyntheticDataset) -> PlainSet:
    """Return the tensors of a distilled set, on the CPU."""
    moved = synthetic.to("cpu")
    return PlainSet(moved.images.detach(), moved.labels.detach(), moved.lr.detach(), moved.label_kind)


def as_synthetic(
    found: PlainSet, facts: Facts, lr: float, recipe: dict[str, Any], versions: dict[str, str]
) -> SyntheticDataset:
    """Return the set with the `facts` of the real images that it was distilled from; with `lr` where it brings none.

    Raises `InputError` if it cannot be distilled from such images.
    """
    shape = tuple(found.images.shape[1:])
    if shape[0] != len(facts.mean) or found.num_classes > len(facts.class_names):
        raise InputError(
            f"--dataset: expected images of {len(facts.mean)} channels and {len(facts.class_names)} classes, found "
            f"{shape} of {found.num_classes} classes; name the data set that the source was distilled from"
        )
    if facts.image_shape and shape != facts.image_shape:
        raise InputError(
            f"--dataset: expected images {facts.image_shape} of {facts.dataset}, found {shape}; name the data set that the "
            "source was distilled from, and its --res"
        )
    return SyntheticDataset(
        found.images,
        found.labels,
        torch.tensor(lr) if found.lr is None else found.lr,
        label_kind=found.label_kind,
        recipe=recipe,
        versions=versions,
        **{name: value for name, value in vars(facts).items() if name != "image_shape"},
    )


def _rate(lr: Tensor, where: str) -> Tensor:
    if lr.numel() != 1 or not float(lr) > 0:
        raise InputError(f"{where}: expected a learning rate above 0 beside it, found {lr.tolist()}")
    return lr.detach().float().reshape(())
