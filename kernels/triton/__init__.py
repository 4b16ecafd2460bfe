"""Compute the operations on CUDA with Triton kernels, and with cuDNN where that is faster.

Importing this package imports neither Triton nor CUDA libraries. The first use of an operation does, and raises
`ImportError` where Triton is missing, so that a GPU never stays idle without a message. As in the other back ends, the
functions are not differentiable. All are deterministic: they use no atomics, and the order of a sum depends only on shapes
and on the table of configurations. No function waits for the device, so a CUDA graph can capture each of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..types import ConvLayer, Precision, WeightBytes

if TYPE_CHECKING:
    from .bias import (
        bias_relu_pool,
        bias_relu_pool_backward,
        bias_relu_pool_dual,
        bias_relu_pool_dual_backward,
    )
    from .block import (
        conv_norm_relu_pool,
        conv_norm_relu_pool_backward,
        conv_norm_relu_pool_dual,
        conv_norm_relu_pool_dual_backward,
        image_patches,
    )
    from .classifier import linear_cross_entropy, linear_cross_entropy_dual
    from .flat import add_up, adjoint_step, index_add, sgd_step, squared_distance
    from .norm import (
        norm_relu_pool,
        norm_relu_pool_backward,
        norm_relu_pool_dual,
        norm_relu_pool_dual_backward,
    )
    from .partial_planes import add_planes
    from .warp import colour_warp_mask, colour_warp_mask_transpose, colour_warp_mask_transpose_add
    from .weights import pack_parameters

    conv3x3: Callable[..., Any]
    conv3x3_dual: Callable[..., Any]
    conv3x3_dual_input_gradient: Callable[..., Any]
    conv3x3_dual_weight_gradient: Callable[..., Any]
    conv3x3_input_gradient: Callable[..., Any]
    conv3x3_input_gradient_tangent: Callable[..., Any]
    conv3x3_tangent: Callable[..., Any]
    conv3x3_weight_gradient: Callable[..., Any]

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
    "colour_warp_mask_transpose_add",
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

_MODULES = {
    "add_planes": "partial_planes",
    "add_up": "flat",
    "adjoint": "flat",
    "bias": "bias",
    "colour": "warp",
    "conv_norm": "block",
    "image_patches": "block",
    "index": "flat",
    "linear": "classifier",
    "norm": "norm",
    "pack_parameters": "weights",
    "sgd": "flat",
    "squared": "flat",
}
"""Module of each operation, by the beginning of the operation's name."""


def has_image_block(channels: int, filters: int | None) -> bool:
    """Return whether there are kernels for the first block of images with `channels` and, unless it is None, `filters`."""
    return channels <= 3 and (filters is None or filters % 16 == 0)


def load() -> None:
    """Import Triton, and load its driver if there is a GPU.

    Raises `ImportError` where Triton is missing or its driver cannot be compiled.
    """
    launch = importlib.import_module(".launch", __package__)
    if torch.cuda.is_available():
        launch.load_driver()


def weight_bytes(
    batch: int, layers: Sequence[ConvLayer], dtype: torch.dtype, device: torch.device, precision: Precision
) -> list[WeightBytes]:
    """See `mtt_fast.kernels.weight_bytes`. Raises `ImportError` where Triton is missing."""
    dispatch = importlib.import_module(".dispatch", __package__)
    return dispatch.weight_bytes(batch, layers, dtype, device, precision)  # type: ignore[no-any-return]


def workspace_bytes(
    batch: int, layers: Sequence[ConvLayer], dtype: torch.dtype, device: torch.device, precision: Precision
) -> int:
    """See `mtt_fast.kernels.workspace_bytes`. Raises `ImportError` where Triton is missing."""
    dispatch = importlib.import_module(".dispatch", __package__)
    return dispatch.workspace_bytes(batch, layers, dtype, device, precision)  # type: ignore[no-any-return]


def compile_ahead(call: Callable[[], object]) -> None:
    """Run `call` so that its launches only compile their kernels, in parallel. Raises `ImportError` where Triton is missing."""
    importlib.import_module(".launch", __package__).compile_ahead(call)


def __getattr__(name: str) -> Any:
    """Return the operation `name`, imported on first use. Raises `ImportError` where Triton is missing."""
    if name.startswith("conv3x3") and name in OPERATIONS:
        return importlib.import_module(".dispatch", __package__).dispatched(name)
    if name in OPERATIONS:
        module = next(module for prefix, module in _MODULES.items() if name.startswith(prefix))
        return getattr(importlib.import_module(f".{module}", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
