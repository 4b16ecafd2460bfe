"""Call the native kernels of `bias_relu_pool` and its derivatives (cpp/bias.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import in_format_of
from .extension import extension
from .planes import channels_last, empty_pooled, empty_stats, output_buffer


def bias_relu_pool(y: Tensor, beta: Tensor) -> Tensor:
    """See `mtt_fast.kernels.bias_relu_pool`."""
    p = empty_pooled(y)
    arguments = (channels_last(y), None, beta, None, channels_last(p), None)
    extension().bias_relu_pool(*arguments, torch.get_num_threads())
    return in_format_of(y, p)


def bias_relu_pool_backward(y: Tensor, beta: Tensor, p_bar: Tensor, reuse: bool = False) -> tuple[Tensor, Tensor]:
    """See `mtt_fast.kernels.bias_relu_pool_backward`."""
    y_bar, (beta_sums,) = output_buffer(y, reuse), empty_stats(y, 1)
    arguments = (channels_last(y), beta, channels_last(p_bar), None, channels_last(y_bar), None, beta_sums)
    extension().bias_relu_pool_backward(*arguments, torch.get_num_threads())
    return in_format_of(y, y_bar), beta_sums


def bias_relu_pool_dual(y: Tensor, y_dot: Tensor, beta: Tensor, beta_dot: Tensor) -> tuple[Tensor, Tensor]:
    """See `mtt_fast.kernels.bias_relu_pool_dual`."""
    p, p_dot = empty_pooled(y), empty_pooled(y)
    arguments = (channels_last(y), channels_last(y_dot), beta, beta_dot, channels_last(p), channels_last(p_dot))
    extension().bias_relu_pool(*arguments, torch.get_num_threads())
    return in_format_of(y, p), in_format_of(y, p_dot)


def bias_relu_pool_dual_backward(
    y: Tensor, beta: Tensor, p_bar: Tensor, p_bar_dot: Tensor, reuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.bias_relu_pool_dual_backward`."""
    y_bar, y_bar_dot, (beta_sums,) = output_buffer(y, reuse), output_buffer(y, False), empty_stats(y, 1)
    arguments = (channels_last(y), beta, channels_last(p_bar), channels_last(p_bar_dot))
    results = (channels_last(y_bar), channels_last(y_bar_dot), beta_sums)
    extension().bias_relu_pool_backward(*arguments, *results, torch.get_num_threads())
    return in_format_of(y, y_bar), in_format_of(y, y_bar_dot), beta_sums
