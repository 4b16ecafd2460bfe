"""Offer the operations that the engine is made of: functions of tensors that know nothing of distillation.

`ops/` has the signatures, contracts and checks. `reference/` defines each operation in plain torch, on any device;
`native/` (compiled from `cpp/`) and `triton/` compute the same faster on a CPU and on CUDA. `dispatch` chooses.
"""

from __future__ import annotations

if __name__ != "mtt_fast.kernels":  # it can be found as `kernels` too, which would be a second set of modules
    raise ImportError("import mtt_fast.kernels, not kernels")

from .dispatch import compile_ahead, has_kernels, native_available, release_memory, work_bytes
from .ops import (
    adjoint_step,
    bias_relu_pool,
    bias_relu_pool_backward,
    bias_relu_pool_dual,
    bias_relu_pool_dual_backward,
    colour_warp_mask,
    colour_warp_mask_transpose,
    conv3x3,
    conv3x3_dual,
    conv3x3_dual_input_gradient,
    conv3x3_dual_weight_gradient,
    conv3x3_input_gradient,
    conv3x3_input_gradient_tangent,
    conv3x3_tangent,
    conv3x3_weight_gradient,
    conv_norm_relu_pool_dual,
    conv_norm_relu_pool_dual_backward,
    linear_cross_entropy,
    linear_cross_entropy_dual,
    norm_relu_pool,
    norm_relu_pool_backward,
    norm_relu_pool_dual,
    norm_relu_pool_dual_backward,
    sgd_step,
    squared_distance,
)
from .types import WARP_PARAMETERS, Activations, Affine, ConvLayer, LabelKind, PlaneStats, Precision

__all__ = [
    "WARP_PARAMETERS",
    "Activations",
    "Affine",
    "ConvLayer",
    "LabelKind",
    "PlaneStats",
    "Precision",
    "adjoint_step",
    "bias_relu_pool",
    "bias_relu_pool_backward",
    "bias_relu_pool_dual",
    "bias_relu_pool_dual_backward",
    "colour_warp_mask",
    "colour_warp_mask_transpose",
    "compile_ahead",
    "conv3x3",
    "conv3x3_dual",
    "conv3x3_dual_input_gradient",
    "conv3x3_dual_weight_gradient",
    "conv3x3_input_gradient",
    "conv3x3_input_gradient_tangent",
    "conv3x3_tangent",
    "conv3x3_weight_gradient",
    "conv_norm_relu_pool_dual",
    "conv_norm_relu_pool_dual_backward",
    "has_kernels",
    "linear_cross_entropy",
    "linear_cross_entropy_dual",
    "native_available",
    "norm_relu_pool",
    "norm_relu_pool_backward",
    "norm_relu_pool_dual",
    "norm_relu_pool_dual_backward",
    "release_memory",
    "sgd_step",
    "squared_distance",
    "work_bytes",
]
