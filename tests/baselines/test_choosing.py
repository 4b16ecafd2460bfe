"""Test the methods that choose real images against naive loops: herding, forgetting, k-means."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from sklearn.cluster import KMeans

from mtt_fast.baselines.forgetting import correct_after_each_epoch, forgetting_events, most_forgotten
from mtt_fast.baselines.herding import herd
from mtt_fast.baselines.kmeans import cluster_centres, nearest_rows
from mtt_fast.baselines.options import TrainedNetworkOptions
from mtt_fast.baselines.random_images import RandomOptions, random_images
from mtt_fast.baselines.trained import trained_parameters, with_labels
from mtt_fast.errors import InputError
from mtt_fast.experts.missing import train_missing_experts
from mtt_fast.testing import module_function, reference_convnet
from mtt_fast.training.experts import ExpertTraining
from mtt_fast.training.images import RealImages
from tests.baselines.network import F64, NET, SHAPE, seeded


@pytest.mark.parametrize("count", [1, 4, 12])
def test_herding_is_greedy(count: int) -> None:
    points = torch.randn(12, 5, dtype=F64)
    chosen: list[int] = []
    for _ in range(count):
        distances = {
            index: float((points.mean(0) - points[[*chosen, index]].mean(0)).norm())
            for index in range(len(points))
            if index not in chosen
        }
        chosen.append(min(distances, key=lambda index: distances[index]))
    assert herd(points, count).tolist() == chosen


def test_forgetting_events_are_counted_one_by_one() -> None:
    right = torch.rand(9, 40) < 0.5
    expected = [
        sum(bool(right[epoch, image]) and not right[epoch + 1, image] for epoch in range(8)) for image in range(40)
    ]
    events = forgetting_events(right)
    assert events.tolist() == expected
    members = torch.arange(1, 40, 3)
    chosen = most_forgotten(members, events, 5, seeded())
    assert len(set(chosen.tolist())) == 5
    assert set(chosen.tolist()) <= set(members.tolist())
    left = [expected[index] for index in members.tolist() if index not in chosen]
    assert min(expected[index] for index in chosen.tolist()) >= max(left)


def test_among_equals_chance_decides() -> None:
    members, events = torch.arange(50), torch.zeros(50, dtype=torch.long)
    picks = [tuple(most_forgotten(members, events, 3, seeded(seed)).tolist()) for seed in range(5)]
    assert len(set(picks)) > 1
    assert picks[0] == tuple(most_forgotten(members, events, 3, seeded(0)).tolist())


def test_what_an_expert_gets_right_after_each_epoch(real: RealImages, tmp_path: Path) -> None:
    store = train_missing_experts(tmp_path / "experts", 1, real, NET, ExpertTraining(3, 0.1), seed=0)
    right = correct_after_each_epoch(store, real.train, NET)
    function = module_function(reference_convnet(*SHAPE))
    seen, labels = real.train.batch(slice(None))
    for epoch in range(3):
        logits = function(store.read(0, epoch + 1), seen)
        top = logits.topk(2, dim=1).values
        sure = top[:, 0] - top[:, 1] > 1e-4  # where rounding cannot decide
        assert int(sure.sum()) > 1000
        assert torch.equal(right[epoch][sure], (logits.argmax(1) == labels)[sure])


def test_the_trained_network_is_the_first_expert_after_its_last_epoch(real: RealImages, tmp_path: Path) -> None:
    options = TrainedNetworkOptions(dataset="digits", buffer_path=str(tmp_path), train_epochs=2, expert_lr=0.1, seed=3)
    store = train_missing_experts(tmp_path / "again", 1, real, NET, options.expert(), seed=3)
    assert torch.equal(trained_parameters(options, real, NET), store.read(0, 2))


def test_an_expert_of_another_network_is_not_asked(real: RealImages, tmp_path: Path) -> None:
    options = TrainedNetworkOptions(dataset="digits", buffer_path=str(tmp_path), train_epochs=1)
    trained_parameters(options, real, NET)
    with pytest.raises(InputError, match=r"expert_0000\.safetensors: "):
        trained_parameters(options, real, dataclasses.replace(NET, width=3))


@pytest.mark.parametrize("epoch", [None, 1])
def test_labels_are_the_mean_predictions_of_the_experts(real: RealImages, tmp_path: Path, epoch: int | None) -> None:
    options = RandomOptions(
        dataset="digits", ipc=4, buffer_path=str(tmp_path), train_epochs=2, labels="experts", label_epoch=epoch
    )
    store = train_missing_experts(tmp_path / "digits" / "ConvNet", 3, real, NET, ExpertTraining(2, 0.1), seed=0)
    images, function = random_images(options, real, NET), module_function(reference_convnet(*SHAPE))
    labelled = with_labels(options, real, NET, images)
    assert torch.equal(labelled.pixels, images.pixels)
    predictions = [function(store.read(expert, epoch or 2), images.pixels).softmax(1) for expert in range(3)]
    torch.testing.assert_close(labelled.labels, torch.stack(predictions).mean(0), rtol=1e-4, atol=1e-5)
    assert (labelled.labels.argmax(1) != images.labels).any()


def test_an_epoch_that_an_expert_does_not_have_is_refused(real: RealImages, tmp_path: Path) -> None:
    options = RandomOptions(
        dataset="digits", buffer_path=str(tmp_path), train_epochs=2, labels="experts", label_epoch=3
    )
    with pytest.raises(InputError, match=r"^--label_epoch 3: expected at most 2, the epochs of .*expert_0000\.safeten"):
        with_labels(options, real, NET, random_images(options, real, NET))


def test_every_expert_has_to_be_of_the_network(real: RealImages, tmp_path: Path) -> None:
    options = RandomOptions(dataset="digits", buffer_path=str(tmp_path), train_epochs=1, labels="experts")
    images = random_images(options, real, NET)
    with_labels(options, real, NET, images)
    other = dataclasses.replace(NET, width=3)
    train_missing_experts(tmp_path / "other", 2, real, other, options.expert(), seed=0)
    name = "expert_0001.safetensors"
    shutil.copy(tmp_path / "other" / name, tmp_path / "digits" / "ConvNet" / name)
    with pytest.raises(InputError, match=name):
        with_labels(options, real, NET, images)


def test_clusters_are_a_fixed_point_and_find_what_is_apart() -> None:
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (middles.repeat_interleave(20, dim=0) + torch.randn(60, 2)).float()
    centres = cluster_centres(points, 3, seeded())
    assert torch.equal(centres, cluster_centres(points, 3, seeded()))
    nearest = torch.stack([(points - centre).norm(dim=1) for centre in centres]).argmin(0)
    for cluster, centre in enumerate(centres):
        torch.testing.assert_close(points[nearest == cluster].mean(0), centre, rtol=1e-5, atol=1e-5)
    assert sorted(torch.bincount(nearest).tolist()) == [20, 20, 20]


def test_clusters_are_the_best_of_several_starts() -> None:
    """Compare the squared distances to the centres with their mean over single starts."""
    points = torch.randn(150, 3)

    def distances(centres: torch.Tensor) -> float:
        return float(torch.cdist(points, centres).min(dim=1).values.square().sum())

    single = [KMeans(15, n_init=1, random_state=start).fit(points.double().numpy()) for start in range(20)]
    mean = sum(fitted.inertia_ for fitted in single) / len(single)
    least = min(fitted.inertia_ for fitted in single)
    for seed in range(4):
        assert distances(cluster_centres(points, 15, seeded(seed))) < least + 0.4 * (mean - least)


def test_the_nearest_image_to_each_centre_is_taken_once() -> None:
    points, centres = torch.randn(30, 4), torch.randn(6, 4)
    chosen: list[int] = []
    for centre in centres:
        left = [index for index in range(30) if index not in chosen]
        chosen.append(min(left, key=lambda index: float((points[index] - centre).norm())))
    assert nearest_rows(points, centres).tolist() == chosen
    assert nearest_rows(points[:3], points[:1].repeat(3, 1)).sort().values.tolist() == [0, 1, 2]
