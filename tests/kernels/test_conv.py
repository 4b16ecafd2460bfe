"""Check the convolutions: the reference against autograd in float64, the other back ends against the reference."""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from bench import kernels as bench
from bench.kernels import READ_IN_PARTS
from bench.settings import Setting
from mtt_fast import ConvNet, kernels
from mtt_fast.kernels import Affine, PackedWeight, PartialPlanes, Precision, WeightPlace, native, reference
from mtt_fast.kernels.native import extension, planes
from mtt_fast.kernels.triton import cudnn
from mtt_fast.kernels.triton.planes import Planes, stacked
from mtt_fast.kernels.types import memory_format
from mtt_fast.testing import assert_close
from tests.kernels.compiling import (
    SHARED,
    WIDTH,
    check,
    check_products,
    compile_launch,
    each_architecture,
    each_precision,
    meta,
    needs_triton,
    planes_of,
    recording,
)
from tests.kernels.helpers import (
    CONVOLUTIONS,
    EPS,
    FORMATS,
    assert_same_by_any_threads,
    convolution_arguments,
    draw,
    jvp,
    refused,
)
from tests.kernels.triton_comparison import cases_of, compare, each_part


def convolution_results(ops: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    x, x_dot, weight, weight_dot, y_bar, y_bar_dot, padding = given.values()
    y, y_dot = ops.conv3x3_dual(x, x_dot, weight, weight_dot, padding)
    x_bar, x_bar_dot = ops.conv3x3_dual_input_gradient(y_bar, y_bar_dot, weight, weight_dot, padding)
    image_y, image_y_dot = ops.conv3x3_dual(x, None, weight, weight_dot, padding)
    return {
        "conv3x3": ops.conv3x3(x, weight, padding),
        "input_gradient": ops.conv3x3_input_gradient(y_bar, weight, padding),
        "weight_gradient": ops.conv3x3_weight_gradient(x, y_bar, padding).sum(0),
        "y": y,
        "y_dot": y_dot,
        "y of images": image_y,
        "y_dot of images": image_y_dot,
        "x_bar": x_bar,
        "x_bar_dot": x_bar_dot,
        "y_dot alone": ops.conv3x3_tangent(x, x_dot, weight, weight_dot, padding),
        "y_dot of images alone": ops.conv3x3_tangent(x, None, weight, weight_dot, padding),
        "x_bar_dot alone": ops.conv3x3_input_gradient_tangent(y_bar, y_bar_dot, weight, weight_dot, padding),
        "weight_bar_dot": ops.conv3x3_dual_weight_gradient(x, x_dot, y_bar, y_bar_dot, padding).sum(0),
        "weight_bar_dot of images": ops.conv3x3_dual_weight_gradient(x, None, y_bar, y_bar_dot, padding).sum(0),
    }


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutions_are_what_autograd_makes_of_conv2d(case: tuple[int, ...], layout: torch.memory_format) -> None:
    given = convolution_arguments(case, layout=layout)
    x, x_dot, weight, weight_dot, y_bar, y_bar_dot, padding = given.values()

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=padding)

    def gradients(x: Tensor, weight: Tensor, y_bar: Tensor) -> Any:
        return torch.func.vjp(convolve, x, weight)[1](y_bar)

    y, y_dot = jvp(convolve, (x, weight), (x_dot, weight_dot))
    still = torch.zeros_like(x)
    _, image_y_dot = jvp(convolve, (x, weight), (still, weight_dot))
    (x_bar, weight_bar), (x_bar_dot, weight_bar_dot) = jvp(
        gradients, (x, weight, y_bar), (x_dot, weight_dot, y_bar_dot)
    )
    _, (_, image_weight_dot) = jvp(gradients, (x, weight, y_bar), (still, weight_dot, y_bar_dot))
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
    actual = convolution_results(kernels, given)
    for (name, value), by_autograd in zip(actual.items(), [*expected, image_weight_dot], strict=True):
        assert_close(name, value, by_autograd, 1e-12)
        backward = name.startswith(("x_bar", "input"))
        weights, model = name.startswith("weight"), y_bar if backward else x
        assert value.is_contiguous() if weights else value.is_contiguous(memory_format=memory_format(model))


@pytest.mark.native
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_native_convolutions_in_float32(case: tuple[int, ...]) -> None:
    given = convolution_arguments(case, torch.float32)
    expected = convolution_results(reference, {k: v if k == "padding" else v.double() for k, v in given.items()})
    for name, actual in convolution_results(kernels, given).items():
        assert actual.dtype == torch.float32
        assert_close(name, actual, expected[name], 3e-6)


@pytest.mark.native
def test_native_results_do_not_depend_on_threads() -> None:
    every = [convolution_arguments(case, torch.float32) for case in CONVOLUTIONS]
    assert_same_by_any_threads(lambda: [v for given in every for v in convolution_results(native, given).values()])


@pytest.mark.native
def test_large_results_are_written_whole_into_memory_that_was_used_before(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    empty = planes._empty

    def poisoned(like: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        tensor: Tensor = empty(like, shape).fill_(float("nan"))
        taken.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(planes, "_empty", poisoned)
    x, weight = draw(9, 3, 32, 33, dtype=torch.float32), draw(40, 3, 3, 3, dtype=torch.float32)
    for _ in range(2):
        y = kernels.planes_of(kernels.conv3x3(x, weight, 1))
        assert y.nbytes > extension.LARGE
        assert_close("y", y, F.conv2d(x, weight, padding=1), 1e-5)
        del y
    assert taken[0] == taken[-1]


@pytest.mark.parametrize("planes", [torch.float32, torch.bfloat16], ids=str)
def test_bf16_rounds_factors_and_adds_up_in_float32(planes: torch.dtype) -> None:
    given = convolution_arguments((2, 40, 6, 5, 33, 1), torch.float32)
    x, weight, y_bar = (given[name].bfloat16().float() for name in ("x", "weight", "y_bar"))
    for actual, expected in (
        (
            kernels.planes_of(kernels.conv3x3(given["x"].to(planes), given["weight"], 1, "bf16")),
            F.conv2d(x, weight, padding=1),
        ),
        (
            kernels.conv3x3_weight_gradient(given["x"].to(planes), given["y_bar"].to(planes), 1, "bf16").sum(0),
            conv2d_weight(x, (33, 40, 3, 3), y_bar, padding=1),
        ),
    ):
        rounded = actual.dtype == torch.bfloat16
        assert_close("result", actual.float(), expected, 4e-3 if rounded else 1e-6)


def test_every_convolution_rounds_all_its_factors() -> None:
    given = convolution_arguments((2, 40, 6, 5, 33, 1), torch.float32)
    rounded = {name: value if name == "padding" else value.bfloat16().float() for name, value in given.items()}
    names = [name for name in dir(kernels) if name.startswith("conv3x3")]
    in_bf16 = SimpleNamespace(**{name: functools.partial(getattr(kernels, name), precision="bf16") for name in names})
    expected = convolution_results(reference, rounded)
    for name, actual in convolution_results(in_bf16, given).items():
        assert_close(name, actual, expected[name], 1e-6)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("padding", [1, 3])
def test_cudnn_makes_one_product_of_batches_that_lie_one_behind_the_other(
    padding: int, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples: list[int] = []

    def noting(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        samples.append(len(x))
        weight_bar: Tensor = conv2d_weight(x, *arguments, **options)
        return weight_bar

    x, x_dot = draw(6, 4, 5, 7, layout=layout).chunk(2)
    y_bar_dot, y_bar = draw(6, 3, 3 + 2 * padding, 5 + 2 * padding, layout=layout).chunk(2)
    expected = reference.conv3x3_dual_weight_gradient(x, x_dot, y_bar, y_bar_dot, padding)
    monkeypatch.setattr(cudnn, "conv2d_weight", noting)
    for apart in (False, True):
        bars = (y_bar.clone(), y_bar_dot) if apart else (y_bar, y_bar_dot)
        actual = cudnn.conv3x3_dual_weight_gradient(x, x_dot, *bars, padding, "fp32")
        assert_close("weight_bar_dot", actual, expected, 1e-13)
    assert samples == [6, 3, 3]


def test_a_thread_computes_with_its_own_settings_of_cudnn() -> None:
    backends: Any = torch.backends
    conv = backends.cudnn.conv
    before, seen = conv.fp32_precision, []

    def in_tf32() -> None:
        with cudnn._precision("tf32"):
            seen.append(conv.fp32_precision)

    with ThreadPoolExecutor(1) as pool:
        with cudnn._precision("fp32"):
            other = pool.submit(in_tf32)
            wait([other], 0.2)
            seen.append(conv.fp32_precision)
        other.result(10)
    assert seen == ["ieee", "tf32"]
    assert conv.fp32_precision == before


def test_batches_are_stacked_where_the_second_begins_at_the_end_of_the_first() -> None:
    for layout in FORMATS:
        both = draw(6, 2, 4, 5, layout=layout)
        first, second = both.chunk(2)
        view = stacked(first, second)
        assert view is not None
        assert view.data_ptr() == both.data_ptr()
        assert_close("both", view, both, 0)
        for other in (first, second.clone(), second[:2], both[2:5], second.transpose(2, 3), second.float()):
            assert stacked(first, other) is None
        assert stacked(second, first) is None
    x, y = Planes.from_tensors(first).empty_pair(first, 7, 2, 1)
    assert x.shape == y.shape == (3, 7, 2, 1)
    assert stacked(x, y) is not None


@needs_triton
def test_a_pair_of_inputs_has_a_pair_of_results() -> None:
    """Check that results lie one after the other: the dual weight gradient then finds ȳ̇ and ȳ, written over ẏ and y, so too."""
    from mtt_fast.kernels.triton import channels_last_planes, norm, norm_single_pass, norm_three_passes, weights
    from mtt_fast.kernels.triton.conv import POINTERS

    with recording([norm, norm_single_pass, norm_three_passes, channels_last_planes], "sm_90"):
        y, affine = meta(2, 16, 8, 8, form=torch.channels_last), Affine(meta(16), meta(16))
        x, x_dot, _ = norm.norm_relu_pool_dual(y, torch.empty_like(y), affine, affine, EPS)
    assert stacked(x, x_dot) is not None
    for inputs, paired in (((x, x_dot), True), ((x, torch.empty_like(x)), False), ((x, None), False)):
        weight = meta(8, 16, 3, 3)
        with recording([weights], "sm_90"):
            results = POINTERS._replace(convolve=lambda *arguments: arguments[5:7])
            y, y_dot = results.conv3x3_dual(*inputs, weight, weight, 1, "tf32")
        assert isinstance(y, Tensor)
        assert isinstance(y_dot, Tensor)
        assert (stacked(y_dot, y) is not None) == paired


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_add_planes_rounds_the_sum_of_parts_once_and_stores_it(dtype: torch.dtype, layout: torch.memory_format) -> None:
    parts = torch.stack([draw(3, 5, 4, 7, dtype=torch.float32) for _ in range(9)])
    parts = torch.stack([part.contiguous(memory_format=layout) for part in parts])
    whole = draw(3, 5, 4, 7, dtype=dtype, layout=layout)
    planes = torch.full_like(whole, float("nan"))
    expected = functools.reduce(torch.add, parts).to(dtype)  # one after the other
    assert not torch.equal(parts.double().sum(0).to(dtype), expected) or dtype == torch.float16
    actual = kernels.add_planes(whole, PartialPlanes(parts, planes))
    assert actual[0] is whole
    assert actual[1] is planes
    assert torch.equal(planes, expected)
    assert planes.is_contiguous(memory_format=layout)
    assert kernels.add_planes(whole)[0] is whole


@pytest.mark.parametrize(
    "operation", [name for name in READ_IN_PARTS if name != "add_planes"] + ["bias_relu_pool_dual"]
)
def test_what_follows_a_convolution_takes_its_parts(operation: str) -> None:
    """Take a CPU's back ends, which add parts up before; Triton's kernels are compared interpreted."""
    setting = Setting(ConvNet(3, 2, 8, 4, 1), images=2, steps=1, batch=2)
    case = next(each for each in bench.operations(setting, torch.device("cpu")) if each.name == operation)
    places = READ_IN_PARTS.get(operation, {0: 3, 1: 6})
    with patch.dict(READ_IN_PARTS, {operation: places}):
        arguments = bench.in_parts(operation, case.arguments)
    read = {place: arguments[place] for place in places}
    whole = [
        reference.add_planes(each._replace(planes=torch.empty_like(each.planes)))[0] if place in read else each
        for place, each in enumerate(arguments)
    ]
    expected, actual = (bench.tensors_of(getattr(kernels, operation)(*given)) for given in (whole, arguments))
    assert all(itertools.starmap(torch.equal, zip(actual, expected, strict=True)))
    for place, each in read.items():
        assert torch.equal(each.planes, whole[place]), "the sum is stored for those that read it afterwards"


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_a_layer_tells_the_size_of_its_result(padding: int) -> None:
    layer = kernels.ConvLayer(4, 9, 6, 5, padding)
    y = F.conv2d(torch.zeros(2, layer.channels, layer.height, layer.width), torch.zeros(5, 4, 3, 3), padding=padding)
    assert y.shape == (2, layer.filters, layer.out_height, layer.out_width)


ZEROS, BAR, WEIGHT = torch.zeros(2, 4, 6, 6), torch.zeros(2, 5, 6, 6), torch.zeros(5, 4, 3, 3)
LAST = ZEROS.contiguous(memory_format=torch.channels_last)
PARTS = torch.zeros(3, 2, 6, 6, 4).permute(0, 1, 4, 2, 3)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize(
    ("op", "arguments", "reason"),
    [
        refused("conv3x3", "strides", ZEROS.transpose(2, 3), WEIGHT, 1),
        refused("conv3x3", "strides", ZEROS, WEIGHT.contiguous(memory_format=torch.channels_last), 1),
        refused("conv3x3", "as many channels", ZEROS, torch.zeros(4, 5, 3, 3), 1),
        refused("conv3x3", "3×3 weights", ZEROS, torch.zeros(*WEIGHT.shape[:2], 5, 5), 1),
        refused("conv3x3", "at least one sample", ZEROS[:0], WEIGHT, 1),
        refused("conv3x3", "at least one sample", ZEROS[:, :0], WEIGHT[:, :0], 1),
        refused("conv3x3_input_gradient", "at least one sample", BAR, WEIGHT[:, :0], 1),
        refused("conv3x3_weight_gradient", "at least one sample", ZEROS[:0], BAR[:0], 1),
        refused("conv3x3_weight_gradient", "at least one sample", ZEROS, BAR[:, :0], 1),
        refused("conv3x3", "leaves nothing", ZEROS[:, :, :2].contiguous(), WEIGHT, 0),
        refused("conv3x3", "padding -1 leaves nothing", ZEROS, WEIGHT, -1),
        refused("conv3x3_dual", "x_dot of shape", ZEROS, ZEROS[:1], WEIGHT, WEIGHT, 1),
        refused("conv3x3_tangent", "x_dot of shape", ZEROS, ZEROS[:1], WEIGHT, WEIGHT, 1),
        refused("conv3x3_dual", "weight_dot of shape", ZEROS, ZEROS, WEIGHT, WEIGHT[:1], 1),
        refused("conv3x3_tangent", "weight_dot of shape", ZEROS, ZEROS, WEIGHT, WEIGHT[:1], 1),
        refused("conv3x3_dual_input_gradient", "y_bar_dot of shape", BAR, BAR[:1], WEIGHT, WEIGHT, 1),
        refused("conv3x3_dual_input_gradient", "weight_dot of shape", BAR, BAR, WEIGHT, WEIGHT[:, :1].contiguous(), 1),
        refused("conv3x3_input_gradient_tangent", "y_bar_dot of shape", BAR, BAR[:1], WEIGHT, WEIGHT, 1),
        refused(
            "conv3x3_input_gradient_tangent", "weight_dot of shape", BAR, BAR, WEIGHT, WEIGHT[:, :1].contiguous(), 1
        ),
        refused("conv3x3_input_gradient", "as many channels", ZEROS, WEIGHT, 1),
        refused("conv3x3_input_gradient", "padding 4 leaves nothing", ZEROS, WEIGHT.transpose(0, 1).contiguous(), 4),
        refused("conv3x3_weight_gradient", "y_bar of shape", ZEROS, ZEROS, 0),
        refused("conv3x3_dual_weight_gradient", "x_dot of shape", ZEROS, ZEROS[:1], ZEROS, ZEROS, 1),
        refused("conv3x3_dual_weight_gradient", "y_bar_dot of shape", ZEROS, ZEROS, BAR, BAR[:1], 1),
        refused("add_planes", "planes 2 of shape", ZEROS, PartialPlanes(PARTS, LAST[:1])),
        refused("add_planes", "planes 2 of floating dtype", LAST, PartialPlanes(PARTS, LAST.half())),
        refused("add_planes", r"parts of planes 1 \(S, B, C, H, W\)", PartialPlanes(PARTS[0], LAST)),
        refused("add_planes", r"parts of planes 1 \(S, B, C, H, W\)", PartialPlanes(PARTS[:0], LAST)),
        refused("add_planes", "a part of planes 1 of shape", PartialPlanes(PARTS[:, :1], LAST)),
        refused("add_planes", "a part of planes 1 of floating dtype", PartialPlanes(PARTS.half(), LAST.half())),
        refused("add_planes", "a part of planes 1 contiguous_format", PartialPlanes(PARTS, ZEROS)),
        refused("add_planes", "one after the other", PartialPlanes(PARTS[::2], LAST)),
        refused(
            "norm_relu_pool", "a part of y of shape", PartialPlanes(PARTS[:, :1], LAST), Affine(*torch.zeros(2, 4)), EPS
        ),
    ],
)
def test_refuses(op: str, arguments: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{op}: .*{reason}"):
        getattr(kernels, op)(*arguments)


@pytest.mark.slow
def test_triton_equals_the_reference_interpreted() -> None:
    lines = compare("conv", "cpu")
    assert len([line for line in lines if line.startswith("refused: expected")]) == 3
    for operation in ("dual", "dual_input_gradient", "tangent", "input_gradient_tangent", "dual_weight_gradient"):
        for case in ("float32", "float64", "'tma'"):
            assert any(f"'conv3x3_{operation}'" in line and case in line for line in lines)
    for case in ("'cudnn'", "'tma'"):
        assert any(case in line and "'ẋ in pairs'" in line for line in lines)


@pytest.mark.gpu
@each_part("conv")
def test_triton_equals_the_reference_on_a_gpu(part: int) -> None:
    compare("conv", "cuda", part)


def test_a_gpu_compares_every_precision_by_every_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    cases: Any = cases_of("conv", "cuda")
    compared = {(case.func.__name__, case.args[2]) for case in cases if len(case.args) > 1}
    assert compared >= {("convolutions", precision) for precision in get_args(Precision)}
    assert compared >= {("boxed_convolutions", precision) for precision in ("tf32", "bf16")}


@pytest.mark.slow
@each_architecture
@each_precision
def test_triton_compiles(architecture: str, precision: Any, tmp_path: Path) -> None:
    """Compile for the first two blocks of 32×32 images and of 128×128 images, once in the other format."""
    from mtt_fast.kernels.triton import implicit_gemm, weights
    from mtt_fast.kernels.triton.conv import POINTERS

    with recording([implicit_gemm, weights], architecture) as launches:
        for side, form in ((32, torch.channels_last), (128, torch.channels_last)):
            x, y = (planes_of(precision, 4, channels, side, side, form=form) for channels in (3, WIDTH))
            weight = meta(WIDTH, 3, 3, 3)
            POINTERS.conv3x3_dual(x, None, weight, weight, 1, precision)
            POINTERS.conv3x3_input_gradient_tangent(y, y, weight, weight, 1, precision)
            POINTERS.conv3x3_dual_weight_gradient(x, None, y, y, 1, precision)
            x, weight = planes_of(precision, 4, WIDTH, side // 2, side // 2, form=form), meta(WIDTH, WIDTH, 3, 3)
            POINTERS.conv3x3_dual(x, x, weight, weight, 1, precision)  # the input gradient is the same kernel
            POINTERS.conv3x3_tangent(x, x, weight, weight, 1, precision)
            POINTERS.conv3x3_dual_weight_gradient(x, x, x, x, 1, precision)
    products = [launch for launch in launches if "PRECISION" in launch.constants]
    assert len(products) == 2 * 6
    check_products(products, architecture, tmp_path, precision)

    with recording([implicit_gemm, weights], architecture) as launches:
        x = planes_of(precision, 4, WIDTH, 16, 16, form=torch.contiguous_format)
        POINTERS.conv3x3_dual(x, x, weight, weight, 1, precision)
        POINTERS.conv3x3_dual_weight_gradient(x, x, x, x, 1, precision)
    check(launches, architecture, tmp_path)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (12, 0)])
def test_the_most_shared_memory_is_that_of_consumer_cards(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compile for RTX cards the products that take the most of all kernels that were compiled for these."""
    from mtt_fast.kernels.triton import implicit_gemm, launch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    rows = launch.architecture(torch.device("cuda"))
    x, weight = planes_of("tf32", 4, WIDTH, 16, 16), meta(WIDTH, 3, 3, WIDTH)
    with recording([implicit_gemm], rows) as launches:
        implicit_gemm.convolve("conv3x3_dual", x, x, weight, weight, x, x, 1, "tf32")
        implicit_gemm.correlate("conv3x3_dual_weight_gradient", x, x, x, x, 1, "tf32")
    card = "sm_{}{}".format(*capability)
    assert 48 < max(compile_launch(each, card, tmp_path).shared / 1024 for each in launches) <= SHARED[rows]


@each_architecture
def test_the_assembler_loses_no_constant(architecture: str, tmp_path: Path) -> None:
    """Compile the kernels that were wrong on an H200 (docs/gpu.md, Faults), and others of few channels."""
    from mtt_fast.kernels.triton import implicit_gemm, weights
    from mtt_fast.kernels.triton.conv import POINTERS

    with recording([implicit_gemm, weights], architecture) as launches:
        for form, padding in itertools.product((torch.contiguous_format, torch.channels_last), (1, 3)):
            y_bar, weight = meta(2, 3, 2 + 2 * padding, 3 + 2 * padding, form=form), meta(3, 1, 3, 3)
            POINTERS.conv3x3_input_gradient(y_bar, weight, padding, "fp32")
            POINTERS.conv3x3_dual_input_gradient(y_bar, y_bar, weight, weight, padding, "fp32")
    products = [launch for launch in launches if "PRECISION" in launch.constants]
    assert len(products) == 8
    check(products, architecture, tmp_path)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_boxes_compile(architecture: str, precision: Any, tmp_path: Path) -> None:
    """Compile for the shapes of the measured settings, with the table's tiles, and once for odd sizes."""
    from mtt_fast.kernels.triton import partial_planes, tma_convolve, tma_correlate, tma_descriptors, weights
    from mtt_fast.kernels.triton.conv import TMA

    weight = meta(WIDTH, WIDTH, 3, 3)
    with recording([tma_descriptors, tma_convolve, tma_correlate, partial_planes, weights], architecture) as launches:
        for samples, side in ((20, 64), (20, 32), (20, 16), (20, 8), (100, 16), (100, 8), (10, 16), (10, 8)):
            x = planes_of(precision, samples, WIDTH, side, side)
            TMA.conv3x3(x, weight, 1, precision)
            partial_planes.add_planes(*TMA.conv3x3_dual(x, x, weight, weight, 1, precision))
            TMA.conv3x3_tangent(x, x, weight, weight, 1, precision)
            TMA.conv3x3_input_gradient_tangent(x, x, weight, weight, 1, precision)
            TMA.conv3x3_dual_weight_gradient(x, x, x, x, 1, precision)
        TMA.conv3x3_weight_gradient(x, x, 1, precision)
        odd, few = planes_of(precision, 3, 104, 9, 13), meta(104, 104, 3, 3)
        TMA.conv3x3_dual(odd, None, few, few, 1, precision)
    once = {repr((launch.kernel, sorted(launch.constants.items()))): launch for launch in launches}
    usages = check(list(once.values()), architecture, tmp_path)
    products = [usage for usage in usages if usage.kernel.startswith(("_convolve", "_correlate"))]
    assert len(products) >= 5
    assert all(usage.tensor_cores and usage.asynchronous and usage.boxes for usage in products), products
    if architecture == "sm_90":  # tensor cores read both factors where the hardware put them
        assert all(usage.through_registers == 0 for usage in products), products


@needs_triton
def test_boxes_are_taken_where_the_table_says_so_and_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from mtt_fast.kernels.triton import dispatch

    taken: list[str] = []

    def backend(name: str) -> Any:
        return SimpleNamespace(conv3x3_dual=lambda *arguments: taken.append(name))

    monkeypatch.setattr(dispatch, "BACKENDS", {name: backend(name) for name in dispatch.BACKENDS})
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    last, weight = torch.channels_last, torch.zeros(128, 128, 3, 3)
    few, many = (torch.zeros(count, 128, 16, 16).contiguous(memory_format=last) for count in (10, 300))
    odd = torch.zeros(10, 126, 16, 16).contiguous(memory_format=last)
    for x, x_dot, factors in (
        (few, few, weight),
        (few, None, weight),
        (many, many, weight),  # more samples than were measured
        (few.contiguous(), few.contiguous(), weight),
        (odd, odd, torch.zeros(128, 126, 3, 3)),  # no whole 16 bytes
        (few, torch.zeros(few.numel() + 1)[1:].view(10, 16, 16, 128).permute(0, 3, 1, 2), weight),  # begins between
    ):
        dispatch.dispatched("conv3x3_dual")(x, x_dot, factors, factors, 1, precision="tf32")
    assert taken == ["tma", "tma", "triton", "triton", "triton", "triton"]
    dispatch.dispatched("conv3x3_dual")(
        few.double(), few.double(), weight.double(), weight.double(), 1, precision="tf32"
    )
    assert taken[-1] == "cudnn"


@needs_triton
@pytest.mark.parametrize("padding", [0, 3])
def test_the_table_is_asked_for_the_shape_of_the_result(padding: int) -> None:
    from mtt_fast.kernels.triton.dispatch import result_planes

    x, weight = draw(2, 3, 5, 7), draw(4, 3, 3, 3)
    y = reference.conv3x3(x, weight, padding, "fp32")
    of_x, of_y = Planes.from_tensors(x), Planes.from_tensors(y)
    assert result_planes("conv3x3", x, weight, padding) == of_y
    assert result_planes("conv3x3_input_gradient", y, weight, padding) == of_x
    assert result_planes("conv3x3_weight_gradient", x, y, padding) == of_y


@needs_triton
def test_boxes_fit_neither_another_dtype_nor_channels_or_sides_that_they_cannot_cut() -> None:
    from mtt_fast.kernels.triton.tma_descriptors import fits

    planes, tensors = Planes(2, 8, 4, 4, torch.channels_last), [torch.zeros(1)]
    halves, gradient = [torch.zeros(1).half()], "conv3x3_weight_gradient"
    assert fits("conv3x3", planes, planes, "tf32", tensors)
    assert not fits("conv3x3", planes, planes, "fp16", tensors)  # float32 planes
    assert not fits("conv3x3", planes, replace(planes, channels=6), "tf32", tensors)
    assert fits(gradient, planes, planes, "fp16", halves)
    odd = replace(planes, height=5)
    assert not fits(gradient, odd, odd, "fp16", halves)
    assert fits("conv3x3", odd, odd, "fp16", halves)


@needs_triton
@pytest.mark.parametrize("operation", ["conv3x3", "conv3x3_input_gradient", "conv3x3_weight_gradient"])
def test_memory_of_the_library_is_planned_where_the_table_takes_it(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class of shapes is that of the result, which of an input gradient are the planes that the layer convolves."""
    from mtt_fast.kernels.triton import dispatch

    def backend_of(asked: str, architecture: str, closely: str, *_: str) -> str:
        assert architecture == "meta"
        of_result = "1024" if operation == "conv3x3_input_gradient" else "256"
        return "cudnn" if asked == operation and of_result in closely.split("-") else "triton"

    monkeypatch.setattr(dispatch, "backend_of", backend_of)
    monkeypatch.setattr(dispatch, "architecture", lambda device: device.type)
    layers = [kernels.ConvLayer(8, 18, 18, 16, 0)]  # 324 pixels, and 256 of the result
    planned = [
        dispatch.workspace_bytes(2, layers, torch.float32, torch.device("meta"), each) for each in ("fp32", "tf32")
    ]
    assert planned == [5 * 2 * (16 * 256) * 4, 0]


@needs_triton
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize(("samples", "side"), [(10, 8), (10, 16), (100, 8), (40, 32)])
def test_memory_beside_planes_is_planned_as_it_is_taken(samples: int, side: int, precision: Any) -> None:
    from mtt_fast.kernels.triton import dispatch, implicit_gemm, tma_convolve, tma_correlate, tma_descriptors, weights

    x, y = (planes_of(precision, samples, channels, side, side) for channels in (128, 104))
    weight = meta(104, 128, 3, 3)
    modules = [dispatch, implicit_gemm, tma_convolve, tma_correlate, tma_descriptors, weights]
    with recording(modules, "sm_90") as launches:

        def run(operation: str, *operands: Any) -> Any:
            launches.clear()
            return dispatch.dispatched(operation)(*operands, 1, precision=precision)

        def copied() -> int:
            every = [launch.arguments[0] for launch in launches if launch.kernel is tma_correlate._copy_lines]
            return sum(lines.nbytes for pair in every for lines in pair)

        def in_parts(*results: Any) -> int:
            return sum(each.parts.nbytes for each in results if isinstance(each, PartialPlanes))

        summands = [run("conv3x3_weight_gradient", x, y).nbytes]
        copies = [copied()]
        summands.append(run("conv3x3_dual_weight_gradient", x, x, y, y).nbytes)
        copies.append(copied())
        parts = in_parts(run("conv3x3_input_gradient", y, weight))
        dual_parts = in_parts(*run("conv3x3_dual_input_gradient", y, y, weight, weight))
        layer = kernels.ConvLayer(128, side, side, 104, 1)
        (planned,) = dispatch.weight_bytes(samples, [layer], x.dtype, x.device, precision)
        (packed,) = weights.pack_parameters(weight.flatten(), None, [WeightPlace(0, 104, 128)], precision, 1.0).weights
        assert isinstance(packed, PackedWeight)
    packed_bytes = packed.straight.nbytes + packed.rotated.nbytes
    assert planned == (packed_bytes, max(summands), *copies, parts, dual_parts)


@needs_triton
def test_boxes_refuse_what_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from mtt_fast.kernels.triton import weights
    from mtt_fast.kernels.triton.conv import TMA

    monkeypatch.setattr(weights, "launch", lambda *_, **__: None)
    x, weight = torch.zeros(2, 6, 4, 4).contiguous(memory_format=torch.channels_last), torch.zeros(8, 6, 3, 3)
    with pytest.raises(ValueError, match="conv3x3: expected channels_last planes of whole 16 bytes a pixel"):
        TMA.conv3x3(x, weight, 1, "tf32")
