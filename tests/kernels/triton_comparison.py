"""Hold Triton's operations of one family to the reference: `python -m tests.kernels.triton_comparison FAMILY DEVICE PART PARTS`.

A program of its own, since a process either interprets Triton's kernels (TRITON_INTERPRET=1, DEVICE cpu) or compiles
them (DEVICE cuda). It prints a line for each case that passed. `compare` runs it. On a GPU, where compiling takes nearly all
the time, a family is cut into parts that are tests of their own: they run side by side, and each has its outcome.

The reference computes on the CPU, in float64, so that no fault of a GPU's libraries hides there.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from mtt_fast.kernels import Affine, PartialPlanes, PlaneStats, Precision
from mtt_fast.testing import added_up
from tests.kernels.sanitizer import watched

# Precisions that the interpreter does not have, and why.
UNINTERPRETED = {"tf32": "it does not round, so this would be fp32 once more"}

# (B, C, K, H, W, padding)
SHAPES = [
    (2, 5, 7, 6, 5, 1),  # odd everywhere
    (1, 1, 3, 4, 5, 3),  # MNIST's first layer: the input gradient crops
    (2, 33, 35, 1, 1, 1),  # 1×1 planes, more outputs than a tile and channels than a step of the sum
    (2, 3, 70, 9, 7, 0),  # more results than a tile in both directions
    (9, 2, 3, 5, 3, 1),  # the weight gradient's sum in several parts, the last one short
]
LARGE = [(7, 128, 128, 16, 16, 1), (5, 3, 128, 32, 32, 1), (3, 128, 128, 64, 64, 1), (9, 100, 60, 9, 13, 1)]

# likewise, of channels that are multiples of 16 bytes
BOXED = [
    (2, 8, 24, 6, 5, 1),  # odd sides, a box that hangs over on each of them
    (1, 8, 8, 4, 5, 3),  # the input gradient crops
    (3, 40, 24, 1, 1, 1),  # 1×1 planes, several samples in a box, more channels than a step of the sum
    (2, 8, 72, 9, 7, 0),  # several tiles in both directions
    (9, 8, 16, 5, 3, 1),  # the weight gradient's sum in several parts, the last one short
    (
        5,
        8,
        24,
        4,
        2,
        1,
    ),  # sides that are powers of two, which weight gradients in 16 bits ask for; the last box is half empty
]
BOX_TILES = [
    {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 1, "num_stages": 2},
    {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "TAPS": 3, "num_warps": 1, "num_stages": 2},
    {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 1, "num_stages": 2},
    {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "TAPS": 9, "num_warps": 1, "num_stages": 2},
]
BOX_CORRELATIONS = [
    {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "TAPS": 3, "PROGRAMS": 4, "num_warps": 1, "num_stages": 2},
    {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 32, "TAPS": 1, "PROGRAMS": 30, "num_warps": 1, "num_stages": 2},
] * 2

# (B, C, H, W): a plane of one tile, odd sizes, 1×1 after the pool, more channels than a block, a plane of several tiles
PLANES = [(2, 3, 4, 4), (1, 5, 7, 5), (2, 33, 2, 2), (3, 4, 3, 9), (1, 2, 18, 20)]
# channels_last planes larger than a tile of BLOCK_C × WINDOWS, that go in parts of TILES tiles
PARTS: list[tuple[tuple[int, int, int, int], dict[str, int]]] = [
    ((2, 4, 4, 4), {"BLOCK_C": 4, "WINDOWS": 2, "TILES": 1, "num_warps": 1}),  # nothing to mask
    ((1, 5, 7, 5), {"BLOCK_C": 4, "WINDOWS": 4, "TILES": 2, "num_warps": 1}),  # odd sizes, two blocks of channels
    ((1, 1, 3, 9), {"BLOCK_C": 16, "WINDOWS": 4, "TILES": 1, "num_warps": 1}),  # one channel, a short last part
]
LARGE_PLANES = [(7, 128, 32, 32), (5, 128, 16, 16), (3, 100, 8, 8), (2, 128, 128, 128), (2, 63, 31, 33)]

# (B, C, H, W): one channel, blocks of pixels that are not whole, more channels than an image's, a line of pixels
IMAGES = [(2, 1, 5, 6), (4, 3, 19, 17), (2, 5, 4, 3), (1, 3, 1, 8)]
LARGE_IMAGES = [(4, 3, 32, 32), (4, 3, 128, 128), (4, 1, 28, 28), (3, 3, 33, 63)]

# ‖found − expected‖ / ‖expected‖
TOLERANCES = {"fp32": 3e-6, "tf32": 2e-3, "fp16": 2e-3, "bf16": 2e-2}

Operation = Callable[..., Any]
Case = Callable[[], None]
"""A comparison. It prints what passed, and raises for what did not."""

PARTS_ON_A_GPU = {"conv": 10, "block": 7, "norm": 3, "bias": 2, "classifier": 5, "student": 12}
"""How many tests the cases of a family are, where they are not one."""

ROOT = Path(__file__).resolve().parents[2]


def each_part(family: str) -> pytest.MarkDecorator:
    """Parametrise a test over the parts of a family."""
    return pytest.mark.parametrize("part", range(PARTS_ON_A_GPU[family]))


def compare(family: str, device: str, part: int = 0) -> list[str]:
    """Run this program for a part of a family, interpreted, and for all of it, where the device is `cpu`; return what it prints."""
    parts = 1 if device == "cpu" else PARTS_ON_A_GPU.get(family, 1)
    return run_part("tests.kernels.triton_comparison", family, device, part=part, parts=parts)


def run_part(module: str, *arguments: str, part: int = 0, parts: int = 1) -> list[str]:
    """Run `module` with the arguments, the part and the number of parts; return the lines that it prints, of which one passed.

    The last argument is the device: on `cpu` Triton is interpreted.
    """
    pytest.importorskip("triton", reason="Triton is not installed: it comes for Linux alone")
    # as many of these run at a time as there are processors
    environment = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1" if arguments[-1] == "cpu" else "0"}
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments, str(part), str(parts)]
    found = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=280, check=False
    )
    if found.returncode:
        pytest.fail(found.stderr, pytrace=False)
    lines = found.stdout.splitlines()
    assert any(line.startswith("passed") for line in lines), lines
    return lines


def poison() -> None:
    """Fill memory that is allocated without a value with NaN, which an element that no kernel writes then shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        allocate = getattr(owner, name)

        def allocate_and_poison(*args: Any, allocate: Operation = allocate, **kwargs: Any) -> Tensor:
            tensor: Tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        setattr(owner, name, allocate_and_poison)


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    """Return the tensors of `results`, also those of a tuple within; planes in parts are added up."""
    if isinstance(results, Tensor):
        return (results,)
    if isinstance(results, PartialPlanes):
        from mtt_fast.kernels import triton

        return tuple(triton.add_planes(results))
    return tuple(tensor for each in results for tensor in as_tuple(each))


def summed_results(back_end: Any, operation: str, *arguments: Any, **named: Any) -> tuple[Tensor, ...]:
    """Return the results of a back end's operation, with summands added up."""
    return added_up(operation, as_tuple(getattr(back_end, operation)(*arguments, **named)))


def check(case: object, run: Callable[[], Any], expected: Any, tolerance: float) -> None:
    found = as_tuple(run())
    again = as_tuple(run()) if found[0].is_cuda else found  # interpreted, a second run could not differ
    for place, (ours, second, wanted) in enumerate(zip(found, again, as_tuple(expected), strict=True)):
        where = f"{case}, result {place}"
        assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype), where
        if ours.dim() == 4:
            assert ours.is_contiguous(memory_format=torch.channels_last) or ours.is_contiguous(), where
            assert not wanted.is_contiguous() or ours.is_contiguous(), where
        assert torch.equal(ours, second), f"{where} differs from one run to the next"
        exact = wanted.double().to(ours.device)
        error = float((ours.double() - exact).norm() / exact.norm())
        assert error <= tolerance, f"{where}: error {error}"
    print("passed:", case)


def far_planes(device: str) -> None:
    """Check statistics in parts where sums of squares would cancel: far from zero, and with a first pixel far from the rest."""
    from mtt_fast.kernels import reference, triton
    from mtt_fast.kernels.triton import lines

    y, y_dot = (torch.randn(1, 2, 7, 5).to(device, memory_format=torch.channels_last) for _ in range(2))
    affine = Affine(torch.ones(2, device=device), torch.zeros(2, device=device))
    first = torch.zeros_like(y)
    first[:, :, 0, 0] = 1e3
    for far in (torch.full_like(y, 1e3), first):
        expected = reference.norm_relu_pool_dual(*map(in_float64, (y + far, y_dot - far, affine, affine)), 1e-5)[2]
        with patch.object(lines, "configuration", return_value=PARTS[1][1]):
            found = triton.norm_relu_pool_dual(y + far, y_dot - far, affine, affine, 1e-5)[2]
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    print("passed: planes far from zero")


def check_norm(shape: tuple[int | str, ...], given: dict[str, Tensor]) -> None:
    """Compare norm, ReLU and pool, and the derivatives."""
    from mtt_fast.kernels import reference

    y, y_dot, bars = given["y"], given["y_dot"], (given["p_bar"], given["p_bar_dot"])
    affine, affine_dot = Affine(given["gamma"], given["beta"]), Affine(given["gamma_dot"], given["beta_dot"])
    stats = reference.norm_relu_pool_dual(y, y_dot, affine, affine_dot, 1e-5)[2]
    cases: dict[str, tuple[Any, ...]] = {
        "norm_relu_pool": (y, affine, 1e-5),
        "norm_relu_pool_backward": (y, stats.mean, stats.rstd, affine, bars[0]),
        "norm_relu_pool_dual": (y, y_dot, affine, affine_dot, 1e-5),
        "norm_relu_pool_dual_backward": (y, y_dot, stats, affine, affine_dot, *bars),
    }
    check_planes(cases, shape, y)


def check_bias(shape: tuple[int | str, ...], given: dict[str, Tensor]) -> None:
    """Compare bias, ReLU and pool, and the derivatives."""
    y, beta, bars = given["z"], given["beta"], (given["p_bar"], given["p_bar_dot"])
    cases: dict[str, tuple[Any, ...]] = {
        "bias_relu_pool": (y, beta),
        "bias_relu_pool_backward": (y, beta, bars[0]),
        "bias_relu_pool_dual": (y, given["y_dot"], beta, given["beta_dot"]),
        "bias_relu_pool_dual_backward": (y, beta, *bars),
    }
    check_planes(cases, shape, y)


def plane_cases(check: Operation, device: str) -> list[Case]:
    """Return the comparisons by `check` of planes in both formats, by the table's tiles, and of channels_last ones in parts."""
    dtypes, last = (torch.float64, torch.float32, torch.bfloat16), torch.channels_last
    shapes = list(itertools.product(PLANES, (torch.contiguous_format, last)))
    if device != "cpu":
        shapes += [(shape, last) for shape in LARGE_PLANES]  # as a student on a GPU has them
    cases: list[Case] = []
    for (shape, form), dtype in itertools.product(shapes, dtypes):
        cases.append(partial(check_drawn, check, device, shape, form, dtype))
    for (shape, tile), dtype in itertools.product(PARTS, dtypes):
        cases.append(partial(check_in_parts, check, device, shape, dtype, tile))
    return cases


def check_drawn(
    check: Operation, device: str, shape: tuple[int, ...], form: torch.memory_format, dtype: torch.dtype, *label: str
) -> None:
    """Compare planes that are drawn."""
    check((*shape, *label), draw_planes(device, shape, form, dtype))


def check_in_parts(
    check: Operation, device: str, shape: tuple[int, ...], dtype: torch.dtype, tile: dict[str, int]
) -> None:
    """Compare channels_last planes that go in parts of `tile`, more than are combined at a time."""
    from mtt_fast.kernels.triton import lines

    with patch.object(lines, "configuration", return_value=tile), patch.object(lines, "COMBINED_PARTS", 2):
        check_drawn(check, device, shape, torch.channels_last, dtype, "in parts")


def draw_planes(
    device: str, shape: tuple[int, ...], form: torch.memory_format, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the arguments of all operations; in channel 0 every u is exactly 0, where ReLU has its kink."""
    from mtt_fast.kernels.types import accumulator

    batch, channels, height, width = shape

    def planes(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype).to(device).contiguous(memory_format=form)

    names = ("gamma", "beta", "gamma_dot", "beta_dot")
    given = {name: planes(*shape) for name in ("y", "y_dot")}
    given |= {name: torch.randn(channels, dtype=accumulator(dtype)).to(device) for name in names}
    given |= {name: planes(batch, channels, height // 2, width // 2) for name in ("p_bar", "p_bar_dot")}
    given["gamma"][0] = given["beta"][0] = 0
    given["z"] = given["y"].clone(memory_format=torch.preserve_format)
    given["z"][:, 0] = 0  # at the kink without a norm
    return given


def check_planes(cases: dict[str, tuple[Any, ...]], shape: tuple[int | str, ...], y: Tensor) -> None:
    """Hold Triton's results to the reference's in float64: values, dtypes, and the memory format of `y`."""
    from mtt_fast.kernels import reference, triton
    from mtt_fast.kernels.types import accumulator, memory_format

    # a plane of bfloat16 is rounded once, at the end (the interpreter cuts it off)
    tolerances = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
    for name, arguments in cases.items():
        found = as_tuple(getattr(triton, name)(*arguments))
        again = as_tuple(getattr(triton, name)(*arguments)) if y.is_cuda else found  # interpreted it could not differ
        expected = as_tuple(getattr(reference, name)(*map(in_float64, arguments)))
        summed, again, expected = (added_up(name, results) for results in (found, again, expected))
        for place, (ours, second, theirs) in enumerate(zip(summed, again, expected, strict=True)):
            case = (name, place, shape, str(y.dtype), str(memory_format(y)))
            error = float((ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-3))
            # Among many units there may be one that rounding carries over ReLU's kink.
            flips = 1e-2 if y.numel() > 100_000 and y.dtype != torch.float64 else 0
            assert error <= max(tolerances[ours.dtype], flips), (*case, error)
            assert ours.dtype == (y.dtype if ours.dim() == 4 else accumulator(y.dtype)), case
            assert ours.dim() < 4 or ours.is_contiguous(memory_format=memory_format(y)), case
            assert torch.equal(ours, second), f"{case} differs from one run to the next"
        if name.endswith("backward") and (y.is_cuda or y.dtype == torch.float32):
            check_reuse(name, arguments, found)
        print("passed:", (name, shape, str(y.dtype)))


def check_reuse(name: str, arguments: tuple[Any, ...], expected: tuple[Tensor, ...]) -> None:
    """Check that a gradient that takes the memory of the planes it is the gradient of is the same."""
    from mtt_fast.kernels import triton

    given = [copied(argument) for argument in arguments]
    found = as_tuple(getattr(triton, name)(*given, reuse=True))
    assert found[0].data_ptr() == given[0].data_ptr(), name
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)), name


def copied(argument: Any) -> Any:
    return argument.clone(memory_format=torch.preserve_format) if isinstance(argument, Tensor) else argument


def in_float64(argument: Any) -> Any:
    if isinstance(argument, Affine | PlaneStats):
        return type(argument)(*map(in_float64, argument))
    return argument.double() if isinstance(argument, Tensor) else argument


def refused_planes(family: str, device: str) -> None:
    """Check that planes neither contiguous nor channels_last are refused."""
    from mtt_fast.kernels import triton

    planes, channel = torch.zeros(2, 4, 6, 8, device=device)[:, :, ::2], torch.zeros(4, device=device)
    try:
        if family == "norm":
            triton.norm_relu_pool(planes, Affine(channel, channel), 1e-5)
        else:
            triton.bias_relu_pool(planes, channel)
    except ValueError as error:
        print("refused:", error)
    else:
        raise AssertionError(f"accepted strides {planes.stride()}")


def convolutions(device: str, dtype: torch.dtype, precision: str, shape: tuple[int, ...], form: Any) -> None:
    """Compare our kernels by pointers and torch's library, between which the table chooses."""
    from mtt_fast.kernels.triton.dispatch import BACKENDS

    tolerance = 1e-13 if dtype == torch.float64 else TOLERANCES[precision]
    backends = [name for name in BACKENDS if name != "tma"]
    for name, arguments, expected in convolution_cases(dtype, shape, form):
        for (dual, operands), backend in itertools.product(placed(name, arguments, device).items(), backends):
            ours = partial(summed_results, BACKENDS[backend], name, *operands, shape[-1], precision=precision)
            allowed = tolerance
            if backend == "cudnn" and name.endswith("weight_gradient") and dtype == torch.float32:
                # it adds up thousands of pixels one after the other: seen 7.7e-6 of twice 3×64²
                batch, *_, height, width, padding = shape
                pixels = batch * (height + 2 * padding - 2) * (width + 2 * padding - 2)
                allowed = max(tolerance, math.sqrt(2 * pixels) * 2**-24)
            check((name, backend, shape, str(form), str(dtype), precision, dual), ours, expected, allowed)


def placed(name: str, arguments: tuple[Tensor | None, ...], device: str) -> dict[str, list[Tensor | None]]:
    """Return the arguments on the device; those of a dual weight gradient also in pairs that lie one behind the other."""
    apart = [None if each is None else each.to(device) for each in arguments]
    if arguments[1] is None:
        return {"no ẋ": apart}
    if name != "conv3x3_dual_weight_gradient":
        return {"ẋ": apart}
    x, x_dot, y_bar, y_bar_dot = (each for each in apart if each is not None)
    y_bar_dot, y_bar = torch.cat([y_bar_dot, y_bar]).chunk(2)
    return {"ẋ": apart, "ẋ in pairs": [*torch.cat([x, x_dot]).chunk(2), y_bar, y_bar_dot]}


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
        exact = added_up(name, getattr(reference, name)(*wide, padding))
        of_weights = accumulator(dtype) if name.endswith("weight_gradient") else dtype
        yield name, arguments, tuple(each.to(of_weights) for each in exact)


def boxed_convolutions(
    device: str, dtype: torch.dtype, precision: str, shape: tuple[int, ...], number: int | None
) -> None:
    """Compare our kernels by boxes, with tile `number` of those below, or with the table's."""
    from mtt_fast.kernels.triton import boxes, tma

    def configuration(operation: str, *_: Any) -> dict[str, int]:
        tiles = BOX_CORRELATIONS if operation.endswith("weight_gradient") else BOX_TILES
        return tiles[number or 0]

    *_, height, width, padding = shape
    powers = all((side + 2 * padding - 2).bit_count() == 1 for side in (height, width))
    for name, arguments, expected in convolution_cases(dtype, shape, torch.channels_last):
        if name.endswith("weight_gradient") and dtype.itemsize == 2 and not powers:
            continue  # goes by pointers
        for dual, operands in placed(name, arguments, device).items():
            ours = partial(summed_results, tma, name, *operands, shape[-1], precision=precision)
            case = (name, "tma", shape, str(dtype), precision, number, dual)
            with nullcontext() if number is None else patch.object(boxes, "box_configuration", configuration):
                check(case, ours, expected, TOLERANCES[precision])


def mixed_formats(device: str) -> None:
    """Check that the weight gradient takes x and ȳ in formats of their own."""
    from mtt_fast.kernels import reference, triton

    x, y_bar = torch.randn(2, 5, 6, 7), torch.randn(2, 4, 6, 7)
    last = torch.channels_last
    for first, second in ((x, y_bar.contiguous(memory_format=last)), (x.contiguous(memory_format=last), y_bar)):
        expected = reference.conv3x3_dual_weight_gradient(first, first, second, second, 1)
        moved = [each.to(device) for each in (first, first, second, second)]
        ours = partial(summed_results, triton, "conv3x3_dual_weight_gradient", *moved, 1, precision="fp32")
        check("mixed formats", ours, expected.sum(0), TOLERANCES["fp32"])


def vectors(device: str) -> None:
    from mtt_fast.kernels import reference, triton

    torch.manual_seed(0)
    for dtype, size in itertools.product((torch.float32, torch.float64, torch.bfloat16), (0, 1, 1003, 600_001)):
        if device == "cpu" and size > 10_000:
            size = 5_000  # interpreted programs take milliseconds each
        a, b = (torch.randn(size).to(device, dtype) for _ in range(2))
        distance = triton.squared_distance(a, b)
        expected = reference.squared_distance(a, b)
        assert distance.dtype == torch.float64
        assert torch.equal(distance, triton.squared_distance(a, b))
        torch.testing.assert_close(distance, expected, rtol=1e-13, atol=0)
        # each kernel rounds once, at the end (the interpreter cuts bfloat16 off), so the reference computes in float64
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-15, torch.bfloat16: 2**-7}[dtype]
        rate, c = torch.tensor(0.03, dtype=dtype, device=device), torch.randn(size).to(device, dtype)

        def close(found: Tensor, wanted: Tensor, tolerance: float = tolerance) -> None:
            torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=min(tolerance, 1e-6))

        def exact(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.double()

        for velocity, decay in ((None, 0.0), (None, 0.0503), (c, 0.0503)):
            out, moved = torch.empty_like(a), torch.empty_like(a)
            expected_out, expected_moved = torch.empty_like(a).double(), torch.empty_like(a).double()
            assert triton.sgd_step(a, b, rate, out, velocity, moved, 0.9, decay) is out
            reference.sgd_step(
                a.double(), b.double(), rate.double(), expected_out, exact(velocity), expected_moved, 0.9, decay
            )
            close(out, expected_out)
            close(moved, expected_moved)
            assert triton.adjoint_step(a, b, c, rate, out, velocity, decay) is out
            reference.adjoint_step(
                a.double(), b.double(), c.double(), rate.double(), expected_out, exact(velocity), decay
            )
            close(out, expected_out)
        reference.adjoint_step(a.double(), b.double(), a.double(), rate.double(), expected_out, c.double(), 0.0503)
        assert triton.adjoint_step(a, b, a, rate, a, c, 0.0503) is a  # in place
        close(a, expected_out)
        print("passed: vectors", size, dtype)


def rows(device: str) -> None:
    from mtt_fast.kernels import reference, triton

    torch.manual_seed(0)
    for dtype, (count, batch, width) in itertools.product(
        (torch.float32, torch.float64), ((5, 7, 3), (1, 4, 600), (9, 2, 1), (3, 0, 4))
    ):
        out, added = torch.randn(count, width, dtype=dtype), torch.randn(batch, width, dtype=dtype)
        index = torch.randint(count, (batch,))
        for alpha in (1.0, -1.0):
            expected = reference.index_add(out.clone(), index, added, alpha)
            ours = out.to(device, copy=True)
            assert triton.index_add(ours, index.to(device), added.to(device), alpha) is ours
            assert torch.equal(ours.cpu(), expected), (dtype, count, batch, width, alpha)
        print("passed: rows", (count, batch, width), dtype)


def powers(device: str) -> None:
    """Check the power of two that brings a direction into fp16's range."""
    from mtt_fast.kernels import reference, triton

    numbers = (0.0, 1e-45, 1e-30, 0.3, 1.0, 64.0, 1e5, 3e38, float("inf"), float("nan"))
    for number, size in itertools.product(numbers, (1, 5_000)):
        theta, direction = torch.zeros(size, device=device), torch.full((size,), number / 2, device=device)
        direction[-1] = -number
        ours, theirs = (
            back_end.pack_parameters(theta, direction, (), "fp16", 64.0).scale for back_end in (triton, reference)
        )
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs), (number, size)
    print("passed: powers of two")


def warp_rows(shape: tuple[int, int, int, int]) -> Tensor:
    """Return parameters for at most four samples: a turn, all at once, none, and a whole displacement under a mask."""
    batch, _, height, width = shape
    rotated = [0, 0, 0, -0.03, 0.26, 0, -0.26, -0.03, 0, 0, 0, 0, 0]
    everything = [0.3, -0.4, 0.5, -0.16, 0.1, 0.7, -0.2, 0.2, -1.3, 1, 3, 0, 2]
    shifted = [0, 0, 0, 0, 0, 1, 0, -2, -1, 0, height, 1, width]
    return torch.tensor([rotated, everything, [0] * 13, shifted][:batch], dtype=torch.float64)


def warps(device: str, shape: tuple[int, int, int, int]) -> None:
    """Compare warps; each sample has parameters of its own."""
    from mtt_fast.kernels import reference, triton

    batch = shape[0]
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        images, parameters = torch.randn(shape).to(device, dtype), warp_rows(shape).to(device, wide)
        for name in ("colour_warp_mask", "colour_warp_mask_transpose"):
            ours, truth = getattr(triton, name), getattr(reference, name)
            expected = truth(images.double(), parameters.double()).to(dtype)
            check((name, shape, str(dtype)), partial(ours, images, parameters), expected, tolerance)
            if batch > 2:
                assert torch.equal(ours(images, parameters)[2], images[2]), "zeros are the identity"


def added_warps(device: str, shape: tuple[int, int, int, int]) -> None:
    """Compare warps' transposes that are added to rows; an index comes again, with a warp in between and without."""
    from mtt_fast.kernels import reference, triton

    parameters = warp_rows(shape)
    index = torch.tensor([3, 0, 3, 3])[: shape[0]]
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        out, y_bar = torch.randn(5, *shape[1:], dtype=dtype), torch.randn(shape, dtype=dtype)
        factor = torch.tensor(-0.37, dtype=dtype)
        for rows in (parameters, None):
            wide = None if rows is None else rows.double()
            expected = reference.colour_warp_mask_transpose_add(
                out.to(torch.float64, copy=True), index, y_bar.double(), wide, factor.double()
            )
            given = (
                index.to(device),
                y_bar.to(device),
                None if rows is None else rows.to(device, dtype),
                factor.to(device),
            )
            case = ("colour_warp_mask_transpose_add", shape, str(dtype), rows is not None)

            def found(given: Any = given, out: Tensor = out) -> Tensor:
                result: Tensor = triton.colour_warp_mask_transpose_add(out.to(device, copy=True), *given)
                return result

            check(case, found, expected.to(dtype), tolerance)


def refusals(device: str) -> None:
    from mtt_fast.kernels.triton import conv

    x, weight = torch.zeros(2, 3, 6, 6, device=device), torch.zeros(4, 3, 3, 3, device=device)
    for first, second in (
        (x[:, :, ::2], None),
        (x.transpose(2, 3), None),
        (x, x.to(memory_format=torch.channels_last)),
    ):
        try:
            conv.conv3x3_dual(first, second, weight, weight, 1, "fp32")
        except ValueError as error:
            print("refused:", error)
        else:
            raise AssertionError(f"accepted strides {first.stride()}")


def all_convolutions(device: str) -> list[Case]:
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
        for shape, tile in zip(BOXED, itertools.cycle(range(len(BOX_TILES))), strict=False):
            cases.append(partial(boxed_convolutions, device, torch.float32, "fp32", shape, tile))
        for shape, tile in itertools.product((BOXED[0], BOXED[-1]), range(2)):
            cases.append(partial(boxed_convolutions, device, torch.bfloat16, "bf16", shape, tile))
    if not interpreted and torch.cuda.get_device_capability()[0] >= 9:
        for shape in BOXED + [shape for shape in LARGE if shape[1] % 8 == shape[2] % 8 == 0]:
            cases.append(partial(boxed_convolutions, device, torch.float32, "tf32", shape, None))
            cases.append(partial(boxed_convolutions, device, torch.bfloat16, "bf16", shape, None))
    return cases


def run(cases: list[Case], part: int, parts: int) -> None:
    """Run the cases of a part, each of which draws the same numbers whatever the others are. Neighbours share kernels.

    Where kernels are interpreted, what they load and store is watched (sanitizer.py).
    Raises `AssertionError` at the end if one failed: time on a GPU is scarce, so one run shows all that is wrong.
    """
    from mtt_fast.kernels.triton.launch import INTERPRETED

    failures = []
    for number in range(len(cases) * part // parts, len(cases) * (part + 1) // parts):
        torch.manual_seed(number)
        try:
            with watched() if INTERPRETED else nullcontext():
                cases[number]()
        except Exception:
            failures.append(traceback.format_exc())
    assert not failures, "\n".join(failures)


def cases_of(family: str, device: str) -> list[Case]:
    """Return all comparisons of a family."""
    from tests.kernels import block_comparison, classifier_comparison, parameters_comparison, partial_comparison

    match family:
        case "norm":
            return [
                *plane_cases(check_norm, device),
                *partial_comparison.norm_cases(device),
                partial(far_planes, device),
                partial(refused_planes, family, device),
            ]
        case "bias":
            return [*plane_cases(check_bias, device), partial(refused_planes, family, device)]
        case "conv":
            return all_convolutions(device)
        case "block":
            return block_comparison.all_blocks(device) + partial_comparison.block_cases(device)
        case "statistics":
            return [partial(block_comparison.statistics, device)]
        case "classifier":
            return classifier_comparison.all_classifiers(device)
        case "flat":
            of_parameters = (parameters_comparison.partial_sums, parameters_comparison.packed_parameters)
            return [partial(check, device) for check in (vectors, rows, powers, *of_parameters)]
        case "warp":
            images = IMAGES if device == "cpu" else IMAGES + LARGE_IMAGES
            return [partial(check, device, shape) for shape in images for check in (warps, added_warps)]
        case _:
            raise ValueError(f"no family is called {family}")


def main(family: str, device: str, part: int, parts: int) -> None:
    assert set(UNINTERPRETED) <= set(get_args(Precision)), "the list of what the interpreter cannot do is out of date"
    torch.backends.cudnn.allow_tf32 = False
    poison()
    run(cases_of(family, device), part, parts)


if __name__ == "__main__":
    family, device, part, parts = sys.argv[1:]
    main(family, device, int(part), int(parts))
