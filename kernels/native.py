"""The compiled CPU twins (cpp/). They are absent where the package was installed without a compiler."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor


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
    assert _native is not None, "the native kernels are not installed"
    return torch.tensor(_native.squared_distance(a, b, torch.get_num_threads()), dtype=torch.float64)
