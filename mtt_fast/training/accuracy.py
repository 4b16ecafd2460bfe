"""Measure the accuracy of a network."""

from __future__ import annotations

import torch
from torch import Tensor

from mtt_fast.networks.protocol import Network
from mtt_fast.training.images import Images

_BATCH = 500


def accuracy(network: Network, theta: Tensor, images: Images) -> float:
    """Return the accuracy of `network` on `images`, in [0, 1]."""
    return int(count_correct(network, theta, images)) / len(images)


def count_correct(network: Network, theta: Tensor, images: Images) -> Tensor:
    """Return the number of `images` that `network` classifies correctly, () int64 on the device, without a synchronisation."""
    return classified_correctly(network, theta, images).sum()


@torch.no_grad()
def classified_correctly(network: Network, theta: Tensor, images: Images) -> Tensor:
    """Return whether `network` classifies each of `images` correctly, (n,) bool on the device, without a synchronisation.

    An image with logits that are not finite counts as wrong.
    """
    correct = []
    for start in range(0, len(images), _BATCH):
        inputs, targets = images.batch(slice(start, start + _BATCH))
        logits = network(theta, inputs)
        correct.append((logits.argmax(dim=1) == targets) & logits.isfinite().all(dim=1))
    return torch.cat(correct)
