"""Triton's norm, ReLU and pool against their definition, interpreted; and compiled ahead of time for three GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed: it comes for Linux alone")

# (B, C, H, W): a plane of one tile, odd sizes, 1×1 after the pool, more channels than a block, a plane of several tiles
SHAPES = [(2, 3, 4, 4), (1, 5, 7, 5), (2, 17, 2, 2), (3, 4, 3, 9), (1, 2, 18, 20)]

COMPARISON = """
import sys
import torch

shapes, device = eval(sys.argv[1]), sys.argv[2]
empty = torch.empty

def poisoned(*arguments, **options):
    tensor = empty(*arguments, **options)
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

torch.empty = poisoned
torch.empty_like = lambda tensor: poisoned(tensor.shape, dtype=tensor.dtype, device=tensor.device).as_strided(
    tensor.shape, tensor.stride())

from mtt_fast.kernels import reference, triton

torch.manual_seed(0)
for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
    for shape in shapes:
        for form in (torch.contiguous_format, torch.channels_last):
            def planes(*size):
                return torch.randn(size, dtype=dtype).to(device).contiguous(memory_format=form)

            B, C, H, W = shape
            y, y_dot = planes(*shape), planes(*shape)
            gamma, beta, gamma_dot, beta_dot = (torch.randn(C, dtype=dtype).to(device) for _ in range(4))
            gamma[0] = beta[0] = 0  # every u of this channel is exactly 0, where ReLU has its kink
            p_bar, p_bar_dot = planes(B, C, H // 2, W // 2), planes(B, C, H // 2, W // 2)
            mean, rstd, k1, k2 = reference.norm_relu_pool_dual(
                y, y_dot, gamma, beta, gamma_dot, beta_dot, 1e-5)[2:]
            for name, arguments in {
                "norm_relu_pool": (y, gamma, beta, 1e-5),
                "norm_relu_pool_backward": (y, mean, rstd, gamma, beta, p_bar),
                "norm_relu_pool_dual": (y, y_dot, gamma, beta, gamma_dot, beta_dot, 1e-5),
                "norm_relu_pool_dual_backward":
                    (y, y_dot, mean, rstd, k1, k2, gamma, beta, gamma_dot, beta_dot, p_bar, p_bar_dot),
            }.items():
                found, expected = (getattr(twin, name)(*arguments) for twin in (triton, reference))
                assert len(found) == len(expected)
                for place, (ours, wanted) in enumerate(zip(found, expected)):
                    error = float((ours - wanted).norm() / wanted.norm().clamp_min(1e-3))
                    assert error <= tolerance, (name, place, shape, str(dtype), str(form), error)
                    assert ours.dim() < 4 or ours.is_contiguous(memory_format=form), (name, place, shape)
try:
    triton.norm_relu_pool(planes(2, 4, 6, 8)[:, :, ::2], gamma[:1], beta[:1], 1e-5)
except ValueError as error:
    print("refused:", error)
"""


def compare(shapes: list[tuple[int, int, int, int]], device: str, **environment: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", COMPARISON, repr(shapes), device]
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=250, env=os.environ | environment, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_equals_the_definition_interpreted() -> None:
    """In a process of its own: whether Triton interprets is decided when a kernel is defined."""
    assert "refused: expected contiguous or channels_last" in compare(SHAPES, "cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_equals_the_definition_on_a_gpu() -> None:
    large = [(7, 128, 32, 32), (5, 128, 16, 16), (3, 100, 8, 8), (2, 128, 128, 128), (2, 63, 31, 33)]
    compare([*SHAPES, *large], "cuda")


# What an operation would launch, compiled for any GPU and with none here: it is called on meta tensors.

TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16"}
OPTIONS = ("num_warps", "num_stages")
ALIGNED = [["tt.divisibility", 16]]  # what the launcher finds of pointers at run time; torch aligns its allocations


@dataclass(frozen=True)
class Launch:
    """One recorded launch of a kernel."""

    kernel: Any
    arguments: tuple[Tensor | int | float | None, ...]
    constants: dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs of a multiprocessor."""

    kernel: str
    warps: int
    registers: int
    stack: int
    local: int
    shared: int


@contextmanager
def recording(modules: list[ModuleType], architecture: str) -> Iterator[list[Launch]]:
    """Collect the launches of `modules`, which believe to run on `architecture` (such as `sm_90`)."""
    launches: list[Launch] = []

    def record(kernel: Any, programs: int, *arguments: Tensor | int | float | None, **constants: Any) -> None:
        launches.append(Launch(kernel, arguments, constants))

    patches: list[Any] = [patch.object(module, "launch", record) for module in modules]
    patches += [patch.object(module, "architecture", return_value=architecture) for module in modules]
    for each in patches:
        each.start()
    try:
        yield launches
    finally:
        for each in patches:
            each.stop()


def compile_launch(launch: Launch, architecture: str, folder: Path) -> Usage:
    """Compile for `architecture` and read the usage off the machine code."""
    constants = dict(launch.constants)
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    signature, attributes = {}, {}
    for place, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments, strict=False)):
        if value is None:
            constants[name] = None
        elif isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[place,] = ALIGNED
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    ordered = {name: signature.get(name, "constexpr") for name in launch.kernel.arg_names}
    source = triton.compiler.ASTSource(launch.kernel, ordered, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options=options)
    binary = folder / f"{compiled.metadata.hash}.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(re.findall(rf"{key}:(\d+)", report)[0]) for key in ("REG", "STACK", "LOCAL")}
    return Usage(
        compiled.metadata.name,
        compiled.metadata.num_warps,
        numbers["REG"],
        numbers["STACK"],
        numbers["LOCAL"],
        compiled.metadata.shared,
    )


def arguments(name: str, shape: tuple[int, int, int, int], form: torch.memory_format) -> list[torch.Tensor | float]:
    batch, channels, height, width = shape

    def planes(*size: int) -> torch.Tensor:
        return torch.empty(batch, channels, *size, device="meta").contiguous(memory_format=form)

    y, p_bar = planes(height, width), planes(height // 2, width // 2)
    number, channel = torch.empty(batch, channels, device="meta"), torch.empty(channels, device="meta")
    of: dict[str, list[Tensor | float]] = {
        "norm_relu_pool": [y, channel, channel, 1e-5],
        "norm_relu_pool_backward": [y, number, number, channel, channel, p_bar],
        "norm_relu_pool_dual": [y, y, *[channel] * 4, 1e-5],
        "norm_relu_pool_dual_backward": [y, y, *[number] * 4, *[channel] * 4, p_bar, p_bar],
    }
    return of[name]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "shared"), [("sm_80", 99), ("sm_90", 227), ("sm_100", 227)])
def test_compiles_without_spills(architecture: str, shared: int, tmp_path: Path) -> None:
    """The largest and the smallest planes of CIFAR's, and those of 128×128 ImageNet, in both formats."""
    import mtt_fast.kernels.triton as operations
    from mtt_fast.kernels.triton import norm

    with recording([norm], architecture) as launches:
        for name in operations.__all__:
            for side in (8, 32, 128):
                for form in (torch.contiguous_format, torch.channels_last):
                    getattr(operations, name)(*arguments(name, (4, 128, side, side), form))
    assert len(launches) == 4 * 3 * 2
    for launch in launches:
        usage = compile_launch(launch, architecture, tmp_path)
        assert usage.local == 0, f"{usage} spills"
        assert usage.shared <= shared * 1024, usage
