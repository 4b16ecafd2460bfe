"""Triton's convolutions, classifier, vector and image kernels, held to their definition: `triton_comparison.py DEVICE`.

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

from mtt_fast.kernels import LabelKind, Precision

# What the interpreter cannot do, and why.
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

# (B, C, H, W): one channel, blocks of pixels that are not whole, more channels than an image's, a line of pixels
IMAGES = [(2, 1, 5, 6), (4, 3, 19, 17), (2, 5, 4, 3), (1, 3, 1, 8)]
LARGE_IMAGES = [(4, 3, 32, 32), (4, 3, 128, 128), (4, 1, 28, 28), (3, 3, 33, 63)]

BLOCKS = [
    (2, 5, 7, 6, 5, 1),  # odd everywhere
    (1, 1, 3, 4, 5, 3),  # MNIST's first layer
    (1, 33, 35, 3, 2, 1),  # more outputs than a tile, and channels than a step of the sum
    (1, 3, 4, 13, 11, 0),  # several tiles of a plane, the last one short
]

# ‖found − expected‖ / ‖expected‖
TOLERANCES = {"fp32": 3e-6, "tf32": 2e-3, "bf16": 2e-2}
# of a block: a unit that rounding carries over ReLU's kink is much among so few
BLOCK_TOLERANCES = {"fp64": 1e-12, "fp32": 1e-4, "tf32": 5e-2, "bf16": 0.2}

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
    """By our kernels and by torch's library, between which the table chooses."""
    from mtt_fast.kernels import reference
    from mtt_fast.kernels.triton.ways import MODULES

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
    for (name, arguments), way in itertools.product(cases, MODULES):
        wide = [None if each is None else each.double() for each in arguments]
        expected = tuple(each.to(dtype) for each in as_tuple(getattr(reference, name)(*wide, padding)))
        case = (name, way, shape, str(form), str(dtype), precision, "ẋ" if arguments[1] is not None else "no ẋ")
        ours = partial(getattr(MODULES[way], name), *arguments, padding, precision=precision)
        check(case, ours, expected, tolerance)


def blocks(device: str, dtype: torch.dtype, precision: str, shape: tuple[int, ...], form: Any) -> None:
    """A whole block in one, of features and of images, with y known and not, and its way back."""
    tolerance = BLOCK_TOLERANCES["fp64" if dtype == torch.float64 else precision]
    from mtt_fast.kernels import reference
    from mtt_fast.kernels.formats import accumulator, memory_format
    from mtt_fast.kernels.triton import block

    batch, channels, outputs, height, width, padding = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(size, dtype=accumulator(dtype)).to(device)

    def planes(*size: int) -> Tensor:
        return draw(batch, *size).to(dtype, memory_format=form)

    x = planes(channels, height, width)
    weights, affine = [draw(outputs, channels, 3, 3) for _ in range(2)], [draw(outputs) for _ in range(4)]
    for x_dot in (torch.randn_like(x), None):
        arguments = (x, x_dot, *weights, *affine, padding, 1e-5, precision)
        wanted = reference.conv_norm_relu_pool_dual(*arguments)
        y = wanted[2][2]
        bars = [torch.randn_like(wanted[0]).contiguous(memory_format=memory_format(y)) for _ in range(2)]
        case = (str(dtype), precision, shape, str(form), "features" if x_dot is not None else "images")
        for known in (None, y):

            def forward(arguments: tuple[Any, ...] = arguments, known: Tensor | None = known) -> tuple[Tensor, ...]:
                p, p_dot, activations = block.conv_norm_relu_pool_dual(*arguments, known)
                assert known is None or activations[2] is known
                return p, p_dot, *activations[2:]

            check(("block", *case), forward, (*wanted[:2], *wanted[2][2:]), tolerance)

        options = (*weights, *affine, *bars, padding, precision, x_dot is not None)

        def backward(activations: list[Any] = wanted[2], options: tuple[Any, ...] = options) -> tuple[Tensor, ...]:
            used = list(activations)
            results = block.conv_norm_relu_pool_dual_backward(used, *options)
            assert used == []
            return tuple(result for result in results if result is not None)

        expected = reference.conv_norm_relu_pool_dual_backward(wanted[2], *options)
        given = tuple(result for result in expected if result is not None)
        check(("block's way back", *case), backward, given, tolerance)


def mixed_formats(device: str) -> None:
    """The weight gradient takes x and ȳ in formats of their own."""
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

    for dtype, size in itertools.product((torch.float32, torch.float64, torch.bfloat16), (0, 1, 1003, 600_001)):
        if device == "cpu" and size > 10_000:
            size = 5_000  # interpreted programs take milliseconds each
        a, b = (torch.randn(size).to(device, dtype) for _ in range(2))
        distance = triton.squared_distance(a, b)
        expected = reference.squared_distance(a, b)
        assert distance.dtype == torch.float64
        assert torch.equal(distance, triton.squared_distance(a, b))
        torch.testing.assert_close(distance, expected, rtol=1e-13, atol=0)
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-15, torch.bfloat16: 1e-2}[dtype]
        close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
        rate, c = torch.tensor(0.03, dtype=dtype, device=device), torch.randn(size).to(device, dtype)
        for velocity, decay in ((None, 0.0), (None, 0.0503), (c, 0.0503)):
            ours, theirs = ([torch.empty_like(each) for each in (a, a)] for _ in range(2))
            for twin, (out, moved) in ((triton, ours), (reference, theirs)):
                assert twin.sgd_step(a, b, rate, out, velocity, moved, 0.9, decay) is out
            for found, wanted in zip(ours, theirs, strict=True):
                close(found, wanted)
            for twin, (out, _) in ((triton, ours), (reference, theirs)):
                assert twin.adjoint_step(a, b, c, rate, out, velocity, decay) is out
            close(ours[0], theirs[0])
        reference.adjoint_step(a, b, a, rate, theirs[0], c, 0.0503)
        assert triton.adjoint_step(a, b, a, rate, a, c, 0.0503) is a  # in place
        close(a, theirs[0])
        print("passed: vectors", size, dtype)


def warps(device: str, shape: tuple[int, int, int, int]) -> None:
    """Each sample has parameters of its own: a turn, all at once, none, and a whole displacement under a mask."""
    from mtt_fast.kernels import reference, triton

    batch, _, height, width = shape
    turned = [0, 0, 0, -0.03, 0.26, 0, -0.26, -0.03, 0, 0, 0, 0, 0]
    everything = [0.3, -0.4, 0.5, -0.16, 0.1, 0.7, -0.2, 0.2, -1.3, 1, 3, 0, 2]
    shifted = [0, 0, 0, 0, 0, 1, 0, -2, -1, 0, height, 1, width]
    rows = [turned, everything, [0] * 13, shifted][:batch]
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
    from mtt_fast.kernels.triton import convolution

    x, weight = torch.zeros(2, 3, 6, 6, device=device), torch.zeros(4, 3, 3, 3, device=device)
    for first, second in (
        (x[:, :, ::2], None),
        (x.transpose(2, 3), None),
        (x, x.to(memory_format=torch.channels_last)),
    ):
        try:
            convolution.conv3x3_dual(first, second, weight, weight, 1, "fp32")
        except ValueError as error:
            print("refused:", error)
        else:
            raise AssertionError(f"accepted strides {first.stride()}")


def main(device: str) -> None:
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
            enough = form == torch.channels_last and shape in SHAPES[: 2 if precision == "fp32" else 1]
            if not interpreted or (enough and precision not in UNINTERPRETED):
                convolutions(device, torch.float32, precision, shape, form)
    if interpreted:
        for shape, form in zip(BLOCKS, itertools.cycle((torch.channels_last, torch.contiguous_format)), strict=False):
            blocks(device, torch.float64, "fp32", shape, form)
    for shape in BLOCKS[:1] if interpreted else BLOCKS + LARGE:
        for dtype, precision in ((torch.float32, "fp32"), (torch.float32, "tf32"), (torch.bfloat16, "bf16")):
            if not (interpreted and precision in UNINTERPRETED):
                blocks(device, dtype, precision, shape, torch.channels_last)
    mixed_formats(device)
    for dtype in (torch.float64, torch.float32):
        classifiers(device, dtype)
    vectors(device)
    for images in IMAGES if interpreted else IMAGES + LARGE_IMAGES:
        warps(device, images)
    refusals(device)


if __name__ == "__main__":
    main(sys.argv[1])
