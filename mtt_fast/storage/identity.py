"""The identity of real images as networks see them: recorded in everything made from them, and compared when that is used.

Distilled sets, checkpoints and experts must be used with the images that they were made from, in the same order of classes,
normalised or whitened alike. With other images they would give plausible but wrong results.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mtt_fast.errors import InputError
from mtt_fast.storage.records import NUMBER, check_form

NORMALISED, WHITENED = "none", "zca"
"""The values of `DatasetIdentity.whitening`."""

_STATISTICS_TOLERANCE = 1e-4  # of means and deviations in [0, 1]; published ones have four digits
WHITENING_TOLERANCE = 1e-3
"""Relative error of a whole matrix below which two are the same; two machines differ by 1e-5, another eps by more than 0.1."""


@dataclass(frozen=True)
class DatasetIdentity:
    """The identity of real images as networks see them. An empty field is unknown, and equals anything."""

    name: str = ""
    """as `ImageData.name`: CIFAR10, imagewoof-128, folder-pets"""
    class_names: tuple[str, ...] = ()
    """in the order of the labels"""
    image_shape: tuple[int, ...] = ()
    """(C, H, W)"""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    whitening: str = ""
    """"none" for normalised images, "zca" for those that are whitened by a fit to these very images with eps 0.1. Not a digest
    of the matrix, whose last bits another machine rounds otherwise; two matrices are compared by `check_same_whitening`"""
    fingerprint: str = ""
    """as `ImageData.fingerprint`: of all images, labels, class names, mean and std"""

    def record(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> DatasetIdentity:
        """Return the identity in what `record` returned. Raises `TypeError` for other fields, or of other types."""
        check_form(record, _FORM)
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
        }
        return cls(**fields)


_FORM = {
    "name?": str, "class_names?": [str], "image_shape?": [int], "mean?": [NUMBER], "std?": [NUMBER], "whitening?": str,
    "fingerprint?": str,
}  # fmt: skip

UNKNOWN = DatasetIdentity()
"""The identity of images that nothing is known about."""


def check_same_data(
    found: DatasetIdentity,
    expected: DatasetIdentity,
    where: str | os.PathLike[str],
    *,
    fix: str | None = None,
    other_data: bool | None = None,
) -> None:
    """Raise `InputError` unless a file was made from the images that it is used with.

    `found` is the identity in the file `where`, `expected` that of the images at hand. `fix` replaces the message's default
    advice, the options that name the right images. With `other_data` True, other images of the same classes and shape pass. With
    False they are refused, and the message mentions that option; with None it does not. The message names the difference that a
    user recognises most easily.
    """
    differences = list(_differences(expected, found))
    for one in differences:
        if other_data and one.deliberate:
            continue
        allowed = other_data is False and all(each.deliberate for each in differences)
        raise InputError(
            f"{where}: {one.what}: expected {one.expected}, found {one.found}; {fix or one.fix}"
            + (", or give `other_data` to use it with these" if allowed else "")
        )


def describe_other_data(found: DatasetIdentity, expected: DatasetIdentity) -> str:
    """Return the difference that `other_data` allowed, for the log; "" if the images are the same."""
    first = next(_differences(expected, found), None)
    return (
        "" if first is None else f"{first.what}: {first.found}, used with {first.expected}, as other data are allowed"
    )


class _Difference(NamedTuple):
    """One difference of two identities, in words."""

    what: str
    expected: str
    found: str
    fix: str = "give the `dataset`, `subset`, `res` and `data_path` that it was made from"
    deliberate: bool = False
    """whether `other_data` allows it"""


def _differences(expected: DatasetIdentity, found: DatasetIdentity) -> Iterator[_Difference]:
    """Yield all differences, first those that a user recognises most easily."""
    same_images = bool(found.fingerprint) and found.fingerprint == expected.fingerprint
    if not same_images:
        unlike = list(_unlike_classes_or_shape(expected, found))
        if _differ(expected.name, found.name):
            yield _Difference("made from another data set", expected.name, found.name, deliberate=not unlike)
        yield from unlike
    if _differ(expected.whitening, found.whitening):
        yield _Difference(
            "whitened in another way",
            _SEEN.get(expected.whitening, expected.whitening),
            _SEEN.get(found.whitening, found.whitening),
            f"{'leave out' if found.whitening == NORMALISED else 'give'} `zca`, as when it was made",
        )
    if not same_images:
        yield from _unlike_images(expected, found)


def _unlike_classes_or_shape(expected: DatasetIdentity, found: DatasetIdentity) -> Iterator[_Difference]:
    if _differ(expected.image_shape, found.image_shape):
        yield _Difference("images of another size", _times(expected.image_shape), _times(found.image_shape))
    ours, theirs = expected.class_names, found.class_names
    if not _differ(ours, theirs):
        return
    if len(ours) != len(theirs):
        yield _Difference("another number of classes", str(len(ours)), str(len(theirs)))
    else:
        place = next(place for place in range(len(ours)) if ours[place] != theirs[place])
        what = "the classes in another order" if sorted(ours) == sorted(theirs) else "other classes"
        yield _Difference(what, f"{ours[place]!r} as class {place}", repr(theirs[place]))


def _unlike_images(expected: DatasetIdentity, found: DatasetIdentity) -> Iterator[_Difference]:
    """Yield the differences between images of one name, shape and classes."""
    if _differ(expected.fingerprint, found.fingerprint):
        ours, theirs = (f"{one.name or 'images'} with fingerprint {one.fingerprint}" for one in (expected, found))
        yield _Difference("made from other images", ours, theirs, deliberate=True)
    for name in ("mean", "std") if expected.whitening != WHITENED else ():
        ours, theirs = getattr(expected, name), getattr(found, name)
        if _differ(ours, theirs) and not _close(ours, theirs):
            yield _Difference(f"normalised by another {name}", _rounded(ours), _rounded(theirs), deliberate=True)


_SEEN = {NORMALISED: "normalised images", WHITENED: "ZCA-whitened images"}


def _differ(one: Any, other: Any) -> bool:
    """Return whether two values are known and differ."""
    return bool(one) and bool(other) and one != other


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=0, abs_tol=_STATISTICS_TOLERANCE) for a, b in zip(one, other, strict=True)
    )


def _times(sides: Sequence[int]) -> str:
    return "×".join(map(str, sides))


def _rounded(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
