"""Options of gradient matching, with the values of the papers' code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mtt_fast.augmentation.siamese import augment_by_strategy
from mtt_fast.baselines.gradient_distance import Metric
from mtt_fast.baselines.options import LearnedImagesOptions
from mtt_fast.commands.options import at_least
from mtt_fast.errors import InputError

_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
"""Updates of the images an iteration, and epochs of the network between two, by images a class."""


@dataclass(frozen=True)
class DcOptions(LearnedImagesOptions):
    """Learn images whose gradient, in networks that train on them, is that of real images."""

    Iteration: int = 1000
    """iterations, each with a fresh network"""
    eval_it: int = 500
    """iterations between evaluations"""
    lr_img: float = 0.1
    """learning rate of the pixels"""
    pix_init: Literal["real", "noise"] = "noise"
    """start from real images or from noise"""
    dis_metric: Metric = "ours"
    """distance of gradients: ours (layer by layer, the papers'), mse, or cos of the whole"""
    outer_loop: int | None = None
    """updates of the images an iteration; the papers' for --ipc 1, 10, 20, 30, 40, 50 without this"""
    inner_loop: int | None = None
    """epochs of the network between two updates; the papers' for the same without this"""

    def loops(self) -> tuple[int, int]:
        """Return updates an iteration and epochs between two. Raises `InputError` where the papers have none."""
        outer, inner = _LOOPS.get(self.ipc, (None, None))
        found = self.outer_loop or outer, self.inner_loop or inner
        if found[0] is None or found[1] is None:
            raise InputError(
                f"--ipc {self.ipc}: the papers name loops for {', '.join(map(str, _LOOPS))} images a class; "
                "give --outer_loop and --inner_loop"
            )
        return found[0], found[1]

    def complaint(self) -> str | None:
        """See `BaselineOptions.complaint`."""
        return super().complaint() or at_least(1, outer_loop=self.outer_loop, inner_loop=self.inner_loop)

    def check(self) -> None:
        """See `BaselineOptions.check`."""
        super().check()
        self.loops()


@dataclass(frozen=True)
class DsaOptions(DcOptions):
    """Learn images as DC does, where real and synthetic ones see the same augmentation."""

    pix_init: Literal["real", "noise"] = "real"
    """start from real images or from noise"""

    def check(self) -> None:
        """See `BaselineOptions.check`."""
        super().check()
        if augment_by_strategy(self.strategy) is None:
            raise InputError("--dsa False: without augmentation DSA is DC; run dc instead")
