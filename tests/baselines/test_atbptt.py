"""Test where AT-BPTT puts its window, and when its stages end."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast import InputError
from mtt_fast.baselines.atbptt import AtBpttOptions, Stages, atbptt, window_of_stage
from mtt_fast.baselines.truncated_bptt import RealLoss, TruncatedBptt, Window
from mtt_fast.training.images import RealImages
from tests.baselines.network import NET, seeded

OPTIONS = AtBpttOptions(dataset="digits", window=4, d=2, totwindow=10)
LENGTHS = torch.tensor([1.0, 3.0, 2.5, 2.5, 2.0, 4.0, 1.0, 1.5, 1.2, 1.3])


def windows(stage: int, lengths: Tensor = LENGTHS, times: int = 4000) -> Counter[Window]:
    """Return how often each window is drawn in a stage."""
    generator = seeded()
    return Counter(window_of_stage(OPTIONS, stage, lambda *_: lengths, generator) for _ in range(times))


def test_the_first_window_begins_at_long_gradients_and_is_wide_where_their_length_changes() -> None:
    # The changes are 0, 2, .5, 0, .5, 2, 3, .5, .3 and .1, and their ranks:
    ranks = [0, 7, 4, 0, 4, 7, 9, 4, 3, 2]
    drawn, expected = windows(1), Counter[Window]()
    for start, (rank, share) in enumerate(zip(ranks, (LENGTHS.exp() / LENGTHS.exp().sum()).tolist(), strict=True)):
        steps = int(4 - 2 + 2 * 2 * rank / 10)
        expected[Window(min(start, 10 - steps), steps)] += 4000 * share
    assert drawn == windows(1)  # the generator alone decides
    assert set(drawn) == set(expected)
    for window, times in expected.items():
        assert drawn[window] == pytest.approx(times, abs=5 * times**0.5)


def test_the_second_window_is_wide_and_lies_anywhere() -> None:
    drawn = windows(2)
    assert drawn == windows(2)  # the generator alone decides
    assert set(drawn) == {Window(start, 6) for start in range(5)}
    assert min(drawn.values()) > 650


def test_the_third_window_is_narrow_and_lies_where_gradients_are_long_from_the_other_end() -> None:
    drawn, expected = windows(3), Counter[Window]()
    for position, share in enumerate((LENGTHS.exp() / LENGTHS.exp().sum()).tolist()):
        expected[Window(max(10 - 2 - position, 0), 2)] += 4000 * share
    assert drawn == windows(3)  # the generator alone decides
    assert set(drawn) == set(expected)
    for window, times in expected.items():
        assert drawn[window] == pytest.approx(times, abs=5 * times**0.5)


@pytest.mark.parametrize("stage", [1, 3])
def test_gradients_that_are_not_finite_are_left_to_the_loss(stage: int) -> None:
    lengths = torch.tensor([1.0, torch.nan, torch.inf, *[torch.nan] * 7])
    assert len(windows(stage, lengths, times=100)) > 3


@pytest.mark.parametrize(
    ("gains", "stages"),
    [
        ([0.3, 0.01, 0.01, 0.01], [1, 1, 1, 2]),  # 3 of 20 steps, and the third counts for the second stage as well
        ([0.3, 0.01, 0.01, 0.02, 0.01, 0.01, 0.01], [1, 1, 1, 1, 1, 1, 2]),  # one that gains begins the count again
        ([0.3, 0.0, 0.0, -0.1, 0.0, 0.0], [1, 1, 1, 2, 2, 3]),
        ([0.3, 0.0, 0.0, 0.0, 0.01, 0.0, 0.0, 0.0, 0.2], [1, 1, 1, 2, 2, 2, 2, 3, 3]),  # 0.01 is enough in the second
    ],
)
def test_a_stage_ends_after_epochs_without_gain(gains: list[float], stages: list[int]) -> None:
    state, accuracy, found = Stages(), 0.0, []
    for gain in gains:
        accuracy += gain + 1e-9
        state.end_epoch(accuracy, totwindow=20)
        found.append(int(state.stage))
    assert found == stages


def test_an_epoch_has_one_window_and_its_mean_accuracy_counts(
    real: RealImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = AtBpttOptions(dataset="digits", batch_real=500, window=2, d=1, totwindow=7)  # 1,437 images are 3 batches
    used: list[Window] = []
    right: list[float] = []
    update_set = TruncatedBptt.update_set

    def recorded(self: TruncatedBptt, iteration: int, window: Window) -> RealLoss:
        reached = update_set(self, iteration, window)
        used.append(window)
        inputs, labels = self.real_images(reached.draws).batch(slice(None))
        right.append(float((NET(reached.theta, inputs).argmax(1) == labels).double().mean()))
        return reached

    monkeypatch.setattr(TruncatedBptt, "update_set", recorded)
    learned = atbptt(options, real, NET)
    losses = [learned.step(iteration) for iteration in range(9)]
    assert len(set(losses)) == 9
    assert used[0:3] == 3 * used[:1]
    assert used[3:6] == 3 * used[3:4]
    assert used[6:9] == 3 * used[6:7]
    assert len({window.before for window in used}) > 1
    assert float(learned.carried["accuracy"]) == pytest.approx(sum(right[6:]) / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": 4}, "^--d 4: expected less than --window 4$"),
        ({"totwindow": 5}, "^--totwindow 5: expected at least --window 4 \\+ --d 2$"),
    ],
)
def test_windows_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(OPTIONS, **change).check()
    replace(OPTIONS, d=3, totwindow=7).check()  # both bounds are allowed
