"""Check how an iteration ends: with an update, without a finite gradient, above the threshold, or with a rate that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtt_fast.distill.evaluation import evaluate_sets
from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.segments import Segment
from mtt_fast.distill.updates import apply_gradients, check_converges, update
from mtt_fast.errors import Diverged
from mtt_fast.parametrisations.parametrisation import Parametrisation, learned_values
from mtt_fast.runtime.interrupts import StopRequest
from mtt_fast.storage.checkpoint import State
from mtt_fast.storage.metrics import MetricsLog


def state_of(lr: torch.Tensor) -> State:
    images = torch.zeros(2, 1, 4, 4)
    return State(0, 1, images, torch.arange(2), lr, torch.zeros_like(images), torch.zeros_like(lr))


def apply_all(folder: Path, finite: Sequence[bool], above: int | None = None) -> State:
    """Return the state after iterations of which each has finite gradients or none; number `above` is above the threshold."""
    state = state_of(torch.tensor(0.5))
    options = DistillOptions(threshold=1.5)
    run: Any = SimpleNamespace(options=options, metrics=MetricsLog(folder, 0), folder=folder)
    try:
        for number, is_finite in enumerate(finite):
            gradients = [torch.ones_like(state.images), torch.zeros(())] if is_finite else None
            kind, values = apply_gradients(run.options, state, [], 2.0 if number == above else 1.0, gradients)
            run.metrics.write(kind, state.iteration, **values)
            run.metrics.write("gradient", state.iteration, cosine=1.0)  # of other kinds are records of no iteration
            check_converges(run, state)
    finally:
        run.metrics.close()
    return state


@pytest.mark.parametrize("before", [[], [True], [False, True]])
def test_a_run_is_given_up_after_25_iterations_in_a_row_without_a_finite_gradient(
    tmp_path: Path, before: list[bool]
) -> None:
    with pytest.raises(Diverged, match=r"25 iterations in a row diverged at a student's learning rate of 0\.5"):
        apply_all(tmp_path, before + [False] * 25)


@pytest.mark.parametrize("above", [None, 24])
def test_a_run_goes_on_where_an_iteration_in_between_has_a_finite_gradient(tmp_path: Path, above: int | None) -> None:
    state = apply_all(tmp_path, [False] * 24 + [True] + [False] * 24, above)
    assert (state.iteration, state.skipped, state.above_threshold) == (49, 48, int(above is not None))
    assert state.images.unique().tolist() == [0 if above else -DistillOptions().lr_img]


@pytest.mark.parametrize(("name", "words"), [("images", "images"), ("labels", "labels"), ("lr", "learning rates")])
def test_a_set_that_is_not_finite_is_not_evaluated(name: str, words: str) -> None:
    state, run = state_of(torch.tensor(0.5)), SimpleNamespace(folder="run")
    values = getattr(state, name).float()
    setattr(state, name, values.masked_fill(torch.arange(values.numel()).view_as(values) == 0, torch.inf))
    with pytest.raises(Diverged, match=f"^run: iteration 0: the {words} are no longer finite"):
        evaluate_sets(run, state, StopRequest())  # type: ignore[arg-type]


def test_each_iteration_is_recorded_and_counted_as_what_it_was(caplog: pytest.LogCaptureFixture) -> None:
    state, options = state_of(torch.tensor([0.5, 1.5])), DistillOptions(threshold=2.0, lr_img=1.0)
    gradients = [torch.ones_like(state.images), torch.zeros(2)]
    matched = {"start_epoch": 3, "expert": 7, "start_epoch_2": 4, "expert_2": 8}
    for loss, given, kind, values in (
        (2.0, gradients, "step", {"loss": 2.0, "lr": 1.0} | matched),
        (2.5, gradients, "above_threshold", {"loss": 2.5} | matched),
        (float("inf"), None, "skip", {"skipped": 1}),  # not above the threshold: the student diverged
        (float("nan"), None, "skip", {"skipped": 2}),
        (3.5, gradients, "above_threshold", {"loss": 3.5} | matched),
    ):
        segments = [Segment(7, 3, tuple), Segment(8, 4, tuple)]
        assert apply_gradients(options, state, segments, loss, given) == (kind, values)
    assert (state.iteration, state.skipped, state.above_threshold) == (5, 2, 2)
    assert state.images.unique().tolist() == [-1.0]  # of the one step
    above, skipped = caplog.messages  # each kind is told once
    assert above.startswith("iteration 2: the matching loss 2.5 is above --threshold 2 and no update is made")
    assert skipped.startswith("iteration 3: the student diverged (loss inf) and the step is skipped")


class Scaled(Parametrisation):
    """Images whose gradient of 1e20 gives their parameters an infinite one."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = torch.nn.Parameter(torch.zeros(2, 1, 4, 4))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return 1e30 * self.pixels[index]


def test_an_iteration_whose_gradient_is_not_finite_in_the_parameters_alone_is_skipped() -> None:
    state, module = state_of(torch.tensor(0.5)), Scaled()
    state.parameters = learned_values(module)
    state.parameters_velocity = {name: torch.zeros_like(each) for name, each in state.parameters.items()}
    gradients = [torch.full_like(state.images, 1e20), torch.ones(())]
    assert apply_gradients(DistillOptions(), state, [], 1.0, gradients, module) == ("skip", {"skipped": 1})
    assert not any(each.any() for each in (*state.parameters.values(), *state.parameters_velocity.values()))
    assert (float(state.lr), float(state.lr_velocity)) == (0.5, 0.0)


def test_a_rate_that_would_not_stay_positive_is_kept_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    state, images = state_of(torch.tensor([0.25, 0.5, 2.0])), torch.zeros(2, 1, 4, 4)
    state.iteration = 6
    for gradient, rates, velocity, kept in (
        ([0.0, 0.75, 0.5], [0.25, 0.5, 1.5], [0, 0, 0.5], 1),
        ([0.25, 0.0, 0.25], [0.25, 0.5, 1.0], [0, 0, 0.5], 2),  # the first would be 0
        ([0.125, 0.25, 0.25], [0.125, 0.25, 0.5], [0.125, 0.25, 0.5], 2),
    ):
        update(DistillOptions(lr_lr=1.0), state, images, torch.tensor(gradient))
        assert (state.lr.tolist(), state.lr_velocity.tolist(), state.lr_kept) == (rates, velocity, kept)
    (told,) = caplog.messages
    assert told.startswith(
        "iteration 6: the update would make the student's learning rate negative (-0.25); it is kept at 0.5. If"
    )
