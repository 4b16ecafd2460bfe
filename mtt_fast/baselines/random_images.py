"""Choose random real images, the baseline of all the others."""

from __future__ import annotations

from mtt_fast.baselines.options import BaselineOptions
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.images import Images, RealImages
from mtt_fast.training.subsets import random_subset


def random_images(options: BaselineOptions, real: RealImages, network: Trainable) -> Images:
    """Return --ipc images of each class, drawn at random without replacement; another --seed draws others."""
    return random_subset(real, options.ipc, generator_for(options.seed, "random"))
