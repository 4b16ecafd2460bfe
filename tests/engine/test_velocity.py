"""Test windows of a training with momentum: the velocity that a path starts with and leaves, against autograd written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast import InputError, SiameseAugment, unroll
from mtt_fast.testing import assert_close, reference_convnet
from tests.engine.optimizer_cases import (
    BATCHES,
    ENGINES,
    NET,
    ORACLE,
    SHAPE,
    STEPS,
    Case,
    assert_same_gradients,
    engines,
    make,
    sgd_written_out,
)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_equals_whole_graph_autograd(engine: str, weight_decay: float) -> None:
    """Compare the gradients of a loss of all rows and of the velocity to everything that it starts from."""
    net, options = engines(engine, momentum=0.9)
    case = make(soft=engine != "micro-batches", per_step=weight_decay > 0)
    to_path, to_velocity = torch.randn(STEPS + 1, len(case.start)).double(), torch.randn(len(case.start)).double()

    def loss(path: Tensor, velocity: Tensor) -> Tensor:
        return (to_path * path).sum() + (to_velocity * velocity).sum()

    def mine(leaves: Case) -> Tensor:
        theta, velocity, images, labels, lr = leaves
        return loss(
            *unroll(
                net, theta, images, labels, lr, BATCHES, momentum=0.9, weight_decay=weight_decay, velocity=velocity,
                return_velocity=True, **options,
            )
        )  # fmt: skip

    assert_same_gradients(case, mine, lambda leaves: loss(*sgd_written_out(leaves, 0.9, weight_decay)))


def test_dampening_of_torch_is_a_smaller_rate_after_the_first_step() -> None:
    """Check the two calls in docs/migrating.md: the path of torch.optim.SGD, and its gradients by autograd."""
    case, share = make(per_step=False), 0.3
    options: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.05}

    def mine(leaves: Case) -> Tensor:
        theta, _, images, labels, lr = leaves
        path, velocity = unroll(NET, theta, images, labels, lr, BATCHES[:1], return_velocity=True, **options)
        velocity = velocity / share
        path = unroll(NET, path[-1], images, labels, share * lr, BATCHES[1:], velocity=velocity, **options)
        end: Tensor = path[-1]
        return end

    def written(leaves: Case) -> Tensor:
        theta, velocity, images, labels, lr = leaves
        for n, index in enumerate(BATCHES):
            loss = F.cross_entropy(ORACLE(theta, images[index]), labels[index])
            gradient = torch.autograd.grad(loss, theta, create_graph=True)[0] + 0.05 * theta
            velocity = 0.9 * velocity + share * gradient if n else gradient + 0 * velocity
            theta = theta - lr * velocity
        return theta.square().sum()

    parameter = torch.nn.Parameter(case.start.clone())
    optimizer = torch.optim.SGD([parameter], float(case.lr), dampening=1 - share, **options)
    for index in BATCHES:
        (parameter.grad,) = torch.autograd.grad(
            F.cross_entropy(ORACLE(parameter, case.images[index]), case.labels[index]), parameter
        )
        optimizer.step()
    assert_close("path", mine(case), parameter.detach(), 1e-12)

    # where a training starts there is no velocity
    assert_same_gradients(case, lambda leaves: mine(leaves).square().sum() + 0 * leaves.velocity.sum(), written)


@pytest.mark.parametrize("gradient", ["exact", "truncated"])
@pytest.mark.parametrize("looks_at", ["velocity", "a row"])
def test_a_loss_of_the_velocity_or_of_a_row_alone(gradient: Any, looks_at: str) -> None:
    def loss(path: Tensor, velocity: Tensor) -> Tensor:
        return velocity.pow(3).sum() if looks_at == "velocity" else path[3].pow(3).sum()

    def mine(leaves: Case) -> Tensor:
        theta, velocity, images, labels, lr = leaves
        options: dict[str, Any] = {"momentum": 0.8, "weight_decay": 0.1, "gradient": gradient}
        return loss(
            *unroll(NET, theta, images, labels, lr, BATCHES, velocity=velocity, return_velocity=True, **options)
        )

    truncated = gradient == "truncated"
    assert_same_gradients(make(), mine, lambda leaves: loss(*sgd_written_out(leaves, 0.8, 0.1, truncated=truncated)))


@pytest.mark.parametrize("row", [2, 3])
def test_a_loss_of_an_early_row_of_a_path_on_the_host(row: int) -> None:
    net, options = engines("the path on the host", momentum=0.8)

    def mine(leaves: Case) -> Tensor:
        theta, velocity, images, labels, lr = leaves
        path: Tensor = unroll(net, theta, images, labels, lr, BATCHES, momentum=0.8, velocity=velocity, **options)
        return path[row].sum()

    assert_same_gradients(make(), mine, lambda leaves: sgd_written_out(leaves, 0.8, 0.0)[0][row].sum())


def test_augmented() -> None:
    augment, case = SiameseAugment(), make(per_step=False)
    generator = torch.Generator().manual_seed(5)
    draws = [augment.draw(case.images[index], generator) for index in BATCHES]

    def mine(leaves: Case) -> Tensor:
        theta, velocity, images, labels, lr = leaves
        path, after = unroll(
            NET, theta, images, labels, lr, BATCHES, augment, momentum=0.9, velocity=velocity, return_velocity=True,
            draws=draws,
        )  # fmt: skip
        return path[-1].square().sum() + after.square().sum()

    def theirs(leaves: Case) -> Tensor:
        path, after = sgd_written_out(leaves, 0.9, 0.0, augment=augment, draws=draws)
        return path[-1].square().sum() + after.square().sum()

    assert_same_gradients(case, mine, theirs)


def test_numerical_derivative_to_the_starting_velocity() -> None:
    case = make(per_step=False)
    start, velocity, images, labels, lr = case
    direction, weights = torch.randn_like(velocity), torch.randn(2, len(start), dtype=torch.float64)

    def value(velocity: Tensor) -> Tensor:
        path, after = unroll(
            NET, start, images, labels, lr, BATCHES, momentum=0.7, velocity=velocity, return_velocity=True
        )
        return (weights[0] * path[-1]).sum() + (weights[1] * after).sum()

    leaf = velocity.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    ends = [value(velocity + step * direction) for step in (1e-6, -1e-6)]
    assert_close("velocity", gradient @ direction, (ends[0] - ends[1]) / 2e-6, 1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_values_are_those_of_torchs_optimizer(weight_decay: float) -> None:
    """Start from a new optimizer, with no velocity, and from one that has made steps."""
    start, _, images, labels, lr = make(per_step=False)
    module = reference_convnet(*SHAPE).double()
    torch.nn.utils.vector_to_parameters(start.clone(), module.parameters())
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, float(lr), momentum=0.9, weight_decay=weight_decay)
    theta, velocity = start, None
    for _ in range(2):
        path, velocity = unroll(
            NET, theta, images, labels, lr, BATCHES, momentum=0.9, weight_decay=weight_decay, velocity=velocity,
            return_velocity=True,
        )  # fmt: skip
        theta = path[-1]
        for index in BATCHES:
            optimizer.zero_grad()
            F.cross_entropy(module(images[index]), labels[index]).backward()
            optimizer.step()
        assert_close("parameters", theta, torch.nn.utils.parameters_to_vector(parameters), 1e-12)
        buffers = [optimizer.state[parameter]["momentum_buffer"].flatten() for parameter in parameters]
        assert_close("velocity", velocity, torch.cat(buffers), 1e-12)


@pytest.mark.parametrize("engine", [name for name in ENGINES if "budget" not in name and "saved" not in name])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_windows_one_after_the_other_are_one_training_bit_for_bit(engine: str, dtype: torch.dtype) -> None:
    net, options = engines(engine, momentum=0.9)
    start, velocity, images, labels, lr = make(dtype=dtype)
    common: dict[str, Any] = {"momentum": 0.9, "weight_decay": 5e-4, "return_velocity": True, **options}
    path, after = unroll(net, start, images, labels, lr, BATCHES, velocity=velocity, **common)
    for cut in range(1, STEPS):
        with torch.no_grad():
            first, between = unroll(net, start, images, labels, lr[:cut], BATCHES[:cut], velocity=velocity, **common)
        second, end = unroll(net, first[-1], images, labels, lr[cut:], BATCHES[cut:], velocity=between, **common)
        assert torch.equal(torch.cat([first, second[1:]]), path)
        assert torch.equal(end, after)


def test_gradients_flow_from_window_to_window() -> None:
    """Send gradients through the row and the velocity that join two windows, as if the windows were one."""

    def joined(leaves: Case) -> Tensor:
        theta, velocity, images, labels, lr = leaves
        first, between = unroll(
            NET, theta, images, labels, lr[:2], BATCHES[:2], momentum=0.9, velocity=velocity, return_velocity=True
        )
        return unroll(NET, first[-1], images, labels, lr[2:], BATCHES[2:], momentum=0.9, velocity=between)[-1].sum()

    assert_same_gradients(make(), joined, lambda leaves: sgd_written_out(leaves, 0.9, 0.0)[0][-1].sum())


def test_without_a_velocity_it_starts_with_none() -> None:
    start, _, images, labels, lr = make()
    given = unroll(NET, start, images, labels, lr, BATCHES, momentum=0.9, velocity=torch.zeros_like(start))
    assert torch.equal(given, unroll(NET, start, images, labels, lr, BATCHES, momentum=0.9))


def test_without_momentum_the_velocity_is_the_last_update() -> None:
    """Check that a caller need not ask whether there is momentum: the velocity at the start then has no effect."""
    start, velocity, images, labels, lr = make().leaves()
    path, after = unroll(
        NET, start, images, labels, lr, BATCHES, weight_decay=0.1, velocity=velocity, return_velocity=True
    )
    expected, last = sgd_written_out(Case(start, velocity, images, labels, lr), 0.0, 0.1)
    assert_close("path", path, expected, 1e-12)
    assert_close("velocity", after, last, 1e-12)
    (gradient,) = torch.autograd.grad(path[-1].sum() + after.sum(), velocity)
    assert not gradient.any()


def test_under_no_grad_nothing_is_recorded() -> None:
    start, velocity, images, labels, lr = make().leaves()
    with torch.no_grad():
        path, after = unroll(
            NET, start, images, labels, lr, BATCHES, momentum=0.9, velocity=velocity, return_velocity=True
        )
    assert not path.requires_grad
    assert not after.requires_grad


def test_what_is_returned_is_the_callers_own() -> None:
    """Check that the result may be written into before the backward pass, and holds no other velocity."""
    start, velocity, images, labels, lr = make().leaves()
    path, after = unroll(NET, start, images, labels, lr, BATCHES, momentum=0.9, velocity=velocity, return_velocity=True)
    assert after.untyped_storage().nbytes() == after.nbytes
    with torch.no_grad():
        after.zero_()
    path[-1].sum().backward()
    assert images.grad is not None


@pytest.mark.parametrize(
    ("velocity", "message"),
    [
        (
            torch.zeros(3, dtype=torch.float64),
            r"`velocity`: expected shape \(\d+,\), found \(3,\)",
        ),
        (
            torch.zeros(NET.num_parameters),
            "`velocity`: expected dtype torch.float64 of theta, found torch.float32",
        ),
        (
            torch.zeros(NET.num_parameters, dtype=torch.float64, device="meta"),
            "expected device cpu of theta, found meta",
        ),
    ],
)
def test_a_velocity_that_does_not_fit_is_refused(velocity: Tensor, message: str) -> None:
    start, _, images, labels, lr = make()
    with pytest.raises(InputError, match=message):
        unroll(NET, start, images, labels, lr, BATCHES, momentum=0.9, velocity=velocity)


def test_a_velocity_may_have_any_strides() -> None:
    case = make()
    spread = torch.stack([case.velocity, case.velocity], dim=1)[:, 0]
    assert not spread.is_contiguous()
    paths = [
        unroll(NET, case.start, case.images, case.labels, case.lr, BATCHES, momentum=0.9, velocity=velocity)
        for velocity in (case.velocity, spread)
    ]
    assert torch.equal(*paths)


def test_without_momentum_the_gradient_to_a_velocity_is_zero() -> None:
    case = make().leaves()
    path = unroll(NET, case.start, case.images, case.labels, case.lr, BATCHES, velocity=case.velocity)
    path[-1].sum().backward()
    assert case.velocity.grad is not None
    assert not case.velocity.grad.any()
