"""Hold the kernels that add up parts where they read them to the same kernels of planes that were added up before.

The sums are the same to the bit. So are the results if they are interpreted; a compiler may contract a² + b² to
fma(a, a, b²) in one kernel and to fma(b, b, a²) in the other. Cases of the families norm and block of triton_comparison.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mtt_fast.kernels import Affine, Convolved, PartialPlanes, PlaneStats, Precision, plane_dtype, planes_of
from mtt_fast.kernels.types import accumulator
from mtt_fast.testing import relative_error
from tests.kernels.comparison import as_tuple
from tests.kernels.plane_comparison import PARTS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(2, 4, 4, 4), (1, 5, 7, 5), (3, 33, 2, 3)]  # nothing to mask; odd sides; channels in several blocks
LARGE_SHAPES = [(10, 128, 16, 16), (10, 128, 8, 8), (7, 128, 9, 7)]
# parts of planes, and of their derivative; None is a tensor
COUNTS = [(3, 6), (1, None), (None, 9), (9, 18)]
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Allowed relative differences between results of a compiler."""
BLOCKS = [(2, 3, 48, 7, 6, 1), (1, 1, 16, 4, 5, 3)]  # (B, C, K, H, W, padding)
LARGE_BLOCKS = [(10, 3, 128, 32, 32, 1), (3, 3, 128, 33, 16, 1)]


def in_parts(shape: tuple[int, ...], count: int | None, dtype: torch.dtype, form: Any, device: str) -> Convolved:
    """Return planes in `count` parts, behind others in one allocation, and without values of their own; or a tensor."""
    if count is None:
        return torch.randn(shape).to(device, dtype, memory_format=form)
    batch, channels, height, width = shape
    if form == torch.channels_last:
        parts = torch.randn(count + 1, batch, height, width, channels).to(device).permute(0, 1, 4, 2, 3)
    else:
        parts = torch.randn(count + 1, *shape).to(device)
    planes = torch.full(shape, float("nan"), dtype=dtype).to(device, memory_format=form)
    return PartialPlanes(parts[1:], planes)


def compare_parts(case: object, operation: Callable[..., Any], read: list[Convolved], place: int, *rest: Any) -> None:
    """Check that an operation gives the same for planes in parts and for planes that were added up before.

    `read` are the planes, which come after `place` of the other arguments, `rest`. The sums must also be stored.
    """
    from mtt_fast.kernels import reference, triton

    before, after = rest[:place], rest[place:]
    copies = [copied(each) for each in read]
    whole = triton.add_planes(*copies)
    expected, results = (as_tuple(operation(*before, *planes, *after)) for planes in (whole, read))
    for number, (actual, wanted) in enumerate(zip(results, expected, strict=True)):
        assert actual.isfinite().all(), f"{case}, result {number}"
        difference, allowed = relative_error(actual, wanted), ROUNDING[actual.dtype] if actual.is_cuda else 0
        assert difference <= allowed, f"{case}, result {number}: {difference}"
    for stored, added, parts in zip(map(planes_of, read), whole, copies, strict=True):
        assert torch.equal(stored, added), f"{case}: the sum that is stored"
        if stored.is_cuda or stored.dtype != torch.bfloat16:  # interpreted, that is cut off
            assert torch.equal(stored, reference.add_planes(copied(parts))[0]), f"{case}: the sum"
    print("passed:", case)


def copied(planes: Convolved) -> Convolved:
    """Return the same planes, with memory of their own for the sum of parts."""
    return planes._replace(planes=torch.empty_like(planes.planes)) if isinstance(planes, PartialPlanes) else planes


def counts_of(operation: str, counts: tuple[int | None, int | None]) -> list[int | None]:
    """Return the parts of what an operation reads: without a direction there is no derivative, and a tensor would show nothing."""
    return [*counts] if "dual" in operation else [next(count for count in counts if count is not None)]


def norm(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], counts: tuple[int | None, int | None], form: Any, tile: Any
) -> None:
    """Compare the operations with a norm, by the table's tiles or by `tile`."""
    from mtt_fast.kernels import triton
    from mtt_fast.kernels.triton import channels_last_planes

    batch, channels, height, width = shape
    pooled = (batch, channels, height // 2, width // 2)

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, dtype=accumulator(dtype)).to(device)

    affine, affine_dot = (Affine(numbers(channels), numbers(channels)) for _ in range(2))
    y, y_dot = (planes_of(in_parts(shape, None, dtype, form, device)) for _ in range(2))
    stats = PlaneStats(*(numbers(batch, channels) for _ in range(4)))
    case = (shape, str(dtype), counts, str(form), tile is not None)
    cases: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {  # arguments in front of what is read, and behind it
        "norm_relu_pool": ((), (affine, 1e-5)),
        "norm_relu_pool_dual": ((), (affine, affine_dot, 1e-5)),
        "norm_relu_pool_backward": ((y, stats.mean, stats.rstd, affine), ()),
        "norm_relu_pool_dual_backward": ((y, y_dot, stats, affine, affine_dot), ()),
    }
    classes = channels_last_planes.shape_classes
    # the planes that were added up before go by the tile of those in parts: another adds up a plane in another order
    by_tile = nullcontext() if tile is None else patch.object(channels_last_planes, "configuration", return_value=tile)
    with (
        by_tile,
        patch.object(channels_last_planes, "shape_classes", lambda planes, dtype, _: classes(planes, dtype, True)),
    ):
        for name, (before, after) in cases.items():
            size = pooled if "backward" in name else shape
            read = [in_parts(size, count, dtype, form, device) for count in counts_of(name, counts)]
            operation = getattr(triton, name)
            compare_parts((name, *case), operation, read, len(before), *before, *after)


def block(device: str, precision: Precision, shape: tuple[int, ...], counts: tuple[int | None, int | None]) -> None:
    """Compare the backward of the first block, and in a direction."""
    from mtt_fast.kernels.triton import block

    batch, channels, filters, height, width, padding = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(size).to(device)

    patches = block.image_patches(draw(batch, channels, height, width), padding, precision)
    weights = [draw(filters, channels, 3, 3) for _ in range(2)]
    affine = [Affine(draw(filters), draw(filters)) for _ in range(2)]
    primal, dual = (patches, weights[0], affine[0]), (patches, *weights, *affine)
    p, folded = block.conv_norm_relu_pool(*primal, 1e-5, precision)
    *_, folded_dual = block.conv_norm_relu_pool_dual(*dual, 1e-5, precision)
    dtype = plane_dtype(torch.float32, precision)
    for name, given, made in (
        ("conv_norm_relu_pool_backward", primal, folded),
        ("conv_norm_relu_pool_dual_backward", dual, folded_dual),
    ):
        every = counts_of(name, counts)
        read = [in_parts(tuple(p.shape), count, dtype, torch.channels_last, device) for count in every]
        operation, options = getattr(block, name), (made, 1e-5, precision)
        compare_parts((name, precision, shape, counts), operation, read, len(given), *given, *options)


def norm_cases(device: str) -> list[Callable[[], None]]:
    """Return the comparisons of planes that registers hold, of planes in passes, and of contiguous ones, which are copied."""
    last, contiguous = torch.channels_last, torch.contiguous_format
    shapes = SHAPES if device == "cpu" else SHAPES + LARGE_SHAPES
    cases: list[Callable[[], None]] = [
        partial(norm, device, dtype, shape, counts, last, None)
        for (shape, dtype), counts in zip(itertools.product(shapes, DTYPES), itertools.cycle(COUNTS), strict=False)
    ]
    shape, tile = PARTS[1]
    cases.append(partial(norm, device, torch.float32, shape, COUNTS[0], last, tile))
    cases.append(partial(norm, device, torch.float32, SHAPES[0], COUNTS[2], contiguous, None))
    return cases


def block_cases(device: str) -> list[Callable[[], None]]:
    """Return the comparisons of the first block in three precisions."""
    shapes = BLOCKS if device == "cpu" else BLOCKS + LARGE_BLOCKS
    precisions: tuple[Precision, ...] = ("tf32", "fp16", "bf16")
    return [
        partial(block, device, precision, shape, counts)
        for (shape, precision), counts in zip(
            itertools.product(shapes, precisions), itertools.cycle(COUNTS), strict=False
        )
    ]
