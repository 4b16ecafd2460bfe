"""The run of a distillation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from mtt_fast.commands.run_loop import LoopRun
from mtt_fast.distill.initial import initial_images
from mtt_fast.distill.options import DistillOptions
from mtt_fast.storage.trajectories import TrajectoryStore


@dataclass(frozen=True, kw_only=True)
class DistillRun(LoopRun):
    """All that stays the same over the iterations of a distillation."""

    options: DistillOptions
    experts: TrajectoryStore
    taking_turns: int
    """the first so many of `experts` are matched"""

    @cached_property
    def first_images(self) -> Tensor:
        """Return the images that the run began with (n, C, H, W), which every picture shows."""
        images, _ = initial_images(self.options, self.real, self.network, self.experts, self.taking_turns)
        return images.pixels
