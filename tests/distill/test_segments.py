"""Test which expert, epoch and random numbers a segment has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.segments import Segment, read_segment


class Experts:
    """A store of 5 experts, of each of which a row says the expert and the epoch."""

    folder = Path("buffers")

    def __len__(self) -> int:
        return 5

    def read(self, expert: int, row: float) -> Tensor:
        return torch.tensor([float(expert), float(row)])


def segments(seed: int, count: int = 40, **more: Any) -> list[Segment]:
    options = DistillOptions(ipc=1, syn_steps=2, batch_syn=3, max_start_epoch=20, expert_epochs=3, seed=seed, **more)
    run: Any = SimpleNamespace(options=options, experts=Experts())
    return [read_segment(run, lambda tensors: lambda: tensors, torch.zeros(10, 1, 8, 8), each) for each in range(count)]


def test_a_segment_is_that_piece_of_its_expert() -> None:
    for segment in segments(0):
        start, target, *_ = segment.tensors()
        assert start.tolist() == [segment.expert, segment.epoch]
        assert target.tolist() == [segment.expert, segment.epoch + 3]


def test_all_experts_take_turns_in_an_order_that_changes() -> None:
    experts = [segment.expert for segment in segments(0)]
    rounds = [tuple(experts[begin : begin + 5]) for begin in range(0, 40, 5)]
    assert all(sorted(each) == list(range(5)) for each in rounds)
    assert len(set(rounds)) > 1


def test_all_segments_of_an_iteration_start_in_its_range_of_epochs() -> None:
    growing = segments(0, num_trajectories=2, current_max_start_epoch=1, expansion_end_epoch=100)
    first, later = growing[:12], growing[12:]  # 19 · 5 // 100 = 0 in iteration 5, and 19 · 6 // 100 = 1
    assert {segment.epoch for segment in first} == {0}
    assert {segment.epoch for segment in later} > {0}


@pytest.mark.parametrize("continuous", [False, True])
def test_the_seed_decides_experts_epochs_images_and_augmentation(continuous: bool) -> None:
    def drawn(seed: int) -> list[list[Any]]:
        of_segments = segments(seed, continuous_start=continuous)
        draws = zip(*(segment.tensors()[2:] for segment in of_segments), strict=True)
        return [
            [segment.expert for segment in of_segments],
            [segment.epoch for segment in of_segments],
            *([each.tolist() for each in part] for part in draws),
        ]

    one, again, other = drawn(1), drawn(1), drawn(2)
    assert one == again
    assert len(one) == 4  # experts, epochs, indices of images, parameters of the augmentation
    assert all(mine != theirs for mine, theirs in zip(one, other, strict=True))
    for part in one[1:]:  # and the segments differ from each other
        assert any(each != part[0] for each in part)
