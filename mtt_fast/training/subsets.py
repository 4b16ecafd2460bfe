"""Find the real images of each class, and draw a random subset with the same number of every class."""

from __future__ import annotations

import torch
from torch import Tensor

from mtt_fast.data import DatasetInfo, ImageData
from mtt_fast.errors import InputError
from mtt_fast.training.images import Images, RealImages


def check_enough(data: ImageData | DatasetInfo, ipc: int, canvas_size: int = 1, left_out: int = 0) -> None:
    """Raise `InputError` that names the class if a class of `data` has fewer than `ipc` · `canvas_size`² + `left_out` training images.

    `left_out` is the number of images of a class that `window_start` leaves out. Of a `DatasetInfo` only their mean number is known,
    which the smallest class does not exceed.
    """
    needed = ipc * canvas_size**2 + left_out
    asked = f"`ipc` {ipc}" + (f", `canvas_size` {canvas_size}" if canvas_size > 1 else "")
    asked += f", `window_start` (leaves {left_out} out)" if left_out else ""
    if isinstance(data, DatasetInfo):
        counts = [("a class", data.num_train // data.num_classes)]
    else:
        in_classes = torch.bincount(data.train.labels, minlength=data.num_classes).tolist()
        counts = [(f"class {name}", count) for name, count in zip(data.class_names, in_classes, strict=True)]
    for name, count in counts:
        if count < needed:
            raise InputError(
                f"{asked}: {name} has only {count} of the {needed} real images that are needed; use a smaller `ipc`"
                + (" or `canvas_size`" if canvas_size > 1 else "")
                + (" or `window_start`" if left_out else "")
            )


def class_members(real: RealImages, ipc: int, left_out: int = 0) -> list[Tensor]:
    """Return the indices, on the CPU, of each class's training images.

    Raises `InputError` if a class has fewer than `ipc` besides the `left_out` ones.
    """
    check_enough(real.data, ipc, left_out=left_out)
    labels = real.train.labels.cpu()
    return [(labels == label).nonzero()[:, 0] for label in range(real.data.num_classes)]


def shuffled_classes(real: RealImages, ipc: int, generator: torch.Generator) -> list[Tensor]:
    """Return `class_members` in random order."""
    return [members[torch.randperm(len(members), generator=generator)] for members in class_members(real, ipc)]


def window_of_difficulty(real: RealImages, difficulty: Tensor, ipc: int, start: int) -> Images:
    """Return the `ipc` training images of each class that come after its `start` hardest ones, class-major, the easiest first.

    `difficulty` (n,) is on the CPU; among equals the first image counts as the hardest. Raises `InputError` if a class has too few
    images.
    """
    members = class_members(real, ipc, start)
    by_difficulty = (each[difficulty[each].argsort(descending=True, stable=True)] for each in members)
    return real.train.subset(torch.cat([each[start : start + ipc].flip(0) for each in by_difficulty]))


def random_subset(real: RealImages, ipc: int, generator: torch.Generator) -> Images:
    """Return `ipc` random training images of each class, sorted by class, as inputs of networks (floating point).

    Raises `InputError` if a class has fewer images than that.
    """
    chosen = [members[:ipc] for members in shuffled_classes(real, ipc, generator)]
    return real.train.subset(torch.cat(chosen))
