"""What stays the same over all iterations of a distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mtt_fast.distill.options import DistillOptions
from mtt_fast.networks.protocol import Trainable
from mtt_fast.storage.metrics import MetricsLog
from mtt_fast.storage.trajectories import TrajectoryStore
from mtt_fast.training.images import RealImages


@dataclass(frozen=True)
class Run:
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
