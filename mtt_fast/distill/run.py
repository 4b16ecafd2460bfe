"""Define `DistillRun`, which the functions of a distillation share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mtt_fast.commands.run_loop import LoopRun
from mtt_fast.distill.cam_network import CamNetwork
from mtt_fast.distill.initial import InitialImages
from mtt_fast.distill.options import DistillOptions
from mtt_fast.parametrisations.parametrisation import Parametrisation, images_at
from mtt_fast.storage.checkpoint import State
from mtt_fast.storage.trajectories import TrajectoryStore


@dataclass(frozen=True, kw_only=True)
class DistillRun(LoopRun):
    """The constants of a distillation."""

    options: DistillOptions
    experts: TrajectoryStore
    """those that are matched"""
    cam: CamNetwork | None
    """the network whose Grad-CAM maps weigh the pixels' gradients"""
    initial: Callable[[], InitialImages]
    """returns the initial images, which are made at the first call; every picture shows them"""
    parametrisation: Parametrisation | None
    """computes the images, if pixels are not learned"""

    def evaluated_images(self, state: State) -> Tensor:
        """Return the images (n, C, H, W) of `state` that are evaluated, saved and drawn. A parametrisation may match others."""
        if self.parametrisation is None:
            return state.images
        assert state.parameters is not None
        return images_at(self.parametrisation, state.parameters, torch.empty_like(state.images), evaluated=True)
