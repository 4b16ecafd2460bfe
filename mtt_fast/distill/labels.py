"""Compute soft labels: initial values of learned labels, and predictions of experts."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from mtt_fast.distill.options import DistillOptions
from mtt_fast.networks.protocol import Network
from mtt_fast.runtime.interrupts import StopRequest, raise_if_stopped
from mtt_fast.storage.trajectories import TrajectoryStore

log = logging.getLogger(__name__)

OWN_CLASS_PROBABILITY = 0.9
"""Probability of an image's own class in `class_logits`; with 1 the gradient of the softmax would be zero."""

_BATCH = 64  # images in a forward pass


def has_soft_baseline(options: DistillOptions, network: Network) -> bool:
    """Return whether a run is also compared with random real images that are labelled by the experts.

    This is so if the run's own labels are soft, since soft labels alone raise the accuracy of random images. A network with batch
    statistics cannot label a few images.
    """
    return options.label_kind != "indices" and not network.mixes_samples


def class_logits(classes: Tensor, num_classes: int) -> Tensor:
    """Return log-probabilities (n, num_classes) float32 for images of `classes` (n,).

    The image's class has probability `OWN_CLASS_PROBABILITY`, and the other classes share the rest evenly.
    """
    shared = (1 - OWN_CLASS_PROBABILITY) / max(1, num_classes - 1)
    probabilities = torch.full((len(classes), num_classes), shared, device=classes.device)
    return probabilities.scatter_(1, classes[:, None], OWN_CLASS_PROBABILITY).log()


def expert_logits(network: Network, experts: Iterable[Tensor], images: Tensor, initial: Tensor) -> Tensor:
    """Return each image's mean logits (n, num_classes) over the `experts` that classify the image correctly (DATM).

    `experts` are parameters (P,), `images` (n, C, H, W). The class of an image is that of its largest logit in `initial`. An image
    that no expert classifies correctly keeps its `initial` logits; the log says how many do.
    """
    classes = initial.argmax(dim=1)
    total, count = torch.zeros_like(initial), torch.zeros_like(initial[:, :1])
    for theta in experts:
        logits = predict(network, theta, images)
        correct = (logits.argmax(dim=1) == classes)[:, None]
        total += logits * correct
        count += correct
    never = count == 0
    if bool(never.any()):
        log.warning(
            "--label_init experts: no expert gets %d of the %d images right; their labels begin as with --label_init classes",
            int(never.sum()), len(images),
        )  # fmt: skip
    return torch.where(never, initial, total / count.clamp(min=1))


def teacher_labels(network: Network, theta: Tensor, images: Tensor, index: Tensor, batch: int) -> Tensor:
    """Return the probabilities (n, num_classes) that the network predicts under `theta` (P,): TESLA's labels in an iteration.

    If `index` (k,) is shorter than `images` (n, C, H, W), only the images at `index` are labelled, and all other rows are zero. A
    forward pass takes at most `batch` images.
    """
    # a permutation of the images is used up before an image repeats, so `unique`, for which the host waits, would leave out none
    used = index.sort().values if len(index) < len(images) else torch.arange(len(images), device=images.device)
    probabilities = predict(network, theta, images[used], batch).softmax(dim=1)
    return images.new_zeros(len(images), probabilities.shape[1]).index_copy_(0, used, probabilities)


def mean_teacher_labels(network: Network, experts: Iterable[Tensor], images: Tensor) -> Tensor:
    """Return the mean of the probabilities (n, num_classes) that `experts`, parameters (P,), predict for `images`."""
    mean = torch.zeros((), device=images.device)
    for number, theta in enumerate(experts, start=1):
        mean = mean + (predict(network, theta, images).softmax(dim=1) - mean) / number
    return mean


@torch.no_grad()
def predict(network: Network, theta: Tensor, images: Tensor, batch: int = _BATCH) -> Tensor:
    """Return the logits (n, num_classes) of `images` under `theta` (P,), in forward passes of at most `batch` images."""
    return torch.cat([network(theta, part) for part in images.split(batch)])


def experts_at(
    store: TrajectoryStore, epoch: int | None, device: torch.device, stop: StopRequest | None = None
) -> Iterable[Tensor]:
    """Yield the parameters (P,) of the experts after `epoch` epochs, or after their last one if None.

    Raises `Stopped` between two experts after a stop request.
    """
    for expert in tqdm(range(len(store)), desc="labels of experts", unit="expert", leave=False):
        raise_if_stopped(stop, "stopped while experts label images; the labels are not kept")
        yield store.read(expert, store.epochs(expert) if epoch is None else epoch).to(device)
