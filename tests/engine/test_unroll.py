"""Test the meta-gradient against golden cases and whole-graph autograd, in float64; float32 by its distance from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mtt_fast import ConvNet, InputError, SiameseAugment, unroll
from mtt_fast.engine.arguments import for_checked_lookup
from mtt_fast.networks.convnet import Norm
from mtt_fast.testing import MetaGradient, assert_close, module_function, reference_convnet, relative_error, whole_graph
from tests.engine.meta_gradients import golden_case, meta_gradient

GOLDEN = ["soft-labels-d3-n6", "rgb64-d4-n3", "rgb128-d5-n2", "cifar-d3-n5"]
FIELDS = ("end", "loss", "images", "labels", "lr", "start")


def assert_same(actual: MetaGradient, expected: MetaGradient, tolerance: float) -> None:
    for name in FIELDS:
        wanted = getattr(expected, name)
        if wanted is not None:
            # dead ReLUs can make a true zero of a random case's gradient
            assert_close(name, getattr(actual, name), wanted, tolerance, floor=1e-5)


@pytest.mark.parametrize("microbatch", [None, 3])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_cases(golden: Any, name: str, microbatch: int | None) -> None:
    case = golden_case(golden, name)
    assert_same(case.meta_gradient(torch.float64, microbatch=microbatch), case.expected, 1e-9)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    depth = draw(st.integers(1, 3))
    size = draw(st.integers(2**depth, 2**depth + 5))
    count = draw(st.integers(1, 6))
    index = st.integers(0, count - 1)
    steps = draw(st.integers(1, 4))
    return {
        "shape": (
            draw(st.sampled_from([1, 2, 3])),
            draw(st.integers(2, 5)),
            size,
            draw(st.integers(1, 5)),
            depth,
            draw(st.sampled_from(["instance", "none"])),
        ),
        "count": count,
        # unequal lengths, repeated indices, one image alone
        "batches": draw(st.lists(st.lists(index, min_size=1, max_size=5), min_size=steps, max_size=steps)),
        "labels": draw(st.sampled_from(["indices", "probabilities", "logits"])),
        "rates": draw(st.booleans()),
        "momentum": draw(st.sampled_from([0.0, 0.9])),
        "weight_decay": draw(st.sampled_from([0.0, 0.05])),
        "microbatch": draw(st.sampled_from([None, 1, 2])),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=90)
@given(cases())
def test_random_cases_equal_whole_graph_autograd(case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    channels, classes, size, *_ = case["shape"]
    net, module = ConvNet(*case["shape"]), reference_convnet(*case["shape"])
    start = 0.5 * torch.randn(net.num_parameters, dtype=torch.float64)
    target = start + 0.1 * torch.randn_like(start)
    images = torch.randn(case["count"], channels, size, size, dtype=torch.float64)
    logits = torch.randn(case["count"], classes, dtype=torch.float64)
    labels = {"indices": logits.argmax(1), "probabilities": logits.softmax(1), "logits": logits}[case["labels"]]
    batches = [torch.tensor(row) for row in case["batches"]]
    lr = torch.rand(len(batches), dtype=torch.float64) if case["rates"] else torch.tensor(0.2, dtype=torch.float64)
    common = {"momentum": case["momentum"], "weight_decay": case["weight_decay"]}
    expected = whole_graph(
        module_function(module),
        start,
        target,
        images,
        labels,
        lr,
        batches,
        label_logits=case["labels"] == "logits",
        **common,
    )
    actual = meta_gradient(
        net,
        start,
        target,
        images,
        labels,
        lr,
        batches,
        label_kind=case["labels"],
        microbatch=case["microbatch"],
        **common,
    )
    assert_same(actual, expected, 1e-9)


def small_case(dtype: torch.dtype = torch.float64, steps: int = 3) -> dict[str, Any]:
    net = ConvNet(in_channels=3, num_classes=4, image_size=8, width=6, depth=2)
    start = net.init(torch.Generator().manual_seed(5)).to(dtype)
    generator = torch.Generator().manual_seed(7)
    return {
        "net": net,
        "start": start,
        "target": start + 0.02 * torch.randn(start.shape, generator=generator, dtype=dtype),
        "images": torch.randn(6, 3, 8, 8, generator=generator, dtype=dtype),
        "labels": torch.tensor([0, 1, 2, 3, 0, 1]),
        "lr": torch.tensor(0.1, dtype=dtype),
        "batches": torch.stack([torch.randperm(6, generator=generator)[:4] for _ in range(steps)]),
    }


def test_numerical_derivative_of_the_whole_unroll() -> None:
    case = small_case(steps=2)
    soft = torch.rand(6, 4, dtype=torch.float64).softmax(1)

    def rows(start: Tensor, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
        return unroll(case["net"], start, images, labels, lr, case["batches"], momentum=0.5, weight_decay=0.01)[1:]

    # not torch.autograd.gradcheck: it asks for exact zeros back for zeros in, where the engine returns 1e-18
    leaves = [leaf.clone().requires_grad_() for leaf in (case["start"], case["images"], soft, case["lr"])]
    cotangent = torch.randn(2, len(case["start"]), dtype=torch.float64)
    gradients = torch.autograd.grad((cotangent * rows(*leaves)).sum(), leaves)
    for position, gradient in enumerate(gradients):
        direction = torch.randn_like(gradient)
        ends = []
        for step in (1e-6, -1e-6):
            moved = [
                leaf.detach() + (step * direction if place == position else 0) for place, leaf in enumerate(leaves)
            ]
            ends.append((cotangent * rows(*moved)).sum())
        assert_close(f"leaf {position}", (gradient * direction).sum(), (ends[0] - ends[1]) / 2e-6, 1e-6)


def test_mixed_precision_of_the_arguments_and_forms_of_the_learning_rate() -> None:
    case = small_case()
    expected = meta_gradient(**case)
    mixed = case | {
        "images": case["images"].float(),
        "target": case["target"].float(),
        "labels": torch.nn.functional.one_hot(case["labels"], 4).float(),
        "lr": case["lr"].view(1),
    }
    actual = meta_gradient(**mixed)
    assert (actual.images.dtype, actual.lr.shape, actual.end.dtype) == (torch.float32, (1,), torch.float64)
    for name in ("end", "images", "lr", "start"):
        assert_close(name, getattr(actual, name).flatten(), getattr(expected, name).flatten(), 1e-5)
    indices = case["labels"].int()
    path = unroll(case["net"], case["start"], case["images"], indices, 0.1, case["batches"])
    assert torch.equal(path[-1], expected.end)


def test_any_rows_of_the_path_can_be_differentiated() -> None:
    case = small_case()
    weights = torch.randn(4, len(case["start"]), dtype=torch.float64)
    images = case["images"].clone().requires_grad_()
    path = unroll(case["net"], case["start"], images, case["labels"], case["lr"], case["batches"])
    (actual,) = torch.autograd.grad((weights * path).sum(), images)
    expected = torch.zeros_like(images)
    for row in (1, 2, 3):  # a path to row n is the unroll of n steps, which the tests above cover
        shorter = unroll(case["net"], case["start"], images, case["labels"], case["lr"], case["batches"][:row])
        expected += torch.autograd.grad((weights[row] * shorter[-1]).sum(), images)[0]
    assert_close("images", actual, expected, 1e-10)


def test_steps_behind_the_last_row_that_counts_are_left_alone() -> None:
    """Check that infinite values in these steps do no harm and take no time."""
    case, asked = small_case(), []

    def counted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        asked.append(logits)
        return torch.nn.functional.cross_entropy(logits, labels)

    images = case["images"].clone().requires_grad_()
    lr = torch.tensor([0.2, 0.1, torch.inf], dtype=torch.float64, requires_grad=True)
    path = unroll(case["net"], case["start"], images, case["labels"], lr, case["batches"], momentum=0.5, loss=counted)
    assert not path[3].isfinite().all()
    assert len(asked) == 2 + 3  # in the trial, and in the steps
    to_images, to_lr = torch.autograd.grad((path[2] - case["target"]).square().sum(), (images, lr))
    assert len(asked) == 2 + 3 + 2
    shorter = unroll(case["net"], case["start"], images, case["labels"], lr[:2], case["batches"][:2], momentum=0.5)
    expected, to_shorter = torch.autograd.grad((shorter[-1] - case["target"]).square().sum(), (images, lr))
    assert_close("images", to_images, expected, 1e-12)
    assert_close("lr", to_lr[:2], to_shorter[:2], 1e-12)
    assert to_lr[2] == 0


def test_augmentation_repeats_its_draws_in_the_backward_sweep() -> None:
    case = small_case(steps=8)
    augment = SiameseAugment()
    generator = torch.Generator().manual_seed(11)
    draws = [augment.draw(case["images"][index], generator) for index in case["batches"]]
    assert len({draw.operation for draw in draws}) >= 4
    expected = whole_graph(
        module_function(reference_convnet(3, 4, 8, 6, 2)),
        case["start"],
        case["target"],
        case["images"],
        case["labels"],
        case["lr"],
        case["batches"],
        augment=lambda images, n: augment(images, draws[n]),
    )
    actual = meta_gradient(**case, augment=augment, generator=torch.Generator().manual_seed(11))
    assert_same(actual, expected, 1e-9)


@pytest.mark.parametrize("norm", ["instance", "none"])
def test_float32_is_as_close_to_the_truth_as_whole_graph_autograd_in_float32(norm: Norm) -> None:
    net, module = ConvNet(width=32, norm=norm), module_function(reference_convnet(3, 10, 32, 32, 3, norm))
    start = net.init(torch.Generator().manual_seed(1))
    case: dict[str, Any] = {
        "start": start,
        "target": start + 0.01 * torch.randn(len(start)),
        "images": torch.randn(20, 3, 32, 32),
        "labels": torch.arange(20) % 10,
        "lr": torch.tensor(0.02),
        "batches": torch.stack([torch.randperm(20)[:10] for _ in range(5)]),
    }
    doubled = {name: value.double() if value.is_floating_point() else value for name, value in case.items()}
    truth, by_autograd, actual = whole_graph(module, **doubled), whole_graph(module, **case), meta_gradient(net, **case)
    for name in ("end", "loss", "images", "lr", "start"):
        wanted = getattr(truth, name)
        allowed = 2 * relative_error(getattr(by_autograd, name), wanted) + 1e-7
        assert_close(name, getattr(actual, name), wanted, allowed)


def test_same_seed_twice_is_bit_identical() -> None:
    results = [
        meta_gradient(
            **small_case(torch.float32, 6), augment=SiameseAugment(), generator=torch.Generator().manual_seed(2)
        )
        for _ in range(2)
    ]
    for name in FIELDS:
        first, second = (getattr(result, name) for result in results)
        assert first is second is None or torch.equal(first, second)


def test_a_custom_loss() -> None:
    case = small_case()

    def squared(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.softmax(1) - torch.nn.functional.one_hot(labels, 4)).square().sum(1).mean()

    images = case["images"].clone().requires_grad_()
    path = unroll(case["net"], case["start"], images, case["labels"], case["lr"], case["batches"], loss=squared)
    path[-1].sum().backward()
    theta, pixels = case["start"], case["images"].clone().requires_grad_()
    theta = theta.clone().requires_grad_()
    for index in case["batches"]:
        loss = squared(case["net"](theta, pixels[index]), case["labels"][index])
        theta = theta - case["lr"] * torch.autograd.grad(loss, theta, create_graph=True)[0]
    assert images.grad is not None
    assert_close("images", images.grad, torch.autograd.grad(theta.sum(), pixels)[0], 1e-10)


class OnlyDraws:
    """An augmentation that has been left unfinished."""

    def draw(self, images: Tensor, generator: torch.Generator | None) -> None:
        """Draw nothing."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": torch.tensor([[0, 6]])}, "expected indices 0 … 5, found 0 … 6"),
        ({"batches": torch.tensor([[-1, 2]])}, "expected indices 0 … 5, found -1"),
        ({"batches": []}, "expected at least one step"),
        ({"batches": torch.tensor([[0, 1], [6, 2]])}, "expected indices 0 … 5, found 2 … 6 in step 1"),
        ({"batches": [torch.tensor([])]}, "expected a vector of indices for step 0"),
        ({"batches": [torch.tensor([True, False, True])]}, r"torch.bool of shape \(3,\); .* mask.nonzero"),
        (
            {"batches": [torch.tensor([0]), torch.tensor([], dtype=torch.long)]},
            "for step 1, found torch.int64 of shape .0",
        ),
        ({"batches": [torch.tensor([[0, 1]])]}, "for step 0, found torch.int64 of shape .1, 2"),
        ({"batches": [torch.tensor([True, False])]}, "for step 0, found torch.bool"),
        ({"start": torch.zeros(5)}, r"expected .* parameters of the network, .* found torch.float32 of shape \(5,\)$"),
        ({"start": torch.zeros(5, dtype=torch.complex64), "lr": 0.1}, "float32 or float64, found torch.complex64"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, "as many labels"),
        ({"labels": torch.zeros(6)}, "expected indices .n,. or soft labels"),
        (
            {"labels": torch.zeros(6, 4, dtype=torch.long)},
            r"\(6, 4\); use .long\(\) for indices, .float\(\) for one-hot",
        ),
        ({"images": torch.zeros(6, 3, 8, 8, dtype=torch.uint8)}, "floating-point images"),
        ({"labels": torch.zeros(6, device="meta")[:, None]}, "expected all tensors on one device, found cpu, meta"),
        ({"lr": torch.zeros(2)}, "expected a scalar, a rate for each step"),
        ({"lr": torch.zeros(1, 3)}, r"expected a scalar, a rate for each step \(3,\), .*, found shape \(1, 3\)"),
        ({"lr": torch.tensor(1j)}, "`lr`: expected real numbers, found torch.complex64"),
        ({"lr": [[0.1], [0.2, 0.3], [0.4]]}, "`lr`: expected a number, numbers or a tensor, found"),
        ({"microbatch": 0}, "expected at least 1, found 0"),
        ({"microbatch": 2.0}, "`microbatch`: expected a whole number, found 2.0"),
        ({"momentum": -0.1}, "`momentum`: expected a finite number of at least 0, found -0.1"),
        ({"momentum": "0.5"}, "`momentum`: expected a number, found '0.5'"),
        ({"momentum": torch.tensor(0.5)}, r"found tensor\(0.5000\); use .item\(\), since no gradient flows to it"),
        ({"weight_decay": float("nan")}, "`weight_decay`: expected a finite number of at least 0, found nan"),
        ({"lr": -0.1}, "`lr`: expected finite numbers of at least 0, found -0.1"),
        ({"lr": [0.1, float("inf"), 0.1]}, "`lr`: expected finite numbers of at least 0"),
        ({"lr": None}, "`lr`: expected a number, numbers or a tensor, found None"),
        ({"lr": [torch.tensor(0.1)] * 3}, "found a list of tensors; use torch.stack"),
        ({"velocity": 0.0}, "`velocity`: expected a tensor, found float"),
        ({"velocity": (torch.zeros(3), torch.zeros(3))}, r"`velocity`: .* found tuple; torch.stack makes one \(2, P\)"),
        (
            {"microbatch": 2, "memory_budget": "1GiB"},
            "`microbatch`, `memory_budget`: expected one of these, found 2; give one",
        ),
        ({"label_kind": "logits"}, "does not fit labels"),
        (
            {"label_kind": "indices", "labels": torch.zeros(6, 4)},
            "`label_kind` 'indices': does not fit labels of dtype torch.float32",
        ),
        ({"label_kind": "soft", "labels": torch.zeros(6, 4)}, "`label_kind` soft: expected indices, probabilities"),
        ({"precision": "auto"}, "`precision` auto: expected fp32, tf32, fp16, bf16"),
        ({"net": torch.nn.Linear(2, 2)}, "one vector of parameters, found Linear; use ConvNet, or FlatModule"),
        ({"start": [0.0, 1.0]}, "`theta`: expected a tensor, found list"),
        ({"start": [torch.zeros(3, 2)]}, "`theta`: .* found list; torch.nn.utils.parameters_to_vector makes one"),
        ({"images": np.zeros((6, 3, 8, 8))}, "`images`: expected a tensor, found ndarray"),
        ({"labels": [0] * 6}, "`labels`: expected a tensor, found list"),
        (
            {"labels": None},
            r"`labels`: expected a tensor, found NoneType; a `loss` that needs no labels may ignore them: give torch\.arange",
        ),
        (
            {"images": (torch.zeros(6, 3), torch.zeros(6, 4))},
            "found tuple; join the parts into one tensor by torch.cat",
        ),
        ({"augment": torch.relu}, "expected an augmentation, such as SiameseAugment, found builtin_function_or_method"),
        ({"net": ConvNet}, "`net`: expected a network, found the class ConvNet; call it to make one"),
        ({"images": torch.tensor(1.0)}, r"`images`: expected at least one, \(n, …\), found shape \(\)"),
        ({"images": torch.zeros(0, 3, 8, 8)}, r"`images`: expected at least one, \(n, …\), found shape \(0, 3, 8, 8\)"),
        (
            {"images": torch.zeros(6, 3, 8, 8).to_sparse()},
            "`images`: expected an ordinary tensor, found a tensor of layout torch.sparse_coo",
        ),
        (
            {"images": torch.nested.nested_tensor([torch.zeros(3, 8, 8)] * 6, layout=torch.jagged)},
            "expected an ordinary tensor, found a nested tensor",
        ),
        (
            {"images": torch.zeros(6, 3, 8, 8).to(torch.float8_e4m3fn)},
            "`images`: expected an ordinary tensor, found a tensor of float8_e4m3fn; use .float()",
        ),
        ({"lr": torch.full((3,), 0.1).to_sparse()}, "`lr`: expected an ordinary tensor, found a tensor of layout"),
        ({"lr": torch.zeros(3, device="meta")}, "`lr`: expected numbers, found a tensor on the device meta"),
        (
            {"batches": torch.ones(3, 2).long().to_sparse()},
            "`batches`: expected an ordinary tensor, found a tensor of layout",
        ),
        ({"velocity": torch.zeros(3).to_sparse()}, "`velocity`: expected an ordinary tensor, found a tensor of layout"),
        (
            {"images": FakeTensorMode().from_tensor(torch.zeros(6, 3, 8, 8))},
            "expected an ordinary tensor, found a FakeTensor",
        ),
        ({"batches": [torch.tensor([2**63], dtype=torch.uint64)]}, "expected indices 0 … 5, found -"),
        ({"generator": 3}, "`generator`: expected a torch.Generator, found int; "),
        ({"augment": "color_crop"}, "expected an augmentation, such as SiameseAugment, found str"),
        ({"draws": 5}, "`draws`: expected a list of the draws of each step, found int"),
        ({"draws": {0: 1}}, "`draws`: expected a list of the draws of each step, found dict"),
        ({"augment": SiameseAugment}, "found the class SiameseAugment; call it to make one"),
        ({"augment": OnlyDraws()}, "`augment`: expected an augmentation, such as SiameseAugment, found OnlyDraws"),
        ({"images": torch.zeros(6, 1, 8, 8)}, r"`images`: .* 3 channels and size 8, found \(1, 8, 8\)"),
        ({"images": torch.zeros(6, 8, 8)}, r"`images`: .* 3 channels and size 8, found \(8, 8\)"),
    ],
)
def test_errors_name_the_cause(change: dict[str, Any], message: str) -> None:
    case = small_case() | change
    start = case.pop("start")
    case.pop("target")
    with pytest.raises(InputError, match=message):
        unroll(case.pop("net"), start, **case)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("options", [{}, {"loss": lambda logits, labels: (logits @ logits.T).mean(), "microbatch": 1}])
def test_images_of_another_shape_and_as_many_features_are_refused_by_every_student(
    options: dict[str, Any], device: str
) -> None:
    case = small_case() | options | {"images": torch.zeros(6, 3, 4, 16)}
    case |= {name: case[name].to(device) for name in ("start", "images", "labels")}
    net = case.pop("net")
    assert net.feature_size_of(4, 16) == (1, 4)
    assert net.feature_size == (2, 2)
    with pytest.raises(InputError, match=r"`images`: expected the network's 3 channels and size 8, found"):
        unroll(net, case.pop("start"), **{name: value for name, value in case.items() if name != "target"})


def test_on_an_accelerator_the_look_up_raises_for_negative_indices_too() -> None:
    labels, indices = torch.arange(6), torch.tensor([0, 5, 3])
    assert torch.equal(labels[for_checked_lookup(indices, len(labels))], indices)
    with pytest.raises(IndexError):
        labels[for_checked_lookup(torch.tensor([0, -1, 3]), len(labels))]


def test_one_rate_may_be_a_part_of_a_larger_tensor() -> None:
    gradients = []
    for rates in (torch.tensor([0.1, 5.0]).double(), torch.tensor([0.1]).double()):
        case = small_case()
        rates.requires_grad_()
        unroll(case["net"], case["start"], case["images"], case["labels"], rates[::2], case["batches"])[
            -1
        ].sum().backward()
        assert rates.grad is not None
        gradients.append(rates.grad[0])
    assert torch.equal(*gradients)


def test_parameters_are_float32_or_float64() -> None:
    case = small_case()
    start = case.pop("start").half()
    case.pop("target")
    with pytest.raises(InputError, match=r"float32 or float64, found torch\.float16"):
        unroll(case.pop("net"), start, **case)


@pytest.mark.parametrize("vectors", [[[0, 1], [2, 3, 4]], np.array([[0, 1], [2, 3]])], ids=["lists", "array"])
def test_batches_may_be_lists_and_arrays(vectors: Any) -> None:
    case = small_case() | {"lr": 0.1}
    net, start, batches = case.pop("net"), case.pop("start"), [torch.tensor(row) for row in vectors]
    case.pop("target")
    path = unroll(net, start, **case | {"batches": vectors})
    assert torch.equal(path, unroll(net, start, **case | {"batches": batches}))
