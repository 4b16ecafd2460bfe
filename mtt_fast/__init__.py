"""Dataset distillation by matching training trajectories: the exact meta-gradient in the memory of one step.

The engine is `unroll`, `matching_loss` and `ConvNet` or `FlatModule`, and `plan` tells what a run will take; the jobs are `python -m mtt_fast.experts`,
`mtt_fast.distill` and `mtt_fast.evaluate`. What lies on disk is imported when it is first named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mtt_fast.adapters import Augmentation, KorniaAugment
from mtt_fast.augment import SiameseAugment
from mtt_fast.convnet import ConvNet
from mtt_fast.errors import InputError
from mtt_fast.flat_module import FlatModule
from mtt_fast.matching import masked_matching_loss, matching_loss, nearest_step, nearest_step_loss
from mtt_fast.memory import Plan, plan
from mtt_fast.unroll import unroll

if TYPE_CHECKING:
    from mtt_fast.synthetic import SyntheticDataset
    from mtt_fast.trajectories import TrajectoryStore
    from mtt_fast.whitening import Whitening

__version__ = "0.1.0"

__all__ = [
    "Augmentation",
    "ConvNet",
    "FlatModule",
    "InputError",
    "KorniaAugment",
    "Plan",
    "SiameseAugment",
    "SyntheticDataset",
    "TrajectoryStore",
    "Whitening",
    "masked_matching_loss",
    "matching_loss",
    "nearest_step",
    "nearest_step_loss",
    "plan",
    "unroll",
]

_LATER = {"SyntheticDataset": "synthetic", "TrajectoryStore": "trajectories", "Whitening": "whitening"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'mtt_fast' has no attribute '{name}'")
    return getattr(importlib.import_module(f"mtt_fast.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
