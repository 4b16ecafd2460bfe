"""Test students that take steps of Adam, against autograd written out."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast import Adam, FlatModule, GraphedMatchingLoss, InputError, matching_loss, plan, unroll
from mtt_fast.engine.students.generic import GenericStudent
from mtt_fast.testing import assert_close
from tests.engine.optimizer_cases import (
    ADAM,
    BATCHES,
    NET,
    Case,
    adam_written_out,
    assert_same_gradients,
    case_of_adam,
    engines,
    make,
)


def test_the_gradient_with_torchs_defaults() -> None:
    """Compare a new training with ε = 1e-8. No gradient is zero in this case, where autograd would give NaN."""
    case, adam = make(soft=True, per_step=False), Adam()
    case = case._replace(velocity=torch.zeros(2, len(case.start), dtype=torch.float64), lr=case.lr / 100)
    names = ("start", "images", "labels", "lr")

    def gradients(last: Tensor, leaves: Case) -> tuple[Tensor, ...]:
        loss = matching_loss(last, start=case.start, target=case.start + 0.01)
        return torch.autograd.grad(loss, [getattr(leaves, name) for name in names])

    ours, theirs = case.leaves(), case.leaves()
    theta, _, images, labels, lr = ours
    found = gradients(unroll(NET, theta, images, labels, lr, BATCHES, optimizer=adam)[-1], ours)
    # a mean and a square that are zero without a gradient, so that √0 is not differentiated
    expected = gradients(adam_written_out(theirs._replace(velocity=case.velocity), adam)[0][-1], theirs)
    for name, one, other in zip(names, found, expected, strict=True):
        assert_close(name, one, other, 1e-6)


def test_a_parameter_that_never_had_a_gradient() -> None:
    """Check that the gradients are finite, and equal to those of autograd with such parameters left out."""
    case, adam = make(per_step=False), Adam(eps=ADAM.eps)

    class Unused(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.unused = torch.nn.Linear(192, 4).weight, torch.nn.Parameter(torch.ones(3))

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) @ self.weight.T + 0 * self.unused.sum()

    net = FlatModule(Unused().double())
    start = net.init().double()

    def linear(theta: Tensor, images: Tensor) -> Tensor:
        return images.flatten(1) @ theta.view(4, 192).T

    def mine(leaves: Case) -> Tensor:
        path = unroll(net, leaves.start, leaves.images, leaves.labels, leaves.lr, BATCHES, optimizer=adam)
        return path[-1].square().sum() + 0 * leaves.velocity.sum()

    def theirs(leaves: Case) -> Tensor:
        used = leaves._replace(start=leaves.start[:-3], velocity=0 * leaves.velocity[:, :-3])
        path, _ = adam_written_out(used, adam, network=linear)
        return path[-1].square().sum() + leaves.start[-3:].square().sum()

    moments = torch.zeros(2, len(start), dtype=torch.float64)
    assert_same_gradients(case._replace(start=start, velocity=moments), mine, theirs)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.9, 0.0), (0.0, 0.99)])
def test_gradients_that_are_zero_in_some_steps_alone(betas: tuple[float, float]) -> None:
    """Compare with recorded steps where some units of ReLU are dead in all steps, or in some. √0 has the derivative zero."""
    sizes, (images, labels, lr) = (192, 6, 4), make(per_step=False)[2:]
    module = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(*sizes[:2]), torch.nn.ReLU(), torch.nn.Linear(*sizes[1:])
    )
    net = FlatModule(module.double())
    start = net.init(torch.Generator().manual_seed(0)).double()
    bias = slice(192 * 6, 192 * 6 + 6)
    start[bias] = torch.tensor([-50.0, -1.0, -0.5, 0.0, 0.5, -50.0])
    batches = [torch.tensor([n % 7]) for n in range(8)]
    case = Case(start, torch.zeros(2, len(start), dtype=torch.float64), images, labels, lr)
    adam = Adam(betas, ADAM.eps)

    def mine(leaves: Case) -> Tensor:
        return unroll(net, leaves.start, leaves.images, labels, leaves.lr, batches, optimizer=adam)

    def theirs(leaves: Case) -> Tensor:
        at_rest = leaves._replace(velocity=0 * leaves.velocity)
        return adam_written_out(at_rest, adam, network=net, batches=batches)[0]

    path, student = mine(case), GenericStudent(net)
    gradients = [student.gradient(path[n], images[index], labels[index]).gradient for n, index in enumerate(batches)]
    times = (torch.stack(gradients)[:, bias] == 0).sum(0)
    assert ((times > 0) & (times < len(batches))).any()
    assert (times == len(batches)).any()
    assert_close("path", path, theirs(case.leaves()), 1e-9)
    assert_same_gradients(
        case,
        lambda leaves: mine(leaves)[-1].square().sum() + 0 * leaves.velocity.sum(),
        lambda leaves: theirs(leaves)[-1].square().sum(),
    )


@pytest.mark.parametrize("engine", ["fused", "a module", "a budget", "micro-batches"])
def test_the_graphed_loss_takes_adam(engine: str) -> None:
    adam = Adam(ADAM.betas, ADAM.eps, 0.01)
    net, options = engines(engine, optimizer=adam)
    case, results = case_of_adam(soft=True), []
    target = case.start + 0.1
    graphed = GraphedMatchingLoss(net, optimizer=adam, **options)
    for way in ("graphed", "unroll"):
        start, _, images, labels, lr = case.leaves()
        if way == "graphed":
            loss = graphed(start, target, images, labels, lr, BATCHES)
        else:
            path = unroll(net, case.start, images, labels, lr, BATCHES, optimizer=adam, **options)
            loss = matching_loss(path[-1], start=case.start, target=target)
        results.append((loss, *torch.autograd.grad(loss, (images, labels, lr))))
    for name, one, other in zip(("loss", "images", "labels", "lr"), *results, strict=True):
        assert_close(name, one, other, 1e-12)


def test_a_callers_moments_may_be_overwritten_before_the_backward_pass() -> None:
    case = case_of_adam()
    gradients: list[Tensor] = []
    for overwrites in (False, True):
        start, moments, images, labels, lr = case.leaves()
        given = moments.detach().clone()
        path = unroll(NET, start, images, labels, lr, BATCHES, optimizer=Adam(steps=ADAM.steps), velocity=given)
        if overwrites:
            given.zero_()
        gradients += torch.autograd.grad(path[-1].sum(), images)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"betas": (0.9,)}, r"`betas`: expected two numbers in \[0, 1\), found \(0.9,\)"),
        ({"betas": (0.9, 1.0)}, r"`betas`: expected two numbers in \[0, 1\)"),
        ({"betas": 0.001}, r"`betas`: expected two numbers in \[0, 1\), found 0.001; the learning rate is `lr`"),
        ({"betas": None}, r"`betas`: expected two numbers in \[0, 1\), found None"),
        ({"betas": ("0.9", "0.99")}, r"`betas`: expected two numbers in \[0, 1\), found \('0.9'"),
        # which would get no gradient
        ({"betas": torch.tensor([0.9, 0.99])}, r"`betas`: expected two numbers in \[0, 1\), found tensor"),
        ({"betas": (torch.tensor(0.9), 0.99)}, r"`betas`: expected two numbers in \[0, 1\), found \(tensor"),
        ({"eps": torch.tensor(0.1)}, r"`eps`: expected a finite number above 0, found tensor\(0.1000\)"),
        ({"eps": "1e-8"}, "`eps`: expected a finite number above 0, found '1e-8'"),
        (
            {"weight_decay": torch.tensor(0.1)},
            "`weight_decay`: expected a number, found tensor",
        ),
        ({"weight_decay": None}, "`weight_decay`: expected a number, found None"),
        ({"eps": 0.0}, "`eps`: expected a finite number above 0, found 0.0"),
        ({"weight_decay": -1.0}, "`weight_decay`: expected a finite number of at least 0, found -1.0"),
        ({"steps": -1}, "`steps`: expected at least 0, found -1"),
        ({"steps": 2.5}, "`steps`: expected a whole number, found 2.5"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Adam(**arguments)


def test_a_list_of_betas_is_a_pair() -> None:
    assert Adam([0.8, 0.95]) == Adam((0.8, 0.95))  # type: ignore[arg-type]
    assert hash(Adam([0.8, 0.95])) == hash(Adam((0.8, 0.95)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": Adam}, r"or None for SGD, found the class mtt_fast.*Adam; the learning rate is `lr`"),
        (
            {"optimizer": None, "momentum": 0.9, "velocity": torch.zeros(2, NET.num_parameters).double()},
            r"found \(2, \d+\); SGD has one velocity \(P,\), Adam as `optimizer` two moments \(2, P\)",
        ),
        ({"optimizer": torch.optim.Adam}, r"`optimizer`: expected mtt_fast.Adam\(…\), or None for SGD, found"),
        ({"momentum": 0.9}, "`momentum` 0.9, `weight_decay` 0: expected 0 with an `optimizer`, since they are SGD's"),
        ({"weight_decay": 0.1}, "`momentum` 0, `weight_decay` 0.1: expected 0 with an `optimizer`"),
        ({"velocity": torch.zeros(2, NET.num_parameters).double()}, r"expected none with Adam\(steps=0\), found one"),
        ({"optimizer": Adam(steps=3)}, r"expected one with Adam\(steps=3\), found none"),
        (
            {"optimizer": Adam(steps=3), "velocity": torch.zeros(NET.num_parameters).double()},
            r"`velocity`: expected shape \(2, \d+\), found \(\d+,\)",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    start, _, images, labels, lr = make()
    with pytest.raises(InputError, match=message):
        unroll(NET, start, images, labels, lr, BATCHES, **{"optimizer": Adam(), **arguments})


def test_a_wrong_optimizer_is_refused_where_it_is_given() -> None:
    with pytest.raises(InputError, match=r"`optimizer`: expected Adam\(steps=0\).*found steps=3; use `unroll`"):
        GraphedMatchingLoss(NET, optimizer=Adam(steps=3))
    for callable_with_an_optimizer in (GraphedMatchingLoss, partial(plan, images=(2, 3, 8, 8), steps=1)):
        with pytest.raises(InputError, match=r"^`optimizer`: expected mtt_fast.Adam\(…\), or None for SGD, found"):
            callable_with_an_optimizer(NET, optimizer=torch.optim.Adam)  # type: ignore[arg-type]
