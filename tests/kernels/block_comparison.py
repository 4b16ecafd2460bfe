"""Hold Triton's first block to the reference, and its statistics to their bound: families of triton_comparison.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args
from unittest.mock import patch

import torch
from torch import Tensor

from mtt_fast.kernels import Affine, Precision
from mtt_fast.kernels.reference.block import gram_of
from mtt_fast.kernels.triton.configurations import Configuration, configuration
from mtt_fast.kernels.types import accumulator
from tests.kernels.comparison import check, summed_results, with_sizes
from tests.kernels.warp_comparison import warp_rows

BLOCKS = [  # (B, C, K, H, W, padding)
    (2, 3, 48, 7, 6, 1),  # an odd side, windows that are not whole, filters in several blocks
    (2, 1, 16, 4, 5, 3),  # MNIST's first layer
    (1, 2, 16, 9, 13, 0),
]
LARGE_BLOCKS = [(7, 3, 128, 32, 32, 1), (3, 3, 128, 65, 64, 1), (5, 1, 128, 28, 28, 3), (2, 3, 1024, 16, 16, 1)]

# of a block: a unit that rounding carries over ReLU's kink is much among so few
BLOCK_TOLERANCES = {"fp64": 1e-12, "fp32": 1e-4, "tf32": 5e-2, "fp16": 5e-2, "bf16": 0.2}
# of patches: a shift that is rounded otherwise rounds a few numbers otherwise; interpreted, bfloat16 is cut off
PATCH_TOLERANCES = {"fp64": 1e-13, "fp32": 1e-6, "tf32": 1e-4, "fp16": 1e-4, "bf16": 2**-6}


def blocks(device: str, dtype: torch.dtype, precision: Any, shape: tuple[int, ...], form: Any) -> None:
    """Compare the first block of images, its backward, and both in a direction."""
    from mtt_fast.kernels import reference
    from mtt_fast.kernels.triton import block

    effective = "fp64" if dtype == torch.float64 else precision
    tolerance, close = BLOCK_TOLERANCES[effective], PATCH_TOLERANCES[effective]
    batch, channels, filters, height, width, padding = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype).to(device)

    case = (str(dtype), precision, shape, str(form))
    x = (draw(batch, channels, height, width) + 2).contiguous(memory_format=form)
    laid_out, patches = (back_end.image_patches(x, padding, precision) for back_end in (block, reference))
    assert laid_out.gram.dtype == patches.gram.dtype
    expected_patches = (patches.images, exact_gram(laid_out.images))
    check(("image_patches", *case), lambda: (laid_out.images, laid_out.gram.sum(1)), expected_patches, close)
    patches_of_batches(case, x, padding, precision, close)

    # whoever made patches, all back ends read them; those of Triton may have their sums in several parts
    patches = laid_out if dtype == torch.float64 else patches
    weights = [draw(filters, channels, 3, 3) for _ in range(2)]
    # few units near the kink, where rounding decides: some filters pass most of a plane, the others little of it
    affine = [Affine(draw(filters), draw(filters).sign() * 2), Affine(draw(filters), draw(filters))]
    affine[0].gamma[0] = affine[0].beta[0] = 0  # every u of the first filter is exactly 0, where ReLU has its kink
    p = reference.conv_norm_relu_pool(patches, weights[0], affine[0], 1e-5, precision)[0]
    bars = [draw(*p.shape).to(p.dtype, memory_format=torch.channels_last) for _ in range(2)]
    primal, dual = (patches, weights[0], affine[0]), (patches, *weights, *affine)
    options = (1e-5, precision)
    *_, folded = block.conv_norm_relu_pool(*primal, *options)
    *_, folded_dual = block.conv_norm_relu_pool_dual(*dual, *options)
    p, p_dot, _ = reference.conv_norm_relu_pool_dual(*dual, *options)
    check(("conv_norm_relu_pool", *case), lambda: block.conv_norm_relu_pool(*primal, *options)[0], p, tolerance)
    name = "conv_norm_relu_pool_dual"
    check((name, *case), lambda: block.conv_norm_relu_pool_dual(*dual, *options)[:2], (p, p_dot), tolerance)
    for name, arguments, made in (
        ("conv_norm_relu_pool_backward", (*primal, bars[0]), folded),
        ("conv_norm_relu_pool_dual_backward", (*dual, *bars), folded_dual),
    ):
        expected = summed_results(reference, name, *arguments, None, *options)
        check((name, *case), partial(summed_results, block, name, *arguments, made, *options), expected, tolerance)
    backward = partial(block.conv_norm_relu_pool_dual_backward, *dual, *bars, folded_dual, *options)
    for number in (1, 4):
        together = partial(with_pixels_together, number, backward)
        check(("x_bar_dot", f"{number} of a window together", *case), together, expected[0], tolerance)
    divisors = (torch.full((), 2.0**-9, dtype=dtype, device=device), torch.full((), 2.0**5, dtype=dtype, device=device))
    for given in (divisors[:1], divisors):
        whole = block.conv_norm_relu_pool_dual_backward(*dual, *bars, folded_dual, *options)
        divided = block.conv_norm_relu_pool_dual_backward(*dual, *bars, folded_dual, *options, given)
        assert torch.equal(divided[0], whole[0] / math.prod(given)), "a power of two is taken out exactly"
        assert all(torch.equal(actual, wanted) for actual, wanted in zip(divided[1:], whole[1:], strict=True))


def with_rounded_factors(case: Callable[[], None]) -> None:
    """Run an interpreted comparison, and check that factors of tf32 products are rounded: Tensor cores would cut them off."""
    from triton._C.libtriton.ir import INPUT_PRECISION
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def check_and_multiply(builder: Any, a: Any, b: Any, total: Any, precision: Any, *rest: Any) -> Any:
        if precision == INPUT_PRECISION.TF32 and a.data.dtype == "float32":
            for factor in (a.data, b.data):
                assert not (factor.view("int32") & 0x1FFF).any(), "a factor of a tf32 product is not rounded"
        return multiply(builder, a, b, total, precision, *rest)

    with patch.object(interpreter.InterpreterBuilder, "create_dot", check_and_multiply):
        case()


def with_pixels_together(number: int, backward: Callable[[], tuple[Tensor, ...]]) -> Tensor:
    """Return x̄̇ by the table's rows, of which that of gradients to patches has `number` of a window's pixels in a tile."""
    from mtt_fast.kernels.triton import block

    def row(*arguments: Any) -> Configuration:
        constants = configuration(*arguments)
        return constants | {"TOGETHER": number} if "TOGETHER" in constants else constants

    with patch.object(block, "configuration", row):
        return backward()[0]


def patches_of_batches(case: tuple[Any, ...], x: Tensor, padding: int, precision: Any, tolerance: float) -> None:
    """Compare the patches of batches that are gathered and augmented as they are made.

    An index comes again, and each sample has a warp of its own.
    """
    from mtt_fast.kernels import reference
    from mtt_fast.kernels.triton import block

    images = x.contiguous()
    index = torch.tensor([len(x) - 1, 0, len(x) - 1, 0], device=x.device)
    parameters = warp_rows((4, *x.shape[1:])).to(x)
    for given in ((index, None), (index, parameters), (None, parameters[: len(x)])):
        rows = images[:4] if given[0] is None else images
        images_of_batch = reference.image_patches(rows, padding, precision, *given).images
        expected = (images_of_batch, exact_gram(block.image_patches(rows, padding, precision, *given).images))

        def patches_of_batch(rows: Tensor = rows, given: Any = given) -> tuple[Tensor, Tensor]:
            patches = block.image_patches(rows, padding, precision, *given)
            return patches.images, patches.gram.sum(1)

        label = ("image_patches of a batch", *(each is not None for each in given), *case)
        check(label, patches_of_batch, expected, tolerance)


def exact_gram(images: Tensor) -> Tensor:
    """Return the sums of products of laid-out images' patches, made in float64, in the dtype of these sums."""
    gram: Tensor = gram_of(images.double())[:, 0]
    return gram.to(accumulator(images.dtype))


def nan_weight(device: str, precision: Any) -> None:
    """Check that a NaN among the weights makes every pixel of its filter's planes NaN, and none of another's."""
    from mtt_fast.kernels.triton import block

    weight = torch.randn(16, 3, 3, 3, device=device)
    weight.view(torch.int32)[5, 1, 0, 2] = 0x7FFFFFFF  # a GPU's own NaN: rounding must not carry over into its sign
    affine = Affine(torch.ones(16, device=device), torch.zeros(16, device=device))
    patches = block.image_patches(torch.randn(2, 3, 5, 6, device=device), 1, precision)
    primal, direction = (weight, affine), (weight, torch.ones_like(weight), affine, affine)
    planes = (
        block.conv_norm_relu_pool(patches, *primal, 1e-5, precision)[0],
        *block.conv_norm_relu_pool_dual(patches, *direction, 1e-5, precision)[:2],
    )
    for p in planes:
        lost = p.isnan().all((0, 2, 3))
        assert lost.nonzero().flatten().tolist() == [5]
        assert p[:, ~lost].isfinite().all()
    print("passed: a weight that is not a number", precision)


def planes_means(device: str, precision: Any) -> None:
    """Check that the folded norm gives planes the mean β, and their derivatives the mean β̇, as precisely as float32 would.

    So do three pieces of the shift together, each rounded, and no two of them in bfloat16.
    """
    from mtt_fast.kernels.triton import block

    count = 9 * 3 + 3
    patches = block.image_patches(torch.randn(2, 3, 7, 6, device=device), 1, precision)
    weights = [torch.randn(16, 3, 3, 3, device=device) for _ in range(2)]
    affine = [Affine(torch.randn(16, device=device), 10 * torch.randn(16, device=device)) for _ in range(2)]
    *_, folded = block.conv_norm_relu_pool_dual(patches, *weights, *affine, 1e-5, precision)
    windows = patches.images.double().unfold(1, 3, 1).unfold(2, 3, 1)  # (B, H', W', C, 3, 3)
    images = windows.permute(0, 1, 2, 4, 5, 3).reshape(2, -1, 9 * 3)
    x = torch.cat([images, torch.ones_like(images[..., :3])], 2)
    for weight, (_, mean) in zip((folded.weight, folded.weight_dot), affine, strict=True):
        assert weight is not None
        f = weight[:, :count].double()
        error, magnitude = (x @ f).mean(1) - mean, (x.abs() @ f.abs()).mean(1)
        bound = 2**-20 if device == "cpu" else 2**-16  # Tensor cores cut off what sums of products do not hold
        assert (error.abs() <= bound * magnitude).all(), f"{precision}: {error / magnitude}"
    print("passed: means of planes", precision)


def statistics(device: str) -> None:
    """Hold the statistics that come from sums of products to the bound of docs/adjoint.md where these cancel: edge filters."""
    from mtt_fast.kernels import reference
    from mtt_fast.kernels.triton import block

    down, across = (axis.to(device) for axis in torch.meshgrid(*[torch.linspace(0, 1, 24)] * 2, indexing="ij"))
    smooth = torch.stack([torch.sin(2 * down + across), torch.cos(across - down), across * down])[None]
    images = {
        "smooth": smooth,
        "far from zero": smooth + 10,
        "low contrast": smooth / 100 + 2,
        "constant": torch.full_like(smooth, 1.7),
        "black": torch.zeros_like(smooth),
    }
    edges = torch.tensor(
        [
            [0.0, 1, 0, 1, -4, 1, 0, 1, 0],  # Laplace
            [1, 0, -1, 2, 0, -2, 1, 0, -1],  # Sobel
            [0, 0, 0, 0, 1, -1, 0, 0, 0],  # a difference
            [1, -2, 1, -2, 4, -2, 1, -2, 1],  # the second one, both ways
        ]
    ).unflatten(1, (3, 3))
    weight = torch.zeros(16, 3, 3, 3)
    for channel in range(3):  # of each channel, and of all
        weight[4 * channel : 4 * channel + 4, channel] = edges
    weight[12:] = edges[:, None] / 3
    weight = weight.to(device)
    affine = Affine(torch.ones(16, device=device), torch.zeros(16, device=device))
    cases: list[Any] = [(*case, weight) for case in itertools.product(images.items(), (0, 1), ("fp32", "tf32"))]
    # filters so steep that a rounding error outweighs eps, by which some variances would be negative
    cases.append((("smooth", smooth), 0, "fp32", 1e3 * weight))
    for (name, x), padding, precision, weight in cases:
        patches = block.image_patches(x, padding, precision)
        p, folded = block.conv_norm_relu_pool(patches, weight, affine, 1e-5, precision)
        wide_patches = patches._replace(images=patches.images.double())
        planes = wide_patches.images.permute(0, 3, 1, 2).cpu()
        variance = torch.nn.functional.conv2d(planes, weight.double().cpu()).var((2, 3), correction=0)
        magnitude = torch.nn.functional.conv2d(planes.abs(), weight.double().abs().cpu())  # |w|·|x̃|
        rstd = (variance + 1e-5).rsqrt()
        error = (folded.stats[:, 1].cpu().double() / rstd - 1).abs()
        bound = 0.5 * 2**-20 * magnitude.square().mean((2, 3)) / (variance + 1e-5) + 2**-21
        assert (error <= bound).all(), f"{name}, {precision}: {error / bound}"
        if precision == "fp32":
            wide = Affine(affine.gamma.double(), affine.beta.double())
            expected = reference.conv_norm_relu_pool(wide_patches, weight.double(), wide, 1e-5)[0]
            of_p = (p.double() - expected).abs().amax((2, 3)).cpu()
            rounding = 2**-22 * rstd * magnitude.amax((2, 3))  # of y itself, a sum of 27 numbers
            allowed = bound * expected.amax((2, 3)).cpu() + rounding
            assert (of_p <= allowed + 1e-12).all(), f"{name}: {of_p / allowed}"
        print("passed: statistics", name, padding, precision, float((error / bound).max()))


def block_cases(device: str) -> list[Callable[[], None]]:
    """Return the comparisons of every shape in every precision; interpreted too, since the kernels round tf32 themselves."""
    shapes = BLOCKS if device == "cpu" else BLOCKS + LARGE_BLOCKS
    formats = (torch.contiguous_format, torch.channels_last)
    cases: list[Callable[[], None]] = []
    for shape, form in zip(shapes, itertools.cycle(formats), strict=False):
        cases.append(partial(blocks, device, torch.float64, "fp32", shape, form))
    for shape, form in zip(shapes, itertools.cycle(formats[::-1]), strict=False):
        cases += [partial(blocks, device, torch.float32, precision, shape, form) for precision in get_args(Precision)]
    if device == "cpu":
        cases = [partial(with_rounded_factors, case) for case in cases]
        # on a GPU a large block takes several tiles
        several = partial(blocks, device, torch.float64, "fp32", (2, 1, 16, 6, 7, 1), torch.contiguous_format)
        # in each part but the last one, and more parts than are added up at a time
        cases.append(partial(with_sizes, "block", several, WINDOWS=1, BLOCK_M=8, PROGRAMS=10))
    checks = itertools.product((nan_weight, planes_means), get_args(Precision))
    return cases + [partial(each, device, precision) for each, precision in checks]
