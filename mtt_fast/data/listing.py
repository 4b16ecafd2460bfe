"""List the image files in class folders. Each file is listed once, under one label, however many links lead to it."""

from __future__ import annotations

import logging
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mtt_fast.data.class_names import class_indices, in_order, is_wnid
from mtt_fast.errors import InputError, reason_of, remedy_for
from mtt_fast.storage.regular import unreadable

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")

RESTORE = "restore it, or remove its link"

_LOOP = "link(s) to a parent folder"
_MAX_KINDS = 8  # of skipped files, in a line of the log

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    """The image files of one split by class folder, in the order of the classes, and the number of skipped entries."""

    classes: Mapping[str, list[str]]
    skipped: Counter[str] = field(default_factory=Counter)  # number of skipped entries by kind


def class_folders(folder: Path) -> list[Path]:
    """Return the folders in `folder`, in the order of their classes. Raises `InputError` if there are none."""
    names = [child.name for child in _children(folder) if _is_class(folder, child)]
    if not names:
        raise InputError(
            f"{folder}: expected a folder a class, found {listed(folder)}; move the images into class folders"
        )
    for name in names:
        # control characters, and what Python makes of bytes that are no text: neither could be kept beside the images
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
            raise InputError(f"{folder}: expected class folders named in plain text, found {name!a}; rename it")
    return [folder / name for name in in_order(names)]


def list_classes(root: Path, folder: Path, chosen: Iterable[str] | None = None) -> Listing:
    """List the images in each class folder of `folder` and its sub-folders; with `chosen`, in those class folders, in this order.

    `root` is the folder of the data set. `root`, `folder` and the class folders may be links to any place. Links below them must
    lead to a place in one of them. A file that is reached in two ways is listed once.
    Raises `InputError` for a link that leaves the data set or is broken, for an image that is not a regular file, and for an image
    under two labels.
    """
    folders = class_folders(folder) if chosen is None else [folder / name for name in chosen]
    allowed_roots = {os.path.realpath(place) for place in (root, folder, *folders)}
    first: dict[str, tuple[str, str]] = {}  # file -> (class, path)
    classes, skipped = {}, _loose(folder, folders) if chosen is None else Counter[str]()
    for place in folders:
        images = _Walk(allowed_roots, skipped).files_below(str(place))
        for identity, path in images.items():
            label, other = first.setdefault(identity, (place.name, path))
            if label != place.name:
                raise InputError(
                    f"{path}: expected each image under one label, found it under {label!r} too ({other}); remove one of them"
                )
        classes[place.name] = sorted(images.values())
    return Listing(classes, skipped)


def listed_by_wnid(listing: Listing, wnids: list[str], where: Path) -> Listing:
    """Return the images by WordNet id, in the order of `wnids`. The folders may have other names of these classes.

    A listing by ids is returned unchanged. Raises `InputError` that names the folder `where` for names of other classes.
    """
    places = list(listing.classes)
    if all(map(is_wnid, places)):
        return listing
    by_index = dict(zip(class_indices(places, wnids, where), places, strict=True))
    return Listing({wnids[index]: listing.classes[by_index[index]] for index in sorted(by_index)}, listing.skipped)


def log_skipped(name: str, *listings: Listing) -> None:
    """Log in one line which entries of the folders of the data set `name` were skipped."""
    skipped = sum((listing.skipped for listing in listings), Counter[str]())
    if skipped:
        counts = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common(_MAX_KINDS))
        log.info("%s: skipped besides the images: %s (names of images end in %s)", name, counts, " ".join(SUFFIXES))


def folder_names(folder: Path) -> set[str]:
    """Return the names of the folders in `folder`, and of links to folders, without hidden ones."""
    return {child.name for child in _children(folder) if not child.name.startswith(".") and os.path.isdir(child.path)}


def is_image_name(name: str) -> bool:
    """Return whether a file name has the suffix of an image."""
    return name.lower().endswith(SUFFIXES)


def listed(folder: Path) -> str:
    """Return the first few names in `folder`, for a message."""
    names = sorted(child.name for child in _children(folder))
    return (", ".join(names[:4]) + (", …" if len(names) > 4 else "")) or "nothing"


def _is_class(folder: Path, child: os.DirEntry[str]) -> bool:
    if child.name.startswith("."):
        return False
    if child.is_symlink():  # a link to a folder around the class folders is no class
        _check_target(child.path)
        return child.is_dir() and not _is_within(os.path.realpath(folder), {os.path.realpath(child.path)})
    return child.is_dir()


def _loose(folder: Path, folders: list[Path]) -> Counter[str]:
    """Count the entries of `folder` that are not class folders, by kind."""
    names = {place.name for place in folders}
    return Counter(_loose_kind(child) for child in _children(folder) if child.name not in names)


def _loose_kind(child: os.DirEntry[str]) -> str:
    if child.name.startswith("."):
        return _kind(child)
    if os.path.isdir(child.path):
        return _LOOP  # all other folders are classes
    return "outside the class folders" if is_image_name(child.name) else _kind(child)


class _Walk:
    """Walk through the folders below a class folder, find each image once, and count all other entries as skipped."""

    def __init__(self, allowed_roots: set[str], skipped: Counter[str]) -> None:
        self.allowed_roots, self.skipped = allowed_roots, skipped
        self.files: dict[str, str] = {}
        self.folders: list[tuple[str, str]] = []
        self.walked: set[str] = set()

    def files_below(self, top: str) -> dict[str, str]:
        """Return the images below the folder `top`, by identity.

        Links are followed last, so that a file is listed by its own path, if that is in these folders.
        """
        links: list[tuple[os.DirEntry[str], str]] = []  # with the real path of the folder that each link is in
        self.folders.append((top, os.path.realpath(top)))
        while self.folders or links:
            if not self.folders:
                self._follow(*links.pop())
                continue
            place, real = self.folders.pop()
            self.walked.add(real)
            for child in _children(place):
                if child.name.startswith("."):
                    self.skipped[_kind(child)] += 1
                elif child.is_symlink():
                    links.append((child, real))
                elif child.is_dir(follow_symlinks=False):
                    self.folders.append((child.path, f"{real}/{child.name}"))
                elif not is_image_name(child.name):
                    self.skipped[_kind(child)] += 1
                else:
                    self._add(child, f"{real}/{child.name}")
        return self.files

    def _follow(self, link: os.DirEntry[str], parent: str) -> None:
        """Add the image that `link` leads to, or queue the folder that it leads to."""
        is_folder = os.path.isdir(link.path)
        if not is_image_name(link.name) and not is_folder:
            self.skipped[_kind(link)] += 1
            return
        _check_target(link.path)
        target = os.path.realpath(link.path)
        if is_folder and _is_within(parent, {target}):
            self.skipped[_LOOP] += 1
        elif not _is_within(target, self.allowed_roots):
            raise InputError(
                f"{link.path}: expected links to files of the data set itself, found one to {target}; copy the images, or link "
                "the whole class folder"
            )
        elif not is_folder:
            self._add(link, target)
        elif target in self.walked:
            self.skipped["link(s) to a folder that is listed already"] += 1
        else:
            self.folders.append((link.path, target))

    def _add(self, child: os.DirEntry[str], real: str) -> None:
        try:
            status = child.stat()
        except OSError as error:
            raise unreadable(child.path, error, RESTORE) from error
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{child.path}: expected an image, found no regular file; remove it")
        # by inode only for files with several hard links, since not every file system has reliable inode numbers
        identity = real if status.st_nlink == 1 else f"{status.st_dev}:{status.st_ino}"
        if self.files.setdefault(identity, child.path) != child.path:
            self.skipped["further name(s) of an image"] += 1


def _is_within(path: str, allowed_roots: set[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in allowed_roots)


def _check_target(link: str) -> None:
    """Raise `InputError` for a broken link, and for one that leads to itself."""
    try:
        os.stat(link)
    except OSError as error:
        raise unreadable(link, error, RESTORE) from error


def _kind(child: os.DirEntry[str]) -> str:
    if child.name.startswith("."):
        return "hidden"
    return os.path.splitext(child.name)[1].lower() or "without a suffix"


def _children(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(
            f"{folder}: expected a folder that can be read ({reason_of(error)}); {remedy_for(error)}"
        ) from error
