"""Call the native kernels of `norm_relu_pool` and its derivatives (cpp/norm.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Affine, PlaneStats, in_format_of
from .extension import extension
from .planes import channels_last, empty_pooled, empty_stats, output_buffer


def norm_relu_pool(y: Tensor, affine: Affine, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool`."""
    p, (mean, rstd) = empty_pooled(y), empty_stats(y, 2)
    arguments = (channels_last(y), None, *affine, None, None, eps)
    results = (channels_last(p), None, mean, rstd, None, None)
    extension().norm_relu_pool(*arguments, *results, torch.get_num_threads())
    return in_format_of(y, p), mean, rstd


def norm_relu_pool_backward(
    y: Tensor, mean: Tensor, rstd: Tensor, affine: Affine, p_bar: Tensor, reuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool_backward`."""
    y_bar, (gamma_sums, beta_sums) = output_buffer(y, reuse), empty_stats(y, 2)
    arguments = (channels_last(y), None, mean, rstd, None, None, *affine, None, None, channels_last(p_bar), None)
    results = (channels_last(y_bar), None, gamma_sums, beta_sums)
    extension().norm_relu_pool_backward(*arguments, *results, torch.get_num_threads())
    return in_format_of(y, y_bar), gamma_sums, beta_sums


def norm_relu_pool_dual(
    y: Tensor, y_dot: Tensor, affine: Affine, affine_dot: Affine, eps: float
) -> tuple[Tensor, Tensor, PlaneStats]:
    """See `mtt_fast.kernels.norm_relu_pool_dual`."""
    p, p_dot, stats = empty_pooled(y), empty_pooled(y), PlaneStats(*empty_stats(y, 4))
    arguments = (channels_last(y), channels_last(y_dot), *affine, *affine_dot, eps)
    results = (channels_last(p), channels_last(p_dot), *stats)
    extension().norm_relu_pool(*arguments, *results, torch.get_num_threads())
    return in_format_of(y, p), in_format_of(y, p_dot), stats


def norm_relu_pool_dual_backward(
    y: Tensor,
    y_dot: Tensor,
    stats: PlaneStats,
    affine: Affine,
    affine_dot: Affine,
    p_bar: Tensor,
    p_bar_dot: Tensor,
    reuse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool_dual_backward`."""
    y_bar, y_bar_dot, (gamma_sums, beta_sums) = output_buffer(y, reuse), output_buffer(y_dot, reuse), empty_stats(y, 2)
    arguments = (channels_last(y), channels_last(y_dot), *stats, *affine, *affine_dot)
    bars = (channels_last(p_bar), channels_last(p_bar_dot))
    results = (channels_last(y_bar), channels_last(y_bar_dot), gamma_sums, beta_sums)
    extension().norm_relu_pool_backward(*arguments, *bars, *results, torch.get_num_threads())
    return in_format_of(y, y_bar), in_format_of(y, y_bar_dot), gamma_sums, beta_sums
