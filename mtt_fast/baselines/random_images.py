"""Choose random real images, the baseline of all the others."""

from __future__ import annotations

from dataclasses import dataclass

from mtt_fast.baselines.options import TrainedNetworkOptions
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.images import Images, RealImages
from mtt_fast.training.subsets import random_subset


@dataclass(frozen=True)
class RandomOptions(TrainedNetworkOptions):
    """Choose real images at random."""

    @property
    def reason_without_network(self) -> str:
        """See `TrainedNetworkOptions.reason_without_network`."""
        return "without --labels experts"


def random_images(options: RandomOptions, real: RealImages, network: Trainable) -> Images:
    """Return --ipc images of each class, drawn at random without replacement; another --seed draws others."""
    return random_subset(real, options.ipc, generator_for(options.seed, "random"))
