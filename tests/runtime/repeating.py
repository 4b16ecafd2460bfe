"""Capture calls on a CPU, which cannot: a replay computes again."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mtt_fast.runtime.cuda_graphs import CapturedCall

Run = Callable[[], tuple[Tensor, ...]]


class Repeating:
    """A capturer that works as CUDA does, as far as a CPU can, and counts."""

    def __init__(self) -> None:
        self.captured = self.graphed = 0

    def __call__(self, run: Run) -> CapturedCall:
        self.captured += 1
        outputs = run()

        def graph() -> None:
            self.graphed += 1
            for place, value in zip(outputs, run(), strict=True):
                place.copy_(value)

        return CapturedCall(graph, outputs)
