"""Test windows of a training with momentum: the velocity that a path starts with and leaves, against autograd written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast import InputError, unroll
from mtt_fast.testing import assert_close
from tests.engine.optimizer_cases import (
    BATCHES,
    NET,
    ORACLE,
    Case,
    assert_same_gradients,
    make,
    sgd_written_out,
)


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
