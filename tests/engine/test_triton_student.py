"""The CUDA path of the fused student: all of it interpreted, and on a GPU where there is one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mtt_fast import ConvNet, matching_loss, unroll
from mtt_fast.engine.fused import FusedConvNetStudent
from mtt_fast.engine.student_choice import student_for
from mtt_fast.testing import relative_error
from tests.kernels.triton_comparison import run_in_processes

GOLDEN = ["soft-labels-d3-n6", "rgb64-d4-n3", "cifar-d3-n5"]


@pytest.mark.slow
def test_equals_the_generic_student_interpreted() -> None:
    lines = run_in_processes("tests.engine.triton_student", "cpu", processes=1, OMP_NUM_THREADS="1")
    for case in ("float64 fp32 fused", "float64 fp32 triton", "float64 fp32 cudnn", "float32 bf16 fused"):
        assert any(line.endswith(case) for line in lines), case


@pytest.mark.gpu
def test_equals_the_generic_student_on_a_gpu() -> None:
    lines = run_in_processes("tests.engine.triton_student", "cuda", processes=12)
    assert any(line.endswith("tf32 fused") for line in lines)


def meta_gradients(case: dict[str, Any], device: str, dtype: torch.dtype, **options: Any) -> dict[str, torch.Tensor]:
    def moved(name: str) -> torch.Tensor:
        value: torch.Tensor = case[name]
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    # clones, since a tensor that has this dtype and device already is the case's own
    images, start, lr = (leaf.clone().requires_grad_() for leaf in (moved("images"), moved("start"), moved("lr")[0]))
    path = unroll(case["net"], start, images, moved("labels"), lr, moved("batches"), **options)
    matching_loss(path[-1], start=start, target=moved("target")).backward()
    found = {"end": path[-1].detach(), "images": images.grad, "lr": lr.grad, "start": start.grad}
    return {name: value.cpu().double() for name, value in found.items() if value is not None}


@pytest.mark.gpu
@pytest.mark.parametrize("microbatch", [None, 3])
@pytest.mark.parametrize("name", GOLDEN)
def test_the_meta_gradient_on_a_gpu(golden: Path, name: str, microbatch: int | None) -> None:
    """Golden cases in float64, and float32 and its precisions by their distance from that."""
    with safe_open(golden / f"{name}.safetensors", framework="pt") as file:
        case: dict[str, Any] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        facts = file.metadata()
    sizes = ("in_channels", "num_classes", "image_size", "width", "depth")
    case["net"] = ConvNet(**{key: int(facts[key]) for key in sizes})  # type: ignore[arg-type]
    expected = {"images": case["grad_images"], "lr": case["grad_lr"][0], "start": case["grad_start"]}
    exact = meta_gradients(case, "cuda", torch.float64, microbatch=microbatch)
    again = meta_gradients(case, "cuda", torch.float64, microbatch=microbatch)
    for key, value in expected.items():
        assert relative_error(exact[key], value, floor=1e-5) <= 1e-9, key
        assert torch.equal(exact[key], again[key]), f"{key} differs from one run to the next"
    of_the_cpu = meta_gradients(case, "cpu", torch.float32, microbatch=microbatch)
    for key, value in of_the_cpu.items():
        allowed = max(4 * relative_error(value, exact[key]), 1e-5)
        found = meta_gradients(case, "cuda", torch.float32, microbatch=microbatch)[key]
        assert relative_error(found, exact[key]) <= allowed, key
    for precision, allowed in (("tf32", 0.1), ("bf16", 0.5)):
        found = meta_gradients(case, "cuda", torch.float32, microbatch=microbatch, precision=precision)["images"]
        assert relative_error(found, exact["images"]) <= allowed, precision


@pytest.mark.gpu
def test_a_gpu_takes_the_fused_student() -> None:
    assert isinstance(student_for(ConvNet(3, 2, 8, 4, 1), torch.device("cuda")), FusedConvNetStudent)


def test_a_gpu_without_triton_is_an_error_in_one_line() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from mtt_fast import ConvNet, InputError\n"
        "from mtt_fast.engine.student_choice import student_for\n"
        "try:\n    student_for(ConvNet(3, 2, 8, 4, 1), torch.device('cuda:1'))\n"
        "except InputError as error:\n    print(error)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("cuda:1: mtt_fast's CUDA kernels need Triton")
    assert answer.stdout.count("\n") == 1
