"""Save the state of a set that is being learned, and load it to continue the run."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtt_fast.baselines.method import LearnedSet
from mtt_fast.errors import InputError
from mtt_fast.networks.users_network import is_same_function
from mtt_fast.storage.checkpoint import FORMER_NUMBERS, check_same_images, other_checkpoint
from mtt_fast.storage.identity import DatasetIdentity
from mtt_fast.storage.run_files import CHECKPOINT, EVALUATIONS
from mtt_fast.storage.tensor_files import load_tensors, read_header, save_tensors
from mtt_fast.storage.text_files import MALFORMED, parse_json

_FORMAT = "mtt_fast baseline checkpoint 2"  # those from before there were checksums say nothing
_OPTIMIZER = "optimiser."  # the spelling that checkpoints have on disk


@dataclass
class Progress:
    """The counters of a run, and what it began with."""

    iteration: int = 0  # completed ones
    data: dict[str, Any] = field(default_factory=dict)  # record of the real images' identity
    network: dict[str, Any] = field(default_factory=dict)  # its description


def save_checkpoint(
    folder: Path, learned: LearnedSet, progress: Progress, evaluations: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write the tensors of `learned` with those of its optimizer, `progress`, and the evaluations so far, atomically."""
    state = learned.optimizer.state_dict()["state"]
    optimizer_tensors = {
        f"{_OPTIMIZER}{index}.{name}": value
        for index, values in state.items()
        for name, value in values.items()
        if value is not None
    }
    save_tensors(
        folder / CHECKPOINT,
        _tensors(learned) | optimizer_tensors,
        {"format": _FORMAT, "progress": json.dumps(asdict(progress)), EVALUATIONS: json.dumps(evaluations)},
    )


def check_continues(folder: Path, identity: DatasetIdentity, network: Mapping[str, Any]) -> None:
    """Raise `InputError` if the run in `folder`, if there is one, began with other real images than those of `identity`.

    It also does so if a user's network differs from the one described by `network`, and if a file is broken.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return
    _, metadata = read_header(path)
    try:
        progress = parse_json(metadata["progress"])
        began_with = DatasetIdentity.from_record(progress.get("data", {}))
        same_network = is_same_function(progress.get("network", {}), network)
    except MALFORMED as error:
        raise other_checkpoint(path, "method") from error
    check_same_images(folder, began_with, identity)
    if not same_network:
        raise InputError(
            f"{path}: {network['kind']} had other outputs at the same parameters when the run began; restore its code, or choose "
            "another `out`"
        )


def load_checkpoint(folder: Path, learned: LearnedSet) -> Progress:
    """Set the tensors of `learned` to their last saved values; return the saved progress, or a new one.

    Raises `InputError` if the file is broken or not a checkpoint of this method.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return Progress()
    saved, metadata = load_tensors(path)
    try:
        if metadata.get("format", _FORMAT) != _FORMAT:
            raise ValueError("another format")
        counters = parse_json(metadata["progress"])
        for name in FORMER_NUMBERS:
            counters.pop(name, None)
        progress = Progress(**counters)
        for name, tensor in _tensors(learned).items():
            if name not in saved and tensor.shape == (0,):
                continue  # what older versions did not carry over starts empty
            _check_like(name, saved[name], tensor)
            tensor.resize_(saved[name].shape).copy_(saved[name])
        parameters = [parameter for group in learned.optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, value in saved.items():
            if name.startswith(_OPTIMIZER):
                index, key = name.removeprefix(_OPTIMIZER).split(".")
                _check_like(name, value, torch.tensor(0.0) if key == "step" else parameters[int(index)])
                state[int(index)][key] = value.clone()
        groups = learned.optimizer.state_dict()["param_groups"]
        learned.optimizer.load_state_dict({"state": dict(state), "param_groups": groups})
    except MALFORMED as error:
        raise other_checkpoint(path, "method") from error
    return progress


def _check_like(name: str, saved: Tensor, now: Tensor) -> None:
    """Raise `ValueError` unless `saved` has the dtype and the shape of the tensor `now`, whose length may grow if it is empty."""
    grows = now.shape == (0,) and saved.dim() == 1
    if saved.dtype != now.dtype or (saved.shape != now.shape and not grows):
        raise ValueError(f"{name} of another dtype or shape")


def _tensors(learned: LearnedSet) -> dict[str, Tensor]:
    return {"images": learned.images, "labels": learned.labels, **learned.carried}
