"""Save and load the state of a distillation between two iterations, from which a run continues."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtt_fast.checks import shown
from mtt_fast.errors import InputError, dtype_name
from mtt_fast.storage.identity import UNKNOWN, DatasetIdentity, check_same_data
from mtt_fast.storage.records import NUMBER, check_form
from mtt_fast.storage.run_files import CHECKPOINT, EVALUATIONS
from mtt_fast.storage.tensor_files import load_tensors, read_header, save_tensors
from mtt_fast.storage.text_files import MALFORMED, parse_json


@dataclass
class State:
    """The state that a distillation carries from one iteration to the next."""

    iteration: int  # number of completed iterations
    num_experts: int  # number of matched experts: those that existed when the run began
    images: Tensor  # (n, C, H, W) float32
    labels: Tensor  # (n,) int64, the classes; or learned logits (n, classes) float32
    lr: Tensor  # () float32; (N,) where each step has one
    images_velocity: Tensor | None  # None if the images are computed from learned parameters
    lr_velocity: Tensor
    labels_velocity: Tensor | None = None  # of learned labels
    ema: Tensor | None = None  # (n, C, H, W): the average of the images over the iterations (FTD)
    pixel_weights: Tensor | None = None  # (n, 1, H, W): factors of the images' gradient (EDF)
    frequencies: Tensor | None = None  # (classes, H, W) bool: the kept frequencies (FreD)
    parameters: dict[str, Tensor] | None = None  # of the parametrisation that computes the images
    parameters_velocity: dict[str, Tensor] | None = None
    parameters_square: dict[str, Tensor] | None = None  # averages of squared gradients, if Adam updates the parameters
    skipped: int = 0  # iterations whose loss or gradient was not finite
    repeated: int = 0  # iterations that were repeated in tf32, as a number was too large for fp16
    above_threshold: int = 0  # iterations without an update, as their loss was above --threshold
    lr_kept: int = 0  # iterations whose update would have made the learning rate negative
    data: DatasetIdentity = UNKNOWN  # of the real images
    digests: tuple[str, ...] = ()  # of the matched experts, see `TrajectoryStore.digest`
    imported: bool = False  # whether these experts come from other software, so that none can be trained in their place
    cam_digest: str = ""  # of the expert of --cam_model
    scores_digest: str = ""  # of the difficulty by which a window chose the first images (SelMatch)
    code_digest: str = ""  # of the file with the user's class that computes the images

    @property
    def updates(self) -> int:
        """Return the number of iterations that updated the images."""
        return self.iteration - self.skipped - self.above_threshold

    @property
    def mean_lr(self) -> float:
        """Return the student's learning rate, or the mean if each step has one."""
        return float(self.lr.mean())


_CHECKPOINT = "mtt_fast checkpoint 2"  # the first format, without checksums, does not name itself
_TENSORS = ("images", "labels", "lr", "lr_velocity")
_OPTIONAL_TENSORS = ("images_velocity", "labels_velocity", "ema", "pixel_weights", "frequencies")
_NAMED_TENSORS = ("parameters", "parameters_velocity", "parameters_square")
_EXPERTS = "experts"
"""The field of a checkpoint for `State.num_experts`."""
_NUMBERS = ("iteration", "skipped", "above_threshold", "lr_kept")
_REPEATED = "repeated"
"""A further number, which old checkpoints lack."""
_IMPORTED = "imported"
"""The field of the metadata for `State.imported`; old checkpoints lack it."""
_DIGESTS = ("cam_digest", "scores_digest", "code_digest")
"""Texts in the metadata, which old checkpoints lack."""
FORMER_NUMBERS = ("seconds", "seconds_evaluation")
"""Fields of old checkpoints, which seconds.json has replaced."""


def save_checkpoint(folder: Path, state: State, evaluations: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write `state` and the records of the evaluations so far (`MetricsLog.evaluations`), atomically."""
    numbers = {name: getattr(state, name) for name in (*_NUMBERS, _REPEATED)} | {_EXPERTS: state.num_experts}
    tensors = {name: getattr(state, name) for name in (*_TENSORS, *_OPTIONAL_TENSORS)}
    for group in _NAMED_TENSORS:
        tensors |= {f"{group}.{name}": tensor for name, tensor in (getattr(state, group) or {}).items()}
    save_tensors(
        folder / CHECKPOINT,
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        {
            "format": _CHECKPOINT,
            "numbers": json.dumps(numbers),
            "data": json.dumps(state.data.record()),
            "digests": json.dumps(state.digests),
            _IMPORTED: json.dumps(state.imported),
            **{name: getattr(state, name) for name in _DIGESTS},
            EVALUATIONS: json.dumps(evaluations),
        },
    )


def load_checkpoint(folder: Path, device: torch.device) -> State | None:
    """Return the last saved state on `device`, or None if there is none. Raises `InputError` if it is broken."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    tensors, metadata = load_tensors(path)
    try:
        names = (*_TENSORS, *(name for name in _OPTIONAL_TENSORS if name in tensors))
        values: dict[str, Any] = {"images_velocity": None}
        values |= {name: tensors[name].to(device, copy=True) for name in names}
        values |= {group: _named(tensors, group, device) for group in _NAMED_TENSORS}
        values |= {name: metadata.get(name, "") for name in _DIGESTS}
        fields = {"data": "{}", "digests": "[]"} | metadata  # which the first format lacks
        numbers, data, digests = (parse_json(fields[name]) for name in ("numbers", "data", "digests"))
        if "format" in metadata:
            check_form(numbers, dict.fromkeys((*_NUMBERS, _EXPERTS, f"{_REPEATED}?"), NUMBER))
            if metadata["format"] != _CHECKPOINT:
                raise ValueError("another format")
        for name in FORMER_NUMBERS:
            numbers.pop(name, None)
        return State(
            num_experts=numbers.pop(_EXPERTS),
            **values | numbers,
            data=DatasetIdentity.from_record(data),
            digests=tuple(digests),
            imported=_says_imported(metadata),
        )
    except MALFORMED as error:
        raise other_checkpoint(path) from error


def _named(tensors: Mapping[str, Tensor], group: str, device: torch.device) -> dict[str, Tensor] | None:
    """Return the tensors of a `group` by name, on `device`, or None if there are none."""
    start = f"{group}."
    named = {name.removeprefix(start): each for name, each in tensors.items() if name.startswith(start)}
    return {name: each.to(device, copy=True) for name, each in named.items()} or None


def initial_num_experts(folder: Path) -> tuple[int, bool]:
    """Return the number of experts with which the run in `folder` began, and whether they come from other software.

    Without a checkpoint the number is 0. Reads only the header. Raises `InputError` if it is broken.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return 0, False
    _, metadata = read_header(path)
    try:
        return int(parse_json(metadata["numbers"])[_EXPERTS]), _says_imported(metadata)
    except MALFORMED as error:
        raise other_checkpoint(path) from error


def _says_imported(metadata: Mapping[str, str]) -> bool:
    return bool(parse_json(metadata.get(_IMPORTED, "false")))


def other_checkpoint(path: Path, kind: str = "version") -> InputError:
    """Return the error for a file that is not a checkpoint of this `kind` (a version or a method)."""
    return InputError(f"{path}: not a checkpoint of this {kind}; choose another `out`")


TensorSpec = tuple[torch.dtype, tuple[int, ...]]
"""The dtype and the shape of a tensor."""


def check_specs(folder: Path, tensors: Mapping[str, Tensor | None], specs: Mapping[str, TensorSpec | None]) -> None:
    """Raise `InputError`, naming the checkpoint in `folder`, unless each of `tensors` has the dtype and shape in `specs`.

    None and a missing name mean that there is no tensor.
    """
    for name in dict.fromkeys((*specs, *tensors)):
        spec, tensor = specs.get(name), tensors.get(name)
        if spec != (None if tensor is None else (tensor.dtype, tuple(tensor.shape))):
            expected = "none" if spec is None else f"{dtype_name(spec[0])} {spec[1]}"
            raise InputError(
                f"{folder / CHECKPOINT}: {name}: expected {expected}, as options and data set ask for, found "
                f"{'none' if tensor is None else shown(tensor)}; restore a copy, or choose another `out`"
            )


def check_same_images(folder: Path, began_with: DatasetIdentity, identity: DatasetIdentity) -> None:
    """Raise `InputError`, naming the run's checkpoint, unless the run in `folder` `began_with` the real images of `identity`."""
    fix = "give back the images that the run began with, or choose another `out`"
    check_same_data(began_with, identity, folder / CHECKPOINT, fix=fix)
