"""Choose the real images of each epoch of an expert by their difficulty: PAD's curriculum."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtt_fast.errors import InputError

EVERY = (0.0, 1.0)
"""The bounds of `Curriculum.shares` in an epoch that visits all images."""


@dataclass(frozen=True, eq=False)
class Curriculum:
    """PAD's curriculum: experts first see the easiest images of each class, then all, and at the end all but the easiest.

    Z. Li et al., Prioritize Alignment in Dataset Distillation, 2024. The rules are those of its code, and the defaults its settings
    for CIFAR-10. Epochs count from 0.
    """

    order: Sequence[Tensor]
    """for each class the indices (n_c,) of its training images, the easiest first, on the CPU"""
    init_ratio: float = 0.75
    """share of each class's images that epoch 0 visits, the easiest"""
    add_end_epoch: int = 20
    """the first epoch that visits all images; the share rises linearly until then"""
    rm_epoch_first: int = 40
    """the last epoch that visits all images"""
    rm_epoch_second: int = 60
    """the last epoch with `rm_easy_ratio_first`"""
    rm_easy_ratio_first: float = 0.1
    """share of each class's images, the easiest, that epochs after `rm_epoch_first` leave out"""
    rm_easy_ratio_second: float = 0.2
    """likewise, after `rm_epoch_second`"""

    def __post_init__(self) -> None:
        """Raise `InputError` for epochs that do not rise, and a class without an image in epoch 0."""
        epochs = [self.add_end_epoch, self.rm_epoch_first, self.rm_epoch_second]
        if epochs != sorted(epochs):
            raise InputError(
                f"`add_end_epoch` {epochs[0]}, `rm_epoch_first` {epochs[1]}, `rm_epoch_second` {epochs[2]}: expected none to be less "
                "than the one before"
            )
        for label, members in enumerate(self.order):
            if int(self.init_ratio * len(members)) < 1:
                raise InputError(
                    f"`init_ratio` {self.init_ratio:g}: expected an image of each class in epoch 0, found none of class {label}, which "
                    f"has {len(members)} images; give a larger share"
                )

    def shares(self, epoch: int) -> tuple[float, float]:
        """Return the bounds, from 0 to 1, of the part of each class's order that `epoch` visits."""
        if 0 < self.add_end_epoch >= epoch:
            # the operations are in the order of PAD's code, so that rounding gives the same numbers of images
            return 0.0, min(1.0, self.init_ratio + (1 - self.init_ratio) * epoch / self.add_end_epoch)
        if epoch <= self.rm_epoch_first:
            return EVERY
        return (self.rm_easy_ratio_first if epoch <= self.rm_epoch_second else self.rm_easy_ratio_second), 1.0

    def between(self, first: float, last: float) -> Tensor:
        """Return the indices of the images between the shares `first` and `last` of each class's order."""
        return torch.cat([members[int(first * len(members)) : int(last * len(members))] for members in self.order])

    def record(self) -> dict[str, Any]:
        """Return the fields by the names of the flags, with a checksum of the order as `sort_method`."""
        digest = hashlib.sha256(torch.cat(list(self.order)).long().numpy().tobytes()).hexdigest()
        return {"sort_method": f"sha256:{digest}"} | {
            name: value for name, value in vars(self).items() if name != "order"
        }
