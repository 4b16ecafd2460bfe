"""The state of a distillation between two iterations, in a file from which a run goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtt_fast.errors import InputError
from mtt_fast.storage.files import load_tensors, save_tensors
from mtt_fast.storage.run_folder import CHECKPOINT


@dataclass
class State:
    """All that a distillation carries from one iteration to the next."""

    iteration: int  # completed ones
    experts: int  # how many take turns; those trained since the start of the run stay out of it
    images: Tensor  # (n, C, H, W) float32
    labels: Tensor  # (n,) int64, the classes; or learned logits (n, classes) float32
    lr: Tensor  # () float32; (N,) where each step has one
    images_velocity: Tensor
    lr_velocity: Tensor
    labels_velocity: Tensor | None = None  # of learned labels
    ema: Tensor | None = None  # (n, C, H, W): the average of the images over the iterations, where it is asked for
    skipped: int = 0  # iterations whose loss or gradient was not finite
    above_threshold: int = 0  # iterations without an update, as their loss was above --threshold
    lr_kept: int = 0  # iterations whose update would have made the learning rate negative
    seconds: float = 0.0
    seconds_evaluation: float = 0.0

    @property
    def mean_lr(self) -> float:
        """The student's learning rate; of several, one a step, the mean."""
        return float(self.lr.mean())


_TENSORS = ("images", "labels", "lr", "images_velocity", "lr_velocity")
_OPTIONAL_TENSORS = ("labels_velocity", "ema")
_NUMBERS = ("iteration", "experts", "skipped", "above_threshold", "lr_kept", "seconds", "seconds_evaluation")


def save_checkpoint(folder: Path, state: State) -> None:
    """Write `state`, atomically."""
    numbers = {name: getattr(state, name) for name in _NUMBERS}
    tensors = {name: getattr(state, name) for name in (*_TENSORS, *_OPTIONAL_TENSORS)}
    save_tensors(
        folder / CHECKPOINT,
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        {"numbers": json.dumps(numbers)},
    )


def load_checkpoint(folder: Path, device: torch.device) -> State | None:
    """Return the last saved state on `device`, or None if there is none. Raises `InputError` if it is broken."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    tensors, metadata = load_tensors(path)
    try:
        names = (*_TENSORS, *(name for name in _OPTIONAL_TENSORS if name in tensors))
        values: dict[str, Any] = {name: tensors[name].to(device, copy=True) for name in names}
        return State(**values | json.loads(metadata["numbers"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a checkpoint of this version; choose another --out") from error
