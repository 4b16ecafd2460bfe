"""Declare the options of gradient matching, with the values of the papers' code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from mtt_fast.augmentation.siamese import augment_by_strategy
from mtt_fast.baselines.gradient_distance import Metric
from mtt_fast.baselines.options import LearnedImagesOptions
from mtt_fast.commands.option_fields import Group, Role
from mtt_fast.commands.options import Count, CountFromZero, CountOrNone, Positive
from mtt_fast.errors import InputError

_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
"""Updates of the images in an iteration, and epochs of the network between two updates, by images per class."""


@dataclass(frozen=True)
class DcOptions(LearnedImagesOptions):
    """Learn images with the same gradient, in networks that train on them, as real images."""

    Iteration: Annotated[CountFromZero, Role.EXTENT] = 1000
    """iterations, each with a fresh network"""
    eval_it: Annotated[Count, Role.EXTENT, Group.EVALUATION] = 500
    """iterations between evaluations"""
    lr_img: Positive = 0.1
    """learning rate of the pixels"""
    pix_init: Literal["real", "noise"] = "noise"
    """initial images: real images or noise"""
    dis_metric: Metric = "ours"
    """distance between gradients: ours (layer by layer, as in the papers), mse, or cos of the whole gradients"""
    outer_loop: CountOrNone = None
    """updates of the images per iteration; if not given, the papers' number for --ipc 1, 10, 20, 30, 40 or 50"""
    inner_loop: CountOrNone = None
    """epochs of the network between two updates of the images; if not given, the papers' number for --ipc 1, 10, 20, 30, 40 or 50"""

    def loops(self) -> tuple[int, int]:
        """Return updates in an iteration and epochs between two updates. Raises `InputError` where the papers have no numbers."""
        outer, inner = _LOOPS.get(self.ipc, (None, None))
        outer = outer if self.outer_loop is None else self.outer_loop
        inner = inner if self.inner_loop is None else self.inner_loop
        if outer is None or inner is None:
            raise InputError(
                f"--ipc {self.ipc}: the papers name loops for {', '.join(map(str, _LOOPS))} images per class; "
                "give --outer_loop and --inner_loop"
            )
        return outer, inner

    def without_effect(self) -> dict[str, str]:
        """See `CommonOptions.without_effect`."""
        reasons, outer = super().without_effect(), self.outer_loop
        if (_LOOPS.get(self.ipc, (None, None))[0] if outer is None else outer) == 1:
            reasons["inner_loop"] = "with one update of the images an iteration: give --outer_loop above 1"
        return reasons

    def check(self) -> None:
        """See `BaselineOptions.check`."""
        super().check()
        self.loops()


@dataclass(frozen=True)
class DsaOptions(DcOptions):
    """Learn images as DC does, with the same augmentation of real and synthetic images."""

    pix_init: Literal["real", "noise"] = "real"
    """initial images: real images or noise"""

    def check(self) -> None:
        """See `BaselineOptions.check`."""
        super().check()
        if augment_by_strategy(self.strategy) is None:
            raise InputError("--dsa False: without augmentation DSA is DC; run dc instead")
