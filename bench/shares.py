"""Measure the shares of an iteration's time: every operation of the fused step is timed where it is dispatched."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch

from bench.measuring import seconds, synchronise
from mtt_fast.kernels import dispatch

Operation = Callable[..., Any]


@contextlib.contextmanager
def wrapped_operations(wrap: Callable[[str, Operation], Operation]) -> Iterator[None]:
    """Make mtt_fast.kernels dispatch to `wrap(name, implementation)` in place of each implementation, within the block."""

    def wrapping(choose: Callable[..., Operation]) -> Callable[..., Operation]:
        def wrapped(operation: str, *arguments: Any) -> Operation:
            return wrap(operation, choose(operation, *arguments))

        return wrapped

    with contextlib.ExitStack() as patches:
        for name in ("implementation_of", "block_implementation_of"):
            patches.enter_context(patch.object(dispatch, name, wrapping(getattr(dispatch, name))))
        yield


def labelled(name: str, operation: Operation) -> Operation:
    """Return `operation`, labelled with its name in a profile."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(f"kernels.{name}"):
            return operation(*args, **kwargs)

    return call


def share_of_operations(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Return the shares of convolutions, other operations and the rest in one call of `run`; empty if no operation ran.

    On a GPU the host waits for each operation, which takes time itself.
    """
    times: dict[str, float] = defaultdict(float)

    def timed(name: str, operation: Operation) -> Operation:
        def call(*args: Any, **kwargs: Any) -> Any:
            result: list[Any] = []
            synchronise(device)
            times[name] += seconds(lambda: result.append(operation(*args, **kwargs)), device)
            return result[0]

        return call

    with wrapped_operations(timed):
        total = seconds(run, device)
    if not times:
        return {}
    convolutions = sum(value for name, value in times.items() if name.startswith("conv"))
    others = sum(times.values()) - convolutions
    return {
        "convolutions": convolutions / total,
        "other operations": others / total,
        "rest": 1 - (convolutions + others) / total,
    }
