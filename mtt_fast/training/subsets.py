"""Draw real images at random, as many of every class."""

from __future__ import annotations

import torch
from torch import Tensor

from mtt_fast.data import ImageData
from mtt_fast.errors import InputError
from mtt_fast.training.images import Images


def check_enough(data: ImageData, ipc: int) -> None:
    """Raise `InputError`, which names the first class of `data` with fewer than `ipc` training images, if there is one."""
    counts = torch.bincount(data.train.labels, minlength=data.num_classes).tolist()
    for name, count in zip(data.class_names, counts, strict=True):
        if count < ipc:
            raise InputError(f"`ipc` {ipc}: class {name} has only {count} of so many real images; use a smaller `ipc`")


def random_subset(real: Images, num_classes: int, ipc: int, generator: torch.Generator) -> Images:
    """Return `ipc` random real images of each class, class-major, as inputs of networks (floating point).

    Raises `InputError` if a class has fewer images than that.
    """
    chosen = [members[:ipc] for members in shuffled_classes(real, num_classes, ipc, generator)]
    return Images(*real.batch(torch.cat(chosen).to(real.labels.device)))


def shuffled_classes(real: Images, num_classes: int, ipc: int, generator: torch.Generator) -> list[Tensor]:
    """Return, for each class, a vector (on the CPU) of the indices of its images in `real`, in random order.

    Raises `InputError` if a class has fewer than `ipc`.
    """
    shuffled = []
    labels = real.labels.cpu()
    for label in range(num_classes):
        members = (labels == label).nonzero()[:, 0]
        if len(members) < ipc:
            raise InputError(f"`ipc` {ipc}: class {label} has only {len(members)} real images; use a smaller `ipc`")
        shuffled.append(members[torch.randperm(len(members), generator=generator)])
    return shuffled
