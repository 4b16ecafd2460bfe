"""Hold the kernels that add up parts where they read them to the same kernels of planes that were added up before.

Results are the same to the bit. Cases of the families norm and block of triton_comparison.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mtt_fast.kernels import Affine, Convolved, PartialPlanes, PlaneStats, Precision, plane_dtype, planes_of
from mtt_fast.kernels.types import accumulator
from tests.kernels.triton_comparison import PARTS, as_tuple

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(2, 4, 4, 4), (1, 5, 7, 5), (3, 33, 2, 3)]  # nothing to mask; odd sides; channels in several blocks
LARGE_SHAPES = [(10, 128, 16, 16), (10, 128, 8, 8), (7, 128, 9, 7)]
COUNTS = [
    (3, 6),
    (1, None),
    (None, 9),
    (9, 18),
]  # parts of the first and the second that are read; None is a whole tensor
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
    """Call an operation with what it reads, which is at `place` of its arguments, in parts and added up before."""
    from mtt_fast.kernels import reference, triton

    before = [*rest[:place]], [*rest[place:]]
    copies = [
        each._replace(planes=each.planes.clone(memory_format=torch.preserve_format))
        if isinstance(each, PartialPlanes)
        else each
        for each in read
    ]
    whole = triton.add_planes(*copies)
    expected = as_tuple(operation(*before[0], *whole, *before[1]))
    found = as_tuple(operation(*before[0], *read, *before[1]))
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.isfinite().all(), f"{case}, result {number}"
        assert torch.equal(ours, theirs), f"{case}, result {number}"
    for ours, theirs, parts in zip(map(planes_of, read), whole, copies, strict=True):
        assert torch.equal(ours, theirs), f"{case}: the sum that is stored"
        if isinstance(parts, PartialPlanes) and (
            ours.is_cuda or ours.dtype != torch.bfloat16
        ):  # interpreted it is cut off
            again = parts._replace(planes=torch.empty_like(ours))
            assert torch.equal(ours, reference.add_planes(again)[0]), f"{case}: the sum"
    print("passed:", case)


def norm(device: str, dtype: torch.dtype, shape: tuple[int, ...], counts: Any, form: Any, tile: Any) -> None:
    """Compare the operations with a norm, by the table's tiles or by `tile`."""
    from mtt_fast.kernels import triton
    from mtt_fast.kernels.triton import lines

    batch, channels, height, width = shape
    pooled = (batch, channels, height // 2, width // 2)

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, dtype=accumulator(dtype)).to(device)

    affine, affine_dot = (Affine(numbers(channels), numbers(channels)) for _ in range(2))
    y, y_dot = (in_parts(shape, None, dtype, form, device) for _ in range(2))
    stats = PlaneStats(*(numbers(batch, channels) for _ in range(4)))
    case = (shape, str(dtype), counts, str(form), tile is not None)
    row = patch.object(lines, "configuration", return_value=tile) if tile else patch.object(lines, "COMBINED_PARTS", 64)
    with row:
        read = [in_parts(shape, count, dtype, form, device) for count in counts]
        compare_parts(("norm_relu_pool", *case), triton.norm_relu_pool, read[:1], 0, affine, 1e-5)
        read = [in_parts(shape, count, dtype, form, device) for count in counts]
        compare_parts(("norm_relu_pool_dual", *case), triton.norm_relu_pool_dual, read, 0, affine, affine_dot, 1e-5)
        read = [in_parts(pooled, count, dtype, form, device) for count in counts]
        name, given = "norm_relu_pool_backward", (planes_of(y), stats.mean, stats.rstd, affine)
        compare_parts((name, *case), triton.norm_relu_pool_backward, read[:1], len(given), *given)
        read = [in_parts(pooled, count, dtype, form, device) for count in counts]
        name, directions = "norm_relu_pool_dual_backward", (planes_of(y), planes_of(y_dot), stats, affine, affine_dot)
        compare_parts((name, *case), triton.norm_relu_pool_dual_backward, read, len(directions), *directions)


def block(device: str, precision: Precision, shape: tuple[int, ...], counts: Any) -> None:
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
        every = counts if "dual" in name else counts[:1]
        read = [in_parts(tuple(p.shape), count, dtype, torch.channels_last, device) for count in every]
        operation, options = getattr(block, name), (made, 1e-5, precision)
        compare_parts((name, precision, shape, counts), operation, read, len(given), *given, *options)


def norm_cases(device: str) -> list[Callable[[], None]]:
    """Return the comparisons of planes that registers hold, of planes in passes, and of contiguous ones."""
    last, contiguous = torch.channels_last, torch.contiguous_format
    shapes = SHAPES if device == "cpu" else SHAPES + LARGE_SHAPES
    cases: list[Callable[[], None]] = [
        partial(norm, device, dtype, shape, counts, last, None)
        for (shape, counts), dtype in itertools.product(zip(shapes, itertools.cycle(COUNTS), strict=False), DTYPES)
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
