"""Learn images whose mean embedding is that of real ones: distribution matching (DM: Zhao & Bilen, WACV 2023).

Each iteration draws a fresh random network, and a batch of real images of each class; one siamese augmentation is applied
to real and synthetic images. Rates, batch, iterations and initialisation are those of the public code (main_DM.py), which
takes --lr_img 10 from 100 images per class on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtt_fast.baselines.method import LearnedSet
from mtt_fast.baselines.options import LearnedImagesOptions
from mtt_fast.baselines.real_data import random_batch, starting_images
from mtt_fast.baselines.siamese import siamese_augmentation
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.prefetch import upload
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.images import RealImages
from mtt_fast.training.subsets import class_members

PIXEL_MOMENTUM = 0.5


@dataclass(frozen=True)
class DmOptions(LearnedImagesOptions):
    """Learn images with the same mean embedding, in random networks, as real images."""


def dm(options: DmOptions, real: RealImages, network: Trainable) -> LearnedSet:
    """Return the set to be learned, of --ipc images of each class."""
    members = class_members(real, options.ipc)
    start = starting_images(real, options.ipc, options.pix_init, options.seed)
    images = start.pixels
    optimizer = torch.optim.SGD([images], lr=options.lr_img, momentum=PIXEL_MOMENTUM)

    def step(iteration: int) -> float:
        generator = generator_for(options.seed, "dm", iteration)
        theta = upload(network.init(generator), images.device)
        images.grad = torch.empty_like(images)
        total = torch.zeros((), device=images.device)
        for label, indices in enumerate(members):
            inputs, _ = random_batch(real.train, indices, options.batch_real, generator)
            augment = siamese_augmentation(options.strategy, inputs, generator)
            rows = slice(label * options.ipc, (label + 1) * options.ipc)
            own = images[rows].detach().requires_grad_()
            distance = embedding_distance(network, theta, augment(own), augment(inputs))
            (images.grad[rows],) = torch.autograd.grad(distance, own)
            total += distance.detach()
        optimizer.step()
        return float(total) / len(members)

    return LearnedSet(images, start.labels, optimizer, step, lr=lambda: torch.tensor(options.lr_net))


def embedding_distance(network: Trainable, theta: Tensor, images: Tensor, real: Tensor) -> Tensor:
    """Return |mean embedding of `images` − mean embedding of `real`|², (), for images of one class, under `theta` (P,)."""
    with torch.no_grad():
        target = network.embed(theta, real).mean(dim=0)
    return (network.embed(theta, images).mean(dim=0) - target).square().sum()
