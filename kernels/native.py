"""The compiled CPU twins (cpp/). They are absent where the package was installed without a compiler."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from .formats import in_format_of


def _load() -> ModuleType | None:
    name = f"{__package__}._native"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:  # not installed; one that is there but does not load is an error, not a fallback
            return None
        raise


# MTT_FAST_NATIVE=0 turns the compiled code off. It is read here, once, when the package is imported.
_native = _load() if os.environ.get("MTT_FAST_NATIVE", "1") != "0" else None
available = _native is not None


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ (a − b)² in float64. `a`, `b`: (P,), on the CPU. The arguments were checked by `mtt_fast.kernels`."""
    return torch.tensor(_module().squared_distance(a, b, torch.get_num_threads()), dtype=torch.float64)


def runs(tensor: Tensor) -> bool:
    """Return whether the twins below are there for a tensor of this device and dtype."""
    return available and tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)


# The twins below are channels-last throughout: oneDNN's convolutions are fastest there, and the channels are the lanes
# of the vector unit. A contiguous tensor is copied to that format, and its results back.


def norm_relu_pool(y: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool`."""
    p, (mean, rstd) = _pooled(y), _numbers(y, 2)
    _module().norm_relu_pool(_last(y), gamma, beta, eps, _last(p), mean, rstd, torch.get_num_threads())
    return in_format_of(y, p), mean, rstd


def norm_relu_pool_backward(
    y: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, p_bar: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool_backward`."""
    y_bar, (gamma_sum, beta_sum) = _like(y), _numbers(y, 2)
    _module().norm_relu_pool_backward(
        _last(y), mean, rstd, gamma, beta, _last(p_bar), _last(y_bar), gamma_sum, beta_sum, torch.get_num_threads()
    )
    return in_format_of(y, y_bar), gamma_sum.sum(0), beta_sum.sum(0)


def norm_relu_pool_dual(
    y: Tensor, y_dot: Tensor, gamma: Tensor, beta: Tensor, gamma_dot: Tensor, beta_dot: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool_dual`."""
    p, p_dot, numbers = _pooled(y), _pooled(y), _numbers(y, 4)
    arguments = (_last(y), _last(y_dot), gamma, beta, gamma_dot, beta_dot, eps, _last(p), _last(p_dot))
    _module().norm_relu_pool_dual(*arguments, *numbers, torch.get_num_threads())
    return in_format_of(y, p), in_format_of(y, p_dot), *numbers


def norm_relu_pool_dual_backward(
    y: Tensor,
    y_dot: Tensor,
    mean: Tensor,
    rstd: Tensor,
    k1: Tensor,
    k2: Tensor,
    gamma: Tensor,
    beta: Tensor,
    gamma_dot: Tensor,
    beta_dot: Tensor,
    p_bar: Tensor,
    p_bar_dot: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool_dual_backward`."""
    y_bar, y_bar_dot, (gamma_sum, beta_sum) = _like(y), _like(y), _numbers(y, 2)
    arguments = (_last(y), _last(y_dot), mean, rstd, k1, k2, gamma, beta, gamma_dot, beta_dot)
    results = (_last(y_bar), _last(y_bar_dot), gamma_sum, beta_sum)
    _module().norm_relu_pool_dual_backward(
        *arguments, _last(p_bar), _last(p_bar_dot), *results, torch.get_num_threads()
    )
    return in_format_of(y, y_bar), in_format_of(y, y_bar_dot), gamma_sum.sum(0), beta_sum.sum(0)


def _module() -> ModuleType:
    assert _native is not None, "the native kernels are not installed"
    return _native


def _last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)  # (B, H, W, C), contiguous


def _like(y: Tensor) -> Tensor:
    return torch.empty_like(y, memory_format=torch.channels_last)


def _pooled(y: Tensor) -> Tensor:
    batch, channels, height, width = y.shape
    shape = (batch, channels, height // 2, width // 2)
    return torch.empty(shape, dtype=y.dtype, memory_format=torch.channels_last)


def _numbers(y: Tensor, count: int) -> list[Tensor]:
    return [torch.empty(y.shape[:2], dtype=y.dtype) for _ in range(count)]
