"""The data sets by name: their files, and their sizes before they are read."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

from mtt_fast.checks import shown
from mtt_fast.data import cifar, digits, folder, imagenet, mnist, tiny_imagenet
from mtt_fast.data.class_lists import SUBSETS
from mtt_fast.data.image_data import DatasetInfo, ImageData
from mtt_fast.data.packing import Source, packed
from mtt_fast.errors import InputError, NotFound

DOWNLOADED = (*cifar.SPECS, *mnist.SPECS)
"""Data sets that --download fetches."""
OF_ONE_SIZE = (*DOWNLOADED, "digits")
"""Data sets whose images are not resized."""
NAMES = (*DOWNLOADED, "Tiny", "ImageNet", *SUBSETS, "digits", "folder")


def load(
    dataset: str | Path,
    *,
    data_path: str | Path = "data",
    subset: str | None = None,
    res: int | None = None,
    download: bool = False,
    packed_path: str | Path | None = None,
    progress: bool = True,
) -> ImageData:
    """Return the data set called `dataset`, whose files are in `data_path`.

    `dataset` is one of `NAMES`, in upper or lower case, or the path of an image folder; "folder" is the image folder `data_path`.
    `subset` selects ten classes of ImageNet. `res` is the side length to which images are resized; data sets of one fixed size
    do not need it. `download` downloads CIFAR10, CIFAR100, MNIST and FashionMNIST if they are missing.
    The images are decoded once, with a progress bar, into `packed_path`/NAME.safetensors (by default `data_path`/packed). From
    then on this file is memory-mapped, until names, sizes or modification times of the source files change.
    Raises `InputError` for an unknown name, and for files that are missing, damaged or do not fit together.
    """
    packed_root = Path(packed_path or Path(data_path) / "packed").expanduser().absolute()
    source = find(dataset, data_path=data_path, subset=subset, res=res, download=download, progress=progress)
    return packed(source, packed_root, progress=progress)


def find(
    dataset: str | Path,
    *,
    data_path: str | Path = "data",
    subset: str | None = None,
    res: int | None = None,
    download: bool = False,
    progress: bool = False,
) -> Source:
    """Return the `Source` of a data set, without reading its images. For the arguments see `load`.

    Raises `NotFound` if its files are in none of the usual places, and `InputError` as `load` does.
    """
    if not isinstance(dataset, str | Path):
        raise InputError(f"`dataset`: expected a name or the path of an image folder, found {shown(dataset)}")
    data_path = Path(data_path).expanduser().absolute()
    name = name_of(dataset) if isinstance(dataset, str) else None
    if res is not None and not (isinstance(res, int | Integral) and res >= 1):
        raise InputError(
            f"`res`: expected a positive number of pixels, found {shown(res)}; leave it out for the default"
        )
    if subset is not None and name != "ImageNet":
        raise InputError(f"`subset`: expected only with `dataset` ImageNet, found with {dataset}; leave it out")
    if name is not None:
        known = _known(name, subset, res, data_path, download=download, progress=progress)
        if known.info is not None and name in OF_ONE_SIZE and res not in (None, known.info.image_shape[-1]):
            raise InputError(
                f"`res`: expected {known.info.image_shape[-1]} or nothing, the size of {name}, found {res}; leave it out"
            )
        return known.find()
    path = Path(dataset).expanduser()
    if isinstance(dataset, Path) or path.is_dir() or os.sep in dataset:
        return folder.source(path, res)
    raise _unknown("`dataset`", dataset, NAMES, ", or the path of an image folder")


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
        source = find(dataset, data_path=data_path, subset=subset, res=res)
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
    name = name_of(dataset)
    return None if name is None else _known(name, subset, res).info


class _Known(NamedTuple):
    """A data set that is known by name."""

    info: DatasetInfo | None  # its published sizes; None for an image folder
    find: Callable[[], Source]


def _known(
    name: str,
    subset: str | None,
    res: int | None,
    data_path: Path = Path(),
    *,
    download: bool = False,
    progress: bool = False,
) -> _Known:
    """Return the data set called `name`, one of `NAMES`; a subset of ImageNet may be the `name` or the `subset`."""
    match name:
        case "CIFAR10" | "CIFAR100":
            find_cifar = partial(cifar.source, name, data_path, res, download=download, progress=progress)
            return _Known(cifar.SPECS[name].info, find_cifar)
        case "MNIST" | "FashionMNIST":
            find_mnist = partial(mnist.source, name, data_path, download=download, progress=progress)
            return _Known(mnist.SPECS[name].info, find_mnist)
        case "digits":
            return _Known(digits.INFO, digits.source)
        case "Tiny":
            return _Known(tiny_imagenet.info(res), partial(tiny_imagenet.source, data_path, res))
        case "folder":
            return _Known(None, partial(folder.source, data_path, res))
        case "ImageNet":
            subset = known_subset(subset) if subset else None
        case _:
            assert name in SUBSETS, f"{name} is one of NAMES, but has no case here"
            subset = name
    return _Known(imagenet.info(subset, res), partial(imagenet.source, data_path, subset, res))


def name_of(dataset: str) -> str | None:
    """Return the name in `NAMES` that equals `dataset` in upper or lower case, or None."""
    return {known.casefold(): known for known in NAMES}.get(dataset.casefold())


def known_subset(subset: str) -> str:
    """Return the name in `SUBSETS` that equals `subset` in upper or lower case. Raises `InputError` if there is none."""
    if subset.casefold() in SUBSETS:
        return subset.casefold()
    raise _unknown("`subset`", subset, tuple(SUBSETS), "")


def _unknown(option: str, name: str, known: tuple[str, ...], alternative: str) -> InputError:
    spelling = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(name.casefold(), spelling, n=1)
    hint = f"did you mean {spelling[near[0]]}?" if near else "choose one of these"
    return InputError(f"{option}: expected one of {', '.join(known)}{alternative}, found {name!r}; {hint}")
