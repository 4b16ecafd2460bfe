"""The sizes of a data set before it is read: image shape, number of classes, number of images."""

from __future__ import annotations

import os
from pathlib import Path

from mtt_fast.data import catalogue, cifar, digits, imagenet, mnist, tiny_imagenet
from mtt_fast.data.class_lists import SUBSETS
from mtt_fast.data.image_data import DatasetInfo
from mtt_fast.errors import InputError, NotFound


def dataset_info(
    dataset: str, subset: str | None = None, res: int | None = None, data_path: str = "data"
) -> DatasetInfo:
    """Return the sizes of a data set, without decoding its images. For the arguments see `load`.

    The images of an image folder are counted. For other data sets, also if they are not downloaded yet, the published numbers are
    returned. Raises `InputError` as `load` does for an unknown name, and for an image folder that is incomplete, or whose images
    have different sizes and no `res` is given.
    """
    known = published(dataset, subset, res)
    place = Path(data_path if dataset.casefold() == "folder" else dataset).expanduser()
    is_word = os.sep not in str(place)  # a misspelt name; `find` suggests the right one
    if known is None and not is_word and not place.is_dir():
        raise InputError(f"`dataset` {place}: expected a data set by name or an image folder, found no folder")
    try:
        source = catalogue.find(dataset, data_path=data_path, subset=subset, res=res)
    except NotFound:
        if known is None:
            raise
        return known
    info = source.info() if source.info else known
    assert info, "image folders count their images, all other data sets have published numbers"
    return info


def published(dataset: str, subset: str | None = None, res: int | None = None) -> DatasetInfo | None:
    """Return the published sizes of a data set, without reading any file; None for an image folder.

    Raises `InputError` for an unknown `subset`.
    """
    name = catalogue.name_of(dataset)
    match name:
        case "CIFAR10" | "CIFAR100":
            return cifar.SPECS[name].info
        case "MNIST" | "FashionMNIST":
            return mnist.SPECS[name].info
        case "digits":
            return digits.INFO
        case "Tiny":
            return tiny_imagenet.info(res)
        case "ImageNet":
            return imagenet.info(catalogue.known_subset(subset) if subset else None, res)
        case "folder" | None:
            return None
    assert name in SUBSETS, f"{name} is one of catalogue.NAMES, but has no case here"
    return imagenet.info(name, res)
