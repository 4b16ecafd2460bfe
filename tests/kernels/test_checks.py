"""Check that operations refuse tensors of which a compiled kernel would see only the memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from mtt_fast import kernels
from mtt_fast.kernels import Affine, PartialSums, WeightPlace

pytestmark = pytest.mark.usefixtures("either_backend")

V, LR, INDEX = torch.ones(4), torch.tensor(0.1), torch.tensor([0, 1])
PLANES, AFFINE = torch.ones(2, 3, 4, 4), Affine(torch.ones(3), torch.zeros(3))

# of each family one operation, and of each way to check an argument
OPERATIONS: dict[str, tuple[Callable[[Tensor], object], Tensor]] = {
    "norm": (lambda y: kernels.norm_relu_pool(y, AFFINE, 1e-5), PLANES),
    "bias": (lambda beta: kernels.bias_relu_pool(PLANES, beta), V[:3]),
    "conv": (lambda weight: kernels.conv3x3(PLANES, weight, 1), torch.ones(2, 3, 3, 3)),
    "block": (lambda x: kernels.image_patches(x, 1), PLANES),
    "classifier": (lambda p: kernels.linear_cross_entropy(p, torch.ones(2, 48), V[:2], INDEX, "indices"), PLANES),
    "warp": (lambda parameters: kernels.colour_warp_mask(PLANES, parameters), torch.zeros(2, 13)),
    "distance": (lambda a: kernels.squared_distance(a, V), V),
    "step": (lambda lr: kernels.sgd_step(V, V, lr, torch.empty(4)), LR),
    "sums": (lambda piece: kernels.sgd_step(V, PartialSums((piece,)), LR, torch.empty(4)), V[None]),
    "rows": (lambda rows: kernels.index_add(torch.zeros(2, 4), INDEX, rows), torch.ones(2, 4)),
}
INDICES: dict[str, Callable[[Tensor], object]] = {
    "classifier": lambda labels: kernels.linear_cross_entropy(PLANES, torch.ones(2, 48), V[:2], labels, "indices"),
    "rows": lambda index: kernels.index_add(torch.zeros(2, 4), index, torch.ones(2, 4)),
}

each_operation = pytest.mark.parametrize("name", OPERATIONS)


@each_operation
def test_a_tangent_of_forward_mode_is_refused(name: str) -> None:
    operation, tensor = OPERATIONS[name]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensor, torch.ones_like(tensor))
        with pytest.raises(ValueError, match=r"is not differentiable, found .* with a tangent of forward mode"):
            operation(dual)
        operation(dual.detach())


@each_operation
def test_a_transform_of_torch_func_is_refused(name: str) -> None:
    operation, tensor = OPERATIONS[name]
    with pytest.raises(ValueError, match=r"found .* of a transform of torch.func"):
        torch.func.vmap(operation)(torch.stack([tensor, tensor]))


@pytest.mark.parametrize("name", INDICES)
def test_indices_of_a_transform_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"found .* of a transform of torch.func"):
        torch.func.vmap(INDICES[name])(torch.stack([INDEX, INDEX]))


@each_operation
def test_a_tensor_without_memory_is_refused(name: str) -> None:
    operation, tensor = OPERATIONS[name]
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        pytest.raises(ValueError, match="of the subclass FakeTensor"),
    ):
        operation(mode.from_tensor(tensor))


@each_operation
def test_a_negative_view_is_refused(name: str) -> None:
    operation, tensor = OPERATIONS[name]
    view = torch._neg_view(tensor)
    with pytest.raises(ValueError, match=r"found .* a negative view; use "):
        operation(view)
    operation(view.resolve_neg())


@pytest.mark.parametrize(
    "operation",
    [
        lambda word: kernels.conv3x3(PLANES, torch.ones(2, 3, 3, 3), 1, word),
        lambda word: kernels.image_patches(PLANES, 1, word),
        lambda word: kernels.pack_parameters(torch.ones(54), None, [WeightPlace(0, 2, 3)], word),
        lambda word: kernels.linear_cross_entropy(PLANES, torch.ones(2, 48), V[:2], torch.ones(2, 2), word),
    ],
    ids=["conv", "block", "pack", "classifier"],
)
def test_another_word_for_a_precision_or_a_kind_of_labels_is_refused(operation: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r": expected (precision fp32, .*|label_kind indices, .*), found 'fp'$"):
        operation("fp")
