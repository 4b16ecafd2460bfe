"""Image folders: train/CLASS/… and test/CLASS/…, of a known data set or any other."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from mtt_fast.data.class_names import abbreviated, class_indices
from mtt_fast.data.image_data import DatasetInfo, check_at_least_two_classes
from mtt_fast.data.images import Fit, decode, read_headers
from mtt_fast.data.listing import SUFFIXES, Listing, folder_names, list_classes, listed, log_skipped
from mtt_fast.data.packing import Contents, Part, Source, key_of, stack_labels
from mtt_fast.errors import InputError

TEST_FOLDERS = ("test", "val", "valid")

Classes = Mapping[str, Sequence[str]]  # a class's folder name -> its image files

log = logging.getLogger(__name__)


def source(root: Path, res: int | None) -> Source:
    """Describe the image folder `root`; its classes are the folder names, sorted (by number, where they are numbers).

    Without `res` all images must have one size. They become one grey channel if all of them are grey, RGB otherwise;
    mean and std are computed from the training images.
    Raises `InputError` if there are no such folders, or their classes differ or are empty.
    """
    if not root.is_dir():
        raise InputError(
            f"{root}: expected an image folder with train/CLASS/ and test/CLASS/, found no folder; check the path"
        )
    root = root.resolve()
    train, test = (list_classes(root, folder) for folder in find_splits(root))
    suffix = f"-{res}" if res else ""
    name = f"folder-{root.name}{suffix}"
    log_skipped(name, train, test)
    place = hashlib.blake2b(str(root).encode(errors="surrogateescape"), digest_size=4).hexdigest()
    return image_source(
        name,
        root,
        train.classes,
        test.classes,
        stem=f"folder-{root.name}-{place}{suffix}",
        size=res,
        fit="crop" if res else "exact",
    )


def has_splits(root: Path) -> bool:
    """Return whether `root` looks like an image folder."""
    return (root / "train").is_dir() and any((root / name).is_dir() for name in TEST_FOLDERS)


def find_splits(root: Path) -> tuple[Path, Path]:
    """Return the folders of the training and the test images below `root`.

    The latter is the first that has the training classes, or classes at all: test images without labels (ImageNet's)
    do not hide labelled validation images. Raises `InputError` where a split has no folder.
    """
    places = [root / name for name in TEST_FOLDERS if (root / name).is_dir()]
    if not (root / "train").is_dir() or not places:
        raise InputError(
            f"{root}: expected train/ and one of {', '.join(f'{name}/' for name in TEST_FOLDERS)}, with a folder a "
            f"class, found {listed(root)}; rearrange the images so, or check the path"
        )
    train, *classes = (folder_names(place) for place in (root / "train", *places))
    labelled = [place for place, names in zip(places, classes, strict=True) if names & train]
    labelled += [place for place, names in zip(places, classes, strict=True) if names]
    chosen = labelled[0] if labelled else places[0]
    if chosen != places[0]:
        log.info("%s: not used, as it has no folders of the training classes; test images: %s", places[0], chosen)
    return root / "train", chosen


def by_class(name: str, folder: Path, listing: Listing, class_names: Sequence[str]) -> dict[str, list[str]]:
    """Return the images of each of the `class_names` of the data set `name`, in their order, listed in `folder`.

    Raises `InputError`, which names `folder`, for a folder that means no class, and for classes without one.
    """
    places = list(listing.classes)
    indices = class_indices(places, class_names, folder)
    if missing := [class_names[index] for index in range(len(class_names)) if index not in indices]:
        raise InputError(
            f"{folder.parent}: expected the {len(class_names)} class folders of {name} in {folder.name}/, found "
            f"{len(places)}, none for {abbreviated(missing)}; correct `data_path`, or name the folder itself: `dataset` "
            f"{folder.parent}"
        )
    places_by_index = dict(zip(indices, places, strict=True))
    return {class_name: listing.classes[places_by_index[index]] for index, class_name in enumerate(class_names)}


def image_source(
    name: str,
    root: Path,
    train: Classes,
    test: Classes,
    *,
    stem: str | None = None,
    class_names: Sequence[str] | None = None,
    channels: int | None = None,
    size: int | None = None,
    fit: Fit,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    labelled_by: Sequence[Path] = (),
) -> Source:
    """Describe a data set of image files by class; class i is the i-th of `train`, called `class_names[i]`, or by its key.

    `channels` and `size` None: taken from the headers of all images. `fit`: see `images.decode`. `labelled_by`: the files that tell the
    classes of images whose paths do not.
    Raises `InputError` for classes that differ or are empty, for a single one, and when it is read, for an image of another size or kind.
    """
    if set(train) != set(test):
        odd = sorted(set(train) ^ set(test))
        raise InputError(
            f"{root}: expected the same classes in training and test images, found {len(odd)} in only one of them "
            f"({', '.join(odd[:3])}{', …' if len(odd) > 3 else ''}); add or remove their folders"
        )
    for split, classes in (("training", train), ("test", test)):
        for label, files in classes.items():
            if not files:
                raise InputError(
                    f"{root}: expected {split} images ({', '.join(SUFFIXES)}) of every class, found none of {label!r}; "
                    "add some, or remove its folders"
                )
    check_at_least_two_classes(str(root), tuple(train))
    train_files = [file for label in train for file in train[label]]
    test_files = [file for label in train for file in test[label]]

    names = tuple(class_names or train)
    log.info("%s: %d classes in this order: %s", name, len(names), abbreviated(names))

    def image_shape() -> tuple[int, int, int]:
        """Return (C, H, W) from the headers of all images: the first may be the only grey one, or the only one of its size."""
        if channels and size and fit != "exact":
            return channels, size, size
        header = read_headers(train_files + test_files, (size, size) if size else None, resize=fit != "exact")
        return (channels or (1 if header.grey else 3), *((size, size) if size else header.size))

    def read() -> Contents:
        # a known shape needs no look at the headers: each image is checked where it is decoded
        shape = (channels, size, size) if channels and size else image_shape()
        return Contents(
            names,
            shape,
            Part(stack_labels([len(train[label]) for label in train]), decode(train_files, shape, fit=fit)),
            Part(stack_labels([len(test[label]) for label in train]), decode(test_files, shape, fit=fit)),
        )

    def info() -> DatasetInfo:
        return DatasetInfo(name, image_shape(), len(names), len(train_files), len(test_files))

    key = key_of(
        root, [*labelled_by, *train_files, *test_files], name, list(train), class_names, channels, size, fit, mean, std
    )
    return Source(name, stem or name, key, read, mean, std, info)
