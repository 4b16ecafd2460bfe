"""Find the class that a name means, such as a folder's.

A label that is the rank of a sorted folder name is right only where everybody sorts the same names. So `class_indices`
labels everything that has names: image folders, and other software's distilled sets.
"""

from __future__ import annotations

import difflib
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

import torch
from torch import Tensor

from mtt_fast.data.class_lists import SPELLINGS, SUBSETS
from mtt_fast.errors import InputError

log = logging.getLogger(__name__)

_WNID = re.compile(r"n\d{8}")
_NUMBERED = re.compile(r"(\D*)(\d{1,18})")
_CLASS_NUMBER = re.compile(r"(?:(?:class|cls|category|label|target|new|c|y)[\W_]*)?(\d{1,18})")
_NAMED = 10  # classes in a line of the log
_MOST_NUMBERS = 128  # before a name: a name of a folder has no room for more, one in a file may have millions


def is_wnid(name: str) -> bool:
    """Return whether `name` is formed as a WordNet id."""
    return _WNID.fullmatch(name) is not None


def in_order(names: Iterable[str]) -> list[str]:
    """Return folder names in the order of their classes: sorted, but by number where they differ only in a number.

    As text, "10" comes before "2", and labels 2 … 10 would all be others than their folders say.
    """
    listed = sorted(names)
    numbered = [(match[1], int(match[2]), name) for name in listed if (match := _NUMBERED.fullmatch(name))]
    if len(numbered) < len(listed) or len({text for text, _, _ in numbered}) > 1:
        return listed
    return [name for _, _, name in sorted(numbered)]


def class_indices(names: Sequence[str], class_names: Sequence[str], where: object) -> list[int]:
    """Return, for each of the `names`, the index in `class_names` of the class that it means.

    Case, separators and leading numbers ("003-cat") do not count. Of the data sets that are known by their
    `class_names`, common spellings, WordNet ids and WordNet's words are known too. Where all names are numbers they are
    class numbers: indices, or for a subset of ImageNet also ranks among its 1000 classes.
    `where` (a folder or file) is for the message. Raises `InputError` for a name that means no class, and for two that
    mean the same one.
    """
    meant = meant_classes(names, class_names, where)
    indices = [index for index in meant if index is not None]
    if len(indices) < len(names):
        raise _unknown(names[meant.index(None)], class_names, where)
    renamed = [f"{name} = {class_names[i]}" for name, i in zip(names, indices, strict=True) if name != class_names[i]]
    if renamed:
        log.info("%s: classes by name: %s", where, abbreviated(renamed))
    return indices


def meant_classes(names: Sequence[str], class_names: Sequence[str], where: object) -> list[int | None]:
    """Return the indices that `class_indices` returns, with None for names that mean no class: those of a larger data set."""
    known = _recognised(class_names)
    exact = {name: index for index, name in enumerate(class_names)}
    spelt = _by_spelling(known.spellings)
    indices = [exact.get(name, _spelt(name, spelt)) for name in names]
    if None in indices and (numbered := _numbered(names, known, where)):
        indices = list(numbered)
    _check_distinct(names, indices, class_names, where)
    return indices


def relabelled(labels: Tensor, indices: Sequence[int], num_classes: int, where: object) -> Tensor:
    """Return `labels` of classes in another order, where class i is class `indices[i]` of `num_classes`.

    Class indices (n,) int64 become others; the columns of soft labels (n, len(indices)) are moved.
    Raises `InputError`, which names `where`, for labels of other classes, and for soft ones that lack a class.
    """
    if labels.dim() == 1:
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(indices):
            raise InputError(
                f"{where}: expected labels in [0, {len(indices)}), one for each class name, found {int(labels.min())} to "
                f"{int(labels.max())}; get it again"
            )
        return torch.tensor(indices, device=labels.device)[labels]
    if not labels.shape[1] == len(indices) == num_classes:
        raise InputError(
            f"{where}: expected soft labels of the data set's {num_classes} classes, found {labels.shape[1]} columns and "
            f"{len(indices)} class names; name the data set that it belongs to"
        )
    moved = torch.empty_like(labels)
    moved[:, torch.tensor(indices, device=labels.device)] = labels
    return moved


def abbreviated(items: Sequence[str]) -> str:
    """Return the items in one line; a long one is cut and ends with their number."""
    return ", ".join(items[:_NAMED]) + (f", … ({len(items)} in all)" if len(items) > _NAMED else "")


def imagenet_wnids() -> list[str]:
    """Return ImageNet's 1000 WordNet ids, sorted: in the order of its classes."""
    return list(_imagenet()[0])


def tiny_wnids() -> list[str]:
    """Return Tiny ImageNet's 200 WordNet ids, sorted."""
    return list(_imagenet()[1])


@dataclass(frozen=True)
class _Classes:
    """The classes of a data set: other names of each (normalised), and the numbers that people give them."""

    spellings: tuple[frozenset[str], ...]
    numberings: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=1)
def _imagenet() -> tuple[dict[str, list[str]], list[str]]:
    """Return (words by WordNet id, ImageNet's 1000 in order; those of them that are Tiny ImageNet's).

    The words are WordNet's, as ILSVRC 2012 lists them, then the names of today's lists where these differ.
    """
    text = (resources.files("mtt_fast.data") / "imagenet_classes.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines()]
    return {wnid: words.split("; ") for wnid, _, words in rows}, [wnid for wnid, tiny, _ in rows if tiny == "tiny"]


@lru_cache(maxsize=1)
def _known_sets() -> tuple[_Classes, ...]:
    words, tiny = _imagenet()
    rank = {wnid: index for index, wnid in enumerate(words)}
    known = [_Classes(_spellings_of(names), (tuple(range(len(names))),)) for names in SPELLINGS]
    for wnids in (list(words), tiny):
        known.append(_Classes(_wordnet(wnids), (tuple(range(len(wnids))),)))
    for subset in SUBSETS.values():
        words_or_own = zip(_wordnet(subset), subset.values(), strict=True)
        spellings = tuple(spelling | {_normalised(name)} for spelling, name in words_or_own)
        known.append(_Classes(spellings, (tuple(range(len(subset))), tuple(rank[wnid] for wnid in subset))))
    return tuple(known)


def _spellings_of(names: tuple[str, ...]) -> tuple[frozenset[str], ...]:
    others = SPELLINGS[names]
    return tuple(frozenset(map(_normalised, (name, *others.get(name, "").split()))) for name in names)


def _wordnet(wnids: Iterable[str]) -> tuple[frozenset[str], ...]:
    words = _imagenet()[0]
    return tuple(frozenset(map(_normalised, (wnid, *words.get(wnid, ())))) for wnid in wnids)


def _recognised(class_names: Sequence[str]) -> _Classes:
    """Return the known data set with these class names, or else what follows from the names."""
    for known in _known_sets():
        if len(class_names) == len(known.spellings) and all(
            _normalised(name) in spelling for name, spelling in zip(class_names, known.spellings, strict=True)
        ):
            return known
    numbers = _class_numbers(class_names)
    return _Classes(_wordnet(class_names), (tuple(range(len(class_names)) if numbers is None else numbers),))


def _class_numbers(names: Sequence[str]) -> list[int] | None:
    """Return the numbers in the names, such as "7" and "class_7", or None unless all are such names."""
    matches = [_CLASS_NUMBER.fullmatch(name.casefold()) for name in names]
    numbers = [int(match[1]) for match in matches if match]
    return numbers if len(numbers) == len(names) else None


def _by_spelling(spellings: Sequence[frozenset[str]]) -> dict[str, int]:
    """Return the class of each spelling that only one class has."""
    classes: dict[str, list[int]] = {}
    for index, names in enumerate(spellings):
        for name in names - {""}:
            classes.setdefault(name, []).append(index)
    return {name: indices[0] for name, indices in classes.items() if len(indices) == 1}


def _spelt(name: str, spelt: dict[str, int]) -> int | None:
    """Return the class that a name means by its words or its WordNet id."""
    for reading in _readings(name):
        if (index := spelt.get(reading)) is not None:
            return index
    number, rest = _number_and_rest(name)
    index = spelt.get(_normalised(rest))
    return index if index == number else None


def _readings(name: str) -> Iterator[str]:
    for _ in range(_MOST_NUMBERS):
        yield _normalised(name)
        yield _normalised(name.partition(",")[0])  # "tench, Tinca tinca"
        if match := _WNID.match(name):
            yield match[0]  # "n01440764-tench"
        _, name = _number_and_rest(name)  # "003-cat", "3 - three"
        if not any(map(str.isalpha, name)):
            return


def _number_and_rest(name: str) -> tuple[int | None, str]:
    match = re.fullmatch(r"(\d{1,18})[\W_]+(.+)", name, re.DOTALL)
    return (int(match[1]), match[2]) if match else (None, "")


def _numbered(names: Sequence[str], known: _Classes, where: object) -> list[int] | None:
    """Return the classes that all names mean by their numbers, or None where they are no class numbers."""
    numbers = _class_numbers(names)
    if numbers is None:
        return None
    readings = [
        [numbering.index(number) for number in numbers]
        for numbering in known.numberings
        if set(numbers) <= set(numbering)
    ]
    if any(reading != readings[0] for reading in readings):
        raise InputError(
            f"{where}: expected numbers that are either indices of classes or ranks among ImageNet's 1000, found "
            f"{abbreviated(names)}, which may be both; rename the folders after their classes"
        )
    return readings[0] if readings else None


def _check_distinct(
    names: Sequence[str], indices: Sequence[int | None], class_names: Sequence[str], where: object
) -> None:
    first: dict[int, str] = {}
    for name, index in zip(names, indices, strict=True):
        if index is None:
            continue
        if index in first:
            raise InputError(
                f"{where}: expected one name for each class, found {first[index]!r} and {name!r}, which both mean "
                f"{class_names[index]!r}; merge them"
            )
        first[index] = name


def _unknown(name: str, class_names: Sequence[str], where: object) -> InputError:
    spellings = _recognised(class_names).spellings
    several = [class_names[index] for index, names in enumerate(spellings) if _normalised(name) in names]
    spelt = _by_spelling(spellings)
    near = difflib.get_close_matches(_normalised(name), spelt, n=3, cutoff=0.5)
    if several:
        hint = f"which may be {' or '.join(several)}"
    elif near:
        hint = f"nearest: {', '.join(dict.fromkeys(class_names[spelt[one]] for one in near))}"
    else:
        hint = f"the classes are {abbreviated(class_names)}"
    return InputError(
        f"{where}: expected the names of the data set's {len(class_names)} classes, or numbers from 0 to "
        f"{len(class_names) - 1}, found {name!r} ({hint}); rename it, or name the data set that it belongs to"
    )


def _normalised(name: str) -> str:
    """Return the letters and digits of a name, in small letters; a number without leading zeros."""
    text = "".join(filter(str.isalnum, unicodedata.normalize("NFKC", name).casefold()))
    return (text.lstrip("0") or "0") if re.fullmatch(r"[0-9]+", text) else text
