"""Define the run of a distillation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from mtt_fast.commands.run_loop import LoopRun
from mtt_fast.distill.cam_network import CamNetwork
from mtt_fast.distill.initial import initial_images
from mtt_fast.distill.options import DistillOptions
from mtt_fast.storage.trajectories import TrajectoryStore


@dataclass(frozen=True, kw_only=True)
class DistillRun(LoopRun):
    """The constants of a distillation."""

    options: DistillOptions
    experts: TrajectoryStore
    num_matched_experts: int
    """number of `experts` that are matched, the first ones"""
    cam: CamNetwork | None = None
    """the network whose Grad-CAM maps weigh the pixels' gradients"""
    difficulty: Tensor | None = None
    """the difficulty of each training image, if the initial images are a window of it"""

    @cached_property
    def first_images(self) -> Tensor:
        """Return the run's initial images (n, C, H, W), which every picture shows."""
        first = initial_images(
            self.options, self.real, self.network, self.experts, self.num_matched_experts, self.difficulty
        )
        return first.images.pixels
