"""What follows the convolution in a block of ConvNet, norm, ReLU and pool, and its derivatives: once for each norm.

A dot is the derivative in the direction of the parameters, a bar the gradient of the loss. `affine` are the parameters
that have an effect here: γ, β of an instance norm; without a norm the convolution's bias. The derivatives take the
convolution along, which some kernels do together with what follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.kernels import Activations, Affine, Precision
from mtt_fast.networks.convnet import NORM_EPS, Norm

Tensors = tuple[Tensor, ...]


class Convolution(NamedTuple):
    """The first part of a block: its weight (K, C, 3, 3), that in the direction, padding and precision."""

    weight: Tensor
    weight_dot: Tensor
    padding: int
    precision: Precision


class Epilogue(NamedTuple):
    """Two functions of y (B, C, H, W), the convolution's result, and two of the whole block in a direction.

    What is kept begins with y; `backward` destroys it only if it may. `dual_backward` takes the activations, and frees each as soon as it can.
    """

    forward: Callable[[Tensor, Tensors], tuple[Tensor, Tensors]]
    """y, affine -> p (B, C, H//2, W//2), kept"""
    backward: Callable[[Tensors, Tensors, Tensor, bool], tuple[Tensor, Tensors]]
    """kept, affine, p̄, may kept be destroyed -> ȳ, the gradients of affine"""
    dual: Callable[
        [Tensor, Tensor | None, Convolution, Tensors, Tensors, Tensor | None], tuple[Tensor, Tensor, Activations]
    ]
    """x, ẋ (None for images), convolution, affine, its dots, y if known -> p, ṗ, activations"""
    dual_backward: Callable[
        [Activations, Convolution, Tensors, Tensors, Tensor | None, Tensor, bool],
        tuple[Tensor | None, Tensor, Tensor, Tensors],
    ]
    """activations, convolution, affine, its dots, p̄, p̄̇, is x̄ wanted -> x̄, x̄̇, W̄̇, the derivatives of affine's gradients"""


def _norm_forward(y: Tensor, affine: Tensors) -> tuple[Tensor, Tensors]:
    p, mean, rstd = kernels.norm_relu_pool(y, Affine(*affine), NORM_EPS)
    return p, (y, mean, rstd)


def _norm_backward(saved: Tensors, affine: Tensors, p_bar: Tensor, reuse: bool) -> tuple[Tensor, Tensors]:
    y_bar, *affine_bar = kernels.norm_relu_pool_backward(*saved, Affine(*affine), p_bar, reuse=reuse)
    return y_bar, tuple(affine_bar)


def _norm_dual(
    x: Tensor, x_dot: Tensor | None, convolution: Convolution, affine: Tensors, affine_dot: Tensors, y: Tensor | None
) -> tuple[Tensor, Tensor, Activations]:
    weight, weight_dot, padding, precision = convolution
    p, p_dot, activations = kernels.conv_norm_relu_pool_dual(
        x, x_dot, weight, weight_dot, Affine(*affine), Affine(*affine_dot), padding, NORM_EPS, precision, y
    )
    return p, p_dot, activations


def _norm_dual_backward(
    activations: Activations,
    convolution: Convolution,
    affine: Tensors,
    affine_dot: Tensors,
    p_bar: Tensor | None,
    p_bar_dot: Tensor,
    wants_x_bar: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensors]:
    assert p_bar is not None
    weight, weight_dot, padding, precision = convolution
    parameters = (weight, weight_dot, Affine(*affine), Affine(*affine_dot))
    x_bar, x_bar_dot, weight_bar_dot, *affine_bar_dot = kernels.conv_norm_relu_pool_dual_backward(
        activations, *parameters, p_bar, p_bar_dot, padding, precision, wants_x_bar
    )
    return x_bar, x_bar_dot, weight_bar_dot, tuple(affine_bar_dot)


def _bias_forward(y: Tensor, affine: Tensors) -> tuple[Tensor, Tensors]:
    return kernels.bias_relu_pool(y, *affine), (y,)


def _bias_backward(saved: Tensors, affine: Tensors, p_bar: Tensor, reuse: bool) -> tuple[Tensor, Tensors]:
    y_bar, beta_bar = kernels.bias_relu_pool_backward(*saved, *affine, p_bar, reuse=reuse)
    return y_bar, (beta_bar,)


def _bias_dual(
    x: Tensor, x_dot: Tensor | None, convolution: Convolution, affine: Tensors, affine_dot: Tensors, y: Tensor | None
) -> tuple[Tensor, Tensor, Activations]:
    if y is None:
        y, y_dot = kernels.conv3x3_dual(x, x_dot, *convolution)
    else:
        y_dot = kernels.conv3x3_tangent(x, x_dot, *convolution)
    p, p_dot = kernels.bias_relu_pool_dual(y, y_dot, *affine, *affine_dot)
    return p, p_dot, Activations(x, x_dot, y)  # ẏ moves no gradient: the block is linear between the kinks


def _bias_dual_backward(
    activations: Activations,
    convolution: Convolution,
    affine: Tensors,
    affine_dot: Tensors,
    p_bar: Tensor | None,
    p_bar_dot: Tensor,
    wants_x_bar: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensors]:
    assert p_bar is not None
    x, x_dot, y, _, _ = activations.take()
    y_bar, y_bar_dot, beta_bar_dot = kernels.bias_relu_pool_dual_backward(y, *affine, p_bar, p_bar_dot, reuse=True)
    del y
    _, _, padding, precision = convolution
    weight_bar_dot = kernels.conv3x3_dual_weight_gradient(x, x_dot, y_bar, y_bar_dot, padding, precision)
    del x, x_dot
    x_bar = None
    if wants_x_bar:
        x_bar, x_bar_dot = kernels.conv3x3_dual_input_gradient(y_bar, y_bar_dot, *convolution)
    else:
        x_bar_dot = kernels.conv3x3_input_gradient_tangent(y_bar, y_bar_dot, *convolution)
    return x_bar, x_bar_dot, weight_bar_dot, (beta_bar_dot,)


EPILOGUES: dict[Norm, Epilogue] = {
    "instance": Epilogue(_norm_forward, _norm_backward, _norm_dual, _norm_dual_backward),
    "none": Epilogue(_bias_forward, _bias_backward, _bias_dual, _bias_dual_backward),
}
