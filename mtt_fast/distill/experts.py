"""Find, train, compress and check the experts of a distillation."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mtt_fast.commands.options import buffer_folder
from mtt_fast.compress import check_compressed_from, compress, waypoint_folder
from mtt_fast.data import DatasetInfo, ImageData
from mtt_fast.distill.options import DistillOptions
from mtt_fast.engine.students.choice import precision_on
from mtt_fast.errors import InputError
from mtt_fast.experts.missing import check_trained_alike, train_missing_experts
from mtt_fast.interop.buffers import BUFFER, CONVEXIFIED
from mtt_fast.networks.protocol import Trainable
from mtt_fast.storage.checkpoint import State, initial_num_experts
from mtt_fast.storage.expert_checks import (
    FLAGS,
    CommonTraining,
    check_alike,
    check_as_requested,
    check_belongs,
    check_long_enough,
    describe_other_draws,
    describe_other_training,
    remark_on_unknown_training,
)
from mtt_fast.storage.foreign import names_in
from mtt_fast.storage.identity import DatasetIdentity, describe_other_data
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.trajectories import TrajectoryStore, experts_in
from mtt_fast.storage.waypoints import evenly_spaced
from mtt_fast.training.experts import ExpertTraining
from mtt_fast.training.images import RealImages

log = logging.getLogger(__name__)


class ExpertInventory(NamedTuple):
    """The folders of a run's experts, the experts that exist, and how many are still to be trained and compressed."""

    uncompressed_folder: Path
    matched_folder: Path
    """folder of the experts to match: `uncompressed_folder`, or the folder of waypoints made from its experts"""
    uncompressed: TrajectoryStore | None
    """the experts in `uncompressed_folder`"""
    ready: TrajectoryStore | None
    """the experts in `matched_folder`"""
    num_missing: int
    """number of experts to train"""
    num_to_compress: int
    """number of experts to compress to waypoints"""
    imported: bool
    """whether there are experts of other software; none is trained in addition to these"""

    @property
    def num_available(self) -> int:
        """Return the number of uncompressed experts, or of compressed ones if there are no others."""
        return len(self.uncompressed or self.ready or ())


def inventory_of(options: DistillOptions, data: ImageData | DatasetInfo) -> ExpertInventory:
    """Count the experts that exist and those that are missing. Raises `InputError` for a damaged one."""
    folder = buffer_folder(options.buffer_path, data, options.model, zca=options.zca)
    num_waypoints = options.num_interpolation
    matched_folder = folder if num_waypoints is None else waypoint_folder(folder, num_waypoints)
    stores = experts_in(folder), experts_in(matched_folder)
    experts, ready = map(_indices, stores)
    needed = options.max_experts or options.num_experts
    imported = any(map(_imported, stores))
    enough = len(ready) >= needed
    untrained = set(range(options.num_experts)) - experts
    missing = set() if enough or imported or len(experts) >= needed else untrained
    to_compress = set() if enough or num_waypoints is None else (experts | missing) - ready
    return ExpertInventory(folder, matched_folder, *stores, len(missing), len(to_compress), imported)


def check_experts(
    options: DistillOptions,
    data: ImageData | DatasetInfo,
    network: Trainable,
    device: torch.device,
    requested: Mapping[str, Any],
) -> None:
    """Raise `InputError` unless the run can use the experts that exist, and can train or compress the missing ones, on `device`.

    `requested` are the experts' hyperparameters that the user set explicitly. A `DatasetInfo` stands for images that are not
    downloaded yet; then fewer properties of the images are compared. The message names an expert's file, the options that do not
    fit, a folder that cannot be written, or a folder that lacks experts that a resumed run started with.
    """
    inventory, identity = inventory_of(options, data), data.identity(zca=options.zca)
    check_missing_experts(options, inventory)
    _check_others_can_be_made(options, inventory, network, device, identity)
    uncompressed = inventory.uncompressed
    store = uncompressed if inventory.num_to_compress else inventory.ready
    if store is None:
        return
    matched = range(len(matched_experts(options, store)))
    for expert in matched:
        check_belongs(store, expert, network, identity, other_data=options.other_data)
        check_long_enough(store, expert, options.last_matched_epoch)
        check_as_requested(store, expert, requested, to_the_end=options.uses_last_epochs)
    check_alike(store, matched, to_the_end=options.uses_last_epochs, fewer="max_experts")
    if uncompressed is not None and store.folder != uncompressed.folder:
        check_compressed_from(store, matched, uncompressed)


def _check_others_can_be_made(
    options: DistillOptions,
    inventory: ExpertInventory,
    network: Trainable,
    device: torch.device,
    identity: DatasetIdentity,
) -> None:
    """Raise `InputError` unless missing experts can be trained, and compressed, beside the existing ones."""
    uncompressed = inventory.uncompressed
    if inventory.num_to_compress and options.num_interpolation is not None:
        evenly_spaced(uncompressed.epochs(0) if uncompressed else options.train_epochs, options.num_interpolation)
    for folder, written in (
        (inventory.uncompressed_folder, inventory.num_missing),
        (inventory.matched_folder, inventory.num_to_compress),
    ):
        if written:
            check_output_folder(folder, "choose another `buffer_path`")
    if inventory.num_missing and uncompressed is not None:
        precision = precision_on(device, network, options.precision)
        hyperparameters, dtype = options.experts().record(), uncompressed.dtype(0)
        common = CommonTraining(network, identity, hyperparameters, options.seed, dtype, precision)
        check_trained_alike(uncompressed, common)
    if inventory.num_missing and uncompressed is None:
        check_nothing_to_convert(inventory.uncompressed_folder)
    ready, available = _indices(inventory.ready), _indices(uncompressed)
    if inventory.num_missing and not ready <= available:  # they would be trained again, perhaps with other results
        raise InputError(
            f"{inventory.uncompressed_folder}: expected the uncompressed experts of those in {inventory.matched_folder.name}, to train further ones, found "
            f"{len(ready & available) or 'none'} of {len(ready)}; restore them, choose another `buffer_path`, or give "
            f"`max_experts` {len(ready)} to use those that are compressed"
        )


def matched_experts(options: DistillOptions, store: TrajectoryStore) -> TrajectoryStore:
    """Return the experts of `store` that a new run matches: the first ones."""
    return store.first(options.max_experts or len(store))


def remark_on_expert_count(options: DistillOptions, inventory: ExpertInventory) -> str:
    """Return a remark if a new run matches fewer experts than it trains, or more than it asks for; else ""."""
    to_make = inventory.num_missing if options.num_interpolation is None else inventory.num_to_compress
    count, requested, most = to_make + len(inventory.ready or ()), options.num_experts, options.max_experts
    if most is None and count > requested and not inventory.imported:
        return (
            f"all {count} experts in the folder are matched, more than --num_experts {requested}; --max_experts {requested} takes the "
            "first ones"
        )
    if most is not None and inventory.num_missing and most < count:
        return (
            f"--num_experts {requested} trains {inventory.num_missing} more, and --max_experts {most} matches {most} of the {count}; "
            f"--num_experts {most} trains no others"
        )
    return ""


def check_missing_experts(options: DistillOptions, inventory: ExpertInventory) -> None:
    """Raise `InputError` if missing experts must not be trained, or would be trained for too few epochs."""
    if not inventory.num_missing:
        return
    _check_experts_of_run_remain(options.folder(), inventory)
    needed = options.last_matched_epoch
    if needed > options.train_epochs:
        raise InputError(
            f"--max_start_epoch {options.max_start_epoch}, --expert_epochs {options.expert_epochs}: segments reach epoch {needed}, "
            f"and experts of --train_epochs {options.train_epochs} end before that; raise --train_epochs to {needed} or lower the others"
        )


def _check_experts_of_run_remain(folder: Path, inventory: ExpertInventory) -> None:
    """Raise `InputError` if experts that the run in `folder` started with are gone.

    Training them again would take hours, and give different experts unless machine, number of threads and all versions are the
    same.
    """
    expected, imported = initial_num_experts(folder)
    if imported:
        found = f"{inventory.num_available} trained here" if inventory.num_available else "none"
        raise InputError(
            f"{inventory.uncompressed_folder}: expected the {expected} imported experts with which the run in {folder} began, found "
            f"{found}; restore them, convert them again with `python -m mtt_fast.convert`, or give the `buffer_path` that they are in"
        )
    if inventory.num_available < expected:
        raise InputError(
            f"{inventory.uncompressed_folder}: expected the {expected} experts with which the run in {folder} began, found "
            f"{inventory.num_available or 'none'}; start in the folder where the run was started, give the `buffer_path` that they are in, "
            "or restore them"
        )


def check_nothing_to_convert(folder: Path) -> None:
    """Raise `InputError` if `folder`, which has no experts, holds buffers of the public code, which should be converted."""
    names = names_in(folder) if folder.is_dir() else []
    if buffers := [name for name in names if re.fullmatch(f"{BUFFER}|{CONVEXIFIED}", name)]:
        raise InputError(
            f"{folder}: expected experts (expert_0000.safetensors, …), found buffers of the public code such as "
            f"{buffers[0]}; convert them with `python -m mtt_fast.convert {shlex.quote(str(folder))} DESTINATION`, or have experts "
            "trained in another `buffer_path`"
        )


def prepare_experts(
    options: DistillOptions, real: RealImages, network: Trainable, requested: Mapping[str, Any]
) -> TrajectoryStore:
    """Train and compress the missing experts, log remarks, and return the store of the experts to match.

    Converted experts are used as they are, and none is trained in addition, as in the public code. For `requested` see
    `check_experts`.
    """
    inventory = inventory_of(options, real.data)
    if inventory.num_missing:
        if remark := whitening_remark(options, real.data):
            log.info("%s", remark)
        train_missing_experts(
            inventory.uncompressed_folder, options.num_experts, real, network, options.experts(), seed=options.seed,
            precision=precision_on(real.train.labels.device, network, options.precision),
            at_once=options.networks_at_once, memory_budget=options.memory_budget,
        )  # fmt: skip
    if inventory.num_to_compress and options.num_interpolation is not None:
        # another distillation may have waited for the same experts, and compress them now
        compress(inventory.uncompressed_folder, inventory.matched_folder, options.num_interpolation, wait=-1)
    store = TrajectoryStore(inventory.matched_folder)
    for line in _remarks(options, real, store, requested):
        log.info("%s: %s", inventory.matched_folder, line)
    return store


def whitening_remark(options: DistillOptions, data: ImageData | DatasetInfo) -> str:
    """Return a remark if the run has no experts for its value of --zca, but there are some for the other value; else ""."""
    own, other = (
        buffer_folder(options.buffer_path, data, options.model, zca=zca) for zca in (options.zca, not options.zca)
    )
    if experts_in(own) or not experts_in(other):
        return ""
    how = "normalised images; leave out --zca" if options.zca else "whitened images; give --zca"
    return f"{own}: no experts yet; those in {other} were trained on {how} to use them"


def _remarks(
    options: DistillOptions, real: RealImages, store: TrajectoryStore, requested: Mapping[str, Any]
) -> Iterator[str]:
    """Yield remarks on properties of the experts that a user may not expect."""
    first = store.metadata(0)
    if other := describe_other_data(first.identity, real.identity):
        yield other
    elif options.other_data and options.cam_model is None:  # whose network may be of other images
        yield "--other_data: has no effect, as the experts were trained on these images"
    if first.imported and len(store) < options.num_experts:
        yield (
            f"imported experts, used as they are: all {len(store)} that are there; --num_experts {options.num_experts} "
            "trains none beside them"
        )
    if first.imported and requested:
        yield remark_on_unknown_training(requested)
    if remark := describe_other_training(first, options.experts().record(), to_the_end=options.uses_last_epochs):
        yield remark
    yield from describe_other_draws(first, options.strategy, options.seed, "the student and of evaluations")


def check_same_experts_so_far(options: DistillOptions, state: State, data: ImageData | DatasetInfo) -> None:
    """Raise `InputError` as `experts_of_run` does, before missing experts are trained or compressed."""
    inventory = inventory_of(options, data)
    store = inventory.ready
    if store is not None and (
        len(store) >= state.num_experts or not (inventory.num_missing or inventory.num_to_compress)
    ):
        experts_of_run(options, state, store)


def experts_of_run(options: DistillOptions, state: State, store: TrajectoryStore) -> TrajectoryStore:
    """Return the experts of `store` that the run with `state` started with; others may have been added, even between them.

    Raises `InputError` unless the run still has, and may use, these experts.
    """
    folder = options.folder()
    if options.max_experts is not None and options.max_experts < state.num_experts:
        raise InputError(
            f"--max_experts {options.max_experts}: expected all {state.num_experts} experts with which the run in {folder} began, and "
            "matches to its end; leave it out, or choose another --out"
        )
    if len(store) < state.num_experts:
        raise InputError(
            f"{folder}: the run was started with {state.num_experts} experts, found {len(store)}; "
            + ("" if store.metadata(0).imported else f"give --num_experts {state.num_experts}, or ")
            + f"restore its --buffer_path, {store.folder}"
        )
    differing = [
        expert
        for expert, digest in enumerate(state.digests)
        if store.digest(expert) not in (digest, "") and digest  # an expert without checksums has ""
    ]
    own = store.starting_with(state.digests) if differing else store
    if own is None:
        raise InputError(
            f"{store.path(differing[0])}: another expert than the one with which the run in {folder} began; restore its "
            "--buffer_path, or choose another --out"
        )
    return own.first(state.num_experts)


def requested_hyperparameters(training: ExpertTraining, given: Set[str]) -> dict[str, Any]:
    """Return those hyperparameters in `training` that the user gave, by the options in `given`."""
    record = training.record()
    names = {name for name, flag in FLAGS.items() if flag in given}
    sharpness = {"rho_max", "rho_min", "alpha", "adaptive"}
    if names & sharpness:  # these have a meaning only together
        names |= sharpness
    return {name: record[name] for name in FLAGS if name in names}


def _indices(store: TrajectoryStore | None) -> set[int]:
    return set(store.indices) if store else set()


def _imported(store: TrajectoryStore | None) -> bool:
    return store is not None and any(store.metadata(expert).imported for expert in range(len(store)))
