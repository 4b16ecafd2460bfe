"""Check that existing experts can be used: that their network, images and training fit the options."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from mtt_fast.errors import InputError, dtype_name
from mtt_fast.networks.by_name import full_name
from mtt_fast.networks.protocol import Trainable
from mtt_fast.networks.users_network import is_same_function
from mtt_fast.storage.checksums import checksum_of
from mtt_fast.storage.expert_metadata import ExpertMetadata
from mtt_fast.storage.identity import DatasetIdentity, check_same_data
from mtt_fast.storage.trajectories import TrajectoryStore

Options = TypeVar("Options")

FLAGS = {
    "train_epochs": "train_epochs", "lr": "expert_lr", "mom": "mom", "l2": "l2", "decay": "decay",
    "batch_size": "batch_real", "rho_max": "rho_max", "rho_min": "rho_min", "alpha": "alpha", "adaptive": "adaptive",
}  # fmt: skip
"""The option of a distillation for each of an expert's hyperparameters that the student does not share."""
BASELINE_FLAGS = FLAGS | {"batch_size": "batch_train"}
"""The same for a baseline, whose expert is trained in the batches of an evaluation."""

_NOT_RECORDED = {"rho_max": 0.0, "rho_min": 0.0, "alpha": 0.0, "adaptive": False, "sort_method": None}
"""The values where they are not recorded: such experts were trained by plain SGD, and on all images in each epoch."""


def hyperparameters_of(metadata: ExpertMetadata) -> dict[str, Any]:
    """Return an expert's hyperparameters, by the names of `ExpertTraining`; {} where they are not known."""
    return {} if metadata.imported else _NOT_RECORDED | metadata.hyperparameters


def check_belongs(
    store: TrajectoryStore,
    expert: int,
    network: Trainable,
    identity: DatasetIdentity,
    *,
    other_data: bool | None = None,
) -> None:
    """Raise `InputError` unless an expert is of `network`, and was trained on the images of `identity`.

    The message names the expert's file. For `other_data` see `check_same_data`.
    """
    metadata, path = store.metadata(expert), store.path(expert)
    fix = "give the options that it was trained with (`model`, `dataset`, `res`), or train new experts in another `buffer_path`"
    _check_network(path, metadata, network.layout.describe(), network.describe(), fix)
    check_same_data(metadata.identity, identity, path, other_data=other_data)


def _check_network(path: Path, metadata: ExpertMetadata, layout: str, described: Mapping[str, Any], fix: str) -> None:
    """Raise `InputError` unless an expert is of the network with this `layout` and this description."""
    expected, found = full_name(described), full_name(metadata.network)
    difference = _first_difference(layout, metadata.layout) if metadata.layout != layout else ""
    if not difference and expected and found and expected != found:
        difference = f"expected {expected}, found {found}, whose parameters have the same shapes"
    if not difference and not is_same_function(described, metadata.network):
        difference = f"{expected} had other outputs at the same parameters when the expert was trained"
        fix = "restore its code, give the new one another name, or choose another `buffer_path`"
    if difference:
        raise InputError(f"{path}: the expert is of another network: {difference}; {fix}")


def check_long_enough(store: TrajectoryStore, expert: int, needed: int) -> None:
    """Raise `InputError` unless an expert has the epoch `needed`; the message names the options that need it."""
    epochs = store.epochs(expert)
    if needed > epochs:
        raise InputError(
            f"{store.path(expert)}: `max_start_epoch` and `expert_epochs` reach epoch {needed}, but the expert ends at "
            f"epoch {epochs}; lower one of them, or train longer experts with `train_epochs` {needed}"
        )


def check_as_requested(store: TrajectoryStore, expert: int, requested: Mapping[str, Any], *, to_the_end: bool) -> None:
    """Raise `InputError` unless an expert was trained with the hyperparameters that the user `requested`, by name.

    The number of epochs matters only if the learning rate decays, or if the run uses the last epoch (`to_the_end`): otherwise a
    longer training starts with the same epochs. An imported expert, whose training is unknown, passes. The message names the
    options with which the expert can be used.
    """
    found = hyperparameters_of(store.metadata(expert))
    differing = _differing(requested, found, to_the_end) if found else []
    if differing:
        first, arguments = differing[0], " ".join(f"`{FLAGS[name]}` {found[name]}" for name in differing)
        raise InputError(
            f"{store.path(expert)}: trained with {first} {found[first]}, not {requested[first]}; choose another `buffer_path`, or "
            f"give {arguments} to use the experts that are there"
        )


def check_alike(store: TrajectoryStore, experts: Iterable[int], *, to_the_end: bool, fewer: str | None = None) -> None:
    """Raise `InputError` unless `experts` were trained alike, as far as is known, except for their seeds.

    The message names one that differs from the first, and the option `fewer` that limits the number of experts, if given. For
    `to_the_end` see `check_as_requested`.
    """
    known = {expert: found for expert in experts if (found := hyperparameters_of(store.metadata(expert)))}
    for expert, found in known.items():
        first = next(iter(known))
        for name in _differing(known[first], found, to_the_end)[:1]:
            raise InputError(
                f"{store.path(expert)}: trained with {name} {found.get(name)}, but {store.path(first).name} with "
                f"{known[first][name]}; keep those of one training in the folder"
                + (f", or give `{fewer}` {expert}" if fewer else "")
            )


def _differing(expected: Mapping[str, Any], found: Mapping[str, Any], to_the_end: bool) -> list[str]:
    """Return the hyperparameters of an expert that differ from `expected`; for `to_the_end` see `check_as_requested`."""
    return [
        name
        for name, value in expected.items()
        if found.get(name) != value and (name != "train_epochs" or to_the_end or found.get("decay"))
    ]


def check_one_kind(store: TrajectoryStore) -> None:
    """Raise `InputError` unless all experts of a folder are of one network and of the same images, and were trained alike.

    The message names one that differs from the first.
    """
    first = store.metadata(0)
    for expert in range(1, len(store)):
        metadata = store.metadata(expert)
        _check_network(
            store.path(expert), metadata, first.layout, first.network, "keep those of one network in the folder"
        )
        check_same_data(
            metadata.identity, first.identity, store.path(expert), fix="keep those of one data set in the folder"
        )
    check_alike(store, range(len(store)), to_the_end=False)


@dataclass(frozen=True)
class CommonTraining:
    """The network, the images and the settings that all experts of a folder have in common."""

    network: Trainable
    identity: DatasetIdentity
    """of the images"""
    hyperparameters: dict[str, Any]
    seed: int
    dtype: torch.dtype
    """in which the parameters are stored"""
    precision: str

    def digest(self) -> str:
        """Return a digest of all fields, which is the same for precisions that count as equal."""
        common = (
            self.network.describe(), self.network.layout.describe(), self.identity.record(), self.hyperparameters, self.seed,
            dtype_name(self.dtype), _rounding(self.precision),
        )  # fmt: skip
        return checksum_of(json.dumps(common, sort_keys=True).encode())

    def check(self, store: TrajectoryStore, expert: int) -> None:
        """Raise `InputError`, naming the first difference, unless an expert was trained like those that are to join its folder."""
        check_belongs(store, expert, self.network, self.identity)
        path, metadata = store.path(expert), store.metadata(expert)
        if metadata.imported:
            raise InputError(
                f"{path}: was imported, so its training is not known, and no further experts can be trained in its folder; "
                "choose another `buffer_path`"
            )
        expected = _NOT_RECORDED | {
            **self.hyperparameters,
            "seed": self.seed,
            "store_dtype": dtype_name(self.dtype),
            "precision": _rounding(self.precision),
        }
        found = hyperparameters_of(metadata) | {"seed": metadata.seed, "store_dtype": dtype_name(store.dtype(expert))}
        found["precision"] = _rounding(metadata.precision or self.precision)
        for name, value in expected.items():
            if found.get(name) != value:
                raise InputError(
                    f"{path}: trained with {name} {found.get(name)}, not {value}; choose another `buffer_path`, or train further ones "
                    "by `python -m mtt_fast.experts` with the options of those there"
                )


def remark_on_unknown_training(requested: Iterable[str]) -> str:
    """Return the remark on imported experts that the `requested` hyperparameters have no effect."""
    flags = ", ".join(f"--{FLAGS[name]}" for name in requested)
    return f"how they were trained is not known, so there is no effect of {flags}"


def describe_other_training(
    expert: ExpertMetadata,
    hyperparameters: Mapping[str, Any],
    *,
    to_the_end: bool,
    flags: Mapping[str, str] = FLAGS,
) -> str:
    """Return a remark if an expert's training differs from `hyperparameters`, with which a job would train it; else "".

    The remark calls them by `flags`.
    Such an expert is used as it is, unless the user requested another (`check_as_requested`, also for `to_the_end`).
    """
    found = hyperparameters_of(expert)
    differing = _differing({name: hyperparameters[name] for name in FLAGS}, found, to_the_end) if found else []
    values = ", ".join(f"--{flags[name]} {found[name]} (not {hyperparameters[name]})" for name in differing)
    return f"used as they are, trained with {values}" if values else ""


def describe_other_draws(expert: ExpertMetadata, augment: str, seed: int, users: str) -> Iterator[str]:
    """Yield remarks where an expert was trained with another augmentation or seed, or on other images in each epoch, than its `users`."""
    trained = hyperparameters_of(expert)
    if (found := trained.get("augment", augment)) != augment:
        yield f"trained with augmentation {found}; {augment} is that of {users}"
    if trained and expert.seed != seed:
        yield f"trained with --seed {expert.seed}; {seed} is that of {users}"
    if trained.get("sort_method"):
        yield "trained on a curriculum of images, easy ones first (PAD)"


def with_training_of(options: Options, hyperparameters: Mapping[str, Any], expert: ExpertMetadata) -> Options:
    """Return `options` with the hyperparameters of the existing `expert` in place of the `hyperparameters` in `options`."""
    found = hyperparameters_of(expert)
    names = {field.name for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    changed = {
        flag: found[name]
        for name, flag in FLAGS.items()
        if flag in names and name in found and found[name] != hyperparameters[name]
    }
    return dataclasses.replace(options, **changed)  # type: ignore[type-var]


def _rounding(precision: str) -> str:
    """Return the precisions that count as equal for experts: 10 mantissa bits or more make no difference."""
    return "bf16" if precision == "bf16" else "fp32, tf32 or fp16"


def _first_difference(expected: str, found: str) -> str:
    """Return the first difference of two layouts, in words."""
    ours, theirs = expected.split(";"), found.split(";")
    position = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    if position is None:
        return f"expected {len(ours)} parameter tensors, found {len(theirs)}"
    return f"expected {ours[position]}, found {theirs[position]}"
