"""Find or train the first expert, embed real images by its network, and label images by the experts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mtt_fast.baselines.options import TrainedNetworkOptions
from mtt_fast.commands.options import buffer_folder
from mtt_fast.distill.experts import check_nothing_to_convert
from mtt_fast.distill.labels import experts_at, mean_teacher_labels
from mtt_fast.errors import InputError
from mtt_fast.experts import missing
from mtt_fast.networks.protocol import Trainable
from mtt_fast.storage.expert_checks import (
    BASELINE_FLAGS,
    check_as_requested,
    check_belongs,
    describe_other_draws,
    describe_other_training,
    remark_on_unknown_training,
    with_training_of,
)
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.trajectories import TrajectoryStore, experts_in
from mtt_fast.training.images import Images, RealImages
from mtt_fast.training.subsets import class_members

log = logging.getLogger(__name__)

_BLOCK = 500  # images in one forward pass


def first_expert(options: TrainedNetworkOptions, real: RealImages, network: Trainable) -> TrajectoryStore:
    """Return a store with at least one expert, which is trained now if there is none.

    Raises `InputError` if the first expert is of another network, data set or whitening.
    """
    folder = buffer_folder(options.buffer_path, real.data, options.model, zca=options.zca)
    store = missing.first_expert(folder, real, network, options.expert(), options)
    check_belongs(store, 0, network, real.identity)
    return store


def with_first_expert_training(
    options: TrainedNetworkOptions, real: RealImages, network: Trainable, requested: Mapping[str, Any]
) -> TrainedNetworkOptions:
    """Return the options with the hyperparameters of the first expert, if there is one; else unchanged.

    Raises `InputError` if the expert is of another network or other images, or was trained with other hyperparameters than
    the `requested` ones; if an expert cannot label images as the options ask; or if there is none, and it cannot be written, or buffers
    of the public code should be converted.
    """
    folder = buffer_folder(options.buffer_path, real.data, options.model, zca=options.zca)
    store = experts_in(folder)
    if store is None:
        check_output_folder(folder, "choose another `buffer_path`")
        check_nothing_to_convert(folder)
        _check_label_epoch(options, options.train_epochs, "the epochs of the expert to train")
        return options
    check_belongs(store, 0, network, real.identity)
    _check_labelling(options, store, real, network)
    check_as_requested(store, 0, requested, to_the_end=True)
    expert, training = store.metadata(0), options.expert().record()
    if requested and expert.imported:
        log.info("%s: %s", store.path(0), remark_on_unknown_training(requested))
    if remark := describe_other_training(expert, training, to_the_end=True, flags=BASELINE_FLAGS):
        log.info("%s: %s", store.folder, remark)
    for line in describe_other_draws(expert, options.strategy, options.seed, "evaluations"):
        log.info("%s: %s", store.path(0), line)
    return with_training_of(options, training, expert)


def trained_parameters(options: TrainedNetworkOptions, real: RealImages, network: Trainable) -> Tensor:
    """Return the parameters (P,), on the images' device, of the first expert after its last epoch."""
    store = first_expert(options, real, network)
    return store.read(0, store.epochs(0)).to(real.train.labels.device)


def with_labels(options: TrainedNetworkOptions, real: RealImages, network: Trainable, images: Images) -> Images:
    """Return `images` with the labels that the options ask for: their classes, or the mean predictions of the experts, probabilities.

    Raises `InputError` if an expert is of another network or other images, or has no epoch `label_epoch`.
    """
    if options.labels == "classes":
        return images
    store = first_expert(options, real, network)
    _check_labelling(options, store, real, network)
    thetas = experts_at(store, options.label_epoch, images.labels.device)
    return dataclasses.replace(images, labels=mean_teacher_labels(network, thetas, images.pixels))


def _check_labelling(
    options: TrainedNetworkOptions, store: TrajectoryStore, real: RealImages, network: Trainable
) -> None:
    """Raise `InputError` if the options ask for labels, and an expert in `store` cannot give them (`with_labels`)."""
    for expert in range(len(store)) if options.labels == "experts" else ():
        check_belongs(store, expert, network, real.identity)
        _check_label_epoch(options, store.epochs(expert), f"the epochs of {store.path(expert)}")


def _check_label_epoch(options: TrainedNetworkOptions, epochs: int, words: str) -> None:
    if options.label_epoch is not None and options.label_epoch > epochs:
        raise InputError(f"--label_epoch {options.label_epoch}: expected at most {epochs}, {words}")


def chosen_by_embedding(
    options: TrainedNetworkOptions, real: RealImages, network: Trainable, choose: Callable[[Tensor], Tensor]
) -> Images:
    """Return the training images of each class at the rows that `choose` returns for the class's `embedded` images."""
    members = class_members(real, options.ipc)
    theta = trained_parameters(options, real, network)
    chosen = [
        indices[choose(embedded(real, network, theta, indices))]
        for indices in tqdm(members, desc="embed", unit="class", leave=False)
    ]
    return real.train.subset(torch.cat(chosen))


@torch.no_grad()
def embedded(real: RealImages, network: Trainable, theta: Tensor, indices: Tensor) -> Tensor:
    """Return the embeddings, the inputs of the network's classifier, of the training images at `indices`, (n, F) float32 on the CPU."""
    batches = (real.train.batch(block.to(theta.device))[0] for block in indices.split(_BLOCK))
    return torch.cat([network.embed(theta, images).cpu() for images in batches])
