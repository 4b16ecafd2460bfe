"""What is known of a data set before it is there: shape, classes, number of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mtt_fast.data import imagenet
from mtt_fast.data.folder import find_splits, list_classes
from mtt_fast.data.images import is_grey, size_of
from mtt_fast.errors import InputError
from mtt_fast.identity import NORMALISED, WHITENED, DatasetIdentity


@dataclass(frozen=True)
class DataFacts:
    """A data set in numbers. `name` is that of the `ImageData` it will be."""

    name: str
    image_shape: tuple[int, int, int]  # (C, H, W)
    num_classes: int
    train: int  # images
    test: int

    @property
    def packed_bytes(self) -> int:
        """Size of its packed file: a byte a value, eight a label."""
        channels, height, width = self.image_shape
        return (self.train + self.test) * (channels * height * width + 8)

    def identity(self, zca: bool) -> DatasetIdentity:
        """Return what is known beforehand of `ImageData.identity`: an image folder may have been renamed since."""
        name = "" if self.name.startswith("folder-") else self.name
        return DatasetIdentity(name, image_shape=self.image_shape, whitening=WHITENED if zca else NORMALISED)


_FIXED = {
    "CIFAR10": DataFacts("CIFAR10", (3, 32, 32), 10, 50_000, 10_000),
    "CIFAR100": DataFacts("CIFAR100", (3, 32, 32), 100, 50_000, 10_000),
    "MNIST": DataFacts("MNIST", (1, 28, 28), 10, 60_000, 10_000),
    "FashionMNIST": DataFacts("FashionMNIST", (1, 28, 28), 10, 60_000, 10_000),
    "digits": DataFacts("digits", (1, 8, 8), 10, 1_442, 355),
}
_TINY = (200, 100_000, 10_000)
_IMAGENET = (1_000, 1_281_167, 50_000)
_SUBSET = (10, 13_000, 500)  # 12,000 to 13,000 images for training, by subset


def data_facts(dataset: str, subset: str | None = None, res: int | None = None, data_path: str = "data") -> DataFacts:
    """Return the facts of a data set by the names that `load` takes, from what is published of it.

    Of an image folder they are counted, without decoding. Raises `InputError` for a folder that is not there or whose
    images have no one size and `res` is not given.
    """
    names = {name.casefold(): name for name in (*_FIXED, "Tiny", "ImageNet", *imagenet.SUBSETS)}
    name = names.get(dataset.casefold())
    if name in _FIXED:
        return _FIXED[name]
    if name == "Tiny":
        side = res or 64
        return DataFacts("Tiny" if side == 64 else f"Tiny-{side}", (3, side, side), *_TINY)
    if name is not None:
        chosen = subset if name == "ImageNet" else name
        side = res or 128
        return DataFacts(f"{chosen or 'ImageNet'}-{side}", (3, side, side), *(_SUBSET if chosen else _IMAGENET))
    return _counted(Path(data_path if dataset == "folder" else dataset).expanduser(), res)


def _counted(root: Path, res: int | None) -> DataFacts:
    if not root.is_dir():
        raise InputError(f"--dataset {root}: expected a data set by name or an image folder, found no folder")
    train, test = (list_classes(folder) for folder in find_splits(root))
    first = next(file for files in train.values() for file in files)
    height, width = (res, res) if res else size_of(first)
    counts = (sum(len(files) for files in split.values()) for split in (train, test))
    suffix = f"-{res}" if res else ""
    shape = (1 if is_grey(first) else 3, height, width)
    return DataFacts(f"folder-{root.resolve().name}{suffix}", shape, len(train), *counts)
