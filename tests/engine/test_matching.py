from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual

from mtt_fast import InputError, matching_loss, path_loss
from mtt_fast.testing import assert_close


def test_value_and_gradient() -> None:
    start, target = torch.randn(1001, dtype=torch.float64), torch.randn(1001, dtype=torch.float64)
    end = torch.randn(1001, dtype=torch.float64, requires_grad=True)
    loss = matching_loss(end, start, target)
    assert_close("loss", loss, ((end - target) ** 2).sum() / ((start - target) ** 2).sum(), 1e-12)
    assert torch.autograd.gradcheck(lambda value: matching_loss(value, start, target), (end,))


def test_float32_vectors_are_summed_in_float64() -> None:
    end, start, target = torch.randn(3, 100_000, generator=torch.Generator().manual_seed(0)).unbind()
    loss = matching_loss(end.requires_grad_(), start, target)
    reached, moved = ((vector.detach().double() - target.double()).square().sum() for vector in (end, start))
    assert float(loss.detach()) == pytest.approx(float(reached / moved), rel=1e-12)
    loss.backward()
    assert end.grad is not None
    assert end.grad.dtype == torch.float32


def test_vectors_need_not_be_contiguous() -> None:
    path, experts = (torch.randn(7, 3, dtype=torch.float64).T for _ in range(2))
    end, start, target = path.requires_grad_()[-1], experts[0], experts[1]
    expected = (end - target).square().sum() / (start - target).square().sum()
    assert_close("loss", matching_loss(end, start, target), expected, 1e-12)


def test_errors_name_the_cause() -> None:
    still = torch.ones(3)
    with pytest.raises(InputError, match="did not move"):
        matching_loss(torch.zeros(3), still, still)
    with pytest.raises(InputError, match="three vectors of one shape"):
        matching_loss(torch.zeros(4), still, torch.zeros(3))
    with pytest.raises(
        InputError, match=r"start: expected a tensor, found list; .*parameters_to_vector makes one of a list"
    ):
        matching_loss(torch.zeros(3), cast(Any, [still]), still)  # as an expert of the public code
    with pytest.raises(
        InputError, match=r"end: expected a flat vector \(P,\), found shape \(1, 3\); path\[-1\] is the last"
    ):
        matching_loss(torch.zeros(1, 3), still, still)
    with pytest.raises(
        InputError, match=r"expected end float32, float64 or bfloat16, .*, found torch.float16, torch.float32"
    ):
        matching_loss(torch.zeros(3).half(), still, 2 * still)
    with pytest.raises(InputError, match=r"and start and target floating, found .* torch.int64; use .float\(\)"):
        matching_loss(torch.zeros(3), still, still.long() * 2)


@pytest.mark.parametrize(
    "transform", [torch.func.grad, torch.func.jacrev, torch.func.vmap], ids=lambda each: each.__name__
)
def test_transforms_of_torch_func_are_refused(transform: Any) -> None:
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "matching_loss": lambda end: matching_loss(end, torch.ones(3), torch.zeros(3)),
        "path_loss": lambda end: path_loss(end.expand(2, 3), torch.ones(3), torch.zeros(3)),
    }
    for name, loss in losses.items():
        with pytest.raises(InputError, match=rf"^{name}: found a transform of torch\.func"):
            transform(loss)(torch.eye(3)[0 if transform is not torch.func.vmap else slice(None)])


def test_forward_mode_is_refused() -> None:
    with dual_level(), pytest.raises(InputError, match="expected a backward pass, found forward-mode differentiation"):
        matching_loss(make_dual(torch.rand(3), torch.ones(3)), torch.ones(3), torch.zeros(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match_step": "Nearest"}, "path_loss match_step: expected last or nearest, found 'Nearest'"),
        ({"loss_ratio": 1.5}, "path_loss loss_ratio: expected at least 0 and less than 1, found 1.5"),
        ({"depth_ratio": None}, "path_loss depth_ratio: expected at least 0 and less than 1, found None"),
        ({"depth_ratio": -0.5}, "path_loss depth_ratio: expected at least 0 and less than 1, found -0.5"),
    ],
)
def test_other_options_of_the_loss_of_a_path_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        path_loss(torch.randn(3, 4), torch.zeros(4), torch.ones(4), **options)
