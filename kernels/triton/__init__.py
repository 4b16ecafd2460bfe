"""Compute the operations on CUDA with Triton kernels, and with cuDNN where that is faster.

Importing this package imports neither Triton nor CUDA libraries. The first use of an operation does, and raises `ImportError`
where Triton is missing, so that a GPU is never silently unused. As in the other back ends, the functions are not differentiable.
All are deterministic: they use no atomics, and the order of a sum depends only on shapes and on the table of configurations. No
function synchronises, so a CUDA graph can capture each of them.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

_MODULES = {
    "add_planes": "partial_planes",
    "add_up": "flat",
    "adjoint_step": "flat",
    "bias_relu_pool": "bias",
    "bias_relu_pool_backward": "bias",
    "bias_relu_pool_dual": "bias",
    "bias_relu_pool_dual_backward": "bias",
    "colour_warp_mask": "warp",
    "colour_warp_mask_transpose": "warp",
    "conv3x3": "dispatch",
    "conv3x3_dual": "dispatch",
    "conv3x3_dual_input_gradient": "dispatch",
    "conv3x3_dual_weight_gradient": "dispatch",
    "conv3x3_input_gradient": "dispatch",
    "conv3x3_input_gradient_tangent": "dispatch",
    "conv3x3_tangent": "dispatch",
    "conv3x3_weight_gradient": "dispatch",
    "conv_norm_relu_pool": "block",
    "conv_norm_relu_pool_backward": "block",
    "conv_norm_relu_pool_dual": "block",
    "conv_norm_relu_pool_dual_backward": "block",
    "image_patches": "block",
    "index_add": "flat",
    "linear_cross_entropy": "classifier",
    "linear_cross_entropy_dual": "classifier",
    "norm_relu_pool": "norm",
    "norm_relu_pool_backward": "norm",
    "norm_relu_pool_dual": "norm",
    "norm_relu_pool_dual_backward": "norm",
    "pack_parameters": "weights",
    "sgd_step": "flat",
    "squared_distance": "flat",
}
"""Module of each operation."""

_OTHERS = {
    "compile_ahead": "launch",
    "image_block_bytes": "block",
    "weight_bytes": "dispatch",
    "workspace_bytes": "dispatch",
}
"""Module of each other function of `mtt_fast.kernels` that this back end has."""

OPERATIONS = frozenset(_MODULES)
NOT_IMPLEMENTED: frozenset[str] = frozenset()


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


def __getattr__(name: str) -> Any:
    """Return an operation or another function, imported on first use. Raises `ImportError` where Triton is missing."""
    module_name = (_MODULES | _OTHERS).get(name)
    if module_name is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{module_name}", __package__)
    return module.dispatched(name) if name.startswith("conv3x3") else getattr(module, name)
