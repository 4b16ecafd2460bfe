"""Check the classifier: the reference against autograd in float64, the other back ends against the reference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast import kernels
from mtt_fast.kernels import LabelKind, reference
from mtt_fast.kernels.native import classifier as native_classifier
from mtt_fast.kernels.native.extension import extension
from mtt_fast.kernels.reference.flat import power_of_two
from mtt_fast.kernels.types import LARGEST_COTANGENT, accumulator
from mtt_fast.testing import assert_close
from tests.kernels.compiling import check, each_architecture, meta, recording
from tests.kernels.helpers import FORMATS, assert_same_by_any_threads, draw, jvp, refused
from tests.kernels.triton_comparison import compare, each_part

CLASSIFIERS = [  # batch, channels, height, width, classes
    (5, 7, 1, 1, 4),
    (1, 3, 1, 1, 1),  # one sample, one class
    (3, 2, 3, 2, 37),  # a part of a vector of classes
    (130, 9, 1, 2, 64),
]
KINDS = ["indices", "probabilities", "logits"]


def labels_of(kind: str, batch: int, classes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return labels of each kind; the probabilities are not on the simplex, and some are zero."""
    logits = draw(batch, classes, dtype=dtype)
    return {"indices": logits.argmax(1), "probabilities": 1.5 * logits.relu(), "logits": logits}[kind]


def classifier_arguments(
    case: tuple[int, ...],
    kind: str,
    dtype: torch.dtype = torch.float64,
    layout: torch.memory_format = torch.channels_last,
) -> dict[str, Any]:
    """Return arguments by name: planes of `dtype` in a `layout`, and the rest of the dtype that goes with them."""
    *shape, classes = case
    batch, width = shape[0], math.prod(shape[1:])
    planes = {name: draw(*shape, dtype=dtype, layout=layout) for name in ("p", "p_dot")}
    dtype = accumulator(dtype)
    return {
        **planes,
        **{name: draw(classes, width, dtype=dtype) for name in ("weight", "weight_dot")},
        **{name: draw(classes, dtype=dtype) for name in ("bias", "bias_dot")},
        "labels": labels_of(kind, batch, classes, dtype),
        "label_kind": kind,
    }


def in_float64(argument: Any) -> Any:
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def classifier_results(ops: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    """Return the results of both operations, by name, but for the scales."""
    primal = ops.linear_cross_entropy(**{name: value for name, value in given.items() if not name.endswith("_dot")})
    dual = ops.linear_cross_entropy_dual(**({"scale": None, "direction_scale": None} | given))
    names = ["loss", "p_bar", "weight_bar", "bias_bar", "loss_dot", "dual p_bar"]
    names += ["p_bar_dot", "weight_bar_dot", "bias_bar_dot", "labels_bar_dot"]
    results = dict(zip(names, primal[:-1] + dual[:-1], strict=True))
    assert primal[-1] is dual[-1] is None
    if given["label_kind"] == "indices":
        assert results.pop("labels_bar_dot") is None
    return results


def classifier_by_autograd(given: dict[str, Any]) -> dict[str, Tensor]:
    labels, kind = given["labels"], given["label_kind"]

    def loss_of(p: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(p.flatten(1), weight, bias), labels.softmax(1) if kind == "logits" else labels)

    argnums = (0, 1, 2) if kind == "indices" else (0, 1, 2, 3)
    gradients_and_loss: Any = torch.func.grad_and_value(loss_of, argnums=argnums)
    names = ("p", "weight", "bias")
    at, along = (tuple(given[name + ending] for name in names) for ending in ("", "_dot"))
    (gradients, loss), (gradients_dot, loss_dot) = jvp(lambda *at: gradients_and_loss(*at, labels), at, along)
    results = {"loss": loss, "loss_dot": loss_dot, "dual p_bar": gradients[0]}
    results |= {f"{name}_bar": value for name, value in zip(names, gradients, strict=False)}
    return results | {f"{name}_bar_dot": value for name, value in zip((*names, "labels"), gradients_dot, strict=False)}


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("case", CLASSIFIERS, ids=str)
def test_the_classifier_is_what_autograd_makes_of_cross_entropy(
    case: tuple[int, ...], layout: torch.memory_format, kind: str
) -> None:
    given = classifier_arguments(case, kind, layout=layout)
    actual, expected = classifier_results(kernels, given), classifier_by_autograd(given)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.dim() < 4 or actual[name].is_contiguous(memory_format=layout)
        assert_close(name, actual[name], value, 1e-12, floor=1e-3)  # of one class, all gradients are zero


@pytest.mark.native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CLASSIFIERS, ids=str)
def test_the_native_classifier_in_float32(case: tuple[int, ...], kind: str) -> None:
    given = classifier_arguments(case, kind, torch.float32)
    wide = {name: in_float64(value) for name, value in given.items()}
    expected = classifier_results(reference, wide)
    for name, actual in classifier_results(kernels, given).items():
        assert actual.dtype == torch.float32
        assert_close(name, actual, expected[name], 5e-6, floor=1e-2)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_classifier_at_logits_of_ten_thousand(dtype: torch.dtype, kind: str) -> None:
    """Take logits whose exponentials overflow, and whose differences underflow to exact zeros."""
    given = classifier_arguments((9, 9, 1, 1, 35), kind, dtype)
    given["p"] = 1e4 * torch.eye(9, dtype=dtype)[:, :, None, None]
    given["weight"] = draw(35, 9).sign().to(dtype)  # so a logit is ±1e4, exactly
    given["weight"][:, :3] = -1
    given["weight"][2, :3] = 1  # one class alone has all the probability
    given["weight"][:, 3] = -1  # no exponential of a logit is above zero
    given["bias"] = torch.zeros(35, dtype=dtype)
    if kind == "logits":
        given["labels"] = 1e4 * given["labels"].sign()
    wide = {name: in_float64(value) for name, value in given.items()}
    expected = classifier_by_autograd(wide)
    for name, actual in classifier_results(kernels, given).items():
        assert_close(name, actual, expected[name], 2e-6 if dtype == torch.float32 else 1e-12, floor=1e-2)


@pytest.mark.native
@pytest.mark.parametrize(
    ("dtype", "least", "tolerance"), [(torch.float32, -78, 1e-6), (torch.float64, -699, 5e-15)], ids=str
)
def test_the_native_exponential_over_all_its_range(dtype: torch.dtype, least: int, tolerance: float) -> None:
    """Measure it through a softmax of two classes: the gradient to the logit x of the wrong one is a share of eˣ / (1 + eˣ)."""
    x = torch.linspace(least, 0, 5001, dtype=torch.float64).to(dtype)
    o, bias = torch.stack([torch.zeros_like(x), x], 1), torch.zeros(2, dtype=dtype)
    right = torch.zeros(len(x), dtype=torch.long)
    extension().cross_entropy(o, None, bias, None, right, None, False, o.new_empty(1), o.new_empty(2), None, 1)
    expected = x.double().sigmoid() / len(x)  # still a normal number
    assert float((o[:, 1].double() / expected - 1).abs().max()) <= tolerance


@pytest.mark.native
def test_the_native_softmax_passes_on_what_is_not_finite() -> None:
    for value in (float("nan"), float("inf")):
        given = classifier_arguments((3, 4, 1, 1, 40), "indices", torch.float32)
        given["bias"][37] = value
        for name, actual in classifier_results(kernels, given).items():
            assert not torch.isfinite(actual).all(), name


@pytest.mark.native
@pytest.mark.parametrize("kind", KINDS)
def test_the_native_softmax_does_not_depend_on_threads(kind: str) -> None:
    """Leave out the matrix products, which are torch's and may depend on threads."""
    o, o_dot, labels = draw(2500, 40), draw(2500, 40), labels_of(kind, 2500, 40)
    bias, bias_dot, given = draw(40), draw(40), native_classifier._labels(labels, cast(LabelKind, kind))

    def both() -> list[Tensor]:
        threads = torch.get_num_threads()
        primal = [o.clone(), o.new_empty(1), o.new_empty(40)]
        dual = [o.clone(), o_dot.clone(), o.new_empty(1), o.new_empty(40), torch.empty_like(o)]
        extension().cross_entropy(primal[0], None, bias, None, *given, *primal[1:], None, threads)
        outputs = (*dual[2:4], None if kind == "indices" else dual[4].fill_(0))
        extension().cross_entropy(*dual[:2], bias, bias_dot, *given, *outputs, threads)
        return [*primal, *dual[: 4 if kind == "indices" else 5]]

    assert_same_by_any_threads(both)


LINEAR = (torch.zeros(6, 5, 1, 1), torch.zeros(3, 5), torch.zeros(3))
DUAL = (LINEAR[0], LINEAR[0], *LINEAR[1:], *LINEAR[1:])
SOFT = torch.zeros(6, 3)
PLANES, WEIGHT = torch.zeros(4, 6, 1, 2), torch.zeros(4, 3)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize(
    ("op", "arguments", "reason"),
    [
        refused(
            "linear_cross_entropy", "found", PLANES[0], torch.zeros(3, 6), torch.zeros(3), torch.zeros(6), "indices"
        ),
        refused("linear_cross_entropy", "weight of shape", PLANES, WEIGHT, torch.zeros(4), torch.zeros(4), "indices"),
        refused(
            "linear_cross_entropy",
            "weight of floating",
            LINEAR[0].half(),
            LINEAR[1].half(),
            *LINEAR[2:],
            SOFT,
            "logits",
        ),
        refused("linear_cross_entropy", "at least one", PLANES[:, :0], *LINEAR[1:], torch.zeros(0), "indices"),
        refused(
            "linear_cross_entropy", "contiguous", torch.zeros(2, 1, 5, 6).transpose(0, 3), *LINEAR[1:], SOFT, "logits"
        ),
        refused("linear_cross_entropy", "found 0 … 3", *LINEAR, torch.tensor([0, 1, 2, 3, 0, 1]), "indices"),
        refused("linear_cross_entropy", "found -1 … 0", *LINEAR, torch.tensor([0, -1, 0, 0, 0, 0]), "indices"),
        refused("linear_cross_entropy", "int32", *LINEAR, torch.zeros(6, dtype=torch.int32), "indices"),
        refused("linear_cross_entropy", "indices .*contiguous", *LINEAR, torch.zeros(12).long()[::2], "indices"),
        refused("linear_cross_entropy", "indices on meta", *LINEAR, torch.zeros(6).long().to("meta"), "indices"),
        refused("linear_cross_entropy", "int64 indices .*float32", *LINEAR, SOFT, "indices"),
        refused("linear_cross_entropy", "probabilities of shape", *LINEAR, torch.zeros(6), "probabilities"),
        refused("linear_cross_entropy", "probabilities of floating", *LINEAR, SOFT.long(), "probabilities"),
        refused("linear_cross_entropy", "logits contiguous", *LINEAR, torch.zeros(3, 6).T, "logits"),
        refused("linear_cross_entropy", "logits that requires", *LINEAR, SOFT.clone().requires_grad_(), "logits"),
        refused(
            "linear_cross_entropy_dual",
            "weight_dot of shape",
            *(*DUAL[:4], torch.zeros(4, 5), torch.zeros(3), SOFT, "logits"),
        ),
        refused("linear_cross_entropy_dual", "bias_dot of shape", *DUAL[:5], torch.zeros(4), SOFT, "logits"),
        refused(
            "linear_cross_entropy_dual",
            "p_dot contiguous",
            PLANES,
            torch.zeros(4, 1, 2, 6).permute(0, 3, 1, 2),
            *DUAL[2:],
            SOFT,
            "logits",
        ),
        refused("linear_cross_entropy_dual", "scale only for planes", *DUAL, SOFT, "logits", torch.tensor(2.0)),
        refused("linear_cross_entropy_dual", "direction_scale of shape", *DUAL, SOFT, "logits", None, torch.ones(1)),
    ],
)
def test_refuses(op: str, arguments: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{op}: .*{reason}"):
        getattr(kernels, op)(*arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("magnitude", [1e-8, 1.0])
def test_gradients_of_float16_have_a_power_of_two(kind: str, magnitude: float) -> None:
    """Check also that the loss and the gradients to labels have no factor, whatever the direction's scale is."""
    given = classifier_arguments((5, 7, 2, 3, 4), kind, torch.float16)
    given["weight"] *= magnitude
    given["weight_dot"] *= magnitude
    wide = {name: in_float64(value) for name, value in given.items()}
    expected = classifier_results(kernels, wide)
    *primal, scale = kernels.linear_cross_entropy(**{k: v for k, v in given.items() if not k.endswith("_dot")})
    assert scale is not None
    assert scale.dtype == torch.float32
    assert float(scale) == float(power_of_two(LARGEST_COTANGENT, expected["p_bar"]))
    for name, actual in zip(("p_bar", "weight_bar", "bias_bar"), primal[1:], strict=True):
        assert actual.dtype == (torch.float16 if name == "p_bar" else torch.float32)
        assert_close(name, actual.double() / float(scale), expected[name], 1e-3)

    given |= {"weight_dot": 8 * given["weight_dot"], "bias_dot": 8 * given["bias_dot"], "p_dot": 8 * given["p_dot"]}
    direction_scale = torch.tensor(8.0)
    for given_scale in (None, scale):
        results = kernels.linear_cross_entropy_dual(**given, scale=given_scale, direction_scale=direction_scale)
        loss_dot, p_bar, p_bar_dot, weight_bar_dot, bias_bar_dot, labels_bar_dot, factor = results
        assert factor is not None
        largest = float(torch.stack([p_bar.abs().max(), p_bar_dot.abs().max()]).max())
        assert 32 <= largest <= 64 if given_scale is None else factor is scale
        assert_close("loss_dot", loss_dot, expected["loss_dot"], 1e-4)
        assert (labels_bar_dot is None) == (kind == "indices")
        if labels_bar_dot is not None:
            assert_close("labels_bar_dot", labels_bar_dot, expected["labels_bar_dot"], 1e-4)
        for name, actual in (
            ("p_bar_dot", p_bar_dot),
            ("weight_bar_dot", weight_bar_dot),
            ("bias_bar_dot", bias_bar_dot),
        ):
            assert_close(name, actual.double() / float(factor) / 8, expected[name], 1e-3)
        assert_close("p_bar", p_bar.double() / float(factor), expected["p_bar"], 1e-3 if given_scale is scale else 1e-2)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("kind", KINDS)
def test_a_directions_scale_is_taken_out_of_the_derivatives_that_leave_a_step(kind: str) -> None:
    given = classifier_arguments((5, 7, 2, 3, 4), kind, torch.float32)
    names = ("loss_dot", "p_bar", "p_bar_dot", "weight_bar_dot", "bias_bar_dot", "labels_bar_dot", "scale")
    plain, scaled = (
        dict(zip(names, kernels.linear_cross_entropy_dual(**given, direction_scale=scale), strict=True))
        for scale in (None, torch.tensor(8.0))
    )
    for name in names[: -2 if kind == "indices" else -1]:
        factor = 8 if name in ("loss_dot", "labels_bar_dot") else 1
        assert torch.equal(plain[name], factor * scaled[name]), name


def test_gradients_that_are_not_finite_or_zero_have_the_power_one() -> None:
    given = classifier_arguments((5, 7, 1, 1, 4), "indices", torch.float16)
    primal = {name: value for name, value in given.items() if not name.endswith("_dot")}
    for change in ({"weight": 0 * given["weight"]}, {"bias": given["bias"] / 0}):
        scale = kernels.linear_cross_entropy(**(primal | change))[-1]
        assert scale is not None
        assert float(scale) == 1


@pytest.mark.slow
def test_triton_equals_the_reference_interpreted() -> None:
    lines = compare("classifier", "cpu")
    for operation in ("linear_cross_entropy", "linear_cross_entropy_dual"):
        twice = 1 if operation.endswith("dual") else 0  # float16, with scales that are given
        # shapes, kinds of labels, dtypes; float16 by small tiles; −∞ in labels
        assert len([line for line in lines if f"'{operation}'" in line]) == 10 * 3 * (4 + twice) + 3 * (1 + twice) + 2


@pytest.mark.gpu
@each_part("classifier")
def test_triton_equals_the_reference_on_a_gpu(part: int) -> None:
    compare("classifier", "cuda", part)


# classes, labels: of each class of shapes the most classes, and labels that need the most, spill first
COMPILED = ((10, "indices"), (64, "probabilities"), (128, "logits"), (200, "probabilities"), (1000, "logits"))


@pytest.mark.slow
@each_architecture
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [128, 256, 512])
def test_triton_compiles_for_the_features_of_networks(
    width: int, dtype: torch.dtype, architecture: str, tmp_path: Path
) -> None:
    """Registers also hold what a loop over features has under way, which is unrolled as the number of its steps allows."""
    from mtt_fast.kernels.triton import classifier

    p, weight, bias = meta(10, width, 4, 4, form=torch.channels_last).to(dtype), meta(10, 16 * width), meta(10)
    labels = torch.empty(10, dtype=torch.long, device="meta")
    with recording([classifier], architecture) as launches:
        classifier.linear_cross_entropy_dual(p, p, weight, bias, weight, bias, labels, "indices", None, None)
    check(launches, architecture, tmp_path)


@each_architecture
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_triton_compiles(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from mtt_fast.kernels.triton import classifier

    is_half = dtype == torch.float16
    with recording([classifier], architecture) as launches:
        for classes, kind in COMPILED:
            p, weight, bias = meta(100, 16, 2, 2, form=torch.channels_last).to(dtype), meta(classes, 64), meta(classes)
            labels = meta(100, classes) if kind != "indices" else torch.empty(100, dtype=torch.long, device="meta")
            given = (labels, cast(LabelKind, kind))
            classifier.linear_cross_entropy(p, weight, bias, *given)
            for scale in (None, meta()) if is_half else (None,):
                classifier.linear_cross_entropy_dual(p, p, weight, bias, weight, bias, *given, scale, scale)
    # with many classes a third kernel finds the range of float16
    assert len(launches) == (5 * 3 * 2 + 2 * 2 if is_half else 5 * 2 * 2)
    check(launches, architecture, tmp_path)
