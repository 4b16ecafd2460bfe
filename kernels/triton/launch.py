"""Import Triton, launch kernels, and compile kernels without running them. All other modules import Triton from here."""

from __future__ import annotations

import contextlib
import gc
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ModuleNotFoundError as error:
    raise ImportError(
        "mtt_fast's CUDA kernels need Triton, which is not installed here; it comes with torch's CUDA builds for "
        "Linux, else `pip install triton`"
    ) from error

__all__ = ["INTERPRETED", "TensorDescriptor", "architecture", "compile_ahead", "item", "launch", "tl", "triton"]

Item = TypeVar("Item")

# Triton reads TRITON_INTERPRET when a kernel is defined, so the mode of a process never changes.
INTERPRETED: bool = triton.knobs.runtime.interpret


@triton.constexpr_function
def item(values: tuple[Item, ...], index: int) -> Item:
    """Return `values[index]`. In a kernel Triton's own indexing would turn a NamedTuple into a plain tuple."""
    return values[index]


def architecture(device: torch.device) -> str:
    """Return the architecture whose configurations suit `device`: `sm_80`, `sm_90` or `sm_100`."""
    if device.type != "cuda":  # interpreted
        return "sm_80"
    major, _ = torch.cuda.get_device_capability(device)
    # Consumer cards (8.6, 8.9, 12.x) have 99 KB of shared memory, and the configurations of sm_80 use no more.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def load_driver() -> None:
    """Load Triton's driver, which Triton compiles at its first use, so that a run does not fail late.

    Raises `ImportError` if it cannot be compiled.
    """
    try:
        triton.runtime.driver.active  # noqa: B018 - a property
    except (AssertionError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        raise ImportError(
            f"Triton could not compile its driver ({error}); it needs a C compiler and Python's header files, such as Debian's "
            "packages gcc and python3-dev"
        ) from error


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run `kernel` with a one-dimensional grid of `programs`, on the device of its first argument.

    The first argument is a tensor, a tuple of tensors, or a TMA descriptor. `constants` are the kernel's constexpr parameters
    and launch options. Raises `ValueError` if the device is not a GPU, except in Triton's interpreter.
    """
    first = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
    first = first if isinstance(first, Tensor) else first.base
    if not (first.is_cuda or (INTERPRETED and first.device.type == "cpu")):
        raise ValueError(f"Triton kernels run on CUDA tensors, found one on {first.device}")
    if programs:
        with torch.cuda.device_of(first):
            if _COMPILES_ONLY.get():
                kernel.warmup(*arguments, grid=(programs,), **constants)
            else:
                kernel[(programs,)](*arguments, **constants)


_COMPILES_ONLY = ContextVar("compiles_only", default=False)  # whether launches compile kernels and do not run them


def compile_ahead(call: Callable[[], object]) -> None:
    """Run `call` so that its launches only compile their kernels, several at a time.

    Tensors that `call` computes are uninitialised, so it must not depend on their values. Backward passes run in this thread,
    since the context variable is set only here. A kernel that does not compile raises its error at its first real launch.
    """

    def compiling() -> None:
        _COMPILES_ONLY.set(True)
        # threads suffice: a compilation holds the GIL for a seventh of its time, and LLVM and ptxas take the rest
        with _no_collection(), ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            call()

    with torch.autograd.set_multithreading_enabled(False):
        copy_context().run(compiling)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Turn off garbage collection within the block.

    Before Python 3.11.8 the parser fails if a collection switches to another thread that parses (python/cpython#106905).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
