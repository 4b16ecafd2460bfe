"""Call the native kernels of `conv3x3` and its derivatives (cpp/conv.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import ConvLayer, in_format_of
from .extension import extension
from .planes import channels_last, empty_grown

# Images have so few channels that the nine taps of all of them are one row of a small matrix product; everything else
# goes through Winograd's transform (cpp/conv.h).
_FEW_CHANNELS = 3


def conv3x3(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """See `mtt_fast.kernels.conv3x3`."""
    y, threads = empty_grown(x, len(weight), 2 * padding - 2), torch.get_num_threads()
    if x.shape[1] <= _FEW_CHANNELS:
        extension().patches(channels_last(x), weight, padding, channels_last(y), threads)
    else:
        extension().winograd(channels_last(x), None, weight, None, padding, False, channels_last(y), None, threads)
    return in_format_of(x, y)


def conv3x3_input_gradient(y_bar: Tensor, weight: Tensor, padding: int) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_input_gradient`."""
    x_bar = empty_grown(y_bar, weight.shape[1], 2 - 2 * padding)
    operands, outputs = (channels_last(y_bar), None, weight, None), (channels_last(x_bar), None)
    extension().winograd(*operands, 2 - padding, True, *outputs, torch.get_num_threads())
    return in_format_of(y_bar, x_bar)


def conv3x3_weight_gradient(x: Tensor, y_bar: Tensor, padding: int) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_weight_gradient`."""
    weight_bar = x.new_empty(y_bar.shape[1], x.shape[1], 3, 3)
    threads = torch.get_num_threads()
    if x.shape[1] <= _FEW_CHANNELS:
        extension().patches_weight_gradient(channels_last(x), channels_last(y_bar), padding, weight_bar, threads)
    else:
        operands = (channels_last(x), None, channels_last(y_bar), None)
        extension().winograd_weight_gradient(*operands, padding, weight_bar, threads)
    return weight_bar[None]


def conv3x3_dual(
    x: Tensor, x_dot: Tensor | None, weight: Tensor, weight_dot: Tensor, padding: int
) -> tuple[Tensor, Tensor]:
    """See `mtt_fast.kernels.conv3x3_dual`."""
    if x_dot is None:
        return conv3x3(x, weight, padding), conv3x3(x, weight_dot, padding)
    y, y_dot = (empty_grown(x, len(weight), 2 * padding - 2) for _ in range(2))
    operands = (channels_last(x), channels_last(x_dot), weight, weight_dot)
    outputs = (channels_last(y), channels_last(y_dot))
    extension().winograd(*operands, padding, False, *outputs, torch.get_num_threads())
    return in_format_of(x, y), in_format_of(x, y_dot)


def conv3x3_tangent(x: Tensor, x_dot: Tensor | None, weight: Tensor, weight_dot: Tensor, padding: int) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_tangent`."""
    if x_dot is None:
        return conv3x3(x, weight_dot, padding)
    y_dot = empty_grown(x, len(weight), 2 * padding - 2)
    operands = (channels_last(x), channels_last(x_dot), weight, weight_dot)
    extension().winograd(*operands, padding, False, None, channels_last(y_dot), torch.get_num_threads())
    return in_format_of(x, y_dot)


def conv3x3_dual_input_gradient(
    y_bar: Tensor, y_bar_dot: Tensor, weight: Tensor, weight_dot: Tensor, padding: int
) -> tuple[Tensor, Tensor]:
    """See `mtt_fast.kernels.conv3x3_dual_input_gradient`."""
    x_bar, x_bar_dot = (empty_grown(y_bar, weight.shape[1], 2 - 2 * padding) for _ in range(2))
    operands = (channels_last(y_bar), channels_last(y_bar_dot), weight, weight_dot)
    outputs = (channels_last(x_bar), channels_last(x_bar_dot))
    extension().winograd(*operands, 2 - padding, True, *outputs, torch.get_num_threads())
    return in_format_of(y_bar, x_bar), in_format_of(y_bar, x_bar_dot)


def conv3x3_input_gradient_tangent(
    y_bar: Tensor, y_bar_dot: Tensor, weight: Tensor, weight_dot: Tensor, padding: int
) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_input_gradient_tangent`."""
    x_bar_dot, threads = empty_grown(y_bar, weight.shape[1], 2 - 2 * padding), torch.get_num_threads()
    operands = (channels_last(y_bar), channels_last(y_bar_dot), weight, weight_dot)
    if weight.shape[1] <= _FEW_CHANNELS:
        extension().patches_input_gradient(*operands, padding, channels_last(x_bar_dot), threads)
    else:
        extension().winograd(*operands, 2 - padding, True, None, channels_last(x_bar_dot), threads)
    return in_format_of(y_bar, x_bar_dot)


def conv3x3_dual_weight_gradient(
    x: Tensor, x_dot: Tensor | None, y_bar: Tensor, y_bar_dot: Tensor, padding: int
) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_dual_weight_gradient`."""
    if x_dot is None:
        return conv3x3_weight_gradient(x, y_bar_dot, padding)
    weight_bar_dot = x.new_empty(y_bar.shape[1], x.shape[1], 3, 3)
    operands = (channels_last(x), channels_last(x_dot), channels_last(y_bar), channels_last(y_bar_dot))
    extension().winograd_weight_gradient(*operands, padding, weight_bar_dot, torch.get_num_threads())
    return weight_bar_dot[None]


def workspace_bytes(batch: int, layers: Sequence[ConvLayer], dtype: torch.dtype) -> int:
    """See `mtt_fast.kernels.workspace_bytes`."""
    of_dtype = {torch.float32: extension().step_work_float32, torch.float64: extension().step_work_float64}[dtype]
    return int(of_dtype(batch, [tuple(layer) for layer in layers], _FEW_CHANNELS, torch.get_num_threads()))
