"""The operations of a student step: definitions against autograd in float64, native twins against the definitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from mtt_fast import kernels
from mtt_fast.kernels import LabelKind, native, reference
from mtt_fast.kernels.formats import memory_format
from mtt_fast.testing import assert_close

EPS = 1e-5
FORMATS = [torch.contiguous_format, torch.channels_last]
needs_native = pytest.mark.skipif(not native.available, reason="the native kernels are not installed or turned off")

PLANES = [
    (2, 3, 4, 4),
    (1, 1, 2, 3),  # a 1×1 plane after the pool, an odd side
    (3, 5, 7, 5),
    (2, 37, 6, 3),  # a part of a vector of channels
    (1, 129, 9, 8),
]
CONVOLUTIONS = [  # batch, channels, height, width, filters, padding
    (2, 3, 4, 4, 5, 1),
    (2, 1, 5, 7, 3, 3),  # padding 3 of one-channel images
    (1, 2, 3, 3, 40, 0),
    (2, 4, 3, 5, 4, 0),
    (2, 40, 6, 3, 33, 1),
    (5, 130, 9, 8, 37, 2),
    (3, 5, 2, 1, 2, 1),  # a tile hangs over
    (80, 6, 16, 16, 4, 1),  # several parts of the sum over tiles
]
CLASSIFIERS = [  # batch, features, classes
    (5, 7, 4),
    (1, 3, 1),  # one sample, one class
    (3, 2, 37),  # a part of a vector of classes
    (130, 9, 64),
]
KINDS = ["indices", "probabilities", "logits"]


@pytest.fixture(params=["native", "reference"])
def either_twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "native" and not native.available:
        pytest.skip("the native kernels are not installed or turned off")
    monkeypatch.setattr(native, "available", request.param == "native")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


Results = Callable[..., dict[str, Tensor]]
_jvp: Any = torch.func.jvp  # its type leaves out what it returns


def draw(*shape: int, dtype: torch.dtype = torch.float64, layout: torch.memory_format | None = None) -> Tensor:
    tensor = torch.randn(shape, dtype=torch.float64).to(dtype)
    return tensor if layout is None else tensor.contiguous(memory_format=layout)


def plane_arguments(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: torch.memory_format
) -> dict[str, Any]:
    batch, channels, height, width = shape
    pooled = (batch, channels, height // 2, width // 2)
    return {
        **{name: draw(*shape, dtype=dtype, layout=layout) for name in ("y", "y_dot")},
        **{name: draw(channels, dtype=dtype) for name in ("gamma", "beta", "gamma_dot", "beta_dot")},
        **{name: draw(*pooled, dtype=dtype, layout=layout) for name in ("p_bar", "p_bar_dot")},
    }


def plane_results(ops: Any, given: dict[str, Any], **options: bool) -> dict[str, Tensor]:
    """All four operations, by name of the result."""
    y, y_dot, gamma, beta = given["y"], given["y_dot"], given["gamma"], given["beta"]
    dots = (given["gamma_dot"], given["beta_dot"])
    bars = (given["p_bar"], given["p_bar_dot"])
    primal = ops.norm_relu_pool(y, gamma, beta, EPS)
    dual = ops.norm_relu_pool_dual(y, y_dot, gamma, beta, *dots, EPS)
    # `reuse` destroys what it is given
    back = ops.norm_relu_pool_backward(y.clone(), *primal[1:], gamma, beta, bars[0], **options)
    dual_back = ops.norm_relu_pool_dual_backward(
        y.clone(), y_dot.clone(), *dual[2:], gamma, beta, *dots, *bars, **options
    )
    names = ["p", "mean", "rstd", "dual p", "p_dot", "dual mean", "dual rstd", "k1", "k2"]
    names += ["y_bar", "gamma_bar", "beta_bar", "dual y_bar", "y_bar_dot", "gamma_bar_dot", "beta_bar_dot"]
    return dict(zip(names, primal + dual + back + dual_back, strict=True))


def bias_results(ops: Any, given: dict[str, Any], **options: bool) -> dict[str, Tensor]:
    """The four operations of a block without norm, by name of the result."""
    y, beta, bars = given["y"], given["beta"], (given["p_bar"], given["p_bar_dot"])
    p = ops.bias_relu_pool(y, beta)
    p_and_dot = ops.bias_relu_pool_dual(y, given["y_dot"], beta, given["beta_dot"])
    back = ops.bias_relu_pool_backward(y.clone(), beta, bars[0], **options)
    dual_back = ops.bias_relu_pool_dual_backward(y.clone(), beta, *bars, **options)
    names = ["p", "dual p", "p_dot", "y_bar", "beta_bar", "dual y_bar", "y_bar_dot", "beta_bar_dot"]
    return dict(zip(names, (p, *p_and_dot, *back, *dual_back), strict=True))


each_end = pytest.mark.parametrize("results", [plane_results, bias_results])


def block(y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.avg_pool2d(F.relu(F.group_norm(y, y.shape[1], gamma, beta, EPS)), 2)


def block_without_norm(y: Tensor, beta: Tensor) -> Tensor:
    return F.avg_pool2d(F.relu(y + beta[:, None, None]), 2)


@pytest.mark.usefixtures("either_twin")
@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("shape", PLANES, ids=str)
def test_planes_are_what_autograd_makes_of_the_block(
    shape: tuple[int, int, int, int], layout: torch.memory_format
) -> None:
    given = plane_arguments(shape, torch.float64, layout)
    found = plane_results(kernels, given)

    def gradients(y: Tensor, gamma: Tensor, beta: Tensor, p_bar: Tensor) -> Any:
        return torch.func.vjp(block, y, gamma, beta)[1](p_bar)

    at = (given["y"].contiguous(), given["gamma"], given["beta"])  # torch's group norm takes no other under jvp
    along = (given["y_dot"].contiguous(), given["gamma_dot"], given["beta_dot"])
    p, p_dot = _jvp(block, at, along)
    bars, bars_dot = _jvp(gradients, (*at, given["p_bar"]), (*along, given["p_bar_dot"]))
    expected = {"p": p, "dual p": p, "p_dot": p_dot, "y_bar": bars[0], "dual y_bar": bars[0], "gamma_bar": bars[1]}
    expected |= {
        "beta_bar": bars[2],
        "y_bar_dot": bars_dot[0],
        "gamma_bar_dot": bars_dot[1],
        "beta_bar_dot": bars_dot[2],
    }
    for name, value in expected.items():
        assert_close(name, found[name], value, 1e-10, floor=1e-3)  # where the ReLU lets a pool through whole: a true 0
    for name in ("p", "p_dot", "y_bar", "y_bar_dot"):
        assert found[name].is_contiguous(memory_format=layout)


@pytest.mark.usefixtures("either_twin")
@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("shape", PLANES, ids=str)
def test_bias_relu_pool_is_what_autograd_makes_of_the_block(
    shape: tuple[int, int, int, int], layout: torch.memory_format
) -> None:
    given = plane_arguments(shape, torch.float64, layout)

    def gradients(y: Tensor, beta: Tensor, p_bar: Tensor) -> Any:
        return torch.func.vjp(block_without_norm, y, beta)[1](p_bar)

    at, along = (given["y"], given["beta"]), (given["y_dot"], given["beta_dot"])
    p, p_dot = _jvp(block_without_norm, at, along)
    (y_bar, beta_bar), (y_bar_dot, beta_bar_dot) = _jvp(gradients, (*at, given["p_bar"]), (*along, given["p_bar_dot"]))
    expected = [p, p, p_dot, y_bar, beta_bar, y_bar, y_bar_dot, beta_bar_dot]
    for (name, found), wanted in zip(bias_results(kernels, given).items(), expected, strict=True):
        assert_close(name, found, wanted, 1e-12)
        assert found.dim() == 1 or found.is_contiguous(memory_format=layout)


def test_the_derivatives_of_bias_relu_pool_are_numerical_ones() -> None:
    given = plane_arguments((2, 3, 5, 4), torch.float64, torch.contiguous_format)
    step = 1e-6
    ends = []
    for sign in (step, -step):
        y, beta, p_bar = (given[name] + sign * given[f"{name}_dot"] for name in ("y", "beta", "p_bar"))
        ends.append((reference.bias_relu_pool(y, beta), *reference.bias_relu_pool_backward(y, beta, p_bar)))
    found = bias_results(reference, given)
    for name, after, before in zip(("p_dot", "y_bar_dot", "beta_bar_dot"), *ends, strict=True):
        assert_close(name, found[name], (after - before) / (2 * step), 1e-7)


def test_the_planes_derivatives_are_numerical_ones() -> None:
    given = plane_arguments((2, 3, 5, 4), torch.float64, torch.contiguous_format)
    step = 1e-6
    ends = []
    for sign in (step, -step):
        y, gamma, beta, p_bar = (given[name] + sign * given[f"{name}_dot"] for name in ("y", "gamma", "beta", "p_bar"))
        p, mean, rstd = reference.norm_relu_pool(y, gamma, beta, EPS)
        ends.append((p, *reference.norm_relu_pool_backward(y, mean, rstd, gamma, beta, p_bar)))
    found = plane_results(reference, given)
    for name, after, before in zip(("p_dot", "y_bar_dot", "gamma_bar_dot", "beta_bar_dot"), *ends, strict=True):
        assert_close(name, found[name], (after - before) / (2 * step), 1e-7)


@needs_native
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", PLANES, ids=str)
@each_end
def test_native_planes_are_the_definition(
    results: Results, shape: tuple[int, int, int, int], dtype: torch.dtype, layout: torch.memory_format, reuse: bool
) -> None:
    given = plane_arguments(shape, dtype, layout)
    exact = results(reference, {name: value.double() for name, value in given.items()})
    for name, found in results(kernels, given, reuse=reuse).items():
        assert found.dtype == dtype
        assert_close(name, found, exact[name], 2e-5 if dtype == torch.float32 else 1e-12, floor=1e-2)


@pytest.mark.usefixtures("either_twin")
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_the_relu_passes_nothing_at_zero(layout: torch.memory_format) -> None:
    given = plane_arguments((2, 20, 4, 4), torch.float64, layout)
    given["gamma"] = torch.zeros(20, dtype=torch.float64)
    given["beta"] = torch.zeros(20, dtype=torch.float64)  # u is 0 everywhere, exactly, though u_dot is not
    for name, value in plane_results(kernels, given).items():
        if name not in ("mean", "rstd", "dual mean", "dual rstd", "k1", "k2"):
            assert torch.count_nonzero(value) == 0, name
    given["beta"] = torch.arange(20, dtype=torch.float64) - 10
    given["y"] = (0 * given["y"] - given["beta"][:, None, None]).contiguous(memory_format=layout)
    for name, value in bias_results(kernels, given).items():
        assert torch.count_nonzero(value) == 0, name


@needs_native
@pytest.mark.parametrize("dual", [False, True])
def test_the_gradient_takes_the_memory_of_what_it_may_reuse(dual: bool) -> None:
    given = plane_arguments((2, 20, 4, 5), torch.float32, torch.channels_last)
    y, beta, bars = given["y"], given["beta"], (given["p_bar"], given["p_bar_dot"])
    operation: Any = kernels.bias_relu_pool_dual_backward if dual else kernels.bias_relu_pool_backward
    arguments = (beta, *bars) if dual else (beta, bars[0])
    kept = operation(y, *arguments)
    version = y._version
    reused = operation(y, *arguments, reuse=True)
    assert reused[0].data_ptr() == y.data_ptr() != kept[0].data_ptr()
    assert y._version > version  # autograd must see that y is no longer what it was
    assert all(torch.equal(a, b) for a, b in zip(kept, reused, strict=True))


@pytest.mark.usefixtures("either_twin")
def test_a_constant_plane_is_finite() -> None:
    given = plane_arguments((2, 20, 4, 5), torch.float32, torch.channels_last)
    given["y"] = torch.full_like(given["y"], 3)
    for name, value in plane_results(kernels, given).items():
        assert torch.isfinite(value).all(), name


def convolution_arguments(
    case: tuple[int, ...], dtype: torch.dtype = torch.float64, layout: torch.memory_format = torch.channels_last
) -> dict[str, Any]:
    batch, channels, height, width, filters, padding = case
    grown = (batch, filters, height + 2 * padding - 2, width + 2 * padding - 2)
    return {
        **{name: draw(batch, channels, height, width, dtype=dtype, layout=layout) for name in ("x", "x_dot")},
        **{name: draw(filters, channels, 3, 3, dtype=dtype) for name in ("weight", "weight_dot")},
        **{name: draw(*grown, dtype=dtype, layout=layout) for name in ("y_bar", "y_bar_dot")},
        "padding": padding,
    }


def convolution_results(ops: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    x, x_dot, weight, weight_dot, y_bar, y_bar_dot, padding = given.values()
    y, y_dot = ops.conv3x3_dual(x, x_dot, weight, weight_dot, padding)
    x_bar, x_bar_dot = ops.conv3x3_dual_input_gradient(y_bar, y_bar_dot, weight, weight_dot, padding)
    image_y, image_y_dot = ops.conv3x3_dual(x, None, weight, weight_dot, padding)
    return {
        "conv3x3": ops.conv3x3(x, weight, padding),
        "input_gradient": ops.conv3x3_input_gradient(y_bar, weight, padding),
        "weight_gradient": ops.conv3x3_weight_gradient(x, y_bar, padding),
        "y": y,
        "y_dot": y_dot,
        "y of images": image_y,
        "y_dot of images": image_y_dot,
        "x_bar": x_bar,
        "x_bar_dot": x_bar_dot,
        "y_dot alone": ops.conv3x3_tangent(x, x_dot, weight, weight_dot, padding),
        "y_dot of images alone": ops.conv3x3_tangent(x, None, weight, weight_dot, padding),
        "x_bar_dot alone": ops.conv3x3_input_gradient_tangent(y_bar, y_bar_dot, weight, weight_dot, padding),
        "weight_bar_dot": ops.conv3x3_dual_weight_gradient(x, x_dot, y_bar, y_bar_dot, padding),
        "weight_bar_dot of images": ops.conv3x3_dual_weight_gradient(x, None, y_bar, y_bar_dot, padding),
    }


@pytest.mark.usefixtures("either_twin")
@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutions_are_what_autograd_makes_of_conv2d(case: tuple[int, ...], layout: torch.memory_format) -> None:
    given = convolution_arguments(case, layout=layout)
    x, x_dot, weight, weight_dot, y_bar, y_bar_dot, padding = given.values()

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=padding)

    def gradients(x: Tensor, weight: Tensor, y_bar: Tensor) -> Any:
        return torch.func.vjp(convolve, x, weight)[1](y_bar)

    y, y_dot = _jvp(convolve, (x, weight), (x_dot, weight_dot))
    still = torch.zeros_like(x)
    _, image_y_dot = _jvp(convolve, (x, weight), (still, weight_dot))
    (x_bar, weight_bar), (x_bar_dot, weight_bar_dot) = _jvp(
        gradients, (x, weight, y_bar), (x_dot, weight_dot, y_bar_dot)
    )
    _, (_, image_weight_dot) = _jvp(gradients, (x, weight, y_bar), (still, weight_dot, y_bar_dot))
    expected = [
        y,
        x_bar,
        weight_bar,
        y,
        y_dot,
        y,
        image_y_dot,
        x_bar,
        x_bar_dot,
        y_dot,
        image_y_dot,
        x_bar_dot,
        weight_bar_dot,
    ]
    found = convolution_results(kernels, given)
    for (name, value), wanted in zip(found.items(), [*expected, image_weight_dot], strict=True):
        assert_close(name, value, wanted, 1e-12)
        backward = name.startswith(("x_bar", "input"))
        weights, model = name.startswith("weight"), y_bar if backward else x
        assert value.is_contiguous() if weights else value.is_contiguous(memory_format=memory_format(model))


@needs_native
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_native_convolutions_in_float32(case: tuple[int, ...]) -> None:
    given = convolution_arguments(case, torch.float32)
    exact = convolution_results(reference, {k: v if k == "padding" else v.double() for k, v in given.items()})
    for name, found in convolution_results(kernels, given).items():
        assert found.dtype == torch.float32
        assert_close(name, found, exact[name], 3e-6)


@needs_native
def test_native_results_do_not_depend_on_threads(threads: Callable[[int], None]) -> None:
    planes = plane_arguments((9, 70, 8, 9), torch.float32, torch.channels_last)
    convolutions = [convolution_arguments(case, torch.float32) for case in CONVOLUTIONS]
    results = []
    for count in (1, 2, 5):
        threads(count)
        found = [*plane_results(kernels, planes).values(), *bias_results(kernels, planes).values()]
        for given in convolutions:
            found += convolution_results(native, given).values()
        results.append(found)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_large_results_are_written_whole_into_memory_that_was_used_before(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    empty = native._empty

    def poisoned(like: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        tensor: Tensor = empty(like, shape).fill_(float("nan"))
        taken.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(native, "_empty", poisoned)
    x, weight = draw(9, 3, 32, 33, dtype=torch.float32), draw(40, 3, 3, 3, dtype=torch.float32)
    for _ in range(2):
        y = kernels.conv3x3(x, weight, 1)
        assert y.nbytes > native._LARGE
        assert_close("y", y, F.conv2d(x, weight, padding=1), 1e-5)
        del y
    assert taken[0] == taken[-1]


def labels_of(kind: str, batch: int, classes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Labels of each kind; the probabilities are not on the simplex, and some are zero."""
    logits = draw(batch, classes, dtype=dtype)
    return {"indices": logits.argmax(1), "probabilities": 1.5 * logits.relu(), "logits": logits}[kind]


def classifier_arguments(case: tuple[int, int, int], kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    batch, width, classes = case
    return {
        **{name: draw(batch, width, dtype=dtype) for name in ("features", "features_dot")},
        **{name: draw(classes, width, dtype=dtype) for name in ("weight", "weight_dot")},
        **{name: draw(classes, dtype=dtype) for name in ("bias", "bias_dot")},
        "labels": labels_of(kind, batch, classes, dtype),
        "label_kind": kind,
    }


def classifier_results(ops: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    """Both operations, by name of the result."""
    primal = ops.linear_cross_entropy(**{name: value for name, value in given.items() if not name.endswith("_dot")})
    dual = ops.linear_cross_entropy_dual(**given)
    names = ["loss", "features_bar", "weight_bar", "bias_bar", "loss_dot", "dual features_bar"]
    names += ["features_bar_dot", "weight_bar_dot", "bias_bar_dot", "labels_bar_dot"]
    results = dict(zip(names, primal + dual, strict=True))
    if given["label_kind"] == "indices":
        assert results.pop("labels_bar_dot") is None
    return results


def classifier_by_autograd(given: dict[str, Any]) -> dict[str, Tensor]:
    labels, kind = given["labels"], given["label_kind"]

    def loss_of(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(features, weight, bias), labels.softmax(1) if kind == "logits" else labels)

    wanted = (0, 1, 2) if kind == "indices" else (0, 1, 2, 3)
    gradients_and_loss: Any = torch.func.grad_and_value(loss_of, argnums=wanted)
    names = ("features", "weight", "bias")
    at, along = (tuple(given[name + ending] for name in names) for ending in ("", "_dot"))
    (gradients, loss), (gradients_dot, loss_dot) = _jvp(lambda *at: gradients_and_loss(*at, labels), at, along)
    results = {"loss": loss, "loss_dot": loss_dot, "dual features_bar": gradients[0]}
    results |= {f"{name}_bar": value for name, value in zip(names, gradients, strict=False)}
    return results | {f"{name}_bar_dot": value for name, value in zip((*names, "labels"), gradients_dot, strict=False)}


@pytest.mark.usefixtures("either_twin")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CLASSIFIERS, ids=str)
def test_the_classifier_is_what_autograd_makes_of_cross_entropy(case: tuple[int, int, int], kind: str) -> None:
    given = classifier_arguments(case, kind)
    found, expected = classifier_results(kernels, given), classifier_by_autograd(given)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(name, found[name], value, 1e-12, floor=1e-3)  # of one class, all gradients are zero


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CLASSIFIERS, ids=str)
def test_the_native_classifier_in_float32(case: tuple[int, int, int], kind: str) -> None:
    given = classifier_arguments(case, kind, torch.float32)
    wide = {k: v.double() if k != "label_kind" and v.is_floating_point() else v for k, v in given.items()}
    exact = classifier_results(reference, wide)
    for name, found in classifier_results(kernels, given).items():
        assert found.dtype == torch.float32
        assert_close(name, found, exact[name], 5e-6, floor=1e-2)


@pytest.mark.usefixtures("either_twin")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_classifier_at_logits_of_ten_thousand(dtype: torch.dtype, kind: str) -> None:
    """Exponentials of such numbers overflow, and their differences underflow to exact zeros."""
    given = classifier_arguments((9, 9, 35), kind, dtype)
    given["features"] = 1e4 * torch.eye(9, dtype=dtype)
    given["weight"] = draw(35, 9).sign().to(dtype)  # so a logit is ±1e4, exactly
    given["weight"][:, :3] = -1
    given["weight"][2, :3] = 1  # one class alone has all the probability
    given["bias"] = torch.zeros(35, dtype=dtype)
    if kind == "logits":
        given["labels"] = 1e4 * given["labels"].sign()
    wide = {k: v.double() if k != "label_kind" and v.is_floating_point() else v for k, v in given.items()}
    expected = classifier_by_autograd(wide)
    for name, found in classifier_results(kernels, given).items():
        assert_close(name, found, expected[name], 2e-6 if dtype == torch.float32 else 1e-12, floor=1e-2)


@needs_native
@pytest.mark.parametrize(
    ("dtype", "least", "tolerance"), [(torch.float32, -78, 1e-6), (torch.float64, -699, 5e-15)], ids=str
)
def test_the_native_exponential_over_all_its_range(dtype: torch.dtype, least: int, tolerance: float) -> None:
    """Through a softmax of two classes: the gradient to the logit x of the wrong one is a share of eˣ / (1 + eˣ)."""
    x = torch.linspace(least, 0, 5001, dtype=torch.float64).to(dtype)
    o, bias = torch.stack([torch.zeros_like(x), x], 1), torch.zeros(2, dtype=dtype)
    right = torch.zeros(len(x), dtype=torch.long)
    native._module().cross_entropy(o, bias, right, None, False, o.new_empty(1), o.new_empty(2), 1)
    exact = x.double().sigmoid() / len(x)  # still a normal number
    assert float((o[:, 1].double() / exact - 1).abs().max()) <= tolerance


@needs_native
def test_the_native_softmax_passes_on_what_is_not_finite() -> None:
    for value in (float("nan"), float("inf")):
        given = classifier_arguments((3, 4, 40), "indices", torch.float32)
        given["bias"][37] = value
        for name, found in classifier_results(kernels, given).items():
            assert not torch.isfinite(found).all(), name


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_the_native_softmax_does_not_depend_on_threads(kind: str) -> None:
    """The products are torch's, and may."""
    o, o_dot, labels = draw(2500, 40), draw(2500, 40), labels_of(kind, 2500, 40)
    bias, bias_dot, given = draw(40), draw(40), native._labels(labels, cast(LabelKind, kind))
    results = []
    for threads in (1, 2, 3):
        primal = [o.clone(), o.new_empty(1), o.new_empty(40)]
        dual = [o.clone(), o_dot.clone(), o.new_empty(1), o.new_empty(40), torch.empty_like(o)]
        native._module().cross_entropy(primal[0], bias, *given, *primal[1:], threads)
        outputs = (*dual[2:4], None if kind == "indices" else dual[4].fill_(0))
        native._module().cross_entropy_dual(*dual[:2], bias, bias_dot, *given, *outputs, threads)
        results.append([*primal, *dual[: 4 if kind == "indices" else 5]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def refused(op: str, reason: str, *arguments: Any) -> Any:
    return pytest.param(op, arguments, reason, id=f"{op}-{reason.replace(' ', '-')}")


ZEROS, CHANNEL, WEIGHT = torch.zeros(2, 4, 6, 6), torch.zeros(4), torch.zeros(5, 4, 3, 3)
LINEAR = (torch.zeros(6, 5), torch.zeros(3, 5), torch.zeros(3))
SOFT = torch.zeros(6, 3)


@pytest.mark.usefixtures("either_twin")
@pytest.mark.parametrize(
    ("op", "arguments", "reason"),
    [
        refused("norm_relu_pool", "strides", ZEROS[:, :, ::2], CHANNEL, CHANNEL, EPS),
        refused("norm_relu_pool", "beta of shape", ZEROS, CHANNEL, torch.zeros(3), EPS),
        refused("norm_relu_pool", "at least 2×2", ZEROS[:, :, :1].contiguous(), CHANNEL, CHANNEL, EPS),
        refused("norm_relu_pool", "float64", ZEROS, CHANNEL.double(), CHANNEL, EPS),
        refused("norm_relu_pool", "int64", ZEROS.long(), CHANNEL.long(), CHANNEL.long(), EPS),
        refused("norm_relu_pool", "one device", ZEROS, CHANNEL.to("meta"), CHANNEL, EPS),
        refused("norm_relu_pool", "requires grad", ZEROS, CHANNEL.clone().requires_grad_(), CHANNEL, EPS),
        refused(
            "norm_relu_pool_backward",
            "p_bar of shape",
            *(ZEROS, torch.zeros(2, 4), torch.zeros(2, 4), CHANNEL, CHANNEL, ZEROS),
        ),
        refused(
            "norm_relu_pool_dual",
            "y_dot channels_last",
            *(ZEROS.contiguous(memory_format=torch.channels_last), ZEROS, CHANNEL, CHANNEL, CHANNEL, CHANNEL, EPS),
        ),
        refused("bias_relu_pool", "strides", ZEROS[:, :, ::2], CHANNEL),
        refused("bias_relu_pool", "beta of shape", ZEROS, torch.zeros(2, 4)),
        refused("bias_relu_pool", "at least 2×2", ZEROS[:, :, :, :1].contiguous(), CHANNEL),
        refused("bias_relu_pool", "requires grad", ZEROS.clone().requires_grad_(), CHANNEL),
        refused("bias_relu_pool_backward", "p_bar of shape", ZEROS, CHANNEL, ZEROS),
        refused("bias_relu_pool_dual", "beta_dot of floating dtype", ZEROS, ZEROS, CHANNEL, CHANNEL.double()),
        refused(
            "bias_relu_pool_dual_backward",
            "p_bar_dot channels_last",
            *(ZEROS.contiguous(memory_format=torch.channels_last), CHANNEL),
            *(ZEROS[:, :, :3, :3].contiguous(memory_format=torch.channels_last), ZEROS[:, :, :3, :3].contiguous()),
        ),
        refused("conv3x3", "strides", ZEROS.transpose(2, 3), WEIGHT, 1),
        refused("conv3x3", "strides", ZEROS, WEIGHT.contiguous(memory_format=torch.channels_last), 1),
        refused("conv3x3", "as many channels", ZEROS, torch.zeros(4, 5, 3, 3), 1),
        refused("conv3x3", "leaves nothing", ZEROS[:, :, :2].contiguous(), WEIGHT, 0),
        refused("conv3x3_dual", "x_dot of shape", ZEROS, ZEROS[:1], WEIGHT, WEIGHT, 1),
        refused("conv3x3_tangent", "x_dot of shape", ZEROS, ZEROS[:1], WEIGHT, WEIGHT, 1),
        refused("conv3x3_input_gradient", "as many channels", ZEROS, WEIGHT, 1),
        refused("conv3x3_weight_gradient", "y_bar of shape", ZEROS, ZEROS, 0),
        refused(
            "linear_cross_entropy", "found", ZEROS[0, 0], torch.zeros(3, 6), torch.zeros(3), torch.zeros(6), "indices"
        ),
        refused(
            "linear_cross_entropy",
            "weight of shape",
            ZEROS[0, 0],
            WEIGHT[0, 0],
            torch.zeros(3),
            torch.zeros(6),
            "indices",
        ),
        refused("linear_cross_entropy", "at least one", ZEROS[0, 0, :0], *LINEAR[1:], torch.zeros(0), "indices"),
        refused("linear_cross_entropy", "features contiguous", torch.zeros(5, 6).T, *LINEAR[1:], SOFT, "logits"),
        refused("linear_cross_entropy", "found 0 … 3", *LINEAR, torch.tensor([0, 1, 2, 3, 0, 1]), "indices"),
        refused("linear_cross_entropy", "found -1 … 0", *LINEAR, torch.tensor([0, -1, 0, 0, 0, 0]), "indices"),
        refused("linear_cross_entropy", "int32", *LINEAR, torch.zeros(6, dtype=torch.int32), "indices"),
        refused("linear_cross_entropy", "int64 indices .*float32", *LINEAR, SOFT, "indices"),
        refused("linear_cross_entropy", "probabilities of shape", *LINEAR, torch.zeros(6), "probabilities"),
        refused("linear_cross_entropy", "probabilities of floating", *LINEAR, SOFT.long(), "probabilities"),
        refused("linear_cross_entropy", "logits contiguous", *LINEAR, torch.zeros(3, 6).T, "logits"),
        refused("linear_cross_entropy", "logits that requires", *LINEAR, SOFT.clone().requires_grad_(), "logits"),
        refused(
            "linear_cross_entropy_dual",
            "weight_dot of shape",
            *(LINEAR[0], LINEAR[0], *LINEAR[1:], torch.zeros(4, 5), torch.zeros(3), SOFT, "logits"),
        ),
    ],
)
def test_refuses(op: str, arguments: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{op}: .*{reason}"):
        getattr(kernels, op)(*arguments)


def block_arguments(case: tuple[int, ...], dtype: torch.dtype, images: bool) -> dict[str, Any]:
    given = convolution_arguments(case, dtype if dtype != torch.bfloat16 else torch.float32)
    batch, _, height, width, filters, padding = case
    sides = [(side + 2 * padding - 2) // 2 for side in (height, width)]
    wide = torch.float32 if dtype == torch.bfloat16 else dtype

    def planes(tensor: Tensor) -> Tensor:
        return tensor.to(dtype, memory_format=torch.channels_last)

    return {
        "x": planes(given["x"]),
        "x_dot": None if images else planes(given["x_dot"]),
        "parameters": [given["weight"], given["weight_dot"], *(draw(filters, dtype=wide) for _ in range(4))],
        "bars": [planes(draw(batch, filters, *sides, dtype=wide)) for _ in range(2)],
        "padding": padding,
    }


def block_results(ops: Any, given: dict[str, Any], precision: Any = "fp32", known: bool = False) -> dict[str, Tensor]:
    x, x_dot, parameters, bars, padding = given.values()
    y = ops.conv3x3(x, parameters[0], padding, precision) if known else None
    p, p_dot, activations = ops.conv_norm_relu_pool_dual(x, x_dot, *parameters, padding, EPS, precision, y)
    forward = {"p": p, "p_dot": p_dot, "y_dot": activations[3].clone(), "mean": activations[4], "k2": activations[7]}
    back = ops.conv_norm_relu_pool_dual_backward(activations, *parameters, *bars, padding, precision, x_dot is not None)
    names = ("x_bar", "x_bar_dot", "weight_bar_dot", "gamma_bar_dot", "beta_bar_dot")
    return forward | {name: value for name, value in zip(names, back, strict=True) if value is not None}


BLOCKS = [case for case in CONVOLUTIONS if min(case[2:4]) + 2 * case[5] - 2 >= 2]


@pytest.mark.usefixtures("either_twin")
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_a_whole_block_is_its_parts(case: tuple[int, ...], images: bool, known: bool) -> None:
    given = block_arguments(case, torch.float64, images)
    expected = block_results(reference, given)
    for name, found in block_results(kernels, given, known=known).items():
        assert_close(name, found, expected[name], 1e-11, floor=1e-4)
    assert ("x_bar" in expected) != images


@pytest.mark.usefixtures("either_twin")
def test_activations_of_a_block_are_used_up() -> None:
    given = block_arguments(BLOCKS[0], torch.float64, False)
    x, x_dot, parameters, bars, padding = given.values()
    activations = kernels.conv_norm_relu_pool_dual(x, x_dot, *parameters, padding, EPS)[2]
    kernels.conv_norm_relu_pool_dual_backward(activations, *parameters, *bars, padding)
    assert activations == []
    with pytest.raises(ValueError, match=r"^conv_norm_relu_pool_dual_backward: .*used twice"):
        kernels.conv_norm_relu_pool_dual_backward(activations, *parameters, *bars, padding)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_bfloat16_planes_have_float32_sums(case: tuple[int, ...], images: bool) -> None:
    given = block_arguments(case, torch.bfloat16, images)
    exact = {
        **{name: given[name] for name in ("x_dot", "padding")},
        "x": given["x"].double(),
        **{name: [each.double() for each in given[name]] for name in ("parameters", "bars")},
    }
    if not images:
        exact["x_dot"] = given["x_dot"].double()
    exact = {name: exact[name] for name in given}  # in the order of the arguments
    expected = block_results(reference, exact)
    for name, found in block_results(kernels, given, "bf16").items():
        assert found.dtype == (torch.bfloat16 if found.dim() == 4 and found.shape[2:] != (3, 3) else torch.float32), (
            name
        )
        assert_close(name, found.double(), expected[name], 0.3, floor=0.3)


@pytest.mark.parametrize("planes", [torch.float32, torch.bfloat16], ids=str)
def test_bf16_rounds_factors_and_adds_up_in_float32(planes: torch.dtype) -> None:
    given = convolution_arguments((2, 40, 6, 5, 33, 1), torch.float32)
    x, weight, y_bar = (given[name].bfloat16().float() for name in ("x", "weight", "y_bar"))
    for found, expected in (
        (kernels.conv3x3(given["x"].to(planes), given["weight"], 1, "bf16"), F.conv2d(x, weight, padding=1)),
        (
            kernels.conv3x3_weight_gradient(given["x"].to(planes), given["y_bar"].to(planes), 1, "bf16"),
            conv2d_weight(x, (33, 40, 3, 3), y_bar, padding=1),
        ),
    ):
        rounded = found.dtype == torch.bfloat16
        assert_close("result", found.float(), expected, 4e-3 if rounded else 1e-6)
