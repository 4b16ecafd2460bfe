"""Image folders: train/CLASS/… and test/CLASS/…, of one's own or of a known data set."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from mtt_fast.data.images import SUFFIXES, decode, is_grey, list_images, size_of
from mtt_fast.data.packing import Contents, Part, Source, key_of, stack_labels
from mtt_fast.errors import InputError

TEST_FOLDERS = ("test", "val", "valid")

Classes = Mapping[str, Sequence[str]]  # a class's folder name -> its image files


def source(root: Path, res: int | None) -> Source:
    """Describe the image folder `root`; its classes are the sorted folder names.

    Without `res` all images must have one size. They become one grey channel if all of them are grey, RGB otherwise;
    mean and std are computed from the training images.
    Raises `InputError` if there are no such folders, or their classes differ or are empty.
    """
    if not root.is_dir():
        raise InputError(
            f"{root}: expected an image folder with train/CLASS/ and test/CLASS/, found no folder; check the path"
        )
    root = root.resolve()
    train, test = find_splits(root)
    suffix = f"-{res}" if res else ""
    place = hashlib.blake2b(str(root).encode(errors="surrogateescape"), digest_size=4).hexdigest()
    return image_source(
        f"folder-{root.name}{suffix}",
        root,
        list_classes(train),
        list_classes(test),
        stem=f"folder-{root.name}-{place}{suffix}",
        size=res,
        resize=res is not None,
    )


def has_splits(root: Path) -> bool:
    """Whether `root` looks like an image folder."""
    return (root / "train").is_dir() and any((root / name).is_dir() for name in TEST_FOLDERS)


def find_splits(root: Path) -> tuple[Path, Path]:
    """Return the folders of the training and the test images below `root`."""
    for name in TEST_FOLDERS:
        if (root / "train").is_dir() and (root / name).is_dir():
            return root / "train", root / name
    raise InputError(
        f"{root}: expected train/ and one of {', '.join(f'{name}/' for name in TEST_FOLDERS)}, with a folder a class, "
        f"found {_listing(root)}; rearrange the images so, or check the path"
    )


def list_classes(folder: Path) -> dict[str, list[str]]:
    """Return the images below each folder in `folder`, by folder name, both sorted."""
    return {child.name: list_images(child) for child in class_folders(folder)}


def class_folders(folder: Path) -> list[Path]:
    """Return the sorted folders in `folder`. Raises `InputError` if there are none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of class folders, found none; check the path")
    children = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not children:
        raise InputError(
            f"{folder}: expected a folder a class, found {_listing(folder)}; move the images into class folders"
        )
    return children


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
    resize: bool,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Source:
    """Describe a data set of image files by class; class i is the i-th of `train`, called `class_names[i]`,
    or by its folder.

    `channels` and `size` None: found out from the images. `resize`: see `images.decode`.
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
    train_files = [file for label in train for file in train[label]]
    test_files = [file for label in train for file in test[label]]

    def read() -> Contents:
        planes = channels or (1 if all(map(is_grey, train_files + test_files)) else 3)
        height, width = (size, size) if size else size_of(train_files[0])
        shape = (planes, height, width)
        return Contents(
            tuple(class_names or train),
            shape,
            Part(stack_labels([len(train[label]) for label in train]), decode(train_files, shape, resize)),
            Part(stack_labels([len(test[label]) for label in train]), decode(test_files, shape, resize)),
        )

    key = key_of(root, train_files + test_files, name, list(train), class_names, channels, size, resize, mean, std)
    return Source(name, stem or name, key, read, mean, std)


def _listing(folder: Path) -> str:
    names = sorted(child.name for child in folder.iterdir())
    return (", ".join(names[:4]) + (", …" if len(names) > 4 else "")) or "nothing"
