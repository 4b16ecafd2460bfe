"""Learn images by gradient matching: DC (Zhao et al., ICLR 2021), and with siamese augmentation DSA (Zhao & Bilen, ICML 2021).

Each iteration takes a fresh network and alternates two parts: it moves the images so that their gradient, class by class,
becomes that of real images, and it trains the network on the images. Rates, loops, batches and initialisation are those of
the public code (main.py, get_loops).

No graph of a gradient is needed. With g the gradient on the images X and v = ∂D/∂g of a distance D, the chain rule
gives dD/dX = ∂(v·g)/∂X, which `Student.gradient_jvp` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor

from mtt_fast.augmentation.siamese import augment_by_strategy
from mtt_fast.baselines.dm import PIXEL_MOMENTUM
from mtt_fast.baselines.gradient_distance import DISTANCES, Metric
from mtt_fast.baselines.method import LearnedSet
from mtt_fast.baselines.options import LearnedImagesOptions
from mtt_fast.baselines.real_data import random_batch, starting_images
from mtt_fast.baselines.siamese import siamese_augmentation
from mtt_fast.commands.option_fields import Group, Role
from mtt_fast.commands.options import Count, CountFromZero, Positive
from mtt_fast.engine.students.choice import precision_on, student_for
from mtt_fast.engine.students.protocol import Student
from mtt_fast.errors import InputError
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.prefetch import upload
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.epochs import Epochs
from mtt_fast.training.images import Images, RealImages
from mtt_fast.training.optimizers import Sgd
from mtt_fast.training.subsets import class_members

_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
"""Updates of the images in an iteration, and epochs of the network between two updates, by images per class."""


@dataclass(frozen=True)
class DcOptions(LearnedImagesOptions):
    """Learn images with the same gradient, in networks that train on them, as real images."""

    Iteration: Annotated[CountFromZero, Role.EXTENT] = 1000
    """iterations, each with a fresh network"""
    eval_it: Annotated[Count, Role.EXTENT, Group.EVALUATION] = 500
    """iterations between evaluations"""
    lr_img: Positive = 0.1
    """learning rate of the pixels"""
    pix_init: Literal["real", "noise"] = "noise"
    """initial images: real images or noise"""
    dis_metric: Metric = "ours"
    """distance between gradients: ours (layer by layer, as in the papers), mse, or cos of the whole gradients"""
    outer_loop: Count | None = None
    """updates of the images per iteration; if not given, the papers' number for --ipc 1, 10, 20, 30, 40 or 50"""
    inner_loop: Count | None = None
    """epochs of the network between two updates of the images; if not given, the papers' number for --ipc 1, 10, 20, 30, 40 or 50"""

    def loops(self) -> tuple[int, int]:
        """Return updates in an iteration and epochs between two updates. Raises `InputError` where the papers have no numbers."""
        outer, inner = self._known_loops()
        if outer is None or inner is None:
            raise InputError(
                f"--ipc {self.ipc}: the papers name loops for {', '.join(map(str, _LOOPS))} images per class; "
                "give --outer_loop and --inner_loop"
            )
        return outer, inner

    def _known_loops(self) -> tuple[int | None, int | None]:
        """Return the numbers of `loops`, None for one that is neither given nor the papers'."""
        outer, inner = _LOOPS.get(self.ipc, (None, None))
        return self.outer_loop or outer, self.inner_loop or inner

    def without_effect(self) -> dict[str, str]:
        """See `CommonOptions.without_effect`."""
        reasons, (outer, _) = super().without_effect(), self._known_loops()
        if outer == 1:
            reasons["inner_loop"] = "with one update of the images an iteration: give --outer_loop above 1"
        return reasons

    def check(self) -> None:
        """See `BaselineOptions.check`."""
        super().check()
        self.loops()


@dataclass(frozen=True)
class DsaOptions(DcOptions):
    """Learn images as DC does, with the same augmentation of real and synthetic images."""

    pix_init: Literal["real", "noise"] = "real"
    """initial images: real images or noise"""

    def check(self) -> None:
        """See `BaselineOptions.check`."""
        super().check()
        if augment_by_strategy(self.strategy) is None:
            option = f"--dsa_strategy {self.dsa_strategy}" if self.dsa else "--dsa False"
            raise InputError(f"{option}: without augmentation DSA is DC; run dc instead")


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
    train = Epochs(student, Images(images, labels), sgd, augment_by_strategy(strategy))
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
