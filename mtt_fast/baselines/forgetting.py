"""Choose the real images that a network in training learns and forgets most often: Forgetting (Toneva et al., ICLR 2019).

This is the coreset baseline of dataset condensation (Zhao et al., ICLR 2021). An image that was never learned counts as never
forgotten, as in DeepCore by the same group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from mtt_fast.baselines.options import TrainedNetworkOptions
from mtt_fast.baselines.trained import first_expert
from mtt_fast.errors import InputError
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.storage.trajectories import TrajectoryStore
from mtt_fast.training.accuracy import classified_correctly
from mtt_fast.training.images import Images, RealImages
from mtt_fast.training.subsets import class_members


@dataclass(frozen=True)
class ForgettingOptions(TrainedNetworkOptions):
    """Choose the real images that a network, the first expert, learned and forgot most often in its training."""


def forgetting(options: ForgettingOptions, real: RealImages, network: Trainable) -> Images:
    """Return the --ipc images of each class with the most forgetting events; among equals, chance decides.

    The paper classifies an image whenever it is in a batch, once an epoch; here all images are classified after each epoch,
    without augmentation, since the expert's parameters were saved then.
    """
    members = class_members(real, options.ipc)
    store = first_expert(options, real, network)
    if store.course(0) is not None:
        raise InputError(
            f"{store.folder}: the expert is compressed, which does not show what it forgot between its waypoints; give the "
            "--buffer_path of uncompressed experts"
        )
    events = forgetting_events(correct_after_each_epoch(store, real.train, network))
    generator = generator_for(options.seed, "forgetting")
    chosen = torch.cat([most_forgotten(indices, events, options.ipc, generator) for indices in members])
    return real.train.subset(chosen)


def correct_after_each_epoch(store: TrajectoryStore, images: Images, network: Trainable) -> Tensor:
    """Return whether the first expert classifies each of `images` correctly after epoch 1, 2, …: (epochs, n) bool, on the CPU."""
    correct = torch.empty(store.epochs(0), len(images), dtype=torch.bool)
    for epoch in tqdm(range(len(correct)), desc="forgetting", unit="epoch", leave=False):
        theta = store.read(0, epoch + 1).to(images.labels.device)
        correct[epoch] = classified_correctly(network, theta, images)
    return correct


def forgetting_events(correct: Tensor) -> Tensor:
    """Return how often each image was classified correctly after one epoch and wrongly after the next, (n,), from `correct` (epochs, n)."""
    return (correct[:-1] & ~correct[1:]).sum(dim=0)


def most_forgotten(members: Tensor, events: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return the `count` of the indices `members` with the most `events` (n,)."""
    shuffled = members[torch.randperm(len(members), generator=generator)]
    return shuffled[events[shuffled].argsort(descending=True, stable=True)[:count]]
