"""Whether the options fit the images, the networks and the experts that are there: told before any work is done."""

from __future__ import annotations

from pathlib import Path

import torch

from mtt_fast.commands.options import buffer_folder
from mtt_fast.compress import waypoint_folder
from mtt_fast.data import ImageData
from mtt_fast.data.published_info import DataFacts
from mtt_fast.distill.options import DistillOptions
from mtt_fast.engine.student_choice import precision_on
from mtt_fast.errors import InputError
from mtt_fast.experts import check_flatness
from mtt_fast.networks.protocol import Trainable
from mtt_fast.storage.trajectories import TrajectoryStore, check_compatible
from mtt_fast.storage.waypoints import evenly_spaced


def check_fits(options: DistillOptions, data: ImageData | DataFacts, network: Trainable, device: torch.device) -> None:
    """Raise `InputError` for an option that the run would stumble on later.

    Of images that are not there yet (`DataFacts`) it is not asked whether each class has enough, nor whether they are those
    that the experts were trained on.
    """
    images = options.ipc * data.num_classes
    if options.batch_syn and options.batch_syn > images:
        raise InputError(
            f"--batch_syn {options.batch_syn}: expected at most the {images} synthetic images there are ({options.ipc} for "
            f"each of {data.num_classes} classes); leave it out to use all"
        )
    if isinstance(data, ImageData):
        _check_enough_images(options, data)
    if network.mixes_samples and (asked := options.asks_experts()):
        raise InputError(
            f"--model {options.model}, {asked}: expected a network without batch norm, since what experts say of single images "
            "takes running statistics, which trajectories do not hold; leave that out, or take another --model"
        )
    for evaluated in options.evaluated_networks(data).values():
        precision_on(device, evaluated, options.precision)
    _check_experts(options, network, buffer_folder(options.buffer_path, data, options.model, options.zca))


def _check_enough_images(options: DistillOptions, data: ImageData) -> None:
    """Raise `InputError` if a class has fewer real images than the synthetic ones start from, or are compared with."""
    counts = torch.bincount(data.train.labels, minlength=data.num_classes).tolist()
    needed = options.ipc * options.tiles
    short = next((label for label, count in enumerate(counts) if count < needed), None)
    if short is not None:
        asked = f"--ipc {options.ipc}" + (f", --canvas_size {options.canvas_size}" if options.texture else "")
        raise InputError(
            f"{asked}: class {data.class_names[short]} has only {counts[short]} real images of the {needed} that each "
            "begins with; use a smaller --ipc"
        )


def _check_experts(options: DistillOptions, network: Trainable, whole: Path) -> None:
    """Raise `InputError` if the experts in `whole`, or those that will be trained or compressed, are of no use."""
    count, needed = options.num_interpolation, options.max_start_epoch + options.expert_epochs
    store = _store(whole if count is None else waypoint_folder(whole, count))
    if count is not None and (store is None or len(store) < (options.max_experts or options.num_experts)):
        store = _store(whole)
        evenly_spaced(store.epochs(0) if store else options.train_epochs, count)
    if store is None and needed > options.train_epochs:
        raise InputError(
            f"--max_start_epoch {options.max_start_epoch} + --expert_epochs {options.expert_epochs}: experts of "
            f"--train_epochs {options.train_epochs} end before that; raise --train_epochs to {needed} or lower the others"
        )
    if store is not None:
        for expert in range(len(store)):
            _check_expert(options, network, store, expert)


def _check_expert(options: DistillOptions, network: Trainable, store: TrajectoryStore, expert: int) -> None:
    metadata = store.metadata(expert)
    check_compatible(
        metadata,
        layout=network.layout.describe(),
        fingerprint=metadata.fingerprint,  # of images that may not be there yet
        whitening="zca" if options.zca else "none",
        needed_epochs=options.max_start_epoch + options.expert_epochs,
        epochs=store.epochs(expert),
        where=str(store.folder),
    )
    check_flatness(metadata, options.experts(), store.folder)


def _store(folder: Path) -> TrajectoryStore | None:
    """Return the experts in `folder`, or None if there is none."""
    store = TrajectoryStore(folder) if folder.is_dir() else None
    return store or None
