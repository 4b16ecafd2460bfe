"""Compute the operations on a CPU by compiled kernels (cpp/).

They are absent where the package was installed without a compiler.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bias import bias_relu_pool, bias_relu_pool_backward, bias_relu_pool_dual, bias_relu_pool_dual_backward
from .classifier import linear_cross_entropy, linear_cross_entropy_dual
from .conv import (
    conv3x3,
    conv3x3_dual,
    conv3x3_dual_input_gradient,
    conv3x3_dual_weight_gradient,
    conv3x3_input_gradient,
    conv3x3_input_gradient_tangent,
    conv3x3_tangent,
    conv3x3_weight_gradient,
)
from .conv import workspace_bytes as workspace_bytes
from .extension import LOADED
from .extension import release_memory as release_memory
from .flat import adjoint_step, sgd_step, squared_distance
from .norm import norm_relu_pool, norm_relu_pool_backward, norm_relu_pool_dual, norm_relu_pool_dual_backward
from .warp import colour_warp_mask, colour_warp_mask_transpose

__all__ = [
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
    "linear_cross_entropy",
    "linear_cross_entropy_dual",
    "norm_relu_pool",
    "norm_relu_pool_backward",
    "norm_relu_pool_dual",
    "norm_relu_pool_dual_backward",
    "sgd_step",
    "squared_distance",
]
OPERATIONS = frozenset(__all__)
NOT_IMPLEMENTED = frozenset(
    {
        "add_planes",
        "add_up",
        "conv_norm_relu_pool",
        "conv_norm_relu_pool_backward",
        "conv_norm_relu_pool_dual",
        "conv_norm_relu_pool_dual_backward",
        "image_patches",
        "index_add",
        "pack_parameters",
    }
)
"""Operations without a native kernel: on a CPU nothing is gained by fusing their parts."""

available = LOADED


def has(operation: str, tensor: Tensor) -> bool:
    """Return whether there is a native kernel of `operation` for a tensor of this device and dtype."""
    dtypes = (torch.float32, torch.float64, *((torch.bfloat16,) if operation == "squared_distance" else ()))
    return available and operation in OPERATIONS and tensor.device.type == "cpu" and tensor.dtype in dtypes
