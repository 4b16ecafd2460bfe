"""Tiny ImageNet in its own layout, or with the validation images moved into class folders."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mtt_fast.data.folder import image_source, list_classes
from mtt_fast.data.imagenet import MEAN, STD
from mtt_fast.data.packing import Source
from mtt_fast.errors import InputError


def source(data_path: Path, res: int | None) -> Source:
    """Describe Tiny ImageNet (200 classes, 3x64x64 unless `res`): `data_path` itself, or tiny-imagenet-200/ in it.

    The test split is the official validation split (the official test split has no labels). Classes come in the order
    of their WordNet ids, as in the public code, not in the order of wnids.txt; they are called by words.txt if it is
    there. Grey images become RGB. Raises `InputError` for a missing or incomplete copy.
    """
    root = next(
        (r for r in (data_path / "tiny-imagenet-200", data_path) if (r / "train").is_dir() and (r / "val").is_dir()),
        None,
    )
    if root is None:
        raise InputError(
            f"Tiny: expected tiny-imagenet-200/ with train/ and val/ in {data_path}, found none; get "
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip and unpack it there, or mend --data_path"
        )
    train = list_classes(root / "train")
    listed = root / "wnids.txt"
    if listed.is_file() and set(wnids := _read(listed).split()) != set(train):
        odd = sorted(set(wnids) ^ set(train))
        raise InputError(
            f"{root / 'train'}: expected the classes of wnids.txt, found {len(odd)} in only one of them "
            f"({', '.join(odd[:3])}); unpack the data set again"
        )
    annotations = root / "val" / "val_annotations.txt"
    own_layout = annotations.is_file() and (root / "val" / "images").is_dir()
    test = _annotated(annotations, list(train)) if own_layout else _rearranged(root / "val")
    return image_source(
        "Tiny" if res in (None, 64) else f"Tiny-{res}",
        root,
        train,
        test,
        class_names=_words(root / "words.txt", list(train)),
        channels=3,
        size=res or 64,
        resize=True,
        mean=MEAN,
        std=STD,
    )


def _annotated(annotations: Path, wnids: list[str]) -> dict[str, list[str]]:
    """Return the validation images by class, from lines "file, WordNet id, box" parted by tabs."""
    classes: dict[str, list[str]] = {wnid: [] for wnid in wnids}
    for number, line in enumerate(_read(annotations).splitlines(), 1):
        name, wnid = [*line.split("\t"), ""][:2]
        if wnid not in classes:
            raise InputError(
                f"{annotations}: line {number}: expected an image and its class in train/, found {line[:60]!r}; "
                "unpack it again"
            )
        classes[wnid].append(str(annotations.parent / "images" / name))
    return classes


def _rearranged(val: Path) -> dict[str, list[str]]:
    return {wnid: files for wnid, files in list_classes(val).items() if wnid != "images" or files}


def _words(path: Path, wnids: list[str]) -> list[str]:
    """Return the first word for each id, or the id itself where there is no word or another class has the same."""
    lines = (line.partition("\t") for line in _read(path).splitlines()) if path.is_file() else ()
    words = {wnid: text.split(",")[0].strip() for wnid, _, text in lines}
    counts = Counter(words.get(wnid) for wnid in wnids)
    return [words[wnid] if words.get(wnid) and counts[words[wnid]] == 1 else wnid for wnid in wnids]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected text, found it unreadable ({error}); unpack the data set again") from error
