"""Run only the convolutions of one iteration, by PyTorch: a floor for the time of the fused student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.measuring import seconds
from bench.settings import Setting


@dataclass(frozen=True)
class Convolution:
    """One convolution of the network (forward, or of a gradient), ready to run, and how often a step runs it."""

    run: Callable[[], Any]
    times: int


def convolutions(setting: Setting, device: torch.device) -> list[Convolution]:
    """Return the convolutions of a step, for the plain gradient and the mixed step: the work of 11 forward passes.

    Each is in the memory format that is faster on `device`.
    """
    net, size, runs = setting.net, setting.side, []
    for block in range(net.depth):
        first, channels = block == 0, net.width if block else net.in_channels
        padding = net.first_padding if first else 1
        x = torch.randn(setting.batch, channels, size, size, device=device)
        weight = torch.randn(net.width, channels, 3, 3, device=device)
        size += 2 * padding - 2
        y = torch.randn(setting.batch, net.width, size, size, device=device)
        size //= 2
        # plain + mixed; the first layer has no ẋ, and the images' gradient is needed only in the mixed step
        counts = {"forward": 1 + (2 if first else 3), "input": 2 if first else 1 + 3, "weight": 1 + (1 if first else 2)}
        runs += [Convolution(_faster(kind, x, weight, y, padding, device), times) for kind, times in counts.items()]
    return runs


def run_all(convolutions: list[Convolution]) -> None:
    """Run every convolution as often as a step needs it."""
    for convolution in convolutions:
        for _ in range(convolution.times):
            convolution.run()


def _faster(kind: str, x: Tensor, weight: Tensor, y: Tensor, padding: int, device: torch.device) -> Callable[[], Any]:
    candidates = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        tensors = [value.contiguous(memory_format=memory_format) for value in (x, weight, y)]
        run = _operation(kind, tensors, padding)
        run()
        candidates.append((min(seconds(run, device) for _ in range(2)), run))
    return min(candidates, key=lambda candidate: candidate[0])[1]


def _operation(kind: str, tensors: list[Tensor], padding: int) -> Callable[[], Any]:
    x, weight, y = tensors
    shape = ([1, 1], [padding, padding], [1, 1])  # stride, padding, dilation
    if kind == "forward":
        return lambda: torch.convolution(x, weight, None, *shape, False, [0, 0], 1)
    output_mask = [kind == "input", kind == "weight", False]
    return lambda: torch.ops.aten.convolution_backward(y, x, weight, None, *shape, False, [0, 0], 1, output_mask)
