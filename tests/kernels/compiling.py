"""Compile the launches of Triton's operations for three GPUs, with none here: no spills, and within shared memory.

An operation is called on meta tensors with its launches recorded, so that the launcher and its table are tested too.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_args
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from mtt_fast.kernels import HALF_PRECISIONS, PartialPlanes, Precision

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: it comes only for Linux"
)

Test = TypeVar("Test", bound=Callable[..., None])

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
ALIGNED = [["tt.divisibility", 16]]  # the launcher finds so of numbers, and of pointers, which torch aligns


@dataclass(frozen=True)
class Launch:
    """One recorded launch of a kernel."""

    kernel: Any
    arguments: tuple[Any, ...]  # tensors, descriptors of tensors, numbers, None
    constants: dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """Resources of a multiprocessor that a compiled kernel takes."""

    kernel: str
    warps: int
    registers: int
    stack: int  # bytes; the kernels keep nothing there but values that do not fit in registers
    shared: int
    tensor_cores: bool
    asynchronous: bool  # those of a Hopper or Blackwell, which read shared memory themselves
    boxes: bool  # whether the tensor memory accelerator loads
    through_registers: int  # tiles that are copied from shared memory before they are multiplied or stored
    lost_constants: int  # sums of two 16-bit numbers with a constant of which the assembler made zero
    divides: bool  # whether numbers are divided; in float32 `/` takes several instructions, and need not be exact
    registers_in_flight: bool  # whether products whose first factor is in registers are left under way in a loop


@contextmanager
def recording(modules: list[ModuleType], architecture: str) -> Iterator[list[Launch]]:
    """Collect the launches of `modules`, which believe that tensors on `meta` are on `architecture` (such as `sm_90`)."""
    launches: list[Launch] = []

    def record(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        launches.append(Launch(kernel, arguments, constants))

    replaced: dict[str, Any] = {"launch": record, "architecture": lambda device: {"meta": architecture}[device.type]}
    patches: list[Any] = [
        patch.object(module, name, value)
        for module in modules
        for name, value in replaced.items()
        if hasattr(module, name)
    ]
    for each in patches:
        each.start()
    try:
        yield launches
    finally:
        for each in patches:
            each.stop()


def compile_launch(launch: Launch, architecture: str, folder: Path) -> Usage:
    """Compile for `architecture` and read the usage off the machine code."""
    import triton
    import triton.tools.tensor_descriptor

    constants = dict(launch.constants)
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments, strict=False)):
        if value is None:
            constants[name] = None
        elif isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[place,] = ALIGNED
        elif isinstance(value, tuple):  # of tensors
            signature[name] = tuple(TYPES[each.dtype] for each in value)
            attributes |= {(place, number): ALIGNED for number in range(len(value))}
        elif isinstance(value, triton.tools.tensor_descriptor.TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype].removeprefix('*')}{list(value.block_shape)}>"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[place,] = ALIGNED
    ordered = {name: signature.get(name, "constexpr") for name in launch.kernel.arg_names}
    source = triton.compiler.ASTSource(launch.kernel, ordered, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options=options)
    binary = folder / f"{compiled.metadata.hash}.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(re.findall(rf"{key}:(\d+)", report)[0]) for key in ("REG", "STACK")}
    return Usage(
        compiled.metadata.name,
        compiled.metadata.num_warps,
        usage["REG"],
        usage["STACK"],
        compiled.metadata.shared,
        re.search(r"mma\S*(tf32|bf16|\.f16|kind::f16)", compiled.asm["ptx"]) is not None,
        re.search(r"wgmma|tcgen05.mma", compiled.asm["ptx"]) is not None,
        "cp.async.bulk.tensor" in compiled.asm["ptx"],
        compiled.asm["ttgir"].count("ttg.local_load"),
        _lost_constants(binary) if "add.s16x2" in compiled.asm["ptx"] else 0,
        re.search(r"\bdiv\.\w+\.f", compiled.asm["ptx"]) is not None,
        _has_registers_in_flight(compiled.asm["ttgir"]),
    )


def _has_registers_in_flight(ttgir: str) -> bool:
    """Return whether a loop goes on while products read their first factor from registers, which its next step overwrites.

    Triton 3.6 and 3.7 wait there for all but the last few; on an H200 the results differed from one run to the next.
    """
    from_registers = re.search(r"warp_group_dot %[^\n]*isAsync = true[^\n]*: tensor<[^\n]*dot_op", ttgir)
    pending = re.findall(r"warp_group_dot_wait[^\n]*pendings = (\d+)", ttgir)
    return from_registers is not None and any(int(number) for number in pending)


def _lost_constants(binary: Path) -> int:
    """Count additions of zero to pairs of 16-bit numbers: ptxas up to 13.1 makes them of any constant where one half is undefined."""
    import triton

    command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(binary)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"VIADD\.16x2\S* R\d+\S*, R\d+\S*, 0x0\b", code))


SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227}  # KB; that of sm_86, sm_89 and sm_120, which take the rows of sm_80
WIDTH = 128


def each_architecture(test: Test) -> Test:
    """Parametrise `test` over the architectures; skip it without Triton."""
    parametrised: Test = needs_triton(pytest.mark.parametrize("architecture", SHARED)(test))
    return parametrised


def meta(*size: int, form: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Return a tensor without memory, which the launcher takes as any other."""
    return torch.empty(size, device="meta").contiguous(memory_format=form)


def check(launches: list[Launch], architecture: str, folder: Path) -> list[Usage]:
    """Compile the launches; fail for one that spills registers or takes too much shared memory."""
    usages = [compile_launch(launch, architecture, folder) for launch in launches]
    for launch, usage in zip(launches, usages, strict=True):
        assert usage.stack == 0, f"spills: {usage}, {launch.constants}"
        assert not usage.lost_constants, f"{usage}, {launch.constants}"
        assert not usage.registers_in_flight, f"{usage}, {launch.constants}"
        assert usage.shared <= SHARED[architecture] * 1024, f"{usage}, {launch.constants}"
    return usages


def in_parts(planes: Tensor, count: int) -> PartialPlanes:
    """Return channels_last planes in parts, as a convolution leaves them."""
    batch, channels, height, width = planes.shape
    return PartialPlanes(meta(count, batch, height, width, channels).permute(0, 1, 4, 2, 3), torch.empty_like(planes))


each_precision = pytest.mark.parametrize("precision", get_args(Precision))


def planes_of(precision: Precision, *size: int, form: torch.memory_format = torch.channels_last) -> Tensor:
    """Return planes as the student has them: fp16 and bf16 products are of float16 and bfloat16 planes."""
    return meta(*size, form=form).to(HALF_PRECISIONS.get(precision, torch.float32))


def check_products(launches: list[Launch], architecture: str, folder: Path, precision: str) -> None:
    """Check also that tensor cores do the products, and the newer ones of them those of many channels."""
    for launch, usage in zip(launches, check(launches, architecture, folder), strict=True):
        assert usage.tensor_cores == (precision != "fp32"), usage
        if usage.tensor_cores and architecture != "sm_80" and min(launch.constants["CI"], launch.constants["CO"]) > 3:
            assert usage.asynchronous, f"{usage}, {launch.constants}"
