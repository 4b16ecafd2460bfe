"""Check that the oracles refuse what they would compare or compute in another sense."""

from __future__ import annotations

import pytest
import torch

from mtt_fast.testing import assert_close, module_function, reference_convnet, relative_error, truncated, whole_graph


def test_tensors_of_other_shapes_are_not_compared_by_broadcasting() -> None:
    ones = torch.ones(3)
    for other in (torch.ones(()), torch.ones(2, 3), torch.ones(4)):
        with pytest.raises(ValueError, match=r"expected tensors of one shape, found \(3,\) and"):
            relative_error(ones, other)
    assert relative_error(ones[None], ones[:, None]) == 0
    assert relative_error(torch.ones(1), torch.ones(())) == 0


def test_imaginary_parts_are_compared() -> None:
    with pytest.raises(AssertionError, match="waves: relative error"):
        assert_close("waves", torch.tensor([1 + 1j]), torch.tensor([1 - 1j]), 1e-3)


def test_another_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="expected instance or none, found batch"):
        reference_convnet(1, 2, 8, 4, 1, norm="batch")


@pytest.mark.parametrize("oracle", [whole_graph, truncated], ids=["whole graph", "truncated"])
def test_one_rate_may_be_a_vector_of_one(oracle: object) -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).double()
    start = torch.nn.utils.parameters_to_vector(module.parameters()).detach()
    images, labels = torch.randn(4, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    batches = [torch.tensor([0, 1]), torch.tensor([2, 3])]

    def gradient_of(lr: list[float] | float) -> torch.Tensor:
        rates = torch.tensor(lr, dtype=torch.float64)
        assert callable(oracle)
        found: torch.Tensor = oracle(module_function(module), start, start + 1, images, labels, rates, batches).lr
        return found

    assert torch.equal(gradient_of([0.1]), gradient_of(0.1)[None])
    assert_close("one rate", gradient_of(0.1), gradient_of([0.1, 0.1]).sum(), 1e-12)


def test_a_layer_in_two_places_and_a_weight_of_two_layers_can_be_called_again() -> None:
    twice, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    other.weight = twice.weight
    module = torch.nn.Sequential(twice, torch.nn.ReLU(), twice, other).double()
    function, images = module_function(module), torch.randn(3, 4, dtype=torch.float64)
    for factor in (1, 2, 3):
        theta = factor * torch.linspace(-1, 1, 24, dtype=torch.float64)
        weight, bias, other_bias = theta[:16].view(4, 4), theta[16:20], theta[20:]
        expected = ((images @ weight.T + bias).relu() @ weight.T + bias) @ weight.T + other_bias
        assert_close("output", function(theta, images), expected, 1e-12)
    assert all(isinstance(value, torch.nn.Parameter) for value in (twice.weight, twice.bias, other.bias))
