"""Check a distilled set where it is read, written and used."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtt_fast.checks import check_ordinary, shown
from mtt_fast.errors import InputError

if TYPE_CHECKING:
    from mtt_fast.data.synthetic import SyntheticDataset

LABEL_KINDS = ("indices", "probabilities", "weights", "logits")
MAX_CLASSES = 1 << 20
"""A larger class index is damage: no data set has so many."""

_LARGEST = 1e15  # that a mean or deviation may be; a larger whole number torch cannot take
_SUM_WITHIN = 1e-2  # of 1: what a row of a thousand probabilities in bfloat16 needs

Where = str | os.PathLike[str]


def check_set(synthetic: SyntheticDataset, where: Where) -> None:
    """Raise `InputError` unless a distilled set has valid tensors, learning rates, and the properties that undo its normalisation.

    The message begins with `where`, as those of all checks here, and names what is wrong.
    """
    check_images_and_labels(synthetic.images, synthetic.labels, synthetic.label_kind, where)
    check_lr(synthetic.lr, where)
    if synthetic.lr_per_step is not None:
        _check_lrs(synthetic.lr_per_step, where)
    check_names(synthetic.class_names, where)
    check_classes(synthetic.labels, len(synthetic.class_names), where)
    channels, height, width = synthetic.images.shape[1:]
    check_normalisation(synthetic.mean, synthetic.std, channels, where)
    if synthetic.canvas is not None:
        _check_canvas(synthetic.canvas, height, width, where)
    if synthetic.whitening is not None:
        _check_whitening(synthetic.whitening, channels * height * width, where)
    _check_parameters(synthetic.parameters, where)
    for name in ("recipe", "versions"):
        if not isinstance(getattr(synthetic, name), dict):
            raise InputError(f"{where}: {name}: expected a dictionary, found {shown(getattr(synthetic, name))}")
    share = synthetic.recipe.get("distilled_share", 1.0)
    if not _is_number(share) or not 0 < share <= 1:
        raise InputError(f"{where}: recipe: expected a distilled_share above 0 and at most 1, found {shown(share)}")
    if share < 1:
        check_share(share, synthetic.labels, synthetic.label_kind, len(synthetic.class_names), where)


def distilled_in_class(ipc: int, distilled_share: float) -> int:
    """Return how many of the `ipc` images of a class, the first ones, are distilled; the others stay real images (SelMatch)."""
    return int(ipc * distilled_share)


def check_share(share: float, labels: Tensor, label_kind: str, classes: int, where: Where) -> None:
    """Raise `InputError` unless the positions of images say which ones are real, if the first `share` of each class was distilled.

    The images must be sorted by class. Every class must have the same number, of which at least one is distilled.
    """
    counts = torch.bincount(labels, minlength=classes) if label_kind == "indices" else labels.new_tensor([len(labels)])
    if len(labels) % classes or bool((counts != counts[0]).any()):
        raise InputError(
            f"{where}: expected the same number of images of each of {classes} classes with a `distilled_share`, found {len(labels)} "
            "images, more of some classes than of others; leave it out"
        )
    if label_kind == "indices" and bool((labels.diff() < 0).any()):
        raise InputError(f"{where}: expected images sorted by class with a `distilled_share`, found others; sort them")
    if not distilled_in_class(len(labels) // classes, share):
        raise InputError(
            f"{where}: expected a `distilled_share` that is at least one of the {len(labels) // classes} images of a class, found {share}; "
            "give a larger one"
        )


def check_images_and_labels(images: Tensor, labels: Tensor, label_kind: str, where: Where) -> None:
    """Raise `InputError` unless images are float32 (n, C, H, W), labels int64 (n,) or float32 (n, classes), and all are finite.

    Class indices must be in [0, `MAX_CLASSES`); rows of probabilities must be at least 0 with the sum 1, and weights at least 0.
    """
    _check_images(images, where)
    if label_kind not in LABEL_KINDS:
        raise InputError(f"{where}: label_kind: expected {', '.join(LABEL_KINDS)}, found {shown(label_kind)}")
    _check_has_numbers(labels, "labels", where)
    if not isinstance(labels, Tensor) or labels.dim() < 1 or len(labels) != len(images):
        raise InputError(f"{where}: labels: expected one for each of {len(images)} images, found {shown(labels)}")
    if label_kind == "indices":
        _check_indices(labels, where)
    else:
        _check_soft(labels, label_kind, where)


def _check_images(images: Tensor, where: Where) -> None:
    _check_has_numbers(images, "images", where)
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.numel() or images.dtype != torch.float32:
        raise InputError(
            f"{where}: images: expected float32 (n, C, H, W), not empty, found {shown(images)}; convert them"
        )
    _check_finite(images, "images", where)


def _check_has_numbers(value: Any, name: str, where: Where) -> None:
    """Raise `InputError` for a tensor whose numbers cannot be read."""
    if not isinstance(value, Tensor):
        return
    check_ordinary(f"{where}: {name}", value)
    if value.is_meta:
        raise InputError(f"{where}: {name}: expected numbers, found a tensor on the device meta; make it on another")


def _check_finite(values: Tensor, name: str, where: Where) -> None:
    if not bool(values.isfinite().all()):
        count = int((~values.isfinite()).sum())
        raise InputError(
            f"{where}: {name}: expected finite numbers, found {count} of {values.numel()} infinite or NaN; make the set again, "
            "with smaller learning rates if its distillation diverged"
        )


def _check_indices(labels: Tensor, where: Where) -> None:
    if labels.dim() != 1 or labels.dtype != torch.int64:
        soft = labels.dim() == 2 and labels.is_floating_point()
        raise InputError(
            f"{where}: labels: expected class indices, int64 (n,), found {shown(labels)}; "
            + ("soft labels need the `label_kind` 'probabilities', 'weights' or 'logits'" if soft else "convert them")
        )
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= MAX_CLASSES:
        raise InputError(
            f"{where}: labels: expected class indices, counted from 0, found {lowest} to {highest}; correct the labels"
        )


def _check_soft(labels: Tensor, label_kind: str, where: Where) -> None:
    if labels.dim() != 2 or labels.shape[1] < 2 or labels.dtype != torch.float32:
        raise InputError(
            f"{where}: labels: expected {label_kind}, float32 (n, classes) of two or more classes, found {shown(labels)}; "
            "correct the labels"
        )
    _check_finite(labels, "labels", where)
    if label_kind == "probabilities" and not are_probabilities(labels):
        sums = labels.sum(dim=1)
        raise InputError(
            f"{where}: labels: expected rows of probabilities, at least 0 with the sum 1, found a least value of "
            f"{float(labels.min()):.3g} and sums from {float(sums.min()):.3g} to {float(sums.max()):.3g}; are they "
            f"{'logits' if (labels < 0).any() else 'weights'}?"
        )
    if label_kind == "weights" and bool((labels < 0).any()):
        raise InputError(
            f"{where}: labels: expected weights of the classes, at least 0, found {float(labels.min()):.3g}; are they logits?"
        )


def are_probabilities(labels: Tensor) -> bool:
    """Return whether all rows of `labels` (n, classes) are at least 0 and sum to 1, as nearly as bfloat16 holds it."""
    sums = labels.sum(dim=1, dtype=torch.float32)
    return bool(((sums - 1).abs() < _SUM_WITHIN).all() and (labels >= 0).all())


def check_classes(labels: Tensor, classes: int, where: Where) -> int:
    """Return the number of classes in `labels`, indices (n,) or soft labels (n, classes), after a check.

    Class indices may leave classes out. Raises `InputError` if the labels are not of `classes` classes.
    """
    if labels.is_floating_point():
        if labels.shape[1] != classes:
            raise InputError(
                f"{where}: labels: expected soft labels of {classes} classes, found {labels.shape[1]}; name the data set that "
                "the set is of"
            )
        return classes
    lowest, highest = int(labels.min()), int(labels.max())
    if not 0 <= lowest <= highest < classes:
        from_one = "; they seem to be counted from 1: subtract 1" if (lowest, highest) == (1, classes) else ""
        raise InputError(
            f"{where}: labels: expected class indices from 0 to {classes - 1}, found {lowest} to {highest}"
            f"{from_one or '; name the data set that the set is of'}"
        )
    return len(labels.unique())


def check_lr(lr: Tensor, where: Where) -> None:
    """Raise `InputError` unless `lr` is one learning rate (), positive and finite."""
    _check_has_numbers(lr, "lr", where)
    if not isinstance(lr, Tensor) or lr.dim() or not lr.is_floating_point() or not 0 < lr.item() < math.inf:
        value = lr.item() if isinstance(lr, Tensor) and not lr.dim() and not lr.is_complex() else shown(lr)
        raise InputError(
            f"{where}: lr: expected one learning rate, finite and above 0, found {value}; give the learning rate that the set was made with, "
            "as a floating-point tensor ()"
        )


def _check_lrs(lrs: Tensor, where: Where) -> None:
    _check_has_numbers(lrs, "lr_per_step", where)
    good = isinstance(lrs, Tensor) and lrs.dim() == 1 and len(lrs) and lrs.is_floating_point()
    if not good or not bool(((lrs > 0) & lrs.isfinite()).all()):
        raise InputError(
            f"{where}: lr_per_step: expected a learning rate for each step, finite and above 0, found {shown(lrs)} with others; "
            "make the set again"
        )


def check_names(names: Sequence[str], where: Where) -> None:
    """Raise `InputError` unless there are names of classes, each of them once."""
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: class_names: expected the classes' names, found {shown(names)}")
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise InputError(f"{where}: class_names: expected each name once, found {shown(twice)} twice; rename one")


def check_normalisation(mean: Sequence[float], std: Sequence[float], channels: int, where: Where) -> None:
    """Raise `InputError` unless `mean` and `std` are finite numbers, one for each channel, and `std` is above 0."""
    for name, values, least in (("mean", mean, -_LARGEST), ("std", std, 0.0)):
        if not hasattr(values, "__len__"):
            raise InputError(
                f"{where}: {name}: expected a number of each of {channels} channels, found {shown(values)}"
            )
        if len(values) != channels or not all(_is_number(value) and least < value < _LARGEST for value in values):
            more = " above 0" if name == "std" else ""
            raise InputError(
                f"{where}: {name}: expected a finite number{more} of each of {channels} channels, found "
                f"({', '.join(shown(value) for value in values[:4])}{', …' if len(values) > 4 else ''})"
            )


def _check_canvas(canvas: Any, height: int, width: int, where: Where) -> None:
    sides = (getattr(canvas, "size", None), getattr(canvas, "samples", None))
    if not all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in sides):
        raise InputError(
            f"{where}: canvas: expected its size and samples as whole numbers of at least 1, found "
            f"{', '.join(map(shown, sides))}"
        )
    if height % canvas.size or width % canvas.size:
        raise InputError(
            f"{where}: canvas: expected a size that divides {height} and {width} pixels, found {canvas.size}"
        )


def _check_whitening(whitening: Any, values: int, where: Where) -> None:
    shapes = {"mean": (values,), "matrix": (values, values), "inverse": (values, values)}
    for name, shape in shapes.items():
        tensor = getattr(whitening, name, None)
        _check_has_numbers(tensor, f"whitening.{name}", where)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise InputError(
                f"{where}: whitening.{name}: expected floating point {shape}, as images of {values} values need it, found "
                f"{shown(tensor)}"
            )
        _check_finite(tensor, f"whitening.{name}", where)


def _check_parameters(parameters: Any, where: Where) -> None:
    if not isinstance(parameters, Mapping):
        raise InputError(f"{where}: parameters: expected a dictionary of tensors by name, found {shown(parameters)}")
    for name, tensor in parameters.items():
        _check_has_numbers(tensor, f"parameters.{name}", where)
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(
                f"{where}: parameters: expected tensors by name, found {shown(tensor)} as {shown(name)}; "
                "use torch.as_tensor, or leave it out"
            )
        _check_finite(tensor, f"parameters.{name}", where)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
