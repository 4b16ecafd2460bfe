"""How a device computes while a job runs: the precision of products, and that the same job gives the same bits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, get_args

import torch

from mtt_fast.choice import student_for
from mtt_fast.errors import InputError
from mtt_fast.fused import FusedConvNetStudent
from mtt_fast.kernels import Precision
from mtt_fast.student import Network

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # without it cuBLAS may add up in another order on each stream


def precision_on(device: torch.device, network: Network, precision: Precision) -> Precision:
    """Return the precision of the factors of products in a job with `network` on `device`, of the one that was asked for.

    A CPU computes in float32 whatever was asked for. Raises `InputError` for what is no precision, and for bf16 where
    `network` takes the generic student, whose precision is what torch's own settings say.
    """
    if precision not in get_args(Precision):
        raise InputError(f"--precision {precision}: expected {', '.join(get_args(Precision))}")
    if device.type == "cpu":
        return "fp32"
    if precision == "bf16" and not isinstance(student_for(network, device), FusedConvNetStudent):
        raise InputError(
            f"--precision bf16: only the fused step of ConvNet knows it, and {type(network).__name__} takes the generic one "
            f"on {device}; use --precision tf32 or fp32"
        )
    return precision


def describe_arithmetic(device: torch.device, network: Network, precision: Precision) -> str:
    """Return which student answers for `network` on `device`, and with which precision, for a log."""
    used = precision_on(device, network, precision)
    return f"{type(student_for(network, device, precision=used)).__name__}, {used}"


@contextlib.contextmanager
def arithmetic(device: torch.device, precision: Precision) -> Iterator[None]:
    """Within the block, have torch compute on `device` with `precision`, and deterministically; then as before.

    On CUDA: float32 products of cuDNN and cuBLAS round their factors to tf32, unless `precision` is fp32; operations
    that add up in an order of their own take the place of those that do not, or raise `RuntimeError`; algorithms are
    chosen by shapes, never by a race. CUBLAS_WORKSPACE_CONFIG is set if it is not, so the block has to begin before
    the process first uses cuBLAS. Nothing is set for a CPU, which is deterministic as it is.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, matmul, memory = torch.backends.cudnn, torch.backends.cuda.matmul, torch.utils.deterministic
    settings: tuple[tuple[Any, str, bool], ...] = (
        (cudnn, "allow_tf32", precision != "fp32"),
        (matmul, "allow_tf32", precision != "fp32"),
        (cudnn, "deterministic", True),
        (cudnn, "benchmark", False),
        (memory, "fill_uninitialized_memory", False),  # a help in the search for errors, at the price of a kernel each
    )
    before = [getattr(owner, name) for owner, name, _ in settings]
    deterministic, only_warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    workspace = os.environ.get(_WORKSPACE)
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=only_warned)
        for (owner, name, _), value in zip(settings, before, strict=True):
            setattr(owner, name, value)
        if workspace is None:
            del os.environ[_WORKSPACE]
