"""SGD on real or synthetic images: one epoch, and the accuracy afterwards. Experts and evaluation share it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.augment import Augment
from mtt_fast.student import Network, Student

_TEST_BATCH = 500


@dataclass(frozen=True)
class Images:
    """Labelled images on one device, made into what the network sees one batch at a time.

    `pixels` (n, C, H, W) are uint8 with `transform` from [0, 1] to the network's input, or floating point as the
    network sees them and `transform` None. `labels` are indices (n,) or probabilities (n, classes).
    """

    pixels: Tensor
    labels: Tensor
    transform: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return (images (b, C, H, W) as the network sees them, labels)."""
        pixels = self.pixels[index]
        return (self.transform(pixels.float() / 255) if self.transform else pixels), self.labels[index]


@dataclass(frozen=True)
class Sgd:
    """Hyper-parameters of plain SGD, as torch.optim.SGD names them."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 256


def train_epoch(
    student: Student,
    theta: Tensor,
    velocity: Tensor,
    images: Images,
    sgd: Sgd,
    augment: Augment | None,
    generator: torch.Generator,
) -> Tensor:
    """Visit every image once in random order, updating `theta` and `velocity` (P,) in place.

    The order and the augmentation come from `generator`; the last batch may be short. Returns the mean loss, a scalar
    tensor on the device.
    """
    order = torch.randperm(len(images), generator=generator).to(theta.device)
    total, rate = theta.new_zeros(()), theta.new_full((), sgd.lr)
    moving = velocity if sgd.momentum else None
    for index in order.split(sgd.batch_size):
        seen, labels = images.batch(index)
        if augment:
            seen = augment(seen, augment.draw(seen, generator))
        loss, gradient, _ = student.gradient(theta, seen, labels)
        total += loss * len(index)
        kernels.sgd_step(
            theta,
            gradient.contiguous(),
            rate,
            out=theta,
            velocity=moving,
            velocity_out=moving,
            momentum=sgd.momentum,
            weight_decay=sgd.weight_decay,
        )
    return total / len(images)


@torch.no_grad()
def accuracy(network: Network, theta: Tensor, images: Images) -> float:
    """Return the share of `images` whose class `network` gets right, in [0, 1]."""
    right = torch.zeros((), dtype=torch.long, device=theta.device)
    for begin in range(0, len(images), _TEST_BATCH):
        seen, labels = images.batch(slice(begin, begin + _TEST_BATCH))
        right += (network(theta, seen).argmax(dim=1) == labels).sum()
    return int(right) / len(images)
