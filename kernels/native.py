"""The compiled CPU twins (cpp/). They are absent where the package was installed without a compiler."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .formats import ConvLayer, LabelKind, in_format_of


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


def has(operation: str, tensor: Tensor) -> bool:
    """Return whether there is a twin of `operation` below for a tensor of this device and dtype."""
    dtypes = (torch.float32, torch.float64, *((torch.bfloat16,) if operation == "squared_distance" else ()))
    return available and operation in globals() and tensor.device.type == "cpu" and tensor.dtype in dtypes


def sgd_step(
    theta: Tensor,
    gradient: Tensor,
    rate: Tensor,
    out: Tensor,
    velocity: Tensor | None,
    velocity_out: Tensor | None,
    momentum: float,
    weight_decay: float,
) -> Tensor:
    """See `mtt_fast.kernels.sgd_step`."""
    factors = (momentum, weight_decay, torch.get_num_threads())
    _module().sgd_step(theta, gradient, rate.item(), out, velocity, velocity_out, *factors)
    torch.autograd.graph.increment_version([out] if velocity_out is None else [out, velocity_out])
    return out


def adjoint_step(
    adjoint: Tensor,
    hessian_v: Tensor,
    direction: Tensor,
    scale: Tensor,
    out: Tensor,
    incoming: Tensor | None,
    weight_decay: float,
) -> Tensor:
    """See `mtt_fast.kernels.adjoint_step`."""
    decayed = direction if weight_decay else None  # what plays no part is not read
    arguments = (adjoint, hessian_v, decayed, scale.item(), out, incoming, weight_decay)
    _module().adjoint_step(*arguments, torch.get_num_threads())
    torch.autograd.graph.increment_version(out)
    return out


# The products of the classifier are torch's: at a student's shapes its library comes close to what the processor can do.
# What lies between them is one pass over the logits, which become the gradients to them.


def linear_cross_entropy(
    features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, label_kind: LabelKind
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.linear_cross_entropy`."""
    o = features.mm(weight.t())
    loss, bias_bar = features.new_empty(()), torch.empty_like(bias)
    _module().cross_entropy(o, bias, *_labels(labels, label_kind), loss, bias_bar, torch.get_num_threads())
    return loss, o.mm(weight), o.t().mm(features), bias_bar


def linear_cross_entropy_dual(
    features: Tensor,
    features_dot: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_dot: Tensor,
    bias_dot: Tensor,
    labels: Tensor,
    label_kind: LabelKind,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """See `mtt_fast.kernels.linear_cross_entropy_dual`."""
    o = features.mm(weight.t())
    o_dot = features.mm(weight_dot.t()).addmm_(features_dot, weight.t())
    loss_dot, bias_bar_dot = features.new_empty(()), torch.empty_like(bias)
    labels_bar_dot = None if label_kind == "indices" else torch.empty_like(labels)
    results = (loss_dot, bias_bar_dot, labels_bar_dot, torch.get_num_threads())
    _module().cross_entropy_dual(o, o_dot, bias, bias_dot, *_labels(labels, label_kind), *results)
    features_bar_dot = o_dot.mm(weight).addmm_(o, weight_dot)
    weight_bar_dot = o_dot.t().mm(features).addmm_(o.t(), features_dot)
    return loss_dot, o.mm(weight), features_bar_dot, weight_bar_dot, bias_bar_dot, labels_bar_dot


def _labels(labels: Tensor, label_kind: LabelKind) -> tuple[Tensor | None, Tensor | None, bool]:
    """Return indices or soft labels, and whether the target is the softmax of the latter."""
    return (labels, None, False) if label_kind == "indices" else (None, labels, label_kind == "logits")


# The twins below are channels-last throughout: oneDNN's convolutions are fastest there, and the channels are the lanes
# of the vector unit. A contiguous tensor is copied to that format, and its results back.


def norm_relu_pool(y: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool`."""
    p, (mean, rstd) = _pooled(y), _numbers(y, 2)
    _module().norm_relu_pool(_last(y), gamma, beta, eps, _last(p), mean, rstd, torch.get_num_threads())
    return in_format_of(y, p), mean, rstd


def norm_relu_pool_backward(
    y: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, p_bar: Tensor, reuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool_backward`."""
    y_bar, (gamma_sum, beta_sum) = _over(y, reuse), _numbers(y, 2)
    _module().norm_relu_pool_backward(
        _last(y), mean, rstd, gamma, beta, _last(p_bar), _last(y_bar), gamma_sum, beta_sum, torch.get_num_threads()
    )
    return in_format_of(y, y_bar), gamma_sum.sum(0), beta_sum.sum(0)


def norm_relu_pool_dual(
    y: Tensor, y_dot: Tensor, gamma: Tensor, beta: Tensor, gamma_dot: Tensor, beta_dot: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool_dual`."""
    p, p_dot, numbers = _pooled(y), _pooled(y), _numbers(y, 4)
    mean, rstd, k1, k2 = numbers
    arguments = (_last(y), _last(y_dot), gamma, beta, gamma_dot, beta_dot, eps, _last(p), _last(p_dot))
    _module().norm_relu_pool_dual(*arguments, *numbers, torch.get_num_threads())
    return in_format_of(y, p), in_format_of(y, p_dot), mean, rstd, k1, k2


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
    reuse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.norm_relu_pool_dual_backward`."""
    y_bar, y_bar_dot, (gamma_sum, beta_sum) = _over(y, reuse), _over(y_dot, reuse), _numbers(y, 2)
    arguments = (_last(y), _last(y_dot), mean, rstd, k1, k2, gamma, beta, gamma_dot, beta_dot)
    results = (_last(y_bar), _last(y_bar_dot), gamma_sum, beta_sum)
    _module().norm_relu_pool_dual_backward(
        *arguments, _last(p_bar), _last(p_bar_dot), *results, torch.get_num_threads()
    )
    return in_format_of(y, y_bar), in_format_of(y, y_bar_dot), gamma_sum.sum(0), beta_sum.sum(0)


def bias_relu_pool(y: Tensor, beta: Tensor) -> Tensor:
    """See `mtt_fast.kernels.bias_relu_pool`."""
    p = _pooled(y)
    _module().bias_relu_pool(_last(y), beta, _last(p), torch.get_num_threads())
    return in_format_of(y, p)


def bias_relu_pool_backward(y: Tensor, beta: Tensor, p_bar: Tensor, reuse: bool = False) -> tuple[Tensor, Tensor]:
    """See `mtt_fast.kernels.bias_relu_pool_backward`."""
    y_bar, (beta_sum,) = _over(y, reuse), _numbers(y, 1)
    _module().bias_relu_pool_backward(_last(y), beta, _last(p_bar), _last(y_bar), beta_sum, torch.get_num_threads())
    return in_format_of(y, y_bar), beta_sum.sum(0)


def bias_relu_pool_dual(y: Tensor, y_dot: Tensor, beta: Tensor, beta_dot: Tensor) -> tuple[Tensor, Tensor]:
    """See `mtt_fast.kernels.bias_relu_pool_dual`."""
    p, p_dot = _pooled(y), _pooled(y)
    arguments = (_last(y), _last(y_dot), beta, beta_dot, _last(p), _last(p_dot))
    _module().bias_relu_pool_dual(*arguments, torch.get_num_threads())
    return in_format_of(y, p), in_format_of(y, p_dot)


def bias_relu_pool_dual_backward(
    y: Tensor, beta: Tensor, p_bar: Tensor, p_bar_dot: Tensor, reuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.bias_relu_pool_dual_backward`."""
    y_bar, y_bar_dot, (beta_sum,) = _over(y, reuse), _over(y, False), _numbers(y, 1)
    arguments = (_last(y), beta, _last(p_bar), _last(p_bar_dot), _last(y_bar), _last(y_bar_dot), beta_sum)
    _module().bias_relu_pool_dual_backward(*arguments, torch.get_num_threads())
    return in_format_of(y, y_bar), in_format_of(y, y_bar_dot), beta_sum.sum(0)


# Images have so few channels that the nine taps of all of them are one row of a small matrix product; everything else
# goes through Winograd's transform (cpp/conv.h).
_FEW_CHANNELS = 3


def conv3x3(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """See `mtt_fast.kernels.conv3x3`."""
    y, threads = _grown(x, len(weight), 2 * padding - 2), torch.get_num_threads()
    if x.shape[1] <= _FEW_CHANNELS:
        _module().patches(_last(x), weight, padding, _last(y), threads)
    else:
        _module().winograd(_last(x), None, weight, None, padding, False, _last(y), None, threads)
    return in_format_of(x, y)


def conv3x3_input_gradient(y_bar: Tensor, weight: Tensor, padding: int) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_input_gradient`."""
    x_bar = _grown(y_bar, weight.shape[1], 2 - 2 * padding)
    _module().winograd(_last(y_bar), None, weight, None, 2 - padding, True, _last(x_bar), None, torch.get_num_threads())
    return in_format_of(y_bar, x_bar)


def conv3x3_weight_gradient(x: Tensor, y_bar: Tensor, padding: int) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_weight_gradient`."""
    weight_bar = x.new_empty(y_bar.shape[1], x.shape[1], 3, 3)
    threads = torch.get_num_threads()
    if x.shape[1] <= _FEW_CHANNELS:
        _module().patches_weight_gradient(_last(x), _last(y_bar), padding, weight_bar, threads)
    else:
        _module().winograd_weight_gradient(_last(x), None, _last(y_bar), None, padding, weight_bar, threads)
    return weight_bar


def conv3x3_dual(
    x: Tensor, x_dot: Tensor | None, weight: Tensor, weight_dot: Tensor, padding: int
) -> tuple[Tensor, Tensor]:
    """See `mtt_fast.kernels.conv3x3_dual`."""
    if x_dot is None:
        return conv3x3(x, weight, padding), conv3x3(x, weight_dot, padding)
    y, y_dot = (_grown(x, len(weight), 2 * padding - 2) for _ in range(2))
    _module().winograd(
        *(_last(x), _last(x_dot), weight, weight_dot, padding, False, _last(y), _last(y_dot), torch.get_num_threads())
    )
    return in_format_of(x, y), in_format_of(x, y_dot)


def conv3x3_tangent(x: Tensor, x_dot: Tensor | None, weight: Tensor, weight_dot: Tensor, padding: int) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_tangent`."""
    if x_dot is None:
        return conv3x3(x, weight_dot, padding)
    y_dot = _grown(x, len(weight), 2 * padding - 2)
    operands = (_last(x), _last(x_dot), weight, weight_dot)
    _module().winograd(*operands, padding, False, None, _last(y_dot), torch.get_num_threads())
    return in_format_of(x, y_dot)


def conv3x3_dual_input_gradient(
    y_bar: Tensor, y_bar_dot: Tensor, weight: Tensor, weight_dot: Tensor, padding: int
) -> tuple[Tensor, Tensor]:
    """See `mtt_fast.kernels.conv3x3_dual_input_gradient`."""
    x_bar, x_bar_dot = (_grown(y_bar, weight.shape[1], 2 - 2 * padding) for _ in range(2))
    outputs = (_last(x_bar), _last(x_bar_dot))
    _module().winograd(
        *(_last(y_bar), _last(y_bar_dot), weight, weight_dot, 2 - padding, True, *outputs, torch.get_num_threads())
    )
    return in_format_of(y_bar, x_bar), in_format_of(y_bar, x_bar_dot)


def conv3x3_input_gradient_tangent(
    y_bar: Tensor, y_bar_dot: Tensor, weight: Tensor, weight_dot: Tensor, padding: int
) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_input_gradient_tangent`."""
    x_bar_dot, threads = _grown(y_bar, weight.shape[1], 2 - 2 * padding), torch.get_num_threads()
    operands = (_last(y_bar), _last(y_bar_dot), weight, weight_dot)
    if weight.shape[1] <= _FEW_CHANNELS:
        _module().patches_input_gradient(*operands, padding, _last(x_bar_dot), threads)
    else:
        _module().winograd(*operands, 2 - padding, True, None, _last(x_bar_dot), threads)
    return in_format_of(y_bar, x_bar_dot)


def conv3x3_dual_weight_gradient(
    x: Tensor, x_dot: Tensor | None, y_bar: Tensor, y_bar_dot: Tensor, padding: int
) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_dual_weight_gradient`."""
    if x_dot is None:
        return conv3x3_weight_gradient(x, y_bar_dot, padding)
    weight_bar_dot = x.new_empty(y_bar.shape[1], x.shape[1], 3, 3)
    operands = (_last(x), _last(x_dot), _last(y_bar), _last(y_bar_dot))
    _module().winograd_weight_gradient(*operands, padding, weight_bar_dot, torch.get_num_threads())
    return weight_bar_dot


# Planes of few channels are what images are, so these take them as they lie: contiguous.


def colour_warp_mask(images: Tensor, parameters: Tensor) -> Tensor:
    """See `mtt_fast.kernels.colour_warp_mask`."""
    y = _memory(images, images.shape)
    _module().colour_warp_mask(images, parameters, y, torch.get_num_threads())
    return y


def colour_warp_mask_transpose(y_bar: Tensor, parameters: Tensor) -> Tensor:
    """See `mtt_fast.kernels.colour_warp_mask_transpose`."""
    x_bar = _memory(y_bar, y_bar.shape)
    _module().colour_warp_mask_transpose(y_bar, parameters, x_bar, torch.get_num_threads())
    return x_bar


def work_bytes(batch: int, layers: Sequence[ConvLayer], dtype: torch.dtype) -> int:
    """See `mtt_fast.kernels.work_bytes`."""
    of_dtype = {torch.float32: _module().step_work_float32, torch.float64: _module().step_work_float64}[dtype]
    return int(of_dtype(batch, [tuple(layer) for layer in layers], _FEW_CHANNELS, torch.get_num_threads()))


def release_memory() -> None:
    """See `mtt_fast.kernels.release_memory`."""
    if _native is not None:
        _native.release_memory()


def _module() -> ModuleType:
    assert _native is not None, "the native kernels are not installed"
    return _native


def _last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)  # (B, H, W, C), contiguous


# Results of at least so many bytes take memory that the module keeps from one call to the next (cpp/pool.h).
_LARGE = 1 << 20


def _empty(like: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Return a tensor without a value, channels_last, (B, C, H, W), of the dtype of `like`."""
    batch, channels, height, width = shape
    return _memory(like, (batch, height, width, channels)).permute(0, 3, 1, 2)


def _memory(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor without a value, contiguous, of the dtype of `like`."""
    size = math.prod(shape) * like.element_size()
    if size < _LARGE:
        return torch.empty(shape, dtype=like.dtype)
    memory: Tensor = _module().memory(size)
    return memory.view(like.dtype).view(shape)


def _over(y: Tensor, reuse: bool) -> Tensor:
    """Return where the gradient to `y` goes: a pixel is read for the last time before its gradient is written."""
    if not (reuse and y.is_contiguous(memory_format=torch.channels_last)):
        return _empty(y, (y.shape[0], y.shape[1], y.shape[2], y.shape[3]))
    torch.autograd.graph.increment_version(y)
    return y


def _pooled(y: Tensor) -> Tensor:
    batch, channels, height, width = y.shape
    shape = (batch, channels, height // 2, width // 2)
    return _empty(y, shape)


def _grown(like: Tensor, channels: int, by: int) -> Tensor:
    batch, _, height, width = like.shape
    shape = (batch, channels, height + by, width + by)
    return _empty(like, shape)


def _numbers(y: Tensor, count: int) -> list[Tensor]:
    return [torch.empty(y.shape[:2], dtype=y.dtype) for _ in range(count)]
