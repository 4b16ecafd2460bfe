"""Choose real images whose mean embedding is close to their class's: herding (Welling, ICML 2009).

They are chosen one after the other as in iCaRL (Rebuffi et al., CVPR 2017), in the embedding of a network trained on all
images, as in the coreset baseline of dataset condensation (Zhao et al., ICLR 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mtt_fast.baselines.options import TrainedNetworkOptions
from mtt_fast.baselines.trained import chosen_by_embedding
from mtt_fast.networks.protocol import Trainable
from mtt_fast.training.images import Images, RealImages


@dataclass(frozen=True)
class HerdingOptions(TrainedNetworkOptions):
    """Choose real images whose mean embedding, in a network trained on all of them (the first expert), is near that of their class."""


def herding(options: HerdingOptions, real: RealImages, network: Trainable) -> Images:
    """Return --ipc images of each class, in the order of their choice, which is not random."""
    return chosen_by_embedding(options, real, network, partial(herd, count=options.ipc))


def herd(embeddings: Tensor, count: int) -> Tensor:
    """Return the indices (count,) of rows of `embeddings` (n, F), chosen greedily.

    Each is the remaining row that brings the mean of the chosen rows nearest to the mean of all.
    """
    points = embeddings.double()
    mean, total = points.mean(dim=0), torch.zeros_like(points[0])
    remaining = torch.ones(len(points), dtype=torch.bool)
    chosen = []
    for size in range(1, count + 1):
        distances = (mean - (total + points) / size).square().sum(dim=1)
        best = int(distances.where(remaining, torch.inf).argmin())
        chosen.append(best)
        remaining[best] = False
        total += points[best]
    return torch.tensor(chosen)
