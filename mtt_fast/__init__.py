"""Dataset distillation by matching training trajectories: the exact meta-gradient in the memory of one step.

The library is `unroll`, a loss such as `matching_loss`, a `ConvNet` or a `FlatModule`, and `plan`, which predicts the memory of a run. The
commands are `python -m mtt_fast.experts`, `mtt_fast.distill` and `mtt_fast.evaluate`. Names in `_LAZY` are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

try:
    import mtt_fast.kernels  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "mtt_fast.kernels":
        raise
    raise ImportError(
        f"{__path__[0]}: expected an installed mtt_fast, found its source, which works once it is installed with "
        "`pip install -e .` there; if mtt_fast is installed elsewhere, start in another folder"
    ) from None

from mtt_fast.augmentation.siamese import SiameseAugment
from mtt_fast.engine.matching import masked_matching_loss, matching_loss, nearest_step, nearest_step_loss, path_loss
from mtt_fast.engine.memory_plan import Plan, plan
from mtt_fast.engine.optimizers import Adam
from mtt_fast.engine.unroll import unroll
from mtt_fast.errors import InputError
from mtt_fast.networks.convnet import ConvNet

if TYPE_CHECKING:
    from mtt_fast.augmentation.adapters import Augmentation, KorniaAugment
    from mtt_fast.data.synthetic import SyntheticDataset
    from mtt_fast.data.whitening import Whitening
    from mtt_fast.engine.graphed_loss import GraphedMatchingLoss
    from mtt_fast.networks.flat_module import FlatModule
    from mtt_fast.parametrisations.parametrisation import Parametrisation
    from mtt_fast.storage.trajectories import TrajectoryStore

__version__ = "0.1.0"

__all__ = [
    "Adam",
    "Augmentation",
    "ConvNet",
    "FlatModule",
    "GraphedMatchingLoss",
    "InputError",
    "KorniaAugment",
    "Parametrisation",
    "Plan",
    "SiameseAugment",
    "SyntheticDataset",
    "TrajectoryStore",
    "Whitening",
    "masked_matching_loss",
    "matching_loss",
    "nearest_step",
    "nearest_step_loss",
    "path_loss",
    "plan",
    "unroll",
]

_LAZY = {
    "Augmentation": "augmentation.adapters",
    "FlatModule": "networks.flat_module",
    "GraphedMatchingLoss": "engine.graphed_loss",
    "KorniaAugment": "augmentation.adapters",
    "Parametrisation": "parametrisations.parametrisation",
    "SyntheticDataset": "data.synthetic",
    "TrajectoryStore": "storage.trajectories",
    "Whitening": "data.whitening",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mtt_fast' has no attribute '{name}'")
    return getattr(importlib.import_module(f"mtt_fast.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
