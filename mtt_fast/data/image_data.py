"""A data set: two splits of uint8 images with labels, class names, and channel statistics."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mtt_fast.checks import shown
from mtt_fast.data.set_checks import MAX_CLASSES, check_names, check_normalisation
from mtt_fast.errors import InputError
from mtt_fast.storage.foreign import plain_tensor
from mtt_fast.storage.identity import NORMALISED, WHITENED, DatasetIdentity

_BLOCK = 4096  # images processed at once, so that a memory-mapped data set is never copied whole


@dataclass(frozen=True)
class Split:
    """Images and their classes, in one fixed order."""

    images: Tensor  # uint8 (n, C, H, W), read-only: memory-mapped if the data set has a packed file
    labels: Tensor  # int64 (n,), each in [0, num_classes)


@dataclass(frozen=True)
class ImageData:
    """A data set ready to use.

    `mean` and `std`, one value per channel, are those of images scaled to [0, 1]. `fingerprint` is a digest of the content
    (images, labels, class names, mean, std). It is the same on every machine. `path` is the packed safetensors file, or None.
    """

    name: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    test: Split
    fingerprint: str
    path: Path | None

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return (C, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def identity(self, *, zca: bool) -> DatasetIdentity:
        """Return the identity of these images as networks see them: whitened with `zca`, otherwise normalised."""
        return DatasetIdentity(
            self.name, self.class_names, self.image_shape, self.mean, self.std, WHITENED if zca else NORMALISED,
            self.fingerprint,
        )  # fmt: skip


@dataclass(frozen=True)
class DatasetInfo:
    """The sizes of a data set, known before its images are read. `name` is as in `ImageData`."""

    name: str
    image_shape: tuple[int, int, int]  # (C, H, W)
    num_classes: int
    num_train: int  # training images
    num_test: int  # test images

    @property
    def packed_bytes(self) -> int:
        """Return the size of its packed file: one byte per value, eight per label."""
        channels, height, width = self.image_shape
        return (self.num_train + self.num_test) * (channels * height * width + 8)

    def identity(self, *, zca: bool) -> DatasetIdentity:
        """Return the part of `ImageData.identity` that is known before images are read; an image folder has no name yet."""
        name = "" if self.name.startswith("folder-") else self.name
        return DatasetIdentity(name, image_shape=self.image_shape, whitening=WHITENED if zca else NORMALISED)


def from_tensors(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    name: str = "tensors",
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageData:
    """Return a data set in memory from the (images uint8 (n, C, H, W), integer labels (n,)) of two splits.

    By default the classes are called "0", "1", …, and `mean` and `std` are computed from `train`.
    Raises `InputError` if dtypes, shapes or labels do not fit together.
    """
    train_split, test_split = checked_splits(train, test)
    if class_names is None:
        class_names = [str(label) for label in range(min(int(train_split.labels.max()) + 1, MAX_CLASSES))]
    check_names(class_names, name)
    check_split_labels(name, train_split.labels, test_split.labels, class_names)
    if mean is None or std is None:
        computed = channel_statistics(train_split.images)
        mean, std = computed[0] if mean is None else mean, computed[1] if std is None else std
    mean, std = _numbers(f"{name}: mean", mean), _numbers(f"{name}: std", std)
    check_normalisation(mean, std, train_split.images.shape[1], name)
    digest = fingerprint(train_split, test_split, class_names, mean, std)
    return ImageData(name, tuple(class_names), mean, std, train_split, test_split, digest, None)


def _numbers(where: str, values: Sequence[float]) -> tuple[float, ...]:
    try:
        return tuple(map(float, values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{where}: expected a number of each channel, found {shown(values)}") from error


def checked_splits(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> tuple[Split, Split]:
    """Return the splits of two pairs of images and labels. Raises `InputError` if dtypes or shapes do not fit together."""
    train_split, test_split = _split("train", train), _split("test", test)
    shape = tuple(train_split.images.shape[1:])
    if tuple(test_split.images.shape[1:]) != shape:
        raise InputError(
            f"test images: expected shape (n, {', '.join(map(str, shape))}) as in train, found {tuple(test_split.images.shape)}; resize "
            "one of them"
        )
    return train_split, test_split


def _split(part: str, pair: tuple[Tensor, Tensor]) -> Split:
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise InputError(f"{part}: expected images and labels, (images, labels), found {shown(pair)}")
    images, labels = pair
    images, labels = plain_tensor(images, f"{part} images"), plain_tensor(labels, f"{part} labels")
    if images.dtype != torch.uint8 or images.ndim != 4 or not images.numel():
        raise InputError(
            f"{part} images: expected uint8 (n, C, H, W) with n > 0, found {images.dtype} {tuple(images.shape)}; "
            "from floats in [0, 1] use (255 * images).round().byte()"
        )
    channels, height, width = images.shape[1:]
    if width in (1, 3) and channels == height > width:
        raise InputError(
            f"{part} images: expected (n, C, H, W), found {tuple(images.shape)}, which has its channels last; use images.permute(0, 3, 1, 2)"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != images.shape[:1]:
        raise InputError(
            f"{part} labels: expected {len(images)} integers, one an image, found {labels.dtype} "
            f"{tuple(labels.shape)}; "
            "give class indices"
        )
    if int(labels.min()) < 0:
        raise InputError(
            f"{part} labels: expected class indices of at least 0, found {int(labels.min())}; leave out images without a class, or "
            "count the classes from 0"
        )
    return Split(images, labels.long())


def check_split_labels(name: str, train: Tensor, test: Tensor, class_names: Sequence[str]) -> None:
    """Raise `InputError` unless all labels are class indices, both splits have images, and every class has training images."""
    check_at_least_two_classes(name, class_names)
    for part, labels in (("training", train), ("test", test)):
        if not len(labels):
            raise InputError(f"{name}: expected {part} images, found none; get the data set again")
        if int(labels.min()) < 0 or int(labels.max()) >= len(class_names):
            raise InputError(
                f"{name}: expected {part} labels in [0, {len(class_names)}), found {int(labels.min())} to "
                f"{int(labels.max())}; "
                "get the data set again, or give the labels' class names"
            )
    counts = torch.bincount(train, minlength=len(class_names))
    if not counts.all():
        empty = class_names[int((counts == 0).nonzero()[0])]
        raise InputError(
            f"{name}: expected training images of every class, found none of {empty!r}; add some or drop the class"
        )


def check_at_least_two_classes(name: str, class_names: Sequence[str]) -> None:
    """Raise `InputError` that begins with `name` for fewer than two classes."""
    if len(class_names) < 2:
        raise InputError(
            f"{name}: expected at least two classes, found {'none' if not class_names else 'one'}"
            f"{''.join(f' ({only!r})' for only in class_names)}; add the images of another class"
        )


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, standard deviation) of each channel of uint8 `images` (n, C, H, W), scaled to [0, 1].

    They are computed from integer histograms, with one division at the end, so that they are the same on every machine.
    """
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64, device=images.device)
    for block in torch.split(images, _BLOCK):
        for channel in range(images.shape[1]):
            counts[channel] += torch.bincount(block[:, channel].flatten(), minlength=256)
    means, stds = [], []
    for histogram in counts.tolist():
        pixels = sum(histogram)
        total = sum(level * count for level, count in enumerate(histogram))
        squares = sum(level**2 * count for level, count in enumerate(histogram))
        variance = (pixels * squares - total**2) / (255 * pixels) ** 2
        means.append(total / (255 * pixels))
        stds.append(math.sqrt(variance) or 1.0)  # a constant channel is left as it is
    return tuple(means), tuple(stds)


def fingerprint(
    train: Split, test: Split, class_names: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> str:
    """Return the digest (32 hex digits) that `ImageData.fingerprint` describes."""
    digest = hashlib.blake2b(digest_size=16)
    info = [tuple(train.images.shape), tuple(test.images.shape), list(class_names), list(mean), list(std)]
    digest.update(json.dumps(info).encode())
    for split in (train, test):
        digest.update(split.labels.contiguous().numpy().data)
        for block in torch.split(split.images, _BLOCK):
            digest.update(block.contiguous().numpy().data)
    return digest.hexdigest()
