from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from mtt_fast import InputError, matching_loss
from mtt_fast.testing import assert_close


def test_value_and_gradient() -> None:
    start, target = torch.randn(1001, dtype=torch.float64), torch.randn(1001, dtype=torch.float64)
    end = torch.randn(1001, dtype=torch.float64, requires_grad=True)
    loss = matching_loss(end, start, target)
    assert_close("loss", loss, ((end - target) ** 2).sum() / ((start - target) ** 2).sum(), 1e-12)
    assert torch.autograd.gradcheck(lambda value: matching_loss(value, start, target), (end,))


def test_float32_vectors_are_summed_in_float64() -> None:
    count = 3_000_000
    start, target = torch.zeros(count), torch.full((count,), 1e-3)
    end = torch.full((count,), 2e-3, requires_grad=True)
    loss = matching_loss(end, start, target)
    assert float(loss.detach()) == pytest.approx(1.0, abs=1e-12 + 2e-7)
    loss.backward()
    assert end.grad is not None
    assert end.grad.dtype == torch.float32


def test_rows_of_a_path_need_not_be_contiguous() -> None:
    path = torch.randn(7, 3, dtype=torch.float64).T.requires_grad_()
    start, target = torch.zeros(7, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
    assert_close("loss", matching_loss(path[-1], start, target), (path[-1] - target).square().sum() / 7, 1e-12)


def test_errors_name_the_cause() -> None:
    still = torch.ones(3)
    with pytest.raises(InputError, match="did not move"):
        matching_loss(torch.zeros(3), still, still)
    with pytest.raises(InputError, match="three vectors of one shape"):
        matching_loss(torch.zeros(4), still, torch.zeros(3))
    with pytest.raises(InputError, match=r"start: expected a flat vector .*parameters_to_vector makes one of a list"):
        matching_loss(torch.zeros(3), cast(Any, [still]), still)  # as an expert of the public code
    with pytest.raises(InputError, match=r"end: expected a flat vector \(P,\), found shape \(1, 3\)"):
        matching_loss(torch.zeros(1, 3), still, still)
