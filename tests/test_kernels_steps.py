"""sgd_step and adjoint_step: both twins against torch.optim and autograd, in memory that is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast.kernels import adjoint_step, native, sgd_step
from mtt_fast.testing import assert_close

SIZES = [0, 1, 15, 1003, (1 << 14) + 1, 400_003]  # less than a vector, around a block, several threads' shares
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(params=["native", "reference"], autouse=True)
def either_twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "native" and not native.available:
        pytest.skip("the native kernels are not installed or turned off")
    monkeypatch.setattr(native, "available", request.param == "native")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(size: int, count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(size, dtype=torch.float64).to(dtype) for _ in range(count)]


def unwritten(like: Tensor) -> Tensor:
    return torch.full_like(like, float("nan"))


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_three_sgd_steps_are_those_of_torch_optim(
    size: int, dtype: torch.dtype, momentum: float, weight_decay: float
) -> None:
    gradients = draw(size, 3, dtype)
    (start,) = draw(size, 1, dtype)
    rate = torch.tensor(0.3, dtype=dtype)
    theirs = start.double().clone().requires_grad_()
    optimiser = torch.optim.SGD([theirs], rate.item(), momentum=momentum, weight_decay=weight_decay)
    theta, velocity = start, None
    for gradient in gradients:
        theirs.grad = gradient.double()
        optimiser.step()
        out = unwritten(start)
        velocity_out = unwritten(start) if momentum else None
        factors = {"momentum": momentum, "weight_decay": weight_decay}
        assert sgd_step(theta, gradient, rate, out, velocity, velocity_out, **factors) is out
        theta, velocity = out, velocity_out
        moved, expected = theta.double() - start.double(), theirs.detach() - start.double()
        assert_close("displacement", moved, expected, 1e-6 if dtype == torch.float32 else 1e-13)
        if velocity is not None:
            buffer = optimiser.state[theirs]["momentum_buffer"]
            assert_close("velocity", velocity, buffer, 1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("with_incoming", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_an_adjoint_step_is_an_sgd_step_transposed(
    size: int, dtype: torch.dtype, weight_decay: float, with_incoming: bool
) -> None:
    """The loss is Σ θ⁴ / 12, whose Hessian is the diagonal of θ²."""
    theta, adjoint, incoming = draw(size, 3, dtype)
    rate = torch.tensor(0.3, dtype=dtype)
    leaf = theta.double().clone().requires_grad_()
    stepped = leaf - rate.double() * (leaf**3 / 3 + weight_decay * leaf)
    (expected,) = torch.autograd.grad(stepped, leaf, adjoint.double())
    out = unwritten(theta)
    given = incoming if with_incoming else None
    result = adjoint_step(adjoint, theta.square() * adjoint, adjoint, -rate, out, given, weight_decay)
    assert result is out
    if with_incoming:
        expected = expected + incoming.double()
    assert_close("adjoint", out, expected, 1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_may_take_the_place_of_arguments(dtype: torch.dtype) -> None:
    theta, gradient, velocity, incoming = draw(1003, 4, dtype)
    rate = torch.tensor(0.3, dtype=dtype)
    out, velocity_out = unwritten(theta), unwritten(theta)
    sgd_step(theta, gradient, rate, out, velocity, velocity_out, 0.9, 0.05)
    expected = adjoint_step(out, gradient, out, rate, unwritten(theta), incoming, 0.05)

    version = theta._version
    sgd_step(theta, gradient, rate, theta, velocity, velocity, 0.9, 0.05)
    assert torch.equal(theta, out)
    assert torch.equal(velocity, velocity_out)
    assert theta._version > version  # autograd is told
    adjoint_step(theta, gradient, theta, rate, theta, incoming, 0.05)
    assert torch.equal(theta, expected)


def test_results_do_not_depend_on_threads(threads: Callable[[int], None]) -> None:
    a, b, c, d = draw(400_003, 4, torch.float32)
    rate, results = torch.tensor(0.3), []
    for count in (1, 2, 3):
        threads(count)
        velocity = unwritten(a)
        theta = sgd_step(a, b, rate, unwritten(a), c, velocity, 0.9, 0.05)
        results.append((theta, velocity, adjoint_step(a, b, c, rate, unwritten(a), d, 0.05)))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


V, RATE = torch.zeros(6), torch.zeros(())


@pytest.mark.parametrize(
    ("step", "arguments", "reason"),
    [
        (sgd_step, (V[:5], V, RATE, V), "expected gradient of shape"),
        (sgd_step, (V.view(2, 3), V, RATE, V), "expected theta of shape"),
        (sgd_step, (V, V, torch.zeros(1), V), "expected rate of shape"),
        (sgd_step, (V, V, RATE.double(), V), "expected rate of floating dtype torch.float32, found torch.float64"),
        (sgd_step, (V.long(), V.long(), RATE, V), "expected theta of floating dtype"),
        (sgd_step, (torch.zeros(12)[::2], V, RATE, V), "expected theta contiguous"),
        (sgd_step, (V, V, RATE, torch.zeros(12)[::2]), "expected out contiguous"),
        (sgd_step, (V, V, RATE, V, V.double()), "expected velocity of floating dtype"),
        (sgd_step, (V, V.clone().requires_grad_(), RATE, V), "found gradient that requires grad"),
        (sgd_step, (V, V, RATE.to("meta"), V), "expected one device"),
        (adjoint_step, (V, V, V[:5], RATE, V), "expected direction of shape"),
        (adjoint_step, (V, V, V, RATE, V, V[:5]), "expected incoming of shape"),
        (adjoint_step, (V, V, V, V, V), "expected scale of shape"),
        (adjoint_step, (V, torch.zeros(12)[::2], V, RATE, V), "expected hessian_v contiguous"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_refuses(step: Callable[..., Tensor], arguments: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{step.__name__}: .*{reason}"):
        step(*arguments)
