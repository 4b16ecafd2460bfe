"""What Triton's operations launch is compiled for three GPUs, with none here: no spills, and within shared memory.

An operation is called on meta tensors with its launches recorded, so that the launcher and its table are tested too.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from mtt_fast.kernels import LabelKind

triton = pytest.importorskip("triton", reason="Triton is not installed: it comes for Linux alone")

TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.int64: "*i64"}
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
    stack: int  # bytes; the kernels keep nothing there but what does not fit in registers
    shared: int
    tensor_cores: bool
    asynchronous: bool  # whether those of a Hopper or Blackwell, which read shared memory themselves


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
    numbers = {key: int(re.findall(rf"{key}:(\d+)", report)[0]) for key in ("REG", "STACK")}
    return Usage(
        compiled.metadata.name,
        compiled.metadata.num_warps,
        numbers["REG"],
        numbers["STACK"],
        compiled.metadata.shared,
        re.search(r"mma\S*(tf32|bf16|kind::f16)", compiled.asm["ptx"]) is not None,
        re.search(r"wgmma|tcgen05.mma", compiled.asm["ptx"]) is not None,
    )


FORMATS = (torch.contiguous_format, torch.channels_last)
SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227}  # KB; that of sm_86 and sm_89, which take the rows of sm_80
WIDTH = 128

each_architecture = pytest.mark.parametrize("architecture", SHARED)


def numbers(*size: int, form: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.empty(size, device="meta").contiguous(memory_format=form)


def check(launches: list[Launch], architecture: str, folder: Path) -> list[Usage]:
    usages = [compile_launch(launch, architecture, folder) for launch in launches]
    for launch, usage in zip(launches, usages, strict=True):
        assert usage.stack == 0, f"spills: {usage}, {launch.constants}"
        assert usage.shared <= SHARED[architecture] * 1024, f"{usage}, {launch.constants}"
    return usages


@pytest.mark.slow
@each_architecture
def test_norm_relu_pool(architecture: str, tmp_path: Path) -> None:
    """The planes of 32×32 images' first and last block, and those of 128×128 images' first."""
    from mtt_fast.kernels.triton import norm, windows

    with recording([windows], architecture) as launches:
        for side in (8, 32, 128):
            for form in FORMATS:
                y, p_bar = (numbers(4, WIDTH, size, size, form=form) for size in (side, side // 2))
                plane, channel = numbers(4, WIDTH), numbers(WIDTH)
                norm.norm_relu_pool(y, channel, channel, 1e-5)
                norm.norm_relu_pool_backward(y, plane, plane, channel, channel, p_bar)
                norm.norm_relu_pool_dual(y, y, *[channel] * 4, 1e-5)
                norm.norm_relu_pool_dual_backward(y, y, *[plane] * 4, *[channel] * 4, p_bar, p_bar)
    assert len(launches) == 3 * 2 * 4
    check(launches, architecture, tmp_path)


@pytest.mark.slow
@each_architecture
def test_bias_relu_pool(architecture: str, tmp_path: Path) -> None:
    """The smallest and the largest of those planes: the rows for the others are these too."""
    from mtt_fast.kernels.triton import bias, windows

    with recording([windows], architecture) as launches:
        for side in (8, 128):
            for form in FORMATS:
                y, p_bar = (numbers(4, WIDTH, size, size, form=form) for size in (side, side // 2))
                beta = numbers(WIDTH)
                bias.bias_relu_pool(y, beta)
                bias.bias_relu_pool_backward(y, beta, p_bar)
                bias.bias_relu_pool_dual(y, y, beta, beta)
                bias.bias_relu_pool_dual_backward(y, beta, p_bar, p_bar)
    assert len(launches) == 2 * 2 * 4
    check(launches, architecture, tmp_path)


each_precision = pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])


def planes(precision: str, *size: int, form: torch.memory_format = torch.channels_last) -> Tensor:
    """As the student has them: bf16 products are of bfloat16 planes."""
    return numbers(*size, form=form).to(torch.bfloat16 if precision == "bf16" else torch.float32)


def check_products(launches: list[Launch], architecture: str, folder: Path, precision: str) -> None:
    """Tensor cores do the products, and the newer ones of them those of many channels."""
    for launch, usage in zip(launches, check(launches, architecture, folder), strict=True):
        assert usage.tensor_cores == (precision != "fp32"), usage
        if usage.tensor_cores and architecture != "sm_80" and min(launch.constants["CI"], launch.constants["CO"]) > 3:
            assert usage.asynchronous, f"{usage}, {launch.constants}"


@pytest.mark.slow
@each_architecture
@each_precision
def test_conv3x3(architecture: str, precision: Any, tmp_path: Path) -> None:
    """The first two blocks of 32×32 images, and those of 128×128 images; once in the other format."""
    from mtt_fast.kernels.triton import convolution, products

    with recording([products], architecture) as launches:
        for side, form in ((32, torch.channels_last), (128, torch.channels_last)):
            x, y = (planes(precision, 4, channels, side, side, form=form) for channels in (3, WIDTH))
            weight = numbers(WIDTH, 3, 3, 3)
            convolution.conv3x3_dual(x, None, weight, weight, 1, precision)
            convolution.conv3x3_input_gradient_tangent(y, y, weight, weight, 1, precision)
            convolution.conv3x3_dual_weight_gradient(x, None, y, y, 1, precision)
            x, weight = planes(precision, 4, WIDTH, side // 2, side // 2, form=form), numbers(WIDTH, WIDTH, 3, 3)
            convolution.conv3x3_dual(x, x, weight, weight, 1, precision)  # the input gradient is the same kernel
            convolution.conv3x3_tangent(x, x, weight, weight, 1, precision)
            convolution.conv3x3_dual_weight_gradient(x, x, x, x, 1, precision)
    assert len(launches) == 2 * 6
    check_products(launches, architecture, tmp_path, precision)

    with recording([products], architecture) as launches:
        x = planes(precision, 4, WIDTH, 16, 16, form=torch.contiguous_format)
        convolution.conv3x3_dual(x, x, weight, weight, 1, precision)
        convolution.conv3x3_dual_weight_gradient(x, x, x, x, 1, precision)
    check(launches, architecture, tmp_path)


@pytest.mark.slow
@each_architecture
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_whole_blocks(architecture: str, precision: Any, tmp_path: Path) -> None:
    """The first block of 128×128 images and the last of 32×32 ones, forward and back."""
    from mtt_fast.kernels.triton import block, products, windows

    with recording([products], architecture) as launches, recording([block, windows], architecture) as others:
        for channels, side in ((3, 128), (WIDTH, 8)):
            x, y = planes(precision, 4, channels, side, side), planes(precision, 4, WIDTH, side, side)
            x_dot, p_bar = x if channels > 3 else None, planes(precision, 4, WIDTH, side // 2, side // 2)
            weight, channel = numbers(WIDTH, channels, 3, 3), numbers(WIDTH)
            arguments = (x, x_dot, weight, weight, *[channel] * 4, 1, 1e-5, precision)
            _, _, activations = block.conv_norm_relu_pool_dual(*arguments)
            block.conv_norm_relu_pool_dual(*arguments, y=y)
            options = (weight, weight, *[channel] * 4, p_bar, p_bar, 1, precision, channels > 3)
            block.conv_norm_relu_pool_dual_backward(activations, *options)
    assert len(launches) == 2 * 4
    assert len(others) == 2 * 5
    check_products(launches, architecture, tmp_path, precision)
    check(others, architecture, tmp_path)


@each_architecture
def test_vectors(architecture: str, tmp_path: Path) -> None:
    from mtt_fast.kernels.triton import vector

    with recording([vector], architecture) as launches:
        a = numbers(1003)
        vector.sgd_step(a, a, numbers(), a, None, None, 0.0, 0.0)
        vector.sgd_step(a, a, numbers(), a, a, a, 0.9, 5e-4)
        vector.adjoint_step(a, a, a, numbers(), a, a, 5e-4)
        vector.squared_distance(a, a)
    assert len(launches) == 5
    check(launches, architecture, tmp_path)


@each_architecture
def test_the_classifier(architecture: str, tmp_path: Path) -> None:
    """A row has all its classes in one tile, so a thousand of them, and labels that need the most, spill first."""
    from mtt_fast.kernels.triton import classifier

    with recording([classifier], architecture) as launches:
        for classes, kind in ((10, "indices"), (200, "probabilities"), (1000, "indices"), (1000, "logits")):
            features, weight, bias = numbers(100, 64), numbers(classes, 64), numbers(classes)
            labels = numbers(100, classes) if kind != "indices" else torch.empty(100, dtype=torch.long, device="meta")
            given = (labels, cast(LabelKind, kind))
            classifier.linear_cross_entropy(features, weight, bias, *given)
            classifier.linear_cross_entropy_dual(features, features, weight, bias, weight, bias, *given)
    assert len(launches) == 4 * 2
    check(launches, architecture, tmp_path)


@pytest.mark.slow
@each_architecture
def test_colour_warp_mask(architecture: str, tmp_path: Path) -> None:
    """One channel and three, at the sides of the smallest and of large images, in float32 and bfloat16."""
    from mtt_fast.kernels.triton import warp

    with recording([warp], architecture) as launches:
        for channels, side, dtype in ((1, 28, torch.float32), (3, 32, torch.float32), (3, 128, torch.bfloat16)):
            images, parameters = numbers(4, channels, side, side).to(dtype), numbers(4, 13)
            warp.colour_warp_mask(images, parameters)
            warp.colour_warp_mask_transpose(images, parameters)
    assert len(launches) == 3 * 2 * 2
    check(launches, architecture, tmp_path)
