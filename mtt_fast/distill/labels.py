"""Make soft labels: the initial values of learned labels, and labels that experts give."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from mtt_fast.networks.protocol import Network
from mtt_fast.storage.trajectories import TrajectoryStore

log = logging.getLogger(__name__)

OWN_CLASS = 0.9
"""The probability of an image's own class in `class_logits`; at 1 the softmax has no gradient, and nothing is learned."""

_AT_ONCE = 64


def class_logits(classes: Tensor, num_classes: int) -> Tensor:
    """Return log-probabilities (n, num_classes) float32 for images of `classes` (n,).

    The image's class has probability `OWN_CLASS`, and the other classes share the rest evenly.
    """
    shared = (1 - OWN_CLASS) / max(1, num_classes - 1)
    probabilities = torch.full((len(classes), num_classes), shared, device=classes.device)
    return probabilities.scatter_(1, classes[:, None], OWN_CLASS).log()


def expert_logits(network: Network, experts: Iterable[Tensor], images: Tensor, initial: Tensor) -> Tensor:
    """Return each image's mean logits (n, num_classes) over the `experts` that classify the image correctly (DATM).

    `experts` are parameters (P,), `images` (n, C, H, W). An image's class is that of its largest logit in `initial`. Where
    no expert is right, DATM's mean is not defined and the image keeps its `initial` logits; the log says how often.
    """
    classes = initial.argmax(dim=1)
    total, times = torch.zeros_like(initial), torch.zeros_like(initial[:, :1])
    for theta in experts:
        logits = predict(network, theta, images)
        right = (logits.argmax(dim=1) == classes)[:, None]
        total += logits * right
        times += right
    never = times == 0
    if bool(never.any()):
        log.warning(
            "--label_init experts: no expert gets %d of the %d images right; their labels begin as with --label_init classes",
            int(never.sum()), len(images),
        )  # fmt: skip
    return torch.where(never, initial, total / times.clamp(min=1))


def teacher_labels(network: Network, theta: Tensor, images: Tensor, index: Tensor, at_once: int) -> Tensor:
    """Return softmax of the logits (n, num_classes) under `theta` (P,): TESLA's labels in an iteration.

    Only the images (n, C, H, W) at `index`, which may repeat, get labels; the rows of the others are zero. A forward pass takes
    `at_once` images, for which a plan of student steps has room.
    """
    rows = index.unique()
    probabilities = predict(network, theta, images[rows], at_once).softmax(dim=1)
    return images.new_zeros(len(images), probabilities.shape[1]).index_copy_(0, rows, probabilities)


def mean_teacher_labels(network: Network, experts: Iterable[Tensor], images: Tensor) -> Tensor:
    """Return the mean over `experts`, parameters (P,), of their softmax for `images`: probabilities (n, num_classes)."""
    mean = torch.zeros((), device=images.device)
    for number, theta in enumerate(experts, start=1):
        mean = mean + (predict(network, theta, images).softmax(dim=1) - mean) / number
    return mean


@torch.no_grad()
def predict(network: Network, theta: Tensor, images: Tensor, at_once: int = _AT_ONCE) -> Tensor:
    """Return the logits (n, num_classes) of `images` under `theta` (P,), `at_once` images at a time."""
    return torch.cat([network(theta, part) for part in images.split(at_once)])


def experts_at(store: TrajectoryStore, count: int, epoch: int | None, device: torch.device) -> Iterable[Tensor]:
    """Yield the parameters (P,) of the first `count` experts after `epoch` epochs, or after their last one if None."""
    for expert in tqdm(range(count), desc="labels of experts", unit="expert", leave=False):
        yield store.read(expert, store.epochs(expert) if epoch is None else epoch).to(device)
