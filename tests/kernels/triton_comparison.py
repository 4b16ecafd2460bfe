"""Hold Triton's operations of one family to the reference: `python -m tests.kernels.triton_comparison FAMILY DEVICE`.

A program of its own, since a process either interprets Triton's kernels (TRITON_INTERPRET=1, DEVICE cpu) or compiles
them (DEVICE cuda). It prints a line for each case that passed. `compare` runs it.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mtt_fast.kernels import Affine, LabelKind, Precision

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
CLASSIFIERS = [  # (B, D, K)
    (5, 7, 4),
    (1, 3, 1),  # one sample, one class
    (3, 2, 37),  # a part of a tile in both directions
    (2, 3, 1000),
]
LARGE = [(7, 128, 128, 16, 16, 1), (5, 3, 128, 32, 32, 1), (3, 128, 128, 64, 64, 1), (9, 100, 60, 9, 13, 1)]

# (B, C, H, W): a plane of one tile, odd sizes, 1×1 after the pool, more channels than a block, a plane of several tiles
PLANES = [(2, 3, 4, 4), (1, 5, 7, 5), (2, 17, 2, 2), (3, 4, 3, 9), (1, 2, 18, 20)]
LARGE_PLANES = [(7, 128, 32, 32), (5, 128, 16, 16), (3, 100, 8, 8), (2, 128, 128, 128), (2, 63, 31, 33)]

# (B, C, H, W): one channel, blocks of pixels that are not whole, more channels than an image's, a line of pixels
IMAGES = [(2, 1, 5, 6), (4, 3, 19, 17), (2, 5, 4, 3), (1, 3, 1, 8)]
LARGE_IMAGES = [(4, 3, 32, 32), (4, 3, 128, 128), (4, 1, 28, 28), (3, 3, 33, 63)]

# ‖found − expected‖ / ‖expected‖
TOLERANCES = {"fp32": 3e-6, "tf32": 2e-3, "bf16": 2e-2}
Operation = Callable[..., Any]

ROOT = Path(__file__).resolve().parents[2]


def compare(family: str, device: str) -> list[str]:
    """Run the program in a process of its own, interpreted for `cpu`; return its lines."""
    pytest.importorskip("triton", reason="Triton is not installed: it comes for Linux alone")
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.triton_comparison", family, device]
    interpreted = {"TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    answer = subprocess.run(
        command, cwd=ROOT, env=os.environ | interpreted, capture_output=True, text=True, timeout=280, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.splitlines()


def poison() -> None:
    """Fill memory that is allocated without a value with NaN, which an element that no kernel writes then shows."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def allocate_and_poison(*args: Any, allocate: Operation = allocate, **kwargs: Any) -> Tensor:
            tensor: Tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        setattr(torch, name, allocate_and_poison)


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    """Return the tensors of `results`, also those of a tuple within."""
    if isinstance(results, Tensor):
        return (results,)
    return tuple(tensor for each in results for tensor in as_tuple(each))


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
        error = float((ours.double() - wanted.double()).norm() / wanted.double().norm())
        assert error <= tolerance, f"{where}: error {error}"
    print("passed:", case)


def norms(device: str) -> None:
    """Compare norm, ReLU and pool, and the derivatives."""
    from mtt_fast.kernels import reference

    for shape, given in plane_cases(device):
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


def biases(device: str) -> None:
    """Compare bias, ReLU and pool, and the derivatives."""
    for shape, given in plane_cases(device):
        y, beta, bars = given["z"], given["beta"], (given["p_bar"], given["p_bar_dot"])
        cases: dict[str, tuple[Any, ...]] = {
            "bias_relu_pool": (y, beta),
            "bias_relu_pool_backward": (y, beta, bars[0]),
            "bias_relu_pool_dual": (y, given["y_dot"], beta, given["beta_dot"]),
            "bias_relu_pool_dual_backward": (y, beta, *bars),
        }
        check_planes(cases, shape, y)


def plane_cases(device: str) -> Iterator[tuple[tuple[int, ...], dict[str, Tensor]]]:
    """Yield the arguments of each shape, dtype and format; in channel 0 every u is exactly 0, where ReLU has its kink."""
    shapes = PLANES if device == "cpu" else PLANES + LARGE_PLANES
    formats = (torch.contiguous_format, torch.channels_last)
    for dtype, shape, form in itertools.product((torch.float64, torch.float32), shapes, formats):
        batch, channels, height, width = shape

        def planes(*size: int, dtype: torch.dtype = dtype, form: Any = form) -> Tensor:
            return torch.randn(size, dtype=dtype).to(device).contiguous(memory_format=form)

        names = ("gamma", "beta", "gamma_dot", "beta_dot")
        given = {name: planes(*shape) for name in ("y", "y_dot")}
        given |= {name: torch.randn(channels, dtype=dtype).to(device) for name in names}
        given |= {name: planes(batch, channels, height // 2, width // 2) for name in ("p_bar", "p_bar_dot")}
        given["gamma"][0] = given["beta"][0] = 0
        given["z"] = given["y"].clone(memory_format=torch.preserve_format)
        given["z"][:, 0] = 0  # at the kink without a norm
        yield shape, given


def check_planes(cases: dict[str, tuple[Any, ...]], shape: tuple[int, ...], y: Tensor) -> None:
    """Hold Triton's results to the reference's: values, and the memory format of `y`."""
    from mtt_fast.kernels import reference, triton
    from mtt_fast.kernels.types import memory_format

    tolerance = 1e-12 if y.dtype == torch.float64 else 1e-5
    for name, arguments in cases.items():
        found, expected = (as_tuple(getattr(back_end, name)(*arguments)) for back_end in (triton, reference))
        for place, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            case = (name, place, shape, str(y.dtype), str(memory_format(y)))
            error = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-3))
            assert error <= tolerance, (*case, error)
            assert ours.dim() < 4 or ours.is_contiguous(memory_format=memory_format(y)), case
        print("passed:", (name, shape, str(y.dtype)))


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
    """Compare our kernels and torch's library, between which the table chooses."""
    from mtt_fast.kernels import reference
    from mtt_fast.kernels.triton.dispatch import BACKENDS

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
    for (name, arguments), backend in itertools.product(cases, BACKENDS):
        wide = [None if each is None else each.double() for each in arguments]
        expected = tuple(each.to(dtype) for each in as_tuple(getattr(reference, name)(*wide, padding)))
        case = (name, backend, shape, str(form), str(dtype), precision, "ẋ" if arguments[1] is not None else "no ẋ")
        ours = partial(getattr(BACKENDS[backend], name), *arguments, padding, precision=precision)
        check(case, ours, expected, tolerance)


def mixed_formats(device: str) -> None:
    """Check that the weight gradient takes x and ȳ in formats of their own."""
    from mtt_fast.kernels import reference, triton

    x, y_bar = torch.randn(2, 5, 6, 7).to(device), torch.randn(2, 4, 6, 7).to(device)
    last = torch.channels_last
    for first, second in ((x, y_bar.contiguous(memory_format=last)), (x.contiguous(memory_format=last), y_bar)):
        arguments = (first, first, second, second, 1)
        ours = partial(triton.conv3x3_dual_weight_gradient, *arguments, precision="fp32")
        check("mixed formats", ours, reference.conv3x3_dual_weight_gradient(*arguments), TOLERANCES["fp32"])


def classifiers(device: str, dtype: torch.dtype) -> None:
    from mtt_fast.kernels import reference, triton

    def draw(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype).to(device)

    for (batch, width, classes), kind in itertools.product(CLASSIFIERS, get_args(LabelKind)):
        features, features_dot = (draw(batch, width) for _ in range(2))
        weight, weight_dot = (draw(classes, width) for _ in range(2))
        bias, bias_dot = (draw(classes) for _ in range(2))
        bias[-1] += 1e4  # what overflows if the maximum is not taken out
        soft = draw(batch, classes)
        labels = {"indices": soft.argmax(1), "probabilities": 1.5 * soft.relu(), "logits": 3 * soft}[kind]
        primal = (features, weight, bias, labels)
        dual = (features, features_dot, weight, bias, weight_dot, bias_dot, labels)
        for name, arguments in (("linear_cross_entropy", primal), ("linear_cross_entropy_dual", dual)):
            wide = [each.double() if each.is_floating_point() else each for each in arguments]
            exact = [each for each in getattr(reference, name)(*wide, kind) if each is not None]
            found = [each for each in getattr(triton, name)(*arguments, kind) if each is not None]
            again = [each for each in getattr(triton, name)(*arguments, kind) if each is not None]
            for place, (ours, second, wanted) in enumerate(zip(found, again, exact, strict=True)):
                case = f"{name}, {(batch, width, classes)}, {kind}, {dtype}, result {place}"
                assert (ours.shape, ours.dtype) == (wanted.shape, dtype), case
                assert torch.equal(ours, second), f"{case} differs from one run to the next"
                error = float((ours.double() - wanted).norm() / wanted.norm().clamp_min(1e-2))
                assert error <= (1e-13 if dtype == torch.float64 else 1e-5), f"{case}: error {error}"
            print("passed:", (name, (batch, width, classes), kind, str(dtype)))

    unknown = torch.tensor([0, classes], device=device)
    primal = (features[:1].expand(2, -1).contiguous(), weight, bias, unknown)
    assert triton.linear_cross_entropy(*primal, "indices")[0].isnan(), "the loss of a label that is no class"


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


def warps(device: str, shape: tuple[int, int, int, int]) -> None:
    """Compare warps; each sample has parameters of its own: a turn, all at once, none, and a whole displacement under a mask."""
    from mtt_fast.kernels import reference, triton

    batch, _, height, width = shape
    rotated = [0, 0, 0, -0.03, 0.26, 0, -0.26, -0.03, 0, 0, 0, 0, 0]
    everything = [0.3, -0.4, 0.5, -0.16, 0.1, 0.7, -0.2, 0.2, -1.3, 1, 3, 0, 2]
    shifted = [0, 0, 0, 0, 0, 1, 0, -2, -1, 0, height, 1, width]
    rows = [rotated, everything, [0] * 13, shifted][:batch]
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        images, parameters = torch.randn(shape).to(device, dtype), torch.tensor(rows, dtype=wide, device=device)
        for name in ("colour_warp_mask", "colour_warp_mask_transpose"):
            ours, truth = getattr(triton, name), getattr(reference, name)
            expected = truth(images.double(), parameters.double()).to(dtype)
            check((name, shape, str(dtype)), partial(ours, images, parameters), expected, tolerance)
            if batch > 2:
                assert torch.equal(ours(images, parameters)[2], images[2]), "zeros are the identity"


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


def all_convolutions(device: str) -> None:
    """Compare every shape compiled; interpreted, those of float64, and few of the others."""
    precisions, interpreted = get_args(Precision), device == "cpu"
    shapes = SHAPES if interpreted else SHAPES + LARGE
    for shape, form in itertools.product(shapes, (torch.contiguous_format, torch.channels_last)):
        if interpreted:
            convolutions(device, torch.float64, "fp32", shape, form)
        for precision in precisions:
            enough = form == torch.channels_last and shape in SHAPES[: 2 if precision == "fp32" else 1]
            if not interpreted or (enough and precision not in UNINTERPRETED):
                convolutions(device, torch.float32, precision, shape, form)
    mixed_formats(device)
    refusals(device)


def main(family: str, device: str) -> None:
    from tests.kernels import block_comparison

    assert set(UNINTERPRETED) <= set(get_args(Precision)), "the list of what the interpreter cannot do is out of date"
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    poison()
    match family:
        case "norm":
            norms(device)
            refused_planes(family, device)
        case "bias":
            biases(device)
            refused_planes(family, device)
        case "conv":
            all_convolutions(device)
        case "block":
            block_comparison.all_blocks(device)
        case "statistics":
            block_comparison.statistics(device)
        case "classifier":
            for dtype in (torch.float64, torch.float32):
                classifiers(device, dtype)
        case "flat":
            vectors(device)
        case "warp":
            for images in IMAGES if device == "cpu" else IMAGES + LARGE_IMAGES:
                warps(device, images)
        case _:
            raise ValueError(f"no family is called {family}")


if __name__ == "__main__":
    main(*sys.argv[1:])
