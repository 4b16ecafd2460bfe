"""Test the CUDA path of the fused student: all of it interpreted, and on a GPU where there is one."""

from __future__ import annotations

import importlib
import itertools
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import pytest
import torch

from bench.settings import setting_named
from mtt_fast import ConvNet, SiameseAugment, plan
from mtt_fast.engine.iteration import iteration
from mtt_fast.engine.students.choice import student_for
from mtt_fast.engine.students.fused import FusedConvNetStudent
from mtt_fast.engine.students.generic import GenericStudent
from mtt_fast.engine.students.live_bytes import CountLiveBytes
from mtt_fast.engine.students.protocol import StepBytes
from mtt_fast.kernels import Affine, ConvLayer, Precision, dispatch
from mtt_fast.testing import relative_error
from tests.engine.counting import image_shape, live_bytes_of_a_step
from tests.engine.meta_gradients import golden_case
from tests.kernels.compiling import recording
from tests.kernels.triton_comparison import PARTS_ON_A_GPU, ROOT, each_part, run_part

PARTS_INTERPRETED = 3
"""All of it takes a minute of one core."""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS_INTERPRETED))
def test_equals_the_generic_student_interpreted(part: int) -> None:
    run_part("tests.engine.students.triton_student", "cpu", part=part, parts=PARTS_INTERPRETED)


def test_every_back_end_is_interpreted() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: it comes only for Linux")
    from tests.engine.students import triton_student

    cases: Any = triton_student.cases_of("cpu")
    steps = {case.args[2:5] for case in cases if case.func is triton_student.compare}
    exact = {(torch.float64, "fp32", backend) for backend in ("triton", "cudnn")}
    rounded = set(itertools.product((torch.float32,), ("fp32", "fp16", "bf16"), ("triton", "cut")))
    assert steps >= exact | rounded
    iterations = {case.args[1:4] for case in cases if case.func is triton_student.compare_iterations}
    assert iterations >= {(torch.float64, "fp32", None), (torch.float64, "fp32", 2), (torch.float32, "fp16", None)}


@contextmanager
def recorded_triton(architecture: str | None = None) -> Iterator[None]:
    """Take Triton's kernels on meta tensors, by the table's rows of an architecture or else by pointers, and launch none."""
    from mtt_fast.kernels import triton
    from mtt_fast.kernels.triton import dispatch as triton_dispatch

    modules = [
        importlib.import_module(f"{triton.__name__}.{each.name}") for each in pkgutil.iter_modules(triton.__path__)
    ]
    with ExitStack() as patches:
        patches.enter_context(patch.object(dispatch, "_runs_triton", return_value=True))
        replaced: dict[str, Any] = {"launch": lambda *_, **__: None}
        if architecture is None:
            patches.enter_context(patch.object(triton_dispatch, "backend_of", return_value="triton"))
        else:
            replaced["architecture"] = lambda *_: architecture
        for module, (name, value) in itertools.product(modules, replaced.items()):
            if hasattr(module, name):
                patches.enter_context(patch.object(module, name, value))
        yield


def live_bytes_on_a_gpu(student: FusedConvNetStudent, batch: int, architecture: str | None = None) -> StepBytes:
    """Count the bytes of a step by Triton's kernels on meta tensors, none of which is launched."""
    with recorded_triton(architecture):
        return live_bytes_of_a_step(student, student.network, batch, "meta")


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("net", "batch"),
    [
        (ConvNet(3, 10, 128, 128, 5), 20),
        (ConvNet(3, 10, 32, 128, 3), 100),
        (ConvNet(3, 10, 32, 128, 3), 10),  # most of it are summands, copies of weights, and parameters
        (ConvNet(1, 10, 28, 128, 3), 100),
        (ConvNet(3, 10, 8, 128, 2), 1000),  # planes smaller than the first block's sums
        (ConvNet(3, 10, 32, 100, 3), 100),  # a width that keeps the planes of the first block
        (ConvNet(3, 10, 32, 128, 3, "none"), 100),
        (ConvNet(3, 10, 64, 128, 1), 100),  # at depth 1 the peak is in the classifier
        (ConvNet(3, 10, 64, 128, 1, "none"), 100),
    ],
    ids=str,
)
def test_the_formula_is_what_a_step_holds(net: ConvNet, batch: int, precision: Any) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: it comes only for Linux")
    student = FusedConvNetStudent(net, "indices", precision)
    live_bytes = live_bytes_on_a_gpu(student, batch)
    with patch.object(dispatch, "_runs_triton", return_value=True):
        planned = student.step_bytes(batch, image_shape(net), torch.float32, torch.device("meta"))
    for name, value in planned._asdict().items():
        assert getattr(live_bytes, name) == pytest.approx(value, rel=0.15, abs=3 << 20), name


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("net", "batch"),
    [
        (ConvNet(3, 10, 32, 128, 3), 10),
        (ConvNet(3, 10, 32, 128, 3), 16),
        (ConvNet(3, 10, 32, 128, 3), 100),  # of which weight gradients by boxes copy planes
        (ConvNet(1, 10, 28, 128, 3), 10),
        (ConvNet(3, 10, 64, 128, 4), 10),
        (ConvNet(3, 10, 32, 128, 3, "none"), 10),
    ],
    ids=lambda value: f"{value.in_channels}x{value.image_size}{value.norm}" if isinstance(value, ConvNet) else None,
)
def test_the_formula_counts_the_parts_of_convolutions(net: ConvNet, batch: int, precision: Any) -> None:
    """Hold it to live bytes by the table of an H100 or H200, which cuts convolutions of so few samples."""
    pytest.importorskip("triton", reason="Triton is not installed: it comes only for Linux")
    student = FusedConvNetStudent(net, "indices", precision)
    live_bytes = live_bytes_on_a_gpu(student, batch, "sm_90")
    with recorded_triton("sm_90"):
        planned = student.step_bytes(batch, image_shape(net), torch.float32, torch.device("meta"))
    for name, value in planned._asdict().items():
        assert getattr(live_bytes, name) == pytest.approx(value, rel=0.15, abs=3 << 20), name
    assert live_bytes.saved == pytest.approx(planned.saved, abs=8)  # of every saved step, so its error grows with them


def test_the_cotangents_of_a_block_live_while_its_planes_are_copied() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: it comes only for Linux")
    net, batch = ConvNet(3, 10, 64, 128, 4), 50
    student = FusedConvNetStudent(net, "indices", "tf32")
    live_bytes = live_bytes_on_a_gpu(student, batch, "sm_90")
    with recorded_triton("sm_90"):
        planned = student.step_bytes(batch, image_shape(net), torch.float32, torch.device("meta"))
    assert live_bytes.gradient_jvp == pytest.approx(planned.gradient_jvp, rel=0.02)


@pytest.mark.parametrize("batch", [1, 10, 200])  # few samples are cut into many parts, so many into one
@pytest.mark.parametrize("precision", ["tf32", "fp16"])
@pytest.mark.parametrize("net", [ConvNet(3, 10, 32, 128, 3), ConvNet(1, 10, 28, 48, 3)], ids=str)
def test_the_bytes_of_a_first_block_without_planes_are_those_of_its_tensors(
    net: ConvNet, precision: Any, batch: int
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: it comes only for Linux")
    from mtt_fast.kernels.triton import block

    layer = FusedConvNetStudent(net).layers(image_shape(net))[0]
    numbers = torch.empty(net.width, device="meta")
    weight, affine = torch.empty(net.width, net.in_channels, 3, 3, device="meta"), Affine(numbers, numbers)
    with recording([block], "sm_90") as launches:
        patches = block.image_patches(torch.empty(batch, *image_shape(net), device="meta"), layer.padding, precision)
        along = (patches, weight, weight, affine, affine)
        p, p_dot, folded = block.conv_norm_relu_pool_dual(*along, 1e-5, precision)
        block.conv_norm_relu_pool_backward(patches, weight, affine, p, folded, 1e-5, precision)
        block.conv_norm_relu_pool_dual_backward(*along, p, p_dot, folded, 1e-5, precision)
        planned = block.image_block_bytes(batch, layer, p.dtype, patches.images.device, precision)
    of_kernel = {launch.kernel.fn.__name__: launch.arguments for launch in launches}
    sums, dual_sums = (each.arguments[4:6] for each in launches if each.kernel.fn.__name__ == "sum_patches")
    linear, columns = of_kernel["finish"][-1], of_kernel["spread"][6]
    tensors = ((patches.images, patches.gram), (folded.weight,), sums[:1], dual_sums, (linear,), (columns,))
    assert planned == tuple(sum(each.nbytes for each in some) for some in tensors)


@pytest.mark.parametrize("side", [28, 29])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_plan_knows_the_sides_of_each_block(channels: int, side: int) -> None:
    net = ConvNet(channels, 10, side, 4, 3)
    last = FusedConvNetStudent(net).layers(image_shape(net))[-1]
    assert (last.out_height // 2, last.out_width // 2) == tuple(net.feature_size)
    assert [layer.padding for layer in FusedConvNetStudent(net).layers(image_shape(net))] == [net.first_padding, 1, 1]


@pytest.mark.parametrize("microbatch", [None, 10])
@pytest.mark.parametrize(("size", "batch"), [(128, 20), (32, 100)])
def test_the_plan_is_what_an_iteration_holds(size: int, batch: int, microbatch: int | None) -> None:
    """Iterate with batches that the student gathers and augments itself."""
    pytest.importorskip("triton", reason="Triton is not installed: it comes only for Linux")
    net, steps, augment = ConvNet(3, 10, size, 128, 5 if size == 128 else 3), 3, SiameseAugment()
    images, theta = torch.empty(50, 3, size, size, device="meta"), torch.empty(net.num_parameters, device="meta")
    labels, indices = (torch.zeros(count, dtype=torch.long, device="meta") for count in (50, steps * batch))
    parameters, lr = torch.empty(steps * batch, 13, device="meta"), torch.empty((), device="meta")
    with recorded_triton():
        planned = plan(
            net, images=images, steps=steps, batch=batch, memory_budget=None, microbatch=microbatch, device="meta",
            augment=augment, precision="tf32",
        )  # fmt: skip
        with CountLiveBytes() as counted, torch.autograd.set_multithreading_enabled(False):
            run = iteration(planned.student, augment, (batch,) * steps)
            run(theta, theta, images, labels, lr, indices, parameters)
        expected = sum(planned.parts.values()) - planned.parts["rest"]
    assert counted.peak == pytest.approx(expected, rel=0.15)


SETTINGS = ("cifar10-ipc1", "cifar10-ipc10", "imagenet128-ipc10")


def measured_peaks() -> dict[tuple[str, str], int]:
    """Return the bytes that an iteration took on an H200, by setting and precision; each record is of one setting."""
    records = json.loads((ROOT / "bench/results/h200/early-launches.json").read_text())["records"]
    return {
        (name, "fp16" if row["engine"].endswith("fp16") else "tf32"): row["peak"]["bytes"]
        for name, record in zip(SETTINGS, records, strict=True)
        for row in record["rows"]
        if row["engine"].startswith("fused")
    }


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_plan_is_within_15_percent_of_what_an_h200_took(name: str, precision: Any) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: it comes only for Linux")
    setting = setting_named(name)
    images = torch.empty(setting.images, *image_shape(setting.net), device="meta", requires_grad=True)
    with recorded_triton("sm_90"):
        planned = plan(
            setting.net, images=images, steps=setting.steps, batch=setting.batch, memory_budget=None, device="meta",
            precision=precision,
        )  # fmt: skip
        expected = sum(planned.parts.values())
    assert expected == pytest.approx(measured_peaks()[name, precision], rel=0.15)


def test_the_library_works_in_memory_of_its_own_where_nothing_is_rounded() -> None:
    """Check that a step in full precision is allowed five planes of the second block; the first one asks no library."""
    pytest.importorskip("triton", reason="Triton is not installed: it comes only for Linux")
    net = ConvNet(3, 10, 32, 128, 3)
    with patch.object(dispatch, "_runs_triton", return_value=True):
        work = {
            precision: FusedConvNetStudent(net, "indices", precision)
            .step_bytes(100, image_shape(net), torch.float32, torch.device("meta"))
            .workspace
            for precision in get_args(Precision)
        }
        of_more, of_fewer = (  # filters than the images have channels, in a first block that asks the library
            FusedConvNetStudent(ConvNet(3, 10, 32, width, 1, "none"))
            .step_bytes(100, image_shape(net), torch.float32, torch.device("meta"))
            .workspace
            for width in (128, 2)
        )
    assert work == {"fp32": 5 * 100 * 128 * 16 * 16 * 4, "tf32": 0, "fp16": 0, "bf16": 0}
    assert (of_more, of_fewer) == (5 * 100 * 128 * 32 * 32 * 4, 5 * 100 * 3 * 32 * 32 * 4)


def test_the_first_block_keeps_no_planes() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: it comes only for Linux")
    at_once, parts = (FusedConvNetStudent(ConvNet(3, 10, 128, width, 5), "indices", "tf32") for width in (128, 127))
    live_at_once, live_in_parts = (live_bytes_on_a_gpu(student, 20) for student in (at_once, parts))
    assert live_at_once.gradient_jvp <= 0.45 * live_in_parts.gradient_jvp
    assert live_at_once.gradient <= 0.5 * live_in_parts.gradient  # both keep the summands of the weights' gradients


@pytest.mark.gpu
@each_part("student")
def test_equals_the_generic_student_on_a_gpu(part: int) -> None:
    run_part("tests.engine.students.triton_student", "cuda", part=part, parts=PARTS_ON_A_GPU["student"])


def test_a_gpu_compares_every_precision_by_every_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: it comes only for Linux")
    from tests.engine.students import triton_student

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    cases: Any = triton_student.cases_of("cuda")
    compared = {case.args[3:5] for case in cases if case.func is triton_student.compare}
    assert compared >= set(itertools.product(get_args(Precision), ("triton", "cudnn")))
    assert compared >= set(itertools.product(("tf32", "fp16", "bf16"), ("tma",)))


each_golden_case = pytest.mark.parametrize("name", ["soft-labels-d3-n6", "rgb64-d4-n3", "cifar-d3-n5"])


@pytest.mark.gpu
@each_golden_case
def test_the_meta_gradient_in_float64_on_a_gpu(golden: Path, name: str) -> None:
    case = golden_case(golden, name)
    exact, again, cut = (
        case.meta_gradient(torch.float64, "cuda", microbatch=microbatch) for microbatch in (None, None, 3)
    )
    for key in ("images", "lr", "start"):
        expected = getattr(case.expected, key)
        assert relative_error(getattr(exact, key).cpu(), expected, floor=1e-5) <= 1e-9, key
        assert relative_error(getattr(cut, key).cpu(), expected, floor=1e-5) <= 1e-9, f"{key} in micro-batches"
        assert torch.equal(getattr(exact, key), getattr(again, key)), f"{key} differs from one run to the next"


@pytest.mark.gpu
@each_golden_case
def test_the_meta_gradient_in_float32_on_a_gpu(golden: Path, name: str) -> None:
    """Hold its error to that of right answers, in which rounding may carry a unit over ReLU's kink; tf32's is beyond.

    Of images that differ by 1e-7, the reference's answers to rgb64-d4-n3 have errors of 9e-7, 3e-4 and 7e-3.
    """
    errors = errors_on_a_gpu(golden, name, "fp32")
    assert errors["images"] <= 2e-2
    assert max(errors["lr"], errors["start"]) <= 1e-3


@pytest.mark.gpu
@each_golden_case
def test_the_meta_gradient_in_tf32_and_fp16_on_a_gpu(golden: Path, name: str) -> None:
    tf32, fp16 = (errors_on_a_gpu(golden, name, precision)["images"] for precision in ("tf32", "fp16"))
    assert tf32 <= 0.1
    assert fp16 <= 2 * tf32


@pytest.mark.gpu
def test_the_meta_gradient_in_bf16_on_a_gpu(golden: Path) -> None:
    """Compare one case: bf16 takes the kernels of fp16, and less is asked of it."""
    assert errors_on_a_gpu(golden, "cifar-d3-n5", "bf16")["images"] <= 0.5


def errors_on_a_gpu(golden: Path, name: str, precision: Precision) -> dict[str, float]:
    """Return and print the errors of the gradients of a golden case in float32."""
    case = golden_case(golden, name)
    actual = case.meta_gradient(torch.float32, "cuda", precision=precision)
    errors = {
        key: relative_error(getattr(actual, key).cpu(), getattr(case.expected, key))
        for key in ("images", "lr", "start")
    }
    print(f"errors of {name} in {precision}:", errors)
    return errors


@pytest.mark.gpu
def test_a_gpu_takes_the_fused_student() -> None:
    assert isinstance(student_for(ConvNet(3, 2, 8, 4, 1), torch.device("cuda")), FusedConvNetStudent)


def test_an_amd_gpu_has_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4.43484")
    device = torch.device("cuda")
    assert isinstance(student_for(ConvNet(3, 2, 8, 4, 1), device), GenericStudent)
    assert not dispatch.has_image_block(ConvLayer(channels=3, height=8, width=8, filters=16, padding=1), device)


def test_a_gpu_without_triton_is_an_error_in_one_line() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from mtt_fast import ConvNet, InputError\n"
        "from mtt_fast.engine.students.choice import student_for\n"
        "try:\n    student_for(ConvNet(3, 2, 8, 4, 1), torch.device('cuda:1'))\n"
        "except InputError as error:\n    print(error)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("cuda:1: mtt_fast's CUDA kernels need Triton")
    assert answer.stdout.count("\n") == 1
