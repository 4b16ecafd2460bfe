"""Choose by k-means the real images nearest to the centres of each class's clusters, or take the centres themselves.

The images nearest to the centres in the embedding of a trained network are "Kmeans-emb" of DC-BENCH (Cui et al., NeurIPS
2022); the centres of clusters of pixels are a baseline of Dataset Distillation (Wang et al., 2018).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from mtt_fast.baselines.options import TrainedNetworkOptions
from mtt_fast.baselines.trained import chosen_by_embedding
from mtt_fast.commands.option_fields import Group
from mtt_fast.errors import InputError
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.training.images import Images, RealImages
from mtt_fast.training.subsets import class_members

_RESTARTS = 10


@dataclass(frozen=True)
class KmeansOptions(TrainedNetworkOptions):
    """Cluster each class and take one image per cluster."""

    pick: Annotated[Literal["nearest", "centres"], Group.SET] = "nearest"
    """image of each cluster. nearest: the real image nearest to the centre of its embeddings; centres: the centre of its pixels"""

    @property
    def reason_without_network(self) -> str:
        """See `TrainedNetworkOptions.reason_without_network`."""
        return "with --pick centres, which uses no trained network" if self.pick == "centres" else ""


def kmeans(options: KmeansOptions, real: RealImages, network: Trainable) -> Images:
    """Return one image for each of --ipc clusters of each class."""
    generator = generator_for(options.seed, "kmeans")
    if options.pick == "centres":
        return _centres(real, options.ipc, generator)

    def choose(embeddings: Tensor) -> Tensor:
        return nearest_rows(embeddings, cluster_centres(embeddings, options.ipc, generator))

    return chosen_by_embedding(options, real, network, choose)


def _centres(real: RealImages, ipc: int, generator: torch.Generator) -> Images:
    """Return the centres of `ipc` clusters of each class's pixels."""
    train, members, centres = real.train, class_members(real, ipc), []
    for indices in tqdm(members, desc="cluster", unit="class", leave=False):
        pixels, _ = train.batch(indices.to(train.labels.device))
        class_centres = cluster_centres(pixels.flatten(1).cpu(), ipc, generator)
        centres.append(class_centres.view(ipc, *real.data.image_shape))
    labels = torch.arange(len(members), device=train.labels.device).repeat_interleave(ipc)
    return Images(torch.cat(centres).to(labels.device), labels)


def cluster_centres(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return the centres (count, F), float32, of the best of ten k-means clusterings of `points` (n, F)."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise InputError(
            f"kmeans: expected scikit-learn, which does the clustering, found none ({error}); pip install 'mtt-fast[demo]'"
        ) from error
    seed = int(torch.randint(2**31, (), generator=generator))
    fitted = KMeans(count, n_init=_RESTARTS, random_state=seed).fit(points.double().numpy())
    return torch.from_numpy(fitted.cluster_centers_).float()


def nearest_rows(points: Tensor, centres: Tensor) -> Tensor:
    """Return for each of `centres` (k, F) the index (k,) of the nearest of `points` (n, F) that no centre has yet."""
    distances = torch.cdist(centres.double(), points.double())
    chosen: list[int] = []
    for centre_distances in distances:
        centre_distances[chosen] = torch.inf
        chosen.append(int(centre_distances.argmin()))
    return torch.tensor(chosen)
