"""What stays the same over all iterations of a distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mtt_fast.distillation.options import DistillOptions
from mtt_fast.models import Trainable
from mtt_fast.options import RealImages
from mtt_fast.run_folder import MetricsLog
from mtt_fast.trajectories import TrajectoryStore


@dataclass(frozen=True)
class Job:
    """The options, and what they name."""

    options: DistillOptions
    folder: Path
    real: RealImages
    network: Trainable
    evaluated: dict[str, Trainable]
    """the networks of an evaluation by name; the first decides which images are best"""
    experts: TrajectoryStore
    metrics: MetricsLog
    began: Callable[[], Tensor]
    """the images that the run began with (n, C, H, W), which every picture shows: found at the first call"""
