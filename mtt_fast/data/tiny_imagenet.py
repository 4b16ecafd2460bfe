"""Tiny ImageNet in its own layout, or with the validation images moved into class folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from mtt_fast.data.class_names import tiny_wnids
from mtt_fast.data.folder import image_source
from mtt_fast.data.image_data import DatasetInfo
from mtt_fast.data.imagenet import MEAN, STD
from mtt_fast.data.listing import Listing, is_image_name, list_classes, listed_by_wnid, log_skipped
from mtt_fast.data.packing import Source
from mtt_fast.errors import InputError, NotFound
from mtt_fast.storage.regular import read_lines

_SIDE = 64
_MAX_BYTES = 16 << 20  # of a text file; words.txt, the longest, has 2.6 MB
_FIX = "unpack the data set again"


def info(res: int | None) -> DatasetInfo:
    """Return the published sizes of Tiny ImageNet."""
    side = res or _SIDE
    name = "Tiny" if side == _SIDE else f"Tiny-{side}"
    return DatasetInfo(name, (3, side, side), num_classes=200, num_train=100_000, num_test=10_000)


def source(data_path: Path, res: int | None) -> Source:
    """Describe Tiny ImageNet (200 classes, 3x64x64 unless `res`): `data_path` itself, or tiny-imagenet-200/ in it.

    The test split is the official validation split (the official test split has no labels). Classes come in the order
    of their WordNet ids, as in the public code, not in the order of wnids.txt; they are called by words.txt if it is
    there. Folders may be named by words or numbers in place of the ids. Grey images become RGB.
    Raises `InputError` for a missing or incomplete copy.
    """
    root = next(
        (r for r in (data_path / "tiny-imagenet-200", data_path) if (r / "train").is_dir() and (r / "val").is_dir()),
        None,
    )
    if root is None:
        raise NotFound(
            f"Tiny: expected tiny-imagenet-200/ with train/ and val/ in {data_path}, found none; get "
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip and unpack it there, or correct `data_path`"
        )
    train = listed_by_wnid(list_classes(root, root / "train"), tiny_wnids(), root / "train")
    wnids, listed = list(train.classes), root / "wnids.txt"
    if listed.exists() and (odd := sorted(set(_lines(listed)) ^ set(wnids))):
        raise InputError(
            f"{root / 'train'}: expected the classes of wnids.txt, found {len(odd)} in only one of them "
            f"({', '.join(odd[:3])}); {_FIX}"
        )
    annotations = root / "val" / "val_annotations.txt"
    pictures = _pictures(root) if annotations.exists() else {}
    test = _annotated(annotations, pictures, wnids) if pictures else _rearranged(root)
    known = info(res)
    log_skipped(known.name, train, test)
    return image_source(
        known.name,
        root,
        train.classes,
        test.classes,
        class_names=_words(root / "words.txt", wnids),
        channels=3,
        size=known.image_shape[1],
        fit="crop",
        mean=MEAN,
        std=STD,
        labelled_by=[annotations] if pictures else (),
    )


def _annotated(annotations: Path, pictures: Mapping[str, str], wnids: list[str]) -> Listing:
    """List the validation images (`pictures`: paths by name) by class, from lines "file, WordNet id, box" parted by tabs.

    Raises `InputError` for a line that names no image, no class, or an image that has its class already.
    """
    classes: dict[str, list[str]] = {wnid: [] for wnid in wnids}
    named: set[str] = set()
    for number, line in enumerate(read_lines(annotations, _MAX_BYTES, _FIX), 1):
        name, wnid = [*line.split("\t"), ""][:2]
        if wnid not in classes or not is_image_name(name) or "/" in name:
            raise InputError(
                f"{annotations}: line {number}: expected an image and its class in train/, found {line[:60]!r}; {_FIX}"
            )
        if name in named:
            raise InputError(f"{annotations}: line {number}: expected each image once, found {name[:60]} again; {_FIX}")
        if name not in pictures:
            raise InputError(
                f"{annotations.parent / 'images' / name}: cannot be read (line {number} of {annotations.name} names it, and "
                f"it is not there); {_FIX}"
            )
        named.add(name)
        classes[wnid].append(pictures[name])
    unnamed = len(pictures) - len(named)
    return Listing(classes, +Counter({"images that val_annotations.txt does not name": unnamed}))


def _pictures(root: Path) -> dict[str, str]:
    """Return the paths of the images in val/images/ by name; scripts that rearrange them leave it empty."""
    if not (root / "val" / "images").is_dir():
        return {}
    files = list_classes(root, root / "val", ["images"]).classes["images"]
    return {Path(file).name: file for file in files}


def _rearranged(root: Path) -> Listing:
    """List the images in val/CLASS/."""
    listing = list_classes(root, root / "val")
    classes = {place: files for place, files in listing.classes.items() if place != "images" or files}
    return listed_by_wnid(Listing(classes, listing.skipped), tiny_wnids(), root / "val")


def _words(path: Path, wnids: list[str]) -> list[str]:
    """Return the first word for each id, or the id itself where there is no word or another class has the same."""
    lines = (line.partition("\t") for line in _lines(path)) if path.exists() else ()
    words = {wnid: text.split(",")[0].strip() for wnid, _, text in lines}
    counts = Counter(words.get(wnid) for wnid in wnids)
    return [words[wnid] if words.get(wnid) and counts[words[wnid]] == 1 else wnid for wnid in wnids]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_lines(path, _MAX_BYTES, _FIX) if line.strip()]
