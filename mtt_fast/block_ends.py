"""What follows the convolution in a block of ConvNet, norm, ReLU and pool, and its derivatives: once for each norm.

A dot is the derivative in the direction of the parameters, a bar the gradient of the loss. `affine` are the parameters
that have an effect here: γ, β of an instance norm; without a norm the convolution's bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.convnet import NORM_EPS, Norm

Tensors = tuple[Tensor, ...]


class BlockEnd(NamedTuple):
    """Four functions of y (B, C, H, W), the convolution's result.

    What is kept begins with y. Those that go back destroy it; `backward` only if it may.
    """

    forward: Callable[[Tensor, Tensors], tuple[Tensor, Tensors]]
    """y, affine -> p (B, C, H//2, W//2), kept"""
    backward: Callable[[Tensors, Tensors, Tensor, bool], tuple[Tensor, Tensors]]
    """kept, affine, p̄, may kept be destroyed -> ȳ, the gradients of affine"""
    dual: Callable[[Tensor, Tensor, Tensors, Tensors], tuple[Tensor, Tensor, Tensors]]
    """y, ẏ, affine, its dots -> p, ṗ, kept"""
    dual_backward: Callable[[Tensors, Tensors, Tensors, Tensor, Tensor], tuple[Tensor, Tensor, Tensors]]
    """kept, affine, its dots, p̄, p̄̇ -> ȳ, ȳ̇, the derivatives of affine's gradients"""


def _norm_forward(y: Tensor, affine: Tensors) -> tuple[Tensor, Tensors]:
    p, *numbers = kernels.norm_relu_pool(y, *affine, NORM_EPS)
    return p, (y, *numbers)


def _norm_backward(kept: Tensors, affine: Tensors, p_bar: Tensor, reuse: bool) -> tuple[Tensor, Tensors]:
    y_bar, *affine_bar = kernels.norm_relu_pool_backward(*kept, *affine, p_bar, reuse=reuse)
    return y_bar, tuple(affine_bar)


def _norm_dual(y: Tensor, y_dot: Tensor, affine: Tensors, affine_dot: Tensors) -> tuple[Tensor, Tensor, Tensors]:
    p, p_dot, *numbers = kernels.norm_relu_pool_dual(y, y_dot, *affine, *affine_dot, NORM_EPS)
    return p, p_dot, (y, y_dot, *numbers)


def _norm_dual_backward(
    kept: Tensors, affine: Tensors, affine_dot: Tensors, p_bar: Tensor, p_bar_dot: Tensor
) -> tuple[Tensor, Tensor, Tensors]:
    arguments = (*kept, *affine, *affine_dot, p_bar, p_bar_dot)
    y_bar, y_bar_dot, *affine_bar_dot = kernels.norm_relu_pool_dual_backward(*arguments, reuse=True)
    return y_bar, y_bar_dot, tuple(affine_bar_dot)


def _bias_forward(y: Tensor, affine: Tensors) -> tuple[Tensor, Tensors]:
    return kernels.bias_relu_pool(y, *affine), (y,)


def _bias_backward(kept: Tensors, affine: Tensors, p_bar: Tensor, reuse: bool) -> tuple[Tensor, Tensors]:
    y_bar, beta_bar = kernels.bias_relu_pool_backward(*kept, *affine, p_bar, reuse=reuse)
    return y_bar, (beta_bar,)


def _bias_dual(y: Tensor, y_dot: Tensor, affine: Tensors, affine_dot: Tensors) -> tuple[Tensor, Tensor, Tensors]:
    p, p_dot = kernels.bias_relu_pool_dual(y, y_dot, *affine, *affine_dot)
    return p, p_dot, (y,)  # ẏ moves no gradient: the block is linear between the kinks


def _bias_dual_backward(
    kept: Tensors, affine: Tensors, affine_dot: Tensors, p_bar: Tensor, p_bar_dot: Tensor
) -> tuple[Tensor, Tensor, Tensors]:
    y_bar, y_bar_dot, beta_bar_dot = kernels.bias_relu_pool_dual_backward(*kept, *affine, p_bar, p_bar_dot, reuse=True)
    return y_bar, y_bar_dot, (beta_bar_dot,)


BLOCK_ENDS: dict[Norm, BlockEnd] = {
    "instance": BlockEnd(_norm_forward, _norm_backward, _norm_dual, _norm_dual_backward),
    "none": BlockEnd(_bias_forward, _bias_backward, _bias_dual, _bias_dual_backward),
}
