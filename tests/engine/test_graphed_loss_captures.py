"""Test that GraphedMatchingLoss is planned and captured once for each kind of arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast import (
    GraphedMatchingLoss,
    Plan,
    SiameseAugment,
    matching_loss,
    path_loss,
    plan,
    unroll,
)
from mtt_fast.engine.iteration import Iteration, planned_iteration
from mtt_fast.networks.protocol import Network
from mtt_fast.runtime.cuda_graphs import CapturedCall, GraphedFunction
from mtt_fast.testing import assert_close
from tests.engine.graphed_loss_cases import BATCHES, MODULE, NET, gradients, tensors


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Return the plans of iterations, in the order in which these are made."""
    plans: list[Plan] = []

    def watched(plan: Plan, *arguments: Any, **options: Any) -> Iteration:
        plans.append(plan)
        return planned_iteration(plan, *arguments, **options)

    monkeypatch.setattr("mtt_fast.engine.graphed_loss.planned_iteration", watched)
    return plans


def test_the_plan_has_room_for_the_gradient_of_any_loss_of_the_path(plans: list[Plan]) -> None:
    for of_path in (path_loss, partial(path_loss, match_step="nearest")):
        GraphedMatchingLoss(NET, label_kind="logits", path_loss=of_path)(**tensors(), batches=BATCHES)
    assert [plan.work.path_gradient for plan in plans] == [False, True]
    assert plans[0] == plan(
        NET, images=(6, 2, 8, 8), steps=3, batch=4, memory_budget=None, dtype=torch.float64, label_kind="logits"
    )


@pytest.fixture
def captured_calls(monkeypatch: pytest.MonkeyPatch) -> list[CapturedCall]:
    """Capture iterations on a CPU as on a GPU; return the captured_calls."""
    captured_calls: list[CapturedCall] = []

    def capture(run: Callable[[], tuple[Tensor, ...]]) -> CapturedCall:
        outputs = run()

        def replay() -> None:
            for output, value in zip(outputs, run(), strict=True):
                output.copy_(value)

        captured_calls.append(CapturedCall(replay, outputs))
        return captured_calls[-1]

    monkeypatch.setattr("mtt_fast.engine.iteration.graphed", lambda function, *_: GraphedFunction(function, capture))
    return captured_calls


def check_equals_unroll(
    graphed: GraphedMatchingLoss, net: Network, given: dict[str, Any], batches: list[Tensor], tolerance: float
) -> None:
    """Check the loss and the gradients of augmented steps, with labels that are logits."""
    random = torch.Generator().manual_seed(4)
    loss = graphed(**given, batches=batches, generator=random)
    path = unroll(
        net, given["start"], given["images"], given["labels"], given["lr"], batches, SiameseAugment(),
        label_kind="logits", generator=random.manual_seed(4),
    )  # fmt: skip
    expected = gradients(matching_loss(path[-1], given["start"], given["target"]), given)
    for mine, theirs in zip(gradients(loss, given), expected, strict=True):
        assert_close("loss or gradient", mine.cpu(), theirs.cpu(), tolerance)


def test_each_kind_of_arguments_is_captured_once(captured_calls: list[CapturedCall]) -> None:
    graphed, given = GraphedMatchingLoss(NET, augment=SiameseAugment(), label_kind="logits"), tensors()
    for batches in (BATCHES, BATCHES, BATCHES[::-1], BATCHES):
        check_equals_unroll(graphed, NET, given, batches, 1e-12)
        with torch.no_grad():
            given["images"] += 0.1
    assert len(captured_calls) == 2


def test_only_so_many_are_captured(captured_calls: list[CapturedCall], caplog: pytest.LogCaptureFixture) -> None:
    graphed, given = GraphedMatchingLoss(NET, label_kind="logits"), tensors()
    for steps in range(1, 11):
        index = torch.arange(2).expand(steps, -1)
        assert graphed(**{**given, "lr": 0.1}, batches=index).isfinite()
        graphed(**{**given, "lr": 0.1}, batches=index)
    assert len(captured_calls) == 8
    assert caplog.text.count("not captured") == 2  # once for each other kind of arguments
    assert graphed.problem == "more than 8 sets of shapes"


def test_on_a_cpu_there_are_not_too_many(caplog: pytest.LogCaptureFixture) -> None:
    graphed, given = GraphedMatchingLoss(NET, label_kind="logits"), tensors()
    for steps in range(1, 11):
        graphed(**{**given, "lr": 0.1}, batches=torch.arange(2).expand(steps, -1))
    assert graphed.problem is None
    assert "not captured" not in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("net", [NET, MODULE], ids=["ConvNet", "module"])
def test_a_gpu_replays_what_unroll_computes(net: Network) -> None:
    graphed = GraphedMatchingLoss(net, augment=SiameseAugment(), label_kind="logits")
    given = tensors(net, device="cuda")
    for _ in range(3):
        check_equals_unroll(graphed, net, given, BATCHES, 1e-10)
        with torch.no_grad():
            given["images"] += 0.1
    assert graphed.problem is None


@pytest.mark.gpu
def test_a_later_call_on_a_gpu_waits_for_nothing() -> None:
    graphed, given = GraphedMatchingLoss(NET, augment=SiameseAugment(), label_kind="logits"), tensors(device="cuda")
    given["lr"] = 0.1
    graphed(**given, batches=BATCHES)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphed(**given, batches=BATCHES).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_each_dtype_has_a_plan_of_its_own_that_counts_the_velocities(plans: list[Plan]) -> None:
    graphed, dtypes = GraphedMatchingLoss(NET, momentum=0.9, label_kind="logits"), (torch.float32, torch.float64)
    for dtype in dtypes:
        graphed(**tensors(dtype=dtype), batches=BATCHES)
    assert [(plan.work.dtype, plan.work.moments) for plan in plans] == [(dtype, 1) for dtype in dtypes]
