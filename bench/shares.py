"""Where an iteration of the fused step spends its time: every operation of mtt_fast.kernels timed where it is called."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.measuring import seconds, synchronise
from mtt_fast import kernels


@contextlib.contextmanager
def timed_operations(device: torch.device) -> Iterator[dict[str, float]]:
    """Within, add up the seconds of each operation, by name. On a GPU each is waited for, which takes time itself."""
    found: dict[str, float] = defaultdict(float)
    operations = {
        name: value for name in kernels.__all__ if callable(value := getattr(kernels, name)) and _computes(name)
    }
    try:
        for name, operation in operations.items():
            setattr(kernels, name, _timed(name, operation, device, found))
        yield found
    finally:
        for name, operation in operations.items():
            setattr(kernels, name, operation)


def share_of_operations(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Return the share of one call of `run` of convolutions, of other operations and of the rest; nothing if none ran."""
    with timed_operations(device) as operations:
        whole = seconds(run, device)
    if not operations:
        return {}
    convolutions = sum(taken for name, taken in operations.items() if name.startswith("conv"))
    others = sum(operations.values()) - convolutions
    return {
        "convolutions": convolutions / whole,
        "other operations": others / whole,
        "rest": 1 - (convolutions + others) / whole,
    }


def _computes(name: str) -> bool:
    return name.startswith(("conv", "norm", "linear", "squared"))


def _timed(
    name: str, operation: Callable[..., Any], device: torch.device, found: dict[str, float]
) -> Callable[..., Any]:
    @functools.wraps(operation)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = None

        def run() -> None:
            nonlocal result
            result = operation(*args, **kwargs)

        synchronise(device)
        found[name] += seconds(run, device)
        return result

    return call
