"""Where an iteration of the fused step spends its time: every operation of mtt_fast.kernels seen where it is called."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.measuring import seconds, synchronise
from mtt_fast import kernels

Operation = Callable[..., Any]
_COMPUTE = ("adjoint", "bias", "conv", "linear", "norm", "sgd", "squared")  # how their names begin


@contextlib.contextmanager
def wrapped_operations(wrap: Callable[[str, Operation], Operation]) -> Iterator[None]:
    """Within, call `wrap(name, operation)` in place of each operation of mtt_fast.kernels."""
    operations = {name: getattr(kernels, name) for name in kernels.__all__ if name.startswith(_COMPUTE)}
    try:
        for name, operation in operations.items():
            setattr(kernels, name, functools.wraps(operation)(wrap(name, operation)))
        yield
    finally:
        for name, operation in operations.items():
            setattr(kernels, name, operation)


def labelled(name: str, operation: Operation) -> Operation:
    """Return `operation` with its name in a profile."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(f"kernels.{name}"):
            return operation(*args, **kwargs)

    return call


def share_of_operations(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Return the share of one call of `run` of convolutions, of other operations and of the rest; nothing if none ran.

    On a GPU each operation is waited for, which takes time itself.
    """
    taken: dict[str, float] = defaultdict(float)
    within = [0.0]  # of each operation under way, the seconds of those that it calls itself

    def timed(name: str, operation: Operation) -> Operation:
        def call(*args: Any, **kwargs: Any) -> Any:
            result: list[Any] = []
            synchronise(device)
            within.append(0.0)
            whole = seconds(lambda: result.append(operation(*args, **kwargs)), device)
            taken[name] += whole - within.pop()
            within[-1] += whole
            return result[0]

        return call

    with wrapped_operations(timed):
        whole = seconds(run, device)
    if not taken:
        return {}
    convolutions = sum(value for name, value in taken.items() if name.startswith("conv"))
    others = sum(taken.values()) - convolutions
    return {
        "convolutions": convolutions / whole,
        "other operations": others / whole,
        "rest": 1 - (convolutions + others) / whole,
    }
