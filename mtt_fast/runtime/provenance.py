"""Name the versions and the device of a record, measure its peak memory, and choose the device."""

from __future__ import annotations

import hashlib
import platform
import re
import resource
import sys
from functools import cache
from importlib import metadata

import torch
from torch import Tensor

from mtt_fast.errors import InputError
from mtt_fast.runtime.tensor_bytes import bytes_of


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result can depend on."""
    installed = {"python": platform.python_version()}
    for package in ("mtt-fast", "torch", "triton", "kornia", "numpy", "safetensors"):
        if version := _installed_version(package):
            installed[package] = version
    # torch itself names its build, such as +cu130; the metadata of some wheels do not
    return installed | {"torch": str(torch.__version__)}


@cache  # since it reads the package's whole description
def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def digest(*tensors: Tensor) -> str:
    """Return the SHA-256 of the tensors' values, in hexadecimal."""
    checksum = hashlib.sha256()
    for tensor in tensors:
        checksum.update(bytes_of(tensor.detach().cpu().contiguous()))
    return checksum.hexdigest()


def device_name(device: torch.device) -> str:
    """Return a readable name of the device: the GPU's model, or the processor with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: of the CUDA allocator on a GPU, of the resident process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_device_name(name: str) -> None:
    """Raise `InputError` unless `name` is a device on which this package can compute, on this machine or another."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", name):
        raise InputError(f"`device` {name}: expected auto, cpu, cuda or cuda:N")


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is the GPU if there is one. Raises `InputError` if the device cannot be used."""
    check_device_name(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= (count := usable_gpus()):
        reason = "" if count else f" ({why_no_gpu()})"
        raise InputError(f"`device` {name}: this machine has {count} usable GPUs{reason}; use `device` cpu")
    return device


def usable_gpus() -> int:
    """Return the number of GPUs on which torch can compute. `torch.cuda.device_count` also counts those whose driver is too old."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def why_no_gpu() -> str:
    """Return the reason that torch gives for not using a GPU, such as a driver that is too old."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return str(error).splitlines()[0].strip().rstrip(".")
    return "torch finds none"
