"""Check an engine before it is timed: exact in float64, and no worse than autograd in float32."""

from __future__ import annotations

import torch

from bench.cases import case_on, make_case, small_setting
from bench.engines import Engine, whole_graph
from bench.settings import Setting
from bench.workers import WorkerError
from mtt_fast.testing import relative_error

FLOAT64_TOLERANCE = 1e-9
FLOAT32_FACTOR = 2.0
"""Allowed multiple of the float32 error of whole-graph autograd: correct engines that round differently diverge at ReLU's kinks."""
FLOAT32_FLOOR = 1e-6
_MICROBATCH = 3  # images, of the small case's batches of 4


def float64_error(engine: Engine, setting: Setting, device: torch.device, *, cut: bool = False) -> float:
    """Return the larger relative error of the gradients of images and lr on a small case, against whole-graph autograd.

    With `cut` the engine computes each batch in micro-batches.
    """
    case = case_on(make_case(small_setting(setting)), torch.float64, device)
    gradients = engine.run(case, **({"microbatch": _MICROBATCH} if cut else {}))
    expected = whole_graph(case)
    return max(relative_error(mine, theirs) for mine, theirs in zip(gradients, expected, strict=True))


def check_errors(float64: float, float32: float = 0.0, allowed_float32: float | None = None) -> None:
    """Raise `WorkerError` unless an engine with these errors may be timed. NaN raises too."""
    if not float64 <= FLOAT64_TOLERANCE:
        raise WorkerError(f"wrong: float64 error {float64:.1e}, allowed {FLOAT64_TOLERANCE:.0e}")
    if allowed_float32 is not None and not float32 <= allowed_float32:
        raise WorkerError(f"wrong: float32 error {float32:.1e}, allowed {allowed_float32:.1e}")


def allowed_float32(autograd: float, precision: str = "tf32") -> float:
    """Return the allowed float32 error of an engine, given the error of autograd (which computes in tf32 or better).

    The factors of bf16 have three bits fewer than those of tf32.
    """
    return max(FLOAT32_FACTOR * autograd * (8 if precision == "bf16" else 1), FLOAT32_FLOOR)
