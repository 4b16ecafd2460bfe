"""Learn images that lower the loss on real images after a few steps: Dataset Distillation (DD: Wang et al., 2018).

Each iteration takes fresh networks (or always the same ones) through all steps, and moves the images and the learning rate
of each step by Adam. Options and defaults are those of the public code for random initialisations; the public code draws
those by Xavier's rule, this one as the network does. The public code's 400 epochs, at CIFAR-10, are 19,600 iterations, and
its 40 epochs between decays 1,960; it shifts and mirrors the real images of CIFAR-10 at random, which is not done here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast.baselines.method import LearnedSet
from mtt_fast.baselines.options import LearnedImagesOptions
from mtt_fast.baselines.real_data import random_batch, starting_images
from mtt_fast.commands.options import Count, Positive
from mtt_fast.engine.students.choice import precision_on
from mtt_fast.engine.unroll import unroll
from mtt_fast.errors import InputError
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.prefetch import upload
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.images import RealImages

_BETAS = (0.5, 0.999)


@dataclass(frozen=True)
class DdOptions(LearnedImagesOptions):
    """Learn images so that a few training steps on them lower the loss on real images."""

    lr_img: Positive = 0.01
    """learning rate of the pixels and of the learning rates (Adam)"""
    decay_it: Count = 2000
    """iterations between decays of --lr_img"""
    decay_factor: Positive = 0.5
    """factor by which each decay multiplies --lr_img"""
    batch_real: Count = 1024
    """real images in the loss"""
    pix_init: Literal["real", "noise"] = "noise"
    """initial images: real images or noise"""
    distilled_images_per_class_per_step: Count = 1
    """synthetic images per class and step; must divide --ipc, and the quotient is the number of different steps"""
    distill_epochs: Count = 3
    """number of passes of the student over all synthetic images"""
    distill_lr: Positive = 0.02
    """initial learning rate of each student step"""
    train_nets_type: Literal["unknown_init", "known_init"] = "unknown_init"
    """initial networks. unknown_init: new random ones in each iteration; known_init: always the same --n_nets ones"""
    n_nets: Count = 1
    """networks per iteration"""

    def without_effect(self) -> dict[str, str]:
        """See `CommonOptions.without_effect`."""
        return super().without_effect() | {"lr_net": "on a set with learned rates, which start at --distill_lr"}

    def check(self) -> None:
        """See `BaselineOptions.check`."""
        super().check()
        if self.ipc % self.distilled_images_per_class_per_step:
            raise InputError(
                f"--distilled_images_per_class_per_step {self.distilled_images_per_class_per_step}: expected a divisor "
                f"of --ipc {self.ipc}"
            )


def dd(options: DdOptions, real: RealImages, network: Trainable) -> LearnedSet:
    """Return the set to be learned: --ipc images of each class, and a learning rate for each step.

    Evaluations by the common protocol use the mean of the learning rates. The method's own training uses each in its step.
    """
    start = starting_images(real, options.ipc, options.pix_init, options.seed)
    images, labels, device = start.pixels, start.labels, start.labels.device
    batches = step_batches(options, real.data.num_classes)
    # the learning rates are the softplus of the learned numbers, so that they stay positive
    raw = torch.full((len(batches),), options.distill_lr, device=device).expm1_().log_()
    optimizer = torch.optim.Adam([images, raw], lr=options.lr_img, betas=_BETAS)
    everything = torch.arange(len(real.train))
    precision = precision_on(device, network, options.precision)

    is_known = options.train_nets_type == "known_init"

    def initial(generator: torch.Generator, number: int) -> Tensor:
        if is_known:  # the first without a number, as when it was the only one, so that such runs can be continued
            generator = generator_for(options.seed, "dd network", *([number] if number else []))
        return upload(network.init(generator), device)

    def step(iteration: int) -> float:
        generator = generator_for(options.seed, "dd", iteration)
        inputs, targets = random_batch(real.train, everything, options.batch_real, generator)
        pixels, learned = images.detach().requires_grad_(), raw.detach().requires_grad_()
        total = torch.zeros((), device=device)
        for number in range(options.n_nets):
            theta, lrs = initial(generator, number), F.softplus(learned)
            path = unroll(network, theta, pixels, labels, lrs, batches, precision=precision)
            loss = F.cross_entropy(network(path[-1], inputs), targets) / options.n_nets
            loss.backward()
            total += loss.detach()
        images.grad, raw.grad = pixels.grad, learned.grad
        optimizer.param_groups[0]["lr"] = options.lr_img * options.decay_factor ** (iteration // options.decay_it)
        optimizer.step()
        return float(total)

    def own_training(generator: torch.Generator) -> Tensor:
        lrs, number = F.softplus(raw), int(torch.randint(options.n_nets, (), generator=generator)) if is_known else 0
        return unroll(network, initial(generator, number), images, labels, lrs, batches, precision=precision)[-1]

    return LearnedSet(
        images, labels, optimizer, step, lr=lambda: F.softplus(raw).mean(), carried={"raw_rates": raw},
        own_training=own_training,
    )  # fmt: skip


def step_batches(options: DdOptions, num_classes: int) -> list[Tensor]:
    """Return the indices of the images of each step: an equal part of each class's, the same parts in every epoch."""
    each = options.distilled_images_per_class_per_step
    indices = torch.arange(num_classes * options.ipc).view(num_classes, -1, each)  # class, step, image
    return [indices[:, step].flatten() for step in range(indices.shape[1])] * options.distill_epochs
