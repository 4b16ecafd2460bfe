"""Measure interleaved seconds, peak memory above a baseline, and the peak performance of the device."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypedDict, get_args

import torch

from mtt_fast.errors import InputError
from mtt_fast.kernels import Precision


class Spread(TypedDict):
    """Median, least and most of n repeated measurements."""

    median: float
    least: float
    most: float
    n: int


class Peak(TypedDict):
    """Bytes above the baseline: resident on a CPU, in PyTorch's allocator on a GPU; `device` as NVML sees the GPU."""

    bytes: int
    device: int | None


def spread(values: list[float]) -> Spread:
    """Return the median, least and most of `values`."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "n": len(values)}


def synchronise(device: torch.device) -> None:
    """Wait until `device` has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that one call of `run` takes."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def seconds_in_turn(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call in this process's turn.

    On a GPU the processes share the memory: each turn ends with an empty cache, so an untimed call first fills the cache
    again.
    """
    if device.type != "cuda":
        return seconds(run, device)
    run()
    elapsed = seconds(run, device)
    torch.cuda.empty_cache()
    return elapsed


def repeated(run: Callable[[], Any], calls: int, device: torch.device) -> Callable[[], object]:
    """Return a function that makes `calls` calls of `run`, which has run before.

    On a GPU it replays them from a graph, as an iteration does: launched one by one, small kernels would wait for the host.
    """
    if device.type != "cuda":

        def several() -> None:
            for _ in range(calls):
                run()

        return several
    graph = torch.cuda.CUDAGraph()
    synchronise(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        graph.capture_begin()
        try:
            for _ in range(calls):
                run()
        finally:
            graph.capture_end()
    graph.replay()
    return graph.replay


def interleaved(
    repetitions: int, subjects: Iterable[str], measure: Callable[[str], float], failed: Callable[[str, Exception], None]
) -> dict[str, Spread]:
    """Measure every subject once, then all again, `repetitions` times, so that a slow minute of the machine affects all of them.

    A subject whose measurement raises is passed to `failed` and left out.
    """
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(repetitions):
        for name in list(times):
            try:
                times[name].append(measure(name))
            except Exception as error:
                failed(name, error)
                del times[name]
    return {name: spread(values) for name, values in times.items()}


def peak_above_baseline(run: Callable[[], Any], device: torch.device) -> Peak:
    """Return the peak memory of one call of `run` above the memory in use before. Libraries must be loaded already.

    Raises `InputError` where a CPU's peak cannot be measured (Linux's /proc only).
    """
    if device.type == "cuda":
        return _peak_on_gpu(run, device)
    reset_peak()
    before = resident_bytes("VmHWM")
    run()
    return {"bytes": resident_bytes("VmHWM") - before, "device": None}


def reset_peak() -> None:
    """Make the peak of this process's resident memory (VmHWM) start anew. Raises `InputError` where Linux's /proc is missing."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)  # to reuse freed memory would hide that much of the peak
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError as error:
        raise InputError("peak memory on a CPU: expected Linux's /proc/self/clear_refs; use a GPU or Linux") from error


def resident_bytes(field: str = "VmRSS") -> int:
    """Return this process's resident memory (VmRSS), its peak (VmHWM), or its part from files (RssFile), from Linux's /proc."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def _peak_on_gpu(run: Callable[[], Any], device: torch.device) -> Peak:
    synchronise(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    allocated, used = torch.cuda.memory_allocated(device), used_on_gpu(device)
    run()
    synchronise(device)
    # the allocator has not given anything back yet, so NVML now sees its peak
    after = used_on_gpu(device)
    return {"bytes": torch.cuda.max_memory_allocated(device) - allocated, "device": after - used}


def used_on_gpu(device: torch.device) -> int:
    """Return the bytes in use on the GPU, by every process, as NVML counts them."""
    import pynvml

    pynvml.nvmlInit()
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(uuid)).used)
    finally:
        pynvml.nvmlShutdown()


def driver_version() -> str:
    """Return the version of the NVIDIA driver."""
    import pynvml

    pynvml.nvmlInit()
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def set_precision(device: torch.device, precision: str) -> None:
    """Set a GPU to multiply float32 numbers in tf32, as the public code runs, or in fp32. A CPU computes in fp32 only.

    With fp16 and bf16, precisions of mtt_fast's own engines, all other products are in tf32.
    """
    if precision not in get_args(Precision):
        raise InputError(f"--precision {precision}: expected {', '.join(get_args(Precision))}")
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"


def matrix_product_peak(device: torch.device) -> float:
    """Return the FLOP/s of the best of forty products of square matrices: the device's peak at this moment.

    Half of the products are 1×1 convolutions, which are the same: on some processors another library computes those.
    """
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    pixels = a.t().reshape(1, size, size // 64, 64).contiguous(memory_format=torch.channels_last)
    kernel = b[:, :, None, None].contiguous(memory_format=torch.channels_last)
    products = (lambda: torch.mm(a, b), lambda: torch.conv2d(pixels, kernel))
    return 2 * size**3 / min(seconds(product, device) for product in products for _ in range(20))


def copy_peak(device: torch.device, size: int | None = None) -> float:
    """Return the bytes/s, read and written, of the best of ten copies of a block larger than any cache."""
    size = size or (2**30 if device.type == "cuda" else 2**28)
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * size / min(seconds(lambda: target.copy_(source), device) for _ in range(10))
