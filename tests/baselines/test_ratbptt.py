"""Test where RaT-BPTT puts its window."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mtt_fast import InputError
from mtt_fast.baselines.ratbptt import RatBpttOptions, random_window, ratbptt
from mtt_fast.baselines.truncated_bptt import Window
from mtt_fast.training.images import RealImages
from tests.baselines.network import NET


def test_the_window_changes_from_epoch_to_epoch_within_its_bounds(
    real: RealImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RatBpttOptions(minwindow=2, window=3, totwindow=7)
    assert {random_window(options, epoch) for epoch in range(50)} == {Window(2, 3), Window(3, 3), Window(4, 3)}
    assert random_window(options, 4) == random_window(options, 4)
    asked: list[int] = []

    def asked_for(options: RatBpttOptions, epoch: int) -> Window:
        asked.append(epoch)
        return Window(options.minwindow, options.window)

    monkeypatch.setattr("mtt_fast.baselines.ratbptt.random_window", asked_for)
    learned = ratbptt(replace(options, dataset="digits", batch_real=500), real, NET)  # 1,437 images are 3 batches
    for iteration in range(4):
        learned.step(iteration)
    assert asked == [0, 0, 0, 1]


def test_a_window_longer_than_the_training_is_refused() -> None:
    with pytest.raises(InputError, match="--totwindow 10: expected at least --minwindow 5 \\+ --window 6"):
        RatBpttOptions(dataset="digits", window=6, minwindow=5, totwindow=10).check()
    RatBpttOptions(dataset="digits", window=6, minwindow=5, totwindow=11).check()
