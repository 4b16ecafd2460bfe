"""Learn images by the loss on real images, through a random window of training (RaT-BPTT: Feng, Vedantam & Kempe, ICLR 2024).

Each iteration trains a fresh network on the images by Adam. The gradient of its loss on real images goes through the last steps
alone, the window. Where the window begins is drawn once for each epoch of the real images. Options and defaults are those of the
public code's command for CIFAR-10, whose 60,000 epochs with --batch_real 5000 are 600,000 iterations. Here the real images of
each iteration are drawn anew, and whitening (--zca) is that of MTT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mtt_fast.augmentation.siamese import augment_by_strategy, augment_with
from mtt_fast.baselines.method import LearnedSet
from mtt_fast.baselines.options import LearnedImagesOptions
from mtt_fast.baselines.real_data import random_batch, starting_images
from mtt_fast.commands.options import Count, CountFromZero, Rate, Share, Strategy
from mtt_fast.engine.optimizers import Adam
from mtt_fast.engine.student import InMicrobatches
from mtt_fast.engine.student_choice import precision_on, student_for
from mtt_fast.engine.unroll import unroll
from mtt_fast.errors import InputError
from mtt_fast.kernels import Precision
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.prefetch import upload
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.images import Images, RealImages

_REAL_PIECE = 500  # real images in memory at once
_PATH_STEPS = 50  # of training without gradients: its path is in memory
_OWN_STEPS = 1000  # of the method's own training; the public code tests after 300, 600, 1000 and 3000


@dataclass(frozen=True)
class RatBpttOptions(LearnedImagesOptions):
    """Learn images so that training on them lowers the loss on real images, through a random window of its steps."""

    lr_img: Rate = 0.001
    """learning rate of the pixels (Adam)"""
    pix_init: Literal["real", "noise"] = "noise"
    """initial images: real images, or noise of length 1"""
    batch_real: Count = 5000
    """real images in the loss"""
    batch_per_class: Count = 10
    """synthetic images of each class in a step; all if there are fewer"""
    window: Count = 60
    """steps through which gradients go"""
    minwindow: CountFromZero = 0
    """least number of steps before the window"""
    totwindow: Count = 200
    """largest number of steps, those of the window included"""
    inner_lr: Rate = 0.001
    """learning rate of the networks (Adam)"""
    syn_strategy: Strategy = "flip_rotate"
    """augmentation of the synthetic images, as --dsa_strategy; none for none"""
    real_strategy: Strategy = "flip_rotate"
    """augmentation of the real images"""
    clip_coef: Share = 0.9
    """gradients are clipped to twice the running average of their length; this is its decay"""

    def check(self) -> None:
        """See `BaselineOptions.check`."""
        super().check()
        if self.minwindow + self.window > self.totwindow:
            raise InputError(
                f"--totwindow {self.totwindow}: expected at least --minwindow {self.minwindow} + --window {self.window}"
            )


def ratbptt(options: RatBpttOptions, real: RealImages, network: Trainable) -> LearnedSet:
    """Return the set to be learned, of --ipc images of each class.

    A ConvNet's steps are computed in fp32 unless --precision says otherwise: a step of Adam is much less exact in tf32.
    """
    start = _starting_images(options, real)
    images, labels, device = start.pixels, start.labels, start.labels.device
    norm = images.new_zeros(())  # the running average of the gradient's length
    optimiser = torch.optim.Adam([images], lr=options.lr_img)
    precision: Precision = "fp32"
    if options.precision != "auto":
        precision = precision_on(device, network, options.precision)
    augment, augment_real = (augment_by_strategy(name) for name in (options.syn_strategy, options.real_strategy))
    everything = torch.arange(len(real.train))
    iterations_per_epoch = math.ceil(len(everything) / options.batch_real)
    student = student_for(network, device, "indices", precision=precision)
    if not network.mixes_samples:
        student = InMicrobatches(student, _REAL_PIECE)

    def steps(
        theta: Tensor, pixels: Tensor, before: int, count: int, moments: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the path and the last moments of `count` steps on `pixels`, after `before` steps that left `moments`."""
        batches = random_batches(options, real.data.num_classes, count, generator)
        return unroll(
            network, theta, pixels, labels, options.inner_lr, batches, augment, optimizer=Adam(steps=before),
            velocity=moments, return_velocity=True, generator=generator, precision=precision,
        )  # fmt: skip

    def trained(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return the parameters and moments of a fresh network after `count` steps."""
        theta, moments = upload(network.init(generator), device), None
        with torch.no_grad():
            for before in range(0, count, _PATH_STEPS):
                path, moments = steps(theta, images, before, min(_PATH_STEPS, count - before), moments, generator)
                theta = path[-1].clone()
        return theta, moments

    def step(iteration: int) -> float:
        generator = generator_for(options.seed, "ratbptt", iteration)
        before = window_start(options, iteration // iterations_per_epoch)
        theta, moments = trained(before, generator)
        pixels = images.detach().requires_grad_()
        path, _ = steps(theta, pixels, before, options.window, moments, generator)
        inputs, targets = random_batch(real.train, everything, options.batch_real, generator)
        if augment_real is not None:
            inputs = augment_with(inputs, upload(augment_real.draw_parameters([inputs], generator), device))
        real_loss = student.gradient(path[-1].detach(), inputs, targets)
        (gradient,) = torch.autograd.grad(path[-1], pixels, real_loss.gradient)
        images.grad = clipped(gradient, norm, options.clip_coef)
        optimiser.step()
        return float(real_loss.loss)

    return LearnedSet(
        images, labels, optimiser, step, lr=lambda: torch.tensor(options.lr_net), carried={"gradient_norm": norm},
        own_training=lambda generator: trained(_OWN_STEPS, generator)[0],
    )  # fmt: skip


def _starting_images(options: RatBpttOptions, real: RealImages) -> Images:
    """Return real images, or noise of which each image has length 1."""
    start = starting_images(real, options.ipc, options.pix_init, options.seed)
    if options.pix_init == "real":
        return start
    return Images(start.pixels / start.pixels.flatten(1).norm(dim=1)[:, None, None, None], start.labels)


def window_start(options: RatBpttOptions, epoch: int) -> int:
    """Return the number of steps before the window, in an epoch of the real images."""
    generator = generator_for(options.seed, "ratbptt window", epoch)
    most = options.totwindow - options.window
    return int(torch.randint(options.minwindow, most + 1, (), generator=generator))


def random_batches(options: RatBpttOptions, num_classes: int, count: int, generator: torch.Generator) -> list[Tensor]:
    """Return the indices of the images of `count` steps: --batch_per_class random ones of each class."""
    first = torch.arange(num_classes)[:, None] * options.ipc
    order = torch.rand(count, num_classes, options.ipc, generator=generator).argsort(-1)[..., : options.batch_per_class]
    return list((first + order).flatten(1))


def clipped(gradient: Tensor, norm: Tensor, decay: float) -> Tensor:
    """Return the gradient with a length of at most twice the running average `norm` (), which is brought up to date before."""
    length: Tensor = torch.linalg.vector_norm(gradient)
    norm.copy_(torch.where(norm == 0, length, torch.lerp(length, norm, decay)))
    share: Tensor = (2 * norm / (length + 1e-6)).clamp(max=1)
    return gradient * share
