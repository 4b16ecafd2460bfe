"""Random real images, the baseline of all the others."""

from __future__ import annotations

from mtt_fast.baselines.options import BaselineOptions
from mtt_fast.evaluate import random_subset
from mtt_fast.models import Trainable
from mtt_fast.options import RealImages
from mtt_fast.seeding import generator_for
from mtt_fast.training import Images


def random_images(options: BaselineOptions, real: RealImages, network: Trainable) -> Images:
    """Return --ipc images of each class, drawn at random without replacement; another --seed draws others."""
    return random_subset(real.train, real.data.num_classes, options.ipc, generator_for(options.seed, "random"))
