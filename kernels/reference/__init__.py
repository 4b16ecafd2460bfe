"""Define each operation in plain torch, on any device and in any precision. Written for clarity, not for speed.

A dot is the derivative in a direction of the parameters, a bar the gradient of the loss, and a bar with a dot the derivative of
that gradient in the direction. `ops` has checked the arguments. With float16 and bfloat16 planes everything is computed in
float32, and only planes are rounded again.
"""

from __future__ import annotations

from .bias import bias_relu_pool, bias_relu_pool_backward, bias_relu_pool_dual, bias_relu_pool_dual_backward
from .block import (
    conv_norm_relu_pool,
    conv_norm_relu_pool_backward,
    conv_norm_relu_pool_dual,
    conv_norm_relu_pool_dual_backward,
    image_patches,
)
from .classifier import linear_cross_entropy, linear_cross_entropy_dual
from .conv import (
    add_planes,
    conv3x3,
    conv3x3_dual,
    conv3x3_dual_input_gradient,
    conv3x3_dual_weight_gradient,
    conv3x3_input_gradient,
    conv3x3_input_gradient_tangent,
    conv3x3_tangent,
    conv3x3_weight_gradient,
)
from .flat import add_up, adjoint_step, index_add, pack_parameters, sgd_step, squared_distance
from .norm import norm_relu_pool, norm_relu_pool_backward, norm_relu_pool_dual, norm_relu_pool_dual_backward
from .warp import colour_warp_mask, colour_warp_mask_transpose

__all__ = [
    "add_planes",
    "add_up",
    "adjoint_step",
    "bias_relu_pool",
    "bias_relu_pool_backward",
    "bias_relu_pool_dual",
    "bias_relu_pool_dual_backward",
    "colour_warp_mask",
    "colour_warp_mask_transpose",
    "conv3x3",
    "conv3x3_dual",
    "conv3x3_dual_input_gradient",
    "conv3x3_dual_weight_gradient",
    "conv3x3_input_gradient",
    "conv3x3_input_gradient_tangent",
    "conv3x3_tangent",
    "conv3x3_weight_gradient",
    "conv_norm_relu_pool",
    "conv_norm_relu_pool_backward",
    "conv_norm_relu_pool_dual",
    "conv_norm_relu_pool_dual_backward",
    "image_patches",
    "index_add",
    "linear_cross_entropy",
    "linear_cross_entropy_dual",
    "norm_relu_pool",
    "norm_relu_pool_backward",
    "norm_relu_pool_dual",
    "norm_relu_pool_dual_backward",
    "pack_parameters",
    "sgd_step",
    "squared_distance",
]
OPERATIONS = frozenset(__all__)
NOT_IMPLEMENTED: frozenset[str] = frozenset()
