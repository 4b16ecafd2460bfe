"""Test learning rates for each parameter, (N, P): against recorded steps of SGD and of Adam."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast import Adam, ConvNet, GraphedMatchingLoss, InputError, matching_loss, plan, unroll
from mtt_fast.engine.students.live_bytes import CountLiveBytes
from mtt_fast.testing import assert_close
from tests.engine.optimizer_cases import (
    BATCHES,
    ENGINES,
    NET,
    STEPS,
    Case,
    assert_same_gradients,
    engines,
    loss_of_all_rows,
    make,
    sgd_written_out,
    stateful,
    unrolled,
)


def with_rates(case: Case) -> Case:
    """Return `case` with a rate for each step and parameter, of the same size; one of them is negative, and one zero."""
    scale = 2 * torch.rand(STEPS, len(case.start), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    scale[1, 2], scale[2, 1] = -0.5, 0
    return case._replace(lr=case.lr.reshape(-1, 1) * scale.to(case.lr))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "weight_decay"), [("SGD", 0.0), ("momentum", 0.05), ("Adam", 0.05)])
def test_equals_whole_graph_autograd(name: str, weight_decay: float, engine: str) -> None:
    """Compare the gradients of a loss of all rows and of the last state to everything that it starts from."""
    optimizer = stateful(name, weight_decay)
    net, way = engines(engine, lr_per_parameter=True, **optimizer.options)
    case = with_rates(optimizer.case(soft=name == "Adam" or engine != "micro-batches"))
    loss = loss_of_all_rows(case)

    assert_same_gradients(
        case,
        lambda leaves: loss(*unrolled(leaves, net, **optimizer.options, **way)),
        lambda leaves: loss(*optimizer.written_out(leaves)),
    )


@pytest.mark.parametrize("gradient", ["exact", "truncated"])
@pytest.mark.parametrize("row", [2, STEPS])
def test_plain_sgd_and_a_loss_of_one_row(gradient: Any, row: int) -> None:
    """Check that rates of steps after that row get a gradient of zero."""
    case, truncated = with_rates(make(soft=True)), gradient == "truncated"

    def mine(leaves: Case) -> Tensor:
        theta, _, images, labels, lr = leaves
        path: Tensor = unroll(NET, theta, images, labels, lr, BATCHES, weight_decay=0.1, gradient=gradient)
        return path[row].pow(3).sum() + 0 * leaves.velocity.sum()

    def theirs(leaves: Case) -> Tensor:
        at_rest = leaves._replace(velocity=0 * leaves.velocity)
        return sgd_written_out(at_rest, 0.0, 0.1, truncated=truncated)[0][row].pow(3).sum()

    assert_same_gradients(case, mine, theirs)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}, {"optimizer": Adam(eps=1e-3)}], ids=str)
def test_equal_rates_are_one_rate(options: dict[str, Any]) -> None:
    case, results = make(), []
    for per_parameter in (False, True):
        theta, _, images, labels, lr = case.leaves()
        rates = lr[:, None].expand(-1, len(theta)) if per_parameter else lr
        path = unroll(NET, theta, images, labels, rates, BATCHES, **options)
        gradients = torch.autograd.grad(path[-1].square().sum(), (theta, images, lr))
        results.append((path, *gradients))
    for name, one, other in zip(("path", "theta", "images", "lr"), *results, strict=True):
        assert_close(name, one, other, 1e-10)


def test_two_rates_of_two_parts_by_a_recorded_loss() -> None:
    """Learn two rates, as LoRS does, by `GraphedMatchingLoss`, which then also takes one rate."""
    case, part = make(soft=True), 100
    target, graphed = case.start + 0.1, GraphedMatchingLoss(NET)
    results = []
    for is_graphed in (True, False):
        start, _, images, labels, lr = case.leaves()
        first, second = lr[0], lr[1]
        rates = torch.cat([first.expand(part), second.expand(len(start) - part)]).expand(STEPS, -1)
        if is_graphed:
            loss = graphed(start, target, images, labels, rates, BATCHES)
        else:
            at_rest = Case(start, torch.zeros_like(start), images, labels, rates)
            loss = matching_loss(sgd_written_out(at_rest, 0.0, 0.0)[0][-1], start=case.start, target=target)
        results.append((loss, *torch.autograd.grad(loss, (images, labels, lr))))
    for name, one, other in zip(("loss", "images", "labels", "lr"), *results, strict=True):
        assert_close(name, one, other, 1e-9)
    one_rate = graphed(case.start, target, case.images, case.labels, case.lr, BATCHES)
    last = unroll(NET, case.start, case.images, case.labels, case.lr, BATCHES)[-1]
    assert_close("loss", one_rate, matching_loss(last, start=case.start, target=target), 1e-12)


@pytest.mark.native
def test_the_plan_counts_the_gradients_of_the_rates() -> None:
    """Count the vectors of a network that is nearly all parameters: enough, and not more than the allowance for losses."""
    net, steps = ConvNet(image_size=8, width=128, depth=2), 8
    images, labels = torch.zeros(2, 3, 8, 8, requires_grad=True), torch.arange(2)
    chosen = plan(net, images=images, steps=steps, lr_per_parameter=True, memory_budget=None)
    start, batches = net.init(torch.Generator().manual_seed(0)), labels.expand(steps, 2)
    lr = torch.full((steps, len(start)), 0.01, requires_grad=True)
    with CountLiveBytes() as counted:
        path = unroll(net, start, images, labels, lr, batches, plan=chosen)
        matching_loss(path[-1], start, start + 1).backward()
    parts = chosen.parts
    allowed = sum(parts[name] for name in ("path", "vectors", "learning rate gradients", "images", "step"))
    assert allowed - 8 * start.nbytes <= counted.peak <= allowed


@pytest.mark.parametrize("shape", [(1, NET.num_parameters), (NET.num_parameters,), (STEPS, 1), (STEPS, 1, 1), (0,)])
def test_rates_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    start, _, images, labels, _ = make()
    expected = rf"`lr`: expected a scalar, .* \({STEPS},\), or one .* \({STEPS}, {NET.num_parameters}\), found shape"
    with pytest.raises(InputError, match=expected):
        unroll(NET, start, images, labels, torch.ones(shape).double(), BATCHES)


def test_rates_of_the_parameters_alone_are_refused_with_the_way_to_give_them() -> None:
    start, _, images, labels, _ = make()
    with pytest.raises(
        InputError, match=rf"`lr.expand\({STEPS}, -1\)` makes rates for each parameter those of each step"
    ):
        unroll(NET, start, images, labels, torch.ones_like(start), BATCHES)
