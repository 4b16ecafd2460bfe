"""Draw the arguments of operations, and name their results, for the tests of several families."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast.kernels import WARP_PARAMETERS

EPS = 1e-5
FORMATS = [torch.contiguous_format, torch.channels_last]

PLANES = [
    (2, 3, 4, 4),
    (1, 1, 2, 3),  # a 1×1 plane after the pool, an odd side
    (3, 5, 7, 5),
    (2, 37, 6, 3),  # a part of a vector of channels
    (1, 129, 9, 8),
]
CONVOLUTIONS = [  # batch, channels, height, width, filters, padding
    (2, 3, 4, 4, 5, 1),
    (2, 1, 5, 7, 3, 3),  # padding 3 of one-channel images
    (1, 2, 3, 3, 40, 0),
    (2, 4, 3, 5, 4, 0),
    (2, 40, 6, 3, 33, 1),
    (5, 130, 9, 8, 37, 2),
    (3, 5, 2, 1, 2, 1),  # a tile hangs over
    (80, 6, 16, 16, 4, 1),  # several parts of the sum over tiles
]

jvp: Any = torch.func.jvp  # its type leaves out what it returns


def draw(*shape: int, dtype: torch.dtype = torch.float64, layout: torch.memory_format | None = None) -> Tensor:
    tensor = torch.randn(shape, dtype=torch.float64).to(dtype)
    return tensor if layout is None else tensor.contiguous(memory_format=layout)


def draw_warp_parameters(shape: tuple[int, int, int, int]) -> Tensor:
    """Return moderate values of all parameters of a warp at once: no two samples alike."""
    batch, _, height, width = shape
    parameters = 0.2 * torch.randn(batch, len(WARP_PARAMETERS), dtype=torch.float64)
    parameters[:, [5, 8]] *= 8  # displacements
    parameters[:, 9] = torch.arange(batch) - 1
    parameters[:, 10] = parameters[:, 9] + height // 2
    parameters[:, 11] = torch.arange(batch)
    parameters[:, 12] = width - 1
    return parameters


def plane_arguments(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: torch.memory_format
) -> dict[str, Any]:
    batch, channels, height, width = shape
    pooled = (batch, channels, height // 2, width // 2)
    return {
        **{name: draw(*shape, dtype=dtype, layout=layout) for name in ("y", "y_dot")},
        **{name: draw(channels, dtype=dtype) for name in ("gamma", "beta", "gamma_dot", "beta_dot")},
        **{name: draw(*pooled, dtype=dtype, layout=layout) for name in ("p_bar", "p_bar_dot")},
    }


def convolution_arguments(
    case: tuple[int, ...], dtype: torch.dtype = torch.float64, layout: torch.memory_format = torch.channels_last
) -> dict[str, Any]:
    batch, channels, height, width, filters, padding = case
    grown = (batch, filters, height + 2 * padding - 2, width + 2 * padding - 2)
    return {
        **{name: draw(batch, channels, height, width, dtype=dtype, layout=layout) for name in ("x", "x_dot")},
        **{name: draw(filters, channels, 3, 3, dtype=dtype) for name in ("weight", "weight_dot")},
        **{name: draw(*grown, dtype=dtype, layout=layout) for name in ("y_bar", "y_bar_dot")},
        "padding": padding,
    }


def assert_same_by_any_threads(compute: Callable[[], Iterable[Tensor]]) -> None:
    """Assert that `compute` returns the same bits, whatever torch's number of threads is."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 7):
            torch.set_num_threads(threads)
            results.append(list(compute()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def refused(op: str, reason: str, *arguments: Any) -> Any:
    return pytest.param(op, arguments, reason, id=f"{op}-{reason.replace(' ', '-')}")
