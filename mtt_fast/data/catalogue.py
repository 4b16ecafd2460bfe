"""The data sets by name."""

from __future__ import annotations

import difflib
import os
from numbers import Integral
from pathlib import Path

from mtt_fast.checks import shown
from mtt_fast.data import cifar, digits, folder, imagenet, mnist, tiny_imagenet
from mtt_fast.data.class_lists import SUBSETS
from mtt_fast.data.image_data import ImageData
from mtt_fast.data.packing import Source, packed
from mtt_fast.errors import InputError

NAMES = (*cifar.SPECS, *mnist.SPECS, "Tiny", "ImageNet", *SUBSETS, "digits", "folder")


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
    match name:
        case "CIFAR10" | "CIFAR100":
            _check_size(name, 32, res)
            return cifar.source(name, data_path, res, download=download, progress=progress)
        case "MNIST" | "FashionMNIST":
            _check_size(name, 28, res)
            return mnist.source(name, data_path, download=download, progress=progress)
        case "digits":
            _check_size(name, 8, res)
            return digits.source()
        case "Tiny":
            return tiny_imagenet.source(data_path, res)
        case "ImageNet":
            return imagenet.source(data_path, known_subset(subset) if subset else None, res)
        case "folder":
            return folder.source(data_path, res)
        case str():
            assert name in SUBSETS, f"{name} is one of NAMES, but has no case here"
            return imagenet.source(data_path, name, res)
    path = Path(dataset).expanduser()
    if isinstance(dataset, Path) or path.is_dir() or os.sep in dataset:
        return folder.source(path, res)
    raise _unknown("`dataset`", dataset, NAMES, ", or the path of an image folder")


def name_of(dataset: str) -> str | None:
    """Return the name in `NAMES` that equals `dataset` in upper or lower case, or None."""
    return {known.casefold(): known for known in NAMES}.get(dataset.casefold())


def known_subset(subset: str) -> str:
    """Return the name in `SUBSETS` that equals `subset` in upper or lower case. Raises `InputError` if there is none."""
    if subset.casefold() in SUBSETS:
        return subset.casefold()
    raise _unknown("`subset`", subset, tuple(SUBSETS), "")


def _check_size(name: str, size: int, res: int | None) -> None:
    if res not in (None, size):
        raise InputError(f"`res`: expected {size} or nothing, the size of {name}, found {res}; leave it out")


def _unknown(option: str, name: str, known: tuple[str, ...], alternative: str) -> InputError:
    spelling = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(name.casefold(), spelling, n=1)
    hint = f"did you mean {spelling[near[0]]}?" if near else "choose one of these"
    return InputError(f"{option}: expected one of {', '.join(known)}{alternative}, found {name!r}; {hint}")
