"""Set how torch computes within a block: precision of products, deterministic algorithms, defaults, autocast, saved tensors, attention."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # without it cuBLAS may add up in another order on each stream


@contextlib.contextmanager
def numerics(device: torch.device, precision: str) -> Iterator[None]:
    """Set torch to compute on `device` with `precision` and deterministically within the block, and reset it after the block.

    On CUDA: float32 products of cuDNN and cuBLAS round their factors to tf32, unless `precision` is fp32 (it may also be "auto");
    operations without a fixed order of sums are replaced by deterministic ones, or raise `RuntimeError`; cuDNN's algorithms are
    chosen by shape, never by timing. CUBLAS_WORKSPACE_CONFIG is set unless the environment has it, so the block must begin before
    the process first uses cuBLAS. Nothing is set for a CPU, which is deterministic anyway.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    matmul, memory = torch.backends.cuda.matmul, torch.utils.deterministic
    settings: tuple[tuple[Any, str, bool | str], ...] = (
        *_tf32_settings(cudnn, (cudnn.conv, cudnn.rnn), allowed=precision != "fp32"),
        *_tf32_settings(matmul, (matmul,), allowed=precision != "fp32"),
        (cudnn, "deterministic", True),
        (cudnn, "benchmark", False),
        (memory, "fill_uninitialized_memory", False),  # a debugging aid that costs a kernel per tensor
    )
    before = [getattr(owner, name) for owner, name, _ in settings]
    deterministic = torch.get_deterministic_debug_mode()
    workspace = os.environ.get(_WORKSPACE)
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        # not by torch.use_deterministic_algorithms, which imports the compiler, in seconds
        torch.set_deterministic_debug_mode("error")
        yield
    finally:
        torch.set_deterministic_debug_mode(deterministic)
        for (owner, name, _), value in zip(settings, before, strict=True):
            setattr(owner, name, value)
        if workspace is None:
            del os.environ[_WORKSPACE]


def _tf32_settings(library: Any, parts: Sequence[Any], *, allowed: bool) -> list[tuple[Any, str, bool | str]]:
    """Return the settings by which all products of a `library` round their factors to tf32, or none do.

    `allow_tf32` is one of them, so that it can be read within the block, as `torch.backends.cudnn.flags` does. It is left out where the
    caller has set `fp32_precision`, since reading it raises an error then.
    """
    settings: list[tuple[Any, str, bool | str]] = [
        (part, "fp32_precision", "tf32" if allowed else "ieee") for part in parts
    ]
    try:
        library.allow_tf32  # noqa: B018 - a property
    except RuntimeError:
        return settings
    return [(library, "allow_tf32", allowed), *settings]  # first, since it sets the others too


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """Use torch's default dtype, device, autocast and gradient mode within the block.

    A command may run in a notebook's process, which may have changed them.
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as settings:
        settings.enter_context(torch.inference_mode(False))
        settings.enter_context(torch.enable_grad())
        if torch.get_default_device() != torch.device("cpu"):  # else not, since a device mode slows every call
            settings.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                settings.enter_context(torch.autocast(kind, enabled=False))
        settings.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Disable the caller's autocast on `device`, so that operations compute in the dtype of their tensors."""
    available = torch.amp.is_autocast_available(device.type)  # not on the meta device
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


@contextlib.contextmanager
def without_saved_tensor_hooks() -> Iterator[None]:
    """Disable the caller's hooks on saved tensors within the block.

    The hooks of `torch.utils.checkpoint` would rerun the caller's whole function for each inner graph, and those of `save_on_cpu`
    fail on meta tensors.
    """
    # private: another torch may lack it
    top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top_hooks is not None and top_hooks(True) is None:
        yield
    else:
        with torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
            yield


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


class _SharedSetting:
    """A process-wide setting, active from the first thread's entry to the last thread's exit."""

    def __init__(self, setting: Callable[[], AbstractContextManager[Any]]) -> None:
        self._setting, self._lock, self._entries = setting, threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._entries:
                self._active = self._setting()
                self._active.__enter__()
            self._entries += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._entries -= 1
            if not self._entries:
                self._active.__exit__(None, None, None)


# attention by plain operations: torch's only implementation that can be differentiated twice
plain_attention = _SharedSetting(functools.partial(sdpa_kernel, SDPBackend.MATH))
