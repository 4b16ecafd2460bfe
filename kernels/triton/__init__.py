"""The operations of `reference.py` for CUDA, written in Triton: so far norm, ReLU and pool.

Importing this package imports neither Triton nor anything of CUDA. The first use of an operation does, and raises
`ImportError` where Triton is missing: a GPU is never left idle in silence. Like the other twins these functions are not
differentiable. All are deterministic: no atomics, and sums are taken in an order that only shapes and the table of
configurations decide.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .norm import (
        norm_relu_pool,
        norm_relu_pool_backward,
        norm_relu_pool_dual,
        norm_relu_pool_dual_backward,
    )

__all__ = [
    "norm_relu_pool",
    "norm_relu_pool_backward",
    "norm_relu_pool_dual",
    "norm_relu_pool_dual_backward",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".norm", __package__), name)
