"""Test the truncated gradient against TESLA's two loops and against autograd that takes each g_n for a constant in θ_n."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast import ConvNet, FlatModule, InputError, matching_loss, unroll
from mtt_fast.testing import assert_close, module_function, reference_convnet, relative_error, truncated, whole_graph
from tests.engine.optimizer_cases import Case, sgd_written_out

NET = ConvNet(in_channels=3, num_classes=4, image_size=9, width=6, depth=2)
ORACLE = module_function(reference_convnet(3, 4, 9, 6, 2))


def case(kind: str = "indices", steps: int = 5, per_step: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    start, logits = NET.init(generator).double(), randn(7, 4)
    return {
        "start": start,
        "target": start + 0.02 * randn(len(start)),
        "images": randn(7, 3, 9, 9),
        "labels": logits.argmax(1) if kind == "indices" else logits.softmax(1),
        "lr": 0.4 + 0.2 * torch.rand(steps, generator=generator).double() if per_step else torch.tensor(0.5).double(),
        "batches": [torch.randperm(7, generator=generator)[: 3 + n % 3] for n in range(steps)],
    }


def by_engine(given: dict[str, Any], net: Any = NET, **options: Any) -> dict[str, Tensor]:
    leaves = {name: given[name].clone() for name in ("start", "images", "labels", "lr")}
    inputs = {name: leaf.requires_grad_() for name, leaf in leaves.items() if leaf.is_floating_point()}
    theta, images, labels, lr = leaves.values()
    path = unroll(net, theta, images, labels, lr, given["batches"], **{"gradient": "truncated"} | options)
    matching_loss(path[-1], theta, given["target"]).backward()
    return {name: leaf.grad for name, leaf in inputs.items() if leaf.grad is not None} | {"end": path[-1].detach()}


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("microbatch", [None, 2])
def test_equals_the_two_loops_of_tesla(kind: str, per_step: bool, microbatch: int | None) -> None:
    given = case(kind, per_step=per_step)
    expected = truncated(ORACLE, **given)
    for net in (NET, FlatModule(reference_convnet(3, 4, 9, 6, 2))):
        actual = by_engine(given, net, microbatch=microbatch)
        assert set(actual) == {"start", "images", "lr", "end"} | ({"labels"} if kind == "probabilities" else set())
        for name, value in actual.items():
            assert_close(name, value, getattr(expected, name), 1e-10)


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.0, 0.1), (0.8, 0.0), (0.8, 0.1)])
def test_everything_but_the_hessians_is_exact(momentum: float, weight_decay: float) -> None:
    """Compare momentum, weight decay and losses of other rows with autograd, with each gradient taken at detached parameters."""
    given = case(per_step=True)
    weights = torch.randn(6, len(given["start"]), dtype=torch.float64)
    options: dict[str, Any] = {"momentum": momentum, "weight_decay": weight_decay}

    start, labels = given["start"], given["labels"]
    ours, theirs = (
        Case(start, torch.zeros_like(start), given["images"], labels, given["lr"]).leaves() for _ in range(2)
    )
    batches = {"batches": given["batches"]}
    path = unroll(NET, ours.start, ours.images, labels, ours.lr, **batches, gradient="truncated", **options)
    expected, _ = sgd_written_out(theirs, momentum, weight_decay, network=ORACLE, truncated=True, **batches)
    names = ("start", "images", "lr")
    results, wanted = (
        torch.autograd.grad((weights * rows).sum(), [getattr(leaves, name) for name in names])
        for rows, leaves in ((path, ours), (expected, theirs))
    )
    for name, one, other in zip(names, results, wanted, strict=True):
        assert_close(name, one, other, 1e-10)


def test_it_is_an_approximation() -> None:
    """Check that on the same path the last step's part is exact and the others' are not, so the tests of either can tell them apart."""
    given = case()
    expected = whole_graph(ORACLE, **given)
    actual = by_engine(given)
    assert_close("end", actual["end"], expected.end, 1e-12)
    assert 0.02 < relative_error(actual["images"], expected.images) < 2
    assert relative_error(actual["lr"], expected.lr) > 0.02
    last = given | {"batches": given["batches"][-1:]}
    assert_close("one step", by_engine(last)["images"], whole_graph(ORACLE, **last).images, 1e-10)


def test_other_words_are_refused() -> None:
    with pytest.raises(InputError, match="`gradient`: expected 'exact' or 'truncated', found 'tesla'"):
        by_engine(case(), gradient="tesla")
