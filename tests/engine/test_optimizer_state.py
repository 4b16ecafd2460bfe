"""Test what holds for the state of any optimizer, SGD's velocity and Adam's moments: against torch.optim, and autograd written out."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast import SiameseAugment, unroll
from mtt_fast.testing import assert_close, reference_convnet
from tests.engine.optimizer_cases import (
    BATCHES,
    ENGINES,
    NET,
    SHAPE,
    STEPS,
    Case,
    assert_same_gradients,
    engines,
    loss_of_all_rows,
    make,
    stateful,
    unrolled,
)

TORCHS: dict[str, tuple[Any, list[str], float, float]] = {
    "momentum": (partial(torch.optim.SGD, momentum=0.9), ["momentum_buffer"], 1, 1e-12),
    "Adam": (torch.optim.Adam, ["exp_avg", "exp_avg_sq"], 0.1, 1e-9),
}
"""torch's optimizers, the names of their states, the factor of the learning rate, and the tolerance."""
each_optimizer = pytest.mark.parametrize("name", TORCHS)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@each_optimizer
def test_values_are_those_of_torchs_optimizer(name: str, weight_decay: float) -> None:
    """Start from a new optimizer, with torch's own defaults, and from one that has made steps."""
    (make_torchs, names, factor, tolerance), start, _, images, labels, lr = TORCHS[name], *make(per_step=False)
    mine = stateful("a new Adam" if name == "Adam" else name, weight_decay)
    module = reference_convnet(*SHAPE).double()
    torch.nn.utils.vector_to_parameters(start.clone(), module.parameters())
    parameters = list(module.parameters())
    optimizer = make_torchs(parameters, factor * float(lr), weight_decay=weight_decay)
    theta, state = start, None
    for window in range(2):
        path, state = unroll(
            NET, theta, images, labels, factor * lr, BATCHES, velocity=state, return_velocity=True, **mine.later(window * STEPS)
        )  # fmt: skip
        theta = path[-1]
        for index in BATCHES:
            optimizer.zero_grad()
            F.cross_entropy(module(images[index]), labels[index]).backward()
            optimizer.step()
        assert_close("parameters", theta, torch.nn.utils.parameters_to_vector(parameters), tolerance)
        for each, vector in zip(names, torch.atleast_2d(state), strict=True):
            buffers = [optimizer.state[parameter][each].flatten() for parameter in parameters]
            assert_close(each, vector, torch.cat(buffers), tolerance)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@each_optimizer
def test_equals_whole_graph_autograd(name: str, weight_decay: float, engine: str) -> None:
    """Compare the gradients of a loss of all rows and of the state to everything that it starts from."""
    optimizer = stateful(name, weight_decay)
    net, way = engines(engine, **optimizer.options)
    case = optimizer.case(soft=engine != "micro-batches", per_step=weight_decay > 0)
    loss = loss_of_all_rows(case)

    assert_same_gradients(
        case,
        lambda leaves: loss(*unrolled(leaves, net, **optimizer.options, **way)),
        lambda leaves: loss(*optimizer.written_out(leaves)),
    )


@pytest.mark.parametrize("gradient", ["exact", "truncated"])
@pytest.mark.parametrize("looks_at", ["the state", "a row"])
@each_optimizer
def test_a_loss_of_the_state_or_of_a_row_alone(name: str, looks_at: str, gradient: Any) -> None:
    optimizer = stateful(name, weight_decay=0.1)

    def loss(path: Tensor, state: Tensor) -> Tensor:
        return state.pow(3).sum() if looks_at == "the state" else path[3].pow(3).sum()

    assert_same_gradients(
        optimizer.case(),
        lambda leaves: loss(*unrolled(leaves, gradient=gradient, **optimizer.options)),
        lambda leaves: loss(*optimizer.written_out(leaves, truncated=gradient == "truncated")),
    )


@pytest.mark.parametrize("row", [0, 2, 3])
@each_optimizer
def test_a_loss_of_an_early_row_of_a_path_on_the_host(name: str, row: int) -> None:
    """Check that the state after that row is the one that is read, and not the last one, which is in the buffer."""
    optimizer = stateful(name, weight_decay=0.1)
    net, way = engines("the path on the host", **optimizer.options)

    def mine(leaves: Case) -> Tensor:
        theta, state, images, labels, lr = leaves
        path: Tensor = unroll(net, theta, images, labels, lr, BATCHES, velocity=state, **optimizer.options, **way)
        return path[row].sum()

    def theirs(leaves: Case) -> Tensor:
        return optimizer.written_out(leaves)[0][row].sum() + 0 * sum(leaf.sum() for leaf in leaves)

    assert_same_gradients(optimizer.case(), mine, theirs)


@each_optimizer
def test_augmented(name: str) -> None:
    optimizer, augment = stateful(name, weight_decay=0.0), SiameseAugment()
    case, generator = optimizer.case(per_step=False), torch.Generator().manual_seed(5)
    draws = [augment.draw(case.images[index], generator) for index in BATCHES]

    def loss(path: Tensor, state: Tensor) -> Tensor:
        return path[-1].square().sum() + state.square().sum()

    fixed: dict[str, Any] = {"augment": augment, "draws": draws}
    assert_same_gradients(
        case,
        lambda leaves: loss(*unrolled(leaves, **fixed, **optimizer.options)),
        lambda leaves: loss(*optimizer.written_out(leaves, **fixed)),
    )


@pytest.mark.parametrize("engine", [name for name in ENGINES if "budget" not in name and "saved" not in name])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["momentum", "Adam", "a new Adam"])
def test_windows_one_after_the_other_are_one_training_bit_for_bit(name: str, dtype: torch.dtype, engine: str) -> None:
    optimizer = stateful(name, weight_decay=5e-4)
    net, way = engines(engine, **optimizer.options)
    start, state, images, labels, lr = optimizer.case(dtype=dtype)
    first_state = None if name == "a new Adam" else state
    common: dict[str, Any] = {"return_velocity": True, **way}
    path, after = unroll(net, start, images, labels, lr, BATCHES, velocity=first_state, **optimizer.options, **common)
    for cut in range(1, STEPS):
        with torch.no_grad():
            first, between = unroll(
                net, start, images, labels, lr[:cut], BATCHES[:cut], velocity=first_state, **optimizer.options, **common
            )
        second, end = unroll(
            net, first[-1], images, labels, lr[cut:], BATCHES[cut:], velocity=between, **optimizer.later(cut), **common
        )
        assert torch.equal(torch.cat([first, second[1:]]), path)
        assert torch.equal(end, after)


@each_optimizer
def test_gradients_flow_from_window_to_window(name: str) -> None:
    """Send gradients through the row and the state that join two windows, as if the windows were one."""
    optimizer = stateful(name, weight_decay=0.0)

    def joined(leaves: Case) -> Tensor:
        theta, state, images, labels, lr = leaves
        first, between = unroll(
            NET, theta, images, labels, lr[:2], BATCHES[:2], velocity=state, return_velocity=True, **optimizer.options
        )
        second: Tensor = unroll(
            NET, first[-1], images, labels, lr[2:], BATCHES[2:], velocity=between, **optimizer.later(2)
        )
        return second[-1].sum()

    assert_same_gradients(optimizer.case(), joined, lambda leaves: optimizer.written_out(leaves)[0][-1].sum())
