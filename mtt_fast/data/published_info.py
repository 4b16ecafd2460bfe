"""What is known of a data set before it is read: shape, classes, number of images."""

from __future__ import annotations

from pathlib import Path

from mtt_fast.data import catalogue, imagenet
from mtt_fast.data.image_data import DatasetInfo
from mtt_fast.errors import InputError, NotFound

__all__ = ["DatasetInfo", "dataset_info"]

_FIXED = {
    "CIFAR10": DatasetInfo("CIFAR10", (3, 32, 32), 10, 50_000, 10_000),
    "CIFAR100": DatasetInfo("CIFAR100", (3, 32, 32), 100, 50_000, 10_000),
    "MNIST": DatasetInfo("MNIST", (1, 28, 28), 10, 60_000, 10_000),
    "FashionMNIST": DatasetInfo("FashionMNIST", (1, 28, 28), 10, 60_000, 10_000),
    "digits": DatasetInfo("digits", (1, 8, 8), 10, 1_442, 355),
}
_TINY = (200, 100_000, 10_000)
_IMAGENET = (1_000, 1_281_167, 50_000)
_SUBSET = (10, 13_000, 500)  # 12,000 to 13,000 images for training, by subset


def dataset_info(
    dataset: str, subset: str | None = None, res: int | None = None, data_path: str = "data"
) -> DatasetInfo:
    """Return the facts of a data set by the names that `load` takes: of the images that are there, without decoding.

    Of one that is not there yet, and of the original files, they are those that are published.
    Raises `InputError` as `load` would for a wrong name, and for image folders that are incomplete or whose images have
    no one size where `res` is not given.
    """
    published = _published(dataset, subset, res)
    place = Path(data_path if dataset.casefold() == "folder" else dataset).expanduser()
    if published is None and not place.is_dir():
        raise InputError(f"--dataset {place}: expected a data set by name or an image folder, found no folder")
    try:
        source = catalogue.find(dataset, data_path=data_path, subset=subset, res=res)
    except NotFound:
        if published is None:
            raise
        return published
    facts = source.facts() if source.facts else published
    assert facts, "image folders count what is there, all others are published"
    return facts


def _published(dataset: str, subset: str | None, res: int | None) -> DatasetInfo | None:
    """Return the facts of a data set that has a name of its own."""
    names = {name.casefold(): name for name in (*_FIXED, "Tiny", "ImageNet", *imagenet.SUBSETS)}
    name = names.get(dataset.casefold())
    if name is None or name in _FIXED:
        return _FIXED.get(name or "")
    if name == "Tiny":
        side = res or 64
        return DatasetInfo("Tiny" if side == 64 else f"Tiny-{side}", (3, side, side), *_TINY)
    chosen = subset.casefold() if subset and name == "ImageNet" else name
    counts = _IMAGENET if chosen == "ImageNet" else _SUBSET
    side = res or 128
    return DatasetInfo(f"{chosen}-{side}", (3, side, side), *counts)
