"""Learn images by gradient matching: DC (Zhao et al., ICLR 2021), and with siamese augmentation DSA (Zhao & Bilen, ICML 2021).

Each iteration takes a fresh network and alternates two parts: it moves the images so that their gradient, class by class,
becomes that of real images, and it trains the network on the images. Rates, loops, batches and initialisation are those of
the public code (main.py, get_loops).

No graph of a gradient is needed. With g the gradient on the images X and v = ∂D/∂g of a distance D, the chain rule
gives dD/dX = ∂(v·g)/∂X, which `Student.gradient_jvp` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mtt_fast.augmentation.siamese import augment_by_strategy
from mtt_fast.baselines.dm import PIXEL_MOMENTUM
from mtt_fast.baselines.gradient_distance import DISTANCES
from mtt_fast.baselines.gradient_matching_options import DcOptions, DsaOptions
from mtt_fast.baselines.method import LearnedSet
from mtt_fast.baselines.real_data import random_batch, starting_images
from mtt_fast.baselines.siamese import siamese_augmentation
from mtt_fast.engine.student import Student
from mtt_fast.engine.student_choice import precision_on, student_for
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.prefetch import upload
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.images import Images, RealImages
from mtt_fast.training.sgd import Sgd, epochs_on
from mtt_fast.training.subsets import class_members


def dc(options: DcOptions, real: RealImages, network: Trainable) -> LearnedSet:
    """Return the set to be learned, of --ipc images of each class, without augmentation; evaluations keep the augmentation."""
    return _learned_set(options, real, network, "none")


def dsa(options: DsaOptions, real: RealImages, network: Trainable) -> LearnedSet:
    """Return the set to be learned, of --ipc images of each class, with siamese augmentation."""
    return _learned_set(options, real, network, options.strategy)


def _learned_set(options: DcOptions, real: RealImages, network: Trainable, strategy: str) -> LearnedSet:
    members = class_members(real, options.ipc)
    start = starting_images(real, options.ipc, options.pix_init, options.seed)
    images, labels = start.pixels, start.labels
    optimizer = torch.optim.SGD([images], lr=options.lr_img, momentum=PIXEL_MOMENTUM)
    student = student_for(network, images.device, precision=precision_on(images.device, network, options.precision))
    sgd = Sgd(options.lr_net, batch_size=options.batch_size)
    train = epochs_on(student, Images(images, labels), sgd, augment_by_strategy(strategy))
    outer_loop, inner_loop = options.loops()

    def match(theta: Tensor, generator: torch.Generator) -> Tensor:
        """Set the images' gradient; return the distance, summed over classes."""
        images.grad = torch.empty_like(images)
        total = torch.zeros((), device=images.device)
        for label, indices in enumerate(members):
            inputs, targets = random_batch(real.train, indices, options.batch_real, generator)
            augment = siamese_augmentation(strategy, inputs, generator)
            real_gradient = student.gradient(theta, augment(inputs), targets).gradient
            rows = slice(label * options.ipc, (label + 1) * options.ipc)
            distance_to = partial(DISTANCES[options.dis_metric], real=real_gradient, layout=network.layout)
            distance, images.grad[rows] = matching_gradient(
                student, theta, images[rows], labels[rows], augment, distance_to
            )
            total += distance
        return total

    def step(iteration: int) -> float:
        generator = generator_for(options.seed, "gradient matching", iteration)
        theta = upload(network.init(generator), images.device)
        total = torch.zeros((), device=images.device)
        for update in range(outer_loop):
            total += match(theta, generator)
            optimizer.step()
            if update + 1 < outer_loop:
                for _ in range(inner_loop):
                    theta, _, _ = train(theta, torch.zeros_like(theta), generator)
        return float(total) / (len(members) * outer_loop)

    return LearnedSet(images, labels, optimizer, step, lr=lambda: torch.tensor(options.lr_net))


def matching_gradient(
    student: Student,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    augment: Callable[[Tensor], Tensor],
    distance: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the `distance` () of the student's gradient, and the gradient of this distance with respect to `images`.

    The student's gradient is that at `theta` (P,) on the augmented `images`.
    """
    own = images.detach().requires_grad_()
    augmented = augment(own)
    inputs = augmented.detach().contiguous()
    gradient = student.gradient(theta, inputs, labels).gradient.requires_grad_()
    value = distance(gradient)
    (direction,) = torch.autograd.grad(value, gradient)
    tangent = student.gradient_jvp(theta, inputs, labels, direction)
    (to_images,) = torch.autograd.grad(augmented, own, tangent.images)
    return value.detach(), to_images
