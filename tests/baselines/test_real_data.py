"""Test what the methods share: starting images, batches, and iterations that depend only on their number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast import InputError
from mtt_fast.baselines.catalogue import METHODS
from mtt_fast.baselines.method import LearnedSet
from mtt_fast.baselines.real_data import random_batch, starting_images
from mtt_fast.experts.missing import train_missing_experts
from mtt_fast.training.experts import ExpertTraining
from mtt_fast.training.images import Images, RealImages
from mtt_fast.training.subsets import class_members
from tests.baselines.network import NET, seeded


def test_starting_images_are_real_or_noise(real: RealImages) -> None:
    start, noise = (starting_images(real, 3, kind, 0) for kind in ("real", "noise"))
    assert start.labels.tolist() == noise.labels.tolist() == [label for label in range(10) for _ in range(3)]
    everything, labels = real.train.batch(slice(None))
    for image, label in zip(start.pixels, start.labels, strict=True):
        assert (everything[labels == label] == image).all(dim=(1, 2, 3)).any()
    assert abs(float(noise.pixels.mean())) < 0.1
    assert float(noise.pixels.std()) == pytest.approx(1, abs=0.1)
    with pytest.raises(InputError, match="`ipc` 5000: class 0 has only"):
        class_members(real, 5000)


def test_a_batch_has_every_image_once(real: RealImages) -> None:
    members = class_members(real, 1)[4]
    seen, labels = random_batch(real.train, members, 10**6, seeded())
    assert len(seen) == len(members)
    assert set(labels.tolist()) == {4}
    assert torch.equal(
        seen.flatten(1).sum(1).sort().values, real.train.batch(members)[0].flatten(1).sum(1).sort().values
    )


@pytest.mark.parametrize("name", ["dm", "dc", "dsa", "dd", "ld", "ratbptt", "atbptt"])
def test_an_iteration_depends_on_its_number_alone(name: str, real: RealImages) -> None:
    method = METHODS[name]
    learnings = [method.make(method.options(dataset="digits"), real, NET) for _ in range(2)]
    losses, sets = [], []
    for learning in learnings:
        assert isinstance(learning, LearnedSet)
        losses.append([learning.step(7), learning.step(8)])
        sets.append(torch.cat([learning.images.flatten(), learning.labels.flatten()]))
    assert losses[0] == losses[1]
    assert torch.equal(*sets)


@pytest.mark.parametrize("name", ["dm", "dc", "dsa", "dd", "ld", "ratbptt", "atbptt"])
def test_another_iteration_and_another_seed_draw_other_numbers(name: str, real: RealImages) -> None:
    """Begin with the same set each time, so that nothing but the iteration's own random numbers can make a difference."""
    method = METHODS[name]

    def learning(seed: int) -> LearnedSet:
        made = method.make(method.options(dataset="digits", seed=seed), real, NET)
        assert isinstance(made, LearnedSet)
        return made

    def tensors(made: LearnedSet) -> list[Tensor]:
        return [made.images, made.labels, *made.carried.values()]

    start = [tensor.clone() for tensor in tensors(learning(0))]

    def loss(seed: int, iteration: int) -> float:
        made = learning(seed)
        for tensor, first in zip(tensors(made), start, strict=True):
            tensor.copy_(first)
        return made.step(iteration)

    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3
    other = learning(1)
    assert not torch.equal(other.images, start[0])
    if "theta" in other.carried:
        assert not torch.equal(other.carried["theta"], start[2])


@pytest.mark.parametrize(("name", "options"), [("random", {}), ("forgetting", {}), ("kmeans", {"ipc": 10})])
def test_the_seed_decides_which_images_are_chosen(
    name: str, options: dict[str, Any], real: RealImages, tmp_path: Path
) -> None:
    if name != "random":
        train_missing_experts(tmp_path / "digits" / "ConvNet", 1, real, NET, ExpertTraining(2, 0.1), seed=0)
        options = options | {"buffer_path": str(tmp_path)}

    def chosen(seed: int) -> Tensor:
        method = METHODS[name]
        made = method.make(method.options(dataset="digits", seed=seed, **options), real, NET)
        assert isinstance(made, Images)
        return made.pixels

    assert torch.equal(chosen(1), chosen(1))
    assert not torch.equal(chosen(1), chosen(2))
