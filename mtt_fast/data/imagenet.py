"""ImageNet-1K and the ten-class subsets of the trajectory-matching papers, from an ImageNet tree or fastai's."""

from __future__ import annotations

from pathlib import Path

from mtt_fast.data.class_lists import SUBSETS
from mtt_fast.data.class_names import imagenet_wnids, meant_classes
from mtt_fast.data.folder import image_source
from mtt_fast.data.image_data import DatasetInfo
from mtt_fast.data.listing import Listing, class_folders, folder_names, list_classes, listed_by_wnid, log_skipped
from mtt_fast.data.packing import Source
from mtt_fast.errors import InputError, NotFound

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_CLASSES = 1000
_SPLITS = ("train", "val")
_RES = 128  # the papers' resolution for the subsets
_GLAD = "imagenet-"  # begins the names of GLaD's subsets


def info(subset: str | None, res: int | None) -> DatasetInfo:
    """Return the published sizes of ImageNet, or of one of `SUBSETS`."""
    size = res or _RES
    name = f"{subset or 'ImageNet'}-{size}"
    if subset is None:
        return DatasetInfo(name, (3, size, size), num_classes=_CLASSES, num_train=1_281_167, num_test=50_000)
    # a subset has 12,000 to 13,000 training images
    return DatasetInfo(name, (3, size, size), num_classes=10, num_train=13_000, num_test=500)


def source(data_path: Path, subset: str | None, res: int | None) -> Source:
    """Describe ImageNet, or one of `SUBSETS`, as 3 x res x res (default 128).

    The folders train/WNID/ and val/WNID/ (the test split) are searched in `data_path` and its sub-folders ImageNet/ and imagenet/;
    for a subset also in those of fastai's archives (imagenette/, imagenette2/, imagenette2-320/, imagenette2-160/). Class folders
    may be named by WordNet id, class name or class number. Images that are not square are squeezed, as in MTT's code; GLaD's subsets are
    cropped, as in GLaD's: the shorter side is resized, and the centre remains. Resizing is bilinear and antialiased, on bytes.
    (These codes resize normalised tensors, which torchvision antialiases since 0.17.) Raises `InputError` if classes are missing.
    """
    root = _find(data_path, subset)
    train, test = (
        _subset_classes(root, root / split, subset) if subset else _all_classes(root, root / split) for split in _SPLITS
    )
    known = info(subset, res)
    log_skipped(known.name, train, test)
    return image_source(
        known.name,
        root,
        train.classes,
        test.classes,
        class_names=tuple(SUBSETS[subset].values()) if subset else list(train.classes),
        channels=3,
        size=known.image_shape[1],
        fit="crop" if subset and subset.startswith(_GLAD) else "squeeze",
        mean=MEAN,
        std=STD,
    )


def _all_classes(root: Path, split: Path) -> Listing:
    """List the images of a split by WordNet id, in the order of the ids. Folders may have other names of the classes."""
    places = class_folders(split)
    if len(places) != _CLASSES:
        raise InputError(
            f"{split}: expected ImageNet's {_CLASSES} class folders, found {len(places)}; give `subset` "
            f"({', '.join(SUBSETS)}), or name the folder itself: `dataset` {root}"
        )
    return listed_by_wnid(list_classes(root, split), imagenet_wnids(), split)


def _subset_classes(root: Path, split: Path, subset: str) -> Listing:
    """List the images of the subset's classes by WordNet id, in the subset's order. `split` may have other classes too."""
    class_folders(split)  # raises if there are none
    places = _places(split, subset)
    listing = list_classes(root, split, places.values())
    return Listing({wnid: listing.classes[place] for wnid, place in places.items()}, listing.skipped)


def _places(split: Path, subset: str) -> dict[str, str]:
    """Return the names of the folders in `split` with classes of the subset, by WordNet id, in the subset's order."""
    names = sorted(folder_names(split))
    places: dict[str, str] = {}
    if len(names) > len(SUBSETS[subset]):
        # a larger tree: numbers are those of ImageNet, and a word may be the name of a class outside the subset
        places = _by_wnid(names, imagenet_wnids(), imagenet_wnids(), split)
    if not set(SUBSETS[subset]) <= set(places):
        places = _by_wnid(names, list(SUBSETS[subset].values()), list(SUBSETS[subset]), split)
    return {wnid: places[wnid] for wnid in SUBSETS[subset] if wnid in places}


def _by_wnid(names: list[str], class_names: list[str], wnids: list[str], where: Path) -> dict[str, str]:
    meant = meant_classes(names, class_names, where)
    return {wnids[index]: name for name, index in zip(names, meant, strict=True) if index is not None}


def _find(data_path: Path, subset: str | None) -> Path:
    """Return the first likely folder that has train/ and val/, and in train/ all classes of `subset`."""
    places = ["", "ImageNet", "imagenet"]
    if subset:
        places += [subset, f"{subset}2", f"{subset}2-320", f"{subset}2-160"]
    roots = [root for place in places if all(((root := data_path / place) / split).is_dir() for split in _SPLITS)]
    if subset is None:
        if roots:
            return roots[0]
        raise NotFound(
            f"ImageNet: expected train/WNID/ and val/WNID/ in {data_path} or its sub-folders {', '.join(places[1:])}, "
            "found none; correct `data_path` (sort the validation images into class folders first)"
        )
    missing = list(SUBSETS[subset])
    for root in roots:
        named = _places(root / "train", subset)
        lacking = [wnid for wnid in SUBSETS[subset] if wnid not in named]
        if not lacking:
            return root
        missing = min(missing, lacking, key=len)
    raise (InputError if roots else NotFound)(
        f"{subset}: expected train/WNID/ and val/WNID/ in {data_path} or its sub-folders {', '.join(places[1:])}, found "
        f"no training folder for {len(missing)} of {len(SUBSETS[subset])} classes ({', '.join(missing[:3])}…); correct "
        "`data_path`"
    )
