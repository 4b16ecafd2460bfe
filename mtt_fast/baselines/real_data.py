"""Draw batches of real images, and the images from which a set starts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mtt_fast.runtime.prefetch import upload
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.images import Images, RealImages
from mtt_fast.training.subsets import random_subset


def random_batch(images: Images, members: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return `count` different images at random among those at `members`, or all if there are fewer, and their labels."""
    chosen = members[torch.randperm(len(members), generator=generator)[:count]]
    return images.batch(upload(chosen, images.labels.device))


def starting_images(real: RealImages, ipc: int, pix_init: Literal["real", "noise"], seed: int) -> Images:
    """Return `ipc` images of each class to start from, class-major: real ones, or noise from a standard normal."""
    generator = generator_for(seed, "initial images")
    start = random_subset(real, ipc, generator)
    if pix_init == "real":
        return start
    return Images(torch.randn(start.pixels.shape, generator=generator).to(start.pixels), start.labels)
