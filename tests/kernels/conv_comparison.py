"""Hold Triton's convolutions, by pointers, by boxes and by torch's library, to the reference: a family of triton_comparison.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, get_args
from unittest.mock import patch

import torch
from torch import Tensor

from mtt_fast.kernels import Precision
from mtt_fast.testing import added_up
from tests.kernels.comparison import TOLERANCES, UNINTERPRETED, Case, check, summed_results, with_sizes

# (B, C, K, H, W, padding)
SHAPES = [
    (2, 5, 7, 6, 5, 1),  # odd everywhere
    (1, 1, 3, 4, 5, 3),  # MNIST's first layer: the input gradient crops
    (2, 33, 35, 1, 1, 1),  # 1×1 planes, more outputs than a tile and channels than a step of the sum
    (2, 3, 70, 9, 7, 0),  # more results than a tile in both directions
    (9, 2, 3, 5, 3, 1),  # the weight gradient's sum in several parts
]
LARGE = [(7, 128, 128, 16, 16, 1), (5, 3, 128, 32, 32, 1), (3, 128, 128, 64, 64, 1), (9, 100, 60, 9, 13, 1)]

# likewise, of channels that are multiples of 16 bytes
BOXED = [
    (2, 8, 24, 6, 5, 1),  # odd sides, a box that hangs over on each of them
    (1, 8, 32, 4, 5, 3),  # the input gradient crops; whole tiles of outputs
    (3, 64, 24, 1, 1, 1),  # 1×1 planes, several samples in a box, more channels than a step; whole tiles to copy
    (2, 8, 72, 9, 7, 0),  # several tiles in both directions
    (9, 8, 16, 5, 3, 1),  # the weight gradient's sum in several parts, the last one short
    (5, 16, 32, 4, 2, 1),  # powers of two, as gradients in 16 bits need; half of the last box is empty; whole tiles
]
BOX_TILES = [
    {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 1, "num_stages": 2},
    {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "TAPS": 3, "num_warps": 1, "num_stages": 2},
    {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 1, "num_stages": 2},
    {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "TAPS": 9, "num_warps": 1, "num_stages": 2},
]
BOX_CORRELATIONS = [
    {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "TAPS": 3, "PROGRAMS": 15, "num_warps": 1, "num_stages": 2},
    {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 32, "TAPS": 1, "PROGRAMS": 40, "num_warps": 1, "num_stages": 2},
] * 2


def convolutions(device: str, dtype: torch.dtype, precision: str, shape: tuple[int, ...], form: Any) -> None:
    """Compare our kernels by pointers and torch's library, between which the table chooses."""
    from mtt_fast.kernels.triton.dispatch import BACKENDS

    tolerance = 1e-13 if dtype == torch.float64 else TOLERANCES[precision]
    backends = [name for name in BACKENDS if name != "tma"]
    for name, arguments, expected in convolution_cases(dtype, shape, form):
        for (dual, operands), backend in itertools.product(placed(name, arguments, device).items(), backends):
            operation = partial(summed_results, BACKENDS[backend], name, *operands, shape[-1], precision=precision)
            allowed = tolerance
            if backend == "cudnn" and name.endswith("weight_gradient") and dtype == torch.float32:
                # it adds up thousands of pixels one after the other: seen 7.7e-6 of twice 3×64²
                batch, *_, height, width, padding = shape
                pixels = batch * (height + 2 * padding - 2) * (width + 2 * padding - 2)
                allowed = max(tolerance, math.sqrt(2 * pixels) * 2**-24)
            check((name, backend, shape, str(form), str(dtype), precision, dual), operation, expected, allowed)


def placed(name: str, arguments: tuple[Tensor | None, ...], device: str) -> dict[str, list[Tensor | None]]:
    """Return the arguments on the device; those of a dual result or weight gradient also in pairs that lie one behind the other."""
    apart = [None if each is None else each.to(device) for each in arguments]
    if arguments[1] is None:
        return {"no ẋ": apart}
    x, x_dot, *rest = (each for each in apart if each is not None)
    if name == "conv3x3_dual_weight_gradient":
        y_bar_dot, y_bar = torch.cat(rest[::-1]).chunk(2)
        rest = [y_bar, y_bar_dot]
    elif name != "conv3x3_dual":
        return {"ẋ": apart}
    return {"ẋ": apart, "ẋ in pairs": [*torch.cat([x, x_dot]).chunk(2), *rest]}


def convolution_cases(
    dtype: torch.dtype, shape: tuple[int, ...], form: Any
) -> Iterator[tuple[str, tuple[Tensor | None, ...], tuple[Tensor, ...]]]:
    """Yield each operation's name, its arguments on the CPU, and what the reference makes of them in float64."""
    from mtt_fast.kernels import reference
    from mtt_fast.kernels.types import accumulator

    batch, channels, outputs, height, width, padding = shape
    grown = (height + 2 * padding - 2, width + 2 * padding - 2)

    def planes(*size: int) -> Tensor:
        return torch.randn(batch, *size, dtype=accumulator(dtype)).to(dtype, memory_format=form)

    x, x_dot = planes(channels, height, width), planes(channels, height, width)
    y_bar, y_bar_dot = planes(outputs, *grown), planes(outputs, *grown)
    weights = [torch.randn(outputs, channels, 3, 3, dtype=accumulator(dtype)) for _ in range(2)]
    cases: list[tuple[str, tuple[Tensor | None, ...]]] = [
        ("conv3x3", (x, weights[0])),
        ("conv3x3_input_gradient", (y_bar, weights[0])),
        ("conv3x3_weight_gradient", (x, y_bar)),
        ("conv3x3_dual", (x, x_dot, *weights)),
        ("conv3x3_dual", (x, None, *weights)),
        ("conv3x3_tangent", (x, x_dot, *weights)),
        ("conv3x3_tangent", (x, None, *weights)),
        ("conv3x3_dual_input_gradient", (y_bar, y_bar_dot, *weights)),
        ("conv3x3_input_gradient_tangent", (y_bar, y_bar_dot, *weights)),
        ("conv3x3_dual_weight_gradient", (x, x_dot, y_bar, y_bar_dot)),
        ("conv3x3_dual_weight_gradient", (x, None, y_bar, y_bar_dot)),
    ]
    for name, arguments in cases:
        wide = [None if each is None else each.double() for each in arguments]
        expected = added_up(name, getattr(reference, name)(*wide, padding))
        of_weights = accumulator(dtype) if name.endswith("weight_gradient") else dtype
        yield name, arguments, tuple(each.to(of_weights) for each in expected)


def boxed_convolutions(
    device: str, dtype: torch.dtype, precision: str, shape: tuple[int, ...], number: int | None
) -> None:
    """Compare our kernels by boxes, with tile `number` of those below, or with the table's."""
    from mtt_fast.kernels.triton import tma_descriptors
    from mtt_fast.kernels.triton.conv import TMA

    def configuration(operation: str, *_: Any) -> dict[str, int]:
        tiles = BOX_CORRELATIONS if operation.endswith("weight_gradient") else BOX_TILES
        return tiles[number or 0]

    *_, height, width, padding = shape
    powers = all((side + 2 * padding - 2).bit_count() == 1 for side in (height, width))
    for name, arguments, expected in convolution_cases(dtype, shape, torch.channels_last):
        if name.endswith("weight_gradient") and dtype.itemsize == 2 and not powers:
            continue  # goes by pointers
        for dual, operands in placed(name, arguments, device).items():
            compute = partial(summed_results, TMA, name, *operands, shape[-1], precision=precision)
            case = (name, "tma", shape, str(dtype), precision, number, dual)
            with nullcontext() if number is None else patch.object(tma_descriptors, "box_configuration", configuration):
                check(case, compute, expected, TOLERANCES[precision])


def mixed_formats(device: str) -> None:
    """Check that the weight gradient takes x and ȳ in formats of their own."""
    from mtt_fast.kernels import reference, triton

    x, y_bar = torch.randn(2, 5, 6, 7), torch.randn(2, 4, 6, 7)
    last = torch.channels_last
    for first, second in ((x, y_bar.contiguous(memory_format=last)), (x.contiguous(memory_format=last), y_bar)):
        expected = reference.conv3x3_dual_weight_gradient(first, first, second, second, 1)
        moved = [each.to(device) for each in (first, first, second, second)]
        compute = partial(summed_results, triton, "conv3x3_dual_weight_gradient", *moved, 1, precision="fp32")
        check("mixed formats", compute, expected.sum(0), TOLERANCES["fp32"])


def refusals(device: str) -> None:
    """Check that planes neither contiguous nor channels_last, and planes of two formats, are refused."""
    from mtt_fast.kernels.triton.conv import POINTERS

    x, weight = torch.zeros(2, 3, 6, 6, device=device), torch.zeros(4, 3, 3, 3, device=device)
    for first, second in (
        (x[:, :, ::2], None),
        (x.transpose(2, 3), None),
        (x, x.to(memory_format=torch.channels_last)),
    ):
        try:
            POINTERS.conv3x3_dual(first, second, weight, weight, 1, "fp32")
        except ValueError as error:
            print("refused:", error)
        else:
            raise AssertionError(f"accepted strides {first.stride()}")


def conv_cases(device: str) -> list[Case]:
    """Return the comparisons: compiled, of every shape; interpreted, of those in float64, and few of the others."""
    precisions, interpreted = get_args(Precision), device == "cpu"
    shapes = SHAPES if interpreted else SHAPES + LARGE
    cases: list[Case] = [partial(mixed_formats, device), partial(refusals, device)]
    for shape, form in itertools.product(shapes, (torch.contiguous_format, torch.channels_last)):
        if interpreted or shape == SHAPES[1]:  # where float32 was wrong (docs/gpu.md, Faults)
            cases.append(partial(convolutions, device, torch.float64, "fp32", shape, form))
        for precision in precisions:
            enough = form == torch.channels_last and shape in SHAPES[: 2 if precision == "fp32" else 1]
            if not interpreted or (enough and precision not in UNINTERPRETED):
                cases.append(partial(convolutions, device, torch.float32, precision, shape, form))
    if interpreted:
        short = partial(convolutions, device, torch.float64, "fp32", SHAPES[-1], torch.channels_last)
        cases.append(partial(with_sizes, "implicit_gemm", short, PROGRAMS=2))  # parts of five tiles and of four
        for shape, tile in zip(BOXED, itertools.cycle(range(len(BOX_TILES))), strict=False):
            cases.append(partial(boxed_convolutions, device, torch.float32, "fp32", shape, tile))
        for shape, tile in itertools.product((BOXED[0], BOXED[-1]), range(2)):
            cases.append(partial(boxed_convolutions, device, torch.bfloat16, "bf16", shape, tile))
    if not interpreted and torch.cuda.get_device_capability()[0] >= 9:
        for shape in BOXED + [shape for shape in LARGE if shape[1] % 8 == shape[2] % 8 == 0]:
            cases.append(partial(boxed_convolutions, device, torch.float32, "tf32", shape, None))
            cases.append(partial(boxed_convolutions, device, torch.bfloat16, "bf16", shape, None))
    return cases
