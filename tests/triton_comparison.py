"""Triton's convolutions and vector kernels against their definition: `python triton_comparison.py DEVICE`.

A program of its own, since a process either interprets Triton's kernels (TRITON_INTERPRET=1, DEVICE cpu) or compiles
them (DEVICE cuda). It prints a line for each case that passed.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

# What the interpreter cannot do, and why.
UNINTERPRETED = {
    "bf16": "it multiplies the bits of bfloat16 numbers as if they were integers",
    "tf32": "it does not round, so this would be fp32 once more",
}

# (B, C, K, H, W, padding)
SHAPES = [
    (2, 5, 7, 6, 5, 1),  # odd everywhere
    (1, 1, 3, 4, 5, 3),  # MNIST's first layer: the input gradient crops
    (3, 17, 33, 1, 1, 1),  # 1×1 planes, several samples a tile, more outputs than a tile
    (2, 3, 70, 9, 7, 0),  # more results than a tile in both directions
    (13, 2, 3, 5, 3, 1),  # the weight gradient's sum in several parts, the last one short
]
LARGE = [(7, 128, 128, 16, 16, 1), (5, 3, 128, 32, 32, 1), (3, 128, 128, 64, 64, 1), (9, 100, 60, 9, 13, 1)]

# ‖found − expected‖ / ‖expected‖
TOLERANCES = {"fp32": 3e-6, "tf32": 2e-3, "bf16": 2e-2}

Operation = Callable[..., Any]


def poison() -> None:
    """Fill what is allocated without a value with NaN, which an element that no kernel writes then shows."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def allocate_and_poison(*args: Any, allocate: Operation = allocate, **kwargs: Any) -> Tensor:
            tensor: Tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        setattr(torch, name, allocate_and_poison)


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def check(what: object, run: Callable[[], Any], expected: Any, tolerance: float) -> None:
    found = as_tuple(run())
    again = as_tuple(run()) if found[0].is_cuda else found  # interpreted, a second run could not differ
    for place, (ours, second, wanted) in enumerate(zip(found, again, as_tuple(expected), strict=True)):
        case = f"{what}, result {place}"
        assert (ours.shape, ours.dtype) == (wanted.shape, wanted.dtype), case
        if ours.dim() == 4:
            assert ours.is_contiguous(memory_format=torch.channels_last) or ours.is_contiguous(), case
            assert not wanted.is_contiguous() or ours.is_contiguous(), case
        assert torch.equal(ours, second), f"{case} differs from one run to the next"
        error = float((ours.double() - wanted.double()).norm() / wanted.double().norm())
        assert error <= tolerance, f"{case}: error {error}"
    print("passed:", what)


def convolutions(device: str, dtype: torch.dtype, precision: str, shape: tuple[int, ...], form: Any) -> None:
    from mtt_fast.kernels import reference, triton

    batch, channels, outputs, height, width, padding = shape
    grown = (height + 2 * padding - 2, width + 2 * padding - 2)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype).to(device)

    def planes(*size: int) -> Tensor:
        return draw(batch, *size).contiguous(memory_format=form)

    x, x_dot = planes(channels, height, width), planes(channels, height, width)
    y_bar, y_bar_dot = planes(outputs, *grown), planes(outputs, *grown)
    weights = [draw(outputs, channels, 3, 3) for _ in range(2)]
    tolerance = 1e-13 if dtype == torch.float64 else TOLERANCES[precision]
    for name, arguments in (
        ("conv3x3_dual", (x, x_dot, *weights)),
        ("conv3x3_dual", (x, None, *weights)),
        ("conv3x3_dual_input_gradient", (y_bar, y_bar_dot, *weights)),
        ("conv3x3_dual_image_gradient", (y_bar, y_bar_dot, *weights)),
        ("conv3x3_dual_weight_gradient", (x, x_dot, y_bar, y_bar_dot)),
        ("conv3x3_dual_weight_gradient", (x, None, y_bar, y_bar_dot)),
    ):
        ours, truth = getattr(triton, name), getattr(reference, name)
        wide = [None if each is None else each.double() for each in arguments]
        expected = tuple(each.to(dtype) for each in as_tuple(truth(*wide, padding)))
        case = (name, shape, str(form), str(dtype), precision, "ẋ" if arguments[1] is not None else "no ẋ")
        check(case, partial(ours, *arguments, padding, precision=precision), expected, tolerance)


def mixed_formats(device: str) -> None:
    """The weight gradient takes x and ȳ in formats of their own."""
    from mtt_fast.kernels import reference, triton

    x, y_bar = torch.randn(2, 5, 6, 7).to(device), torch.randn(2, 4, 6, 7).to(device)
    last = torch.channels_last
    for first, second in ((x, y_bar.contiguous(memory_format=last)), (x.contiguous(memory_format=last), y_bar)):
        arguments = (first, first, second, second, 1)
        ours = partial(triton.conv3x3_dual_weight_gradient, *arguments, precision="fp32")
        check("mixed formats", ours, reference.conv3x3_dual_weight_gradient(*arguments), TOLERANCES["fp32"])


def vectors(device: str) -> None:
    from mtt_fast.kernels import reference, triton

    for dtype, size in itertools.product((torch.float32, torch.float64, torch.bfloat16), (0, 1, 1003, 600_001)):
        if device == "cpu" and size > 10_000:
            size = 5_000  # interpreted programs take milliseconds each
        a, b = (torch.randn(size).to(device, dtype) for _ in range(2))
        distance = triton.squared_distance(a, b)
        expected = reference.squared_distance(a, b)
        assert distance.dtype == torch.float64
        assert torch.equal(distance, triton.squared_distance(a, b))
        torch.testing.assert_close(distance, expected, rtol=1e-13, atol=0)
        rate = torch.tensor(0.03, dtype=dtype, device=device)
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-15, torch.bfloat16: 1e-2}[dtype]
        expected = (a.double() - rate.double() * b.double()).to(dtype)
        torch.testing.assert_close(triton.descend(a, b, rate), expected, rtol=tolerance, atol=tolerance)
        assert triton.descend(a, b, rate, out=a) is a  # in place
        torch.testing.assert_close(a, expected, rtol=tolerance, atol=tolerance)
        print("passed: vectors", size, dtype)


def refusals(device: str) -> None:
    from mtt_fast.kernels import triton

    x, weight = torch.zeros(2, 3, 6, 6, device=device), torch.zeros(4, 3, 3, 3, device=device)
    for first, second in (
        (x[:, :, ::2], None),
        (x.transpose(2, 3), None),
        (x, x.to(memory_format=torch.channels_last)),
    ):
        try:
            triton.conv3x3_dual(first, second, weight, weight, 1)
        except ValueError as error:
            print("refused:", error)
        else:
            raise AssertionError(f"accepted strides {first.stride()}")


def main(device: str) -> None:
    from mtt_fast.kernels.triton.convolution import Precision

    precisions = get_args(Precision)
    assert set(UNINTERPRETED) <= set(precisions), "the list of what the interpreter cannot do is out of date"
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    poison()
    interpreted = device == "cpu"
    shapes = SHAPES if interpreted else SHAPES + LARGE
    for shape, form in itertools.product(shapes, (torch.contiguous_format, torch.channels_last)):
        if interpreted:
            convolutions(device, torch.float64, "fp32", shape, form)
        for precision in precisions:
            if not (interpreted and precision in UNINTERPRETED):
                convolutions(device, torch.float32, precision, shape, form)
    mixed_formats(device)
    vectors(device)
    refusals(device)


if __name__ == "__main__":
    main(sys.argv[1])
