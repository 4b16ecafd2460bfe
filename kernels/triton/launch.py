"""Import Triton, which no other module does by itself; launch its kernels, or compile them without."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import Any

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

__all__ = ["INTERPRETED", "TensorDescriptor", "architecture", "compile_ahead", "launch", "tl", "triton"]

# Triton reads TRITON_INTERPRET when a kernel is defined, so a process is in one mode from beginning to end.
INTERPRETED: bool = triton.knobs.runtime.interpret


def architecture(device: torch.device) -> str:
    """Return the family of GPUs whose configurations suit `device`: `sm_80`, `sm_90` or `sm_100`."""
    if device.type != "cuda":  # interpreted
        return "sm_80"
    major, _ = torch.cuda.get_device_capability(device)
    # Consumer cards (8.6, 8.9, 12.x) have 99 KB of shared memory, and the rows of sm_80 stay within that.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run `kernel` in a one-dimensional grid. The first argument is a tensor on the device to run on, some, or a descriptor of one."""
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


_COMPILES_ONLY = ContextVar("launches of this context compile kernels and run none", default=False)


def compile_ahead(call: Callable[[], object]) -> None:
    """Make a `call` whose launches compile their kernels, several at a time, and run none of them.

    What `call` computes has no meaning, so it must not depend on any value. Its backward passes stay in this thread, where
    launches know what they are to do. A kernel that does not compile fails when it is launched.
    """

    def compiling() -> None:
        _COMPILES_ONLY.set(True)
        # threads are enough: of a compilation, the seventh part holds the interpreter's lock, and the rest is LLVM's and ptxas's
        with _no_collection(), ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            call()

    with torch.autograd.set_multithreading_enabled(False):
        copy_context().run(compiling)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no garbage: Python before 3.11.8 fails to parse in two threads if a collection hands over (python/cpython#106905)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
