"""Check the first block: the reference against autograd in float64, Triton against the reference, and the statistics' bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.candidates import BLOCKS as CANDIDATES
from mtt_fast import kernels
from mtt_fast.kernels import HALF_PRECISIONS, Affine, ConvLayer, Precision, native, triton
from mtt_fast.testing import added_up, assert_close
from tests.kernels.compiling import (
    WIDTH,
    check,
    each_architecture,
    each_precision,
    in_parts,
    meta,
    needs_triton,
    recording,
)
from tests.kernels.helpers import EPS, FORMATS, draw, draw_warp_parameters, jvp, refused
from tests.kernels.triton_comparison import compare, each_part

BLOCKS = [  # batch, channels, height, width, filters, padding
    (2, 3, 6, 6, 16, 1),
    (2, 1, 5, 8, 3, 3),  # padding 3 of one-channel images, an odd side
    (1, 2, 7, 9, 5, 0),
    (3, 5, 4, 3, 4, 1),
    (1, 1, 1, 2, 2, 2),  # a window or two, of padding for the most part
]


def block(padding: int, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    y = F.conv2d(x, weight, padding=padding)
    return F.avg_pool2d(F.relu(F.group_norm(y, y.shape[1], gamma, beta, EPS)), 2)


def block_arguments(case: tuple[int, ...]) -> dict[str, Any]:
    batch, channels, height, width, filters, padding = case
    sides = [(side + 2 * padding - 2) // 2 for side in (height, width)]
    return {
        "x": draw(batch, channels, height, width) + 2,
        "weights": [draw(filters, channels, 3, 3) for _ in range(2)],
        "affine": [Affine(draw(filters), draw(filters)) for _ in range(2)],
        "bars": [draw(batch, filters, *sides, layout=torch.channels_last) for _ in range(2)],
        "padding": padding,
    }


def block_results(given: dict[str, Any]) -> dict[str, Tensor]:
    """Return the results of the five operations, by name."""
    (weight, weight_dot), (affine, affine_dot) = given["weights"], given["affine"]
    patches = kernels.image_patches(given["x"], given["padding"])
    p, folded = kernels.conv_norm_relu_pool(patches, weight, affine, EPS)
    back = kernels.conv_norm_relu_pool_backward(patches, weight, affine, given["bars"][0], folded, EPS)
    along = (patches, weight, weight_dot, affine, affine_dot)
    dual_p, p_dot, folded = kernels.conv_norm_relu_pool_dual(*along, EPS)
    dual_back = kernels.conv_norm_relu_pool_dual_backward(*along, *given["bars"], folded, EPS)
    back, dual_back = (added_up("conv_norm_relu_pool_backward", each) for each in (back, dual_back))
    names = ["p", "weight_bar", "gamma_bar", "beta_bar", "dual p", "p_dot"]
    names += ["x_bar_dot", "weight_bar_dot", "gamma_bar_dot", "beta_bar_dot"]
    return dict(zip(names, (p, *back, dual_p, p_dot, *dual_back), strict=True))


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_the_block_is_what_autograd_makes_of_it(case: tuple[int, ...], layout: torch.memory_format) -> None:
    given = block_arguments(case)
    actual = block_results(given | {"x": given["x"].contiguous(memory_format=layout)})

    def whole(*at: Tensor) -> Tensor:
        return block(given["padding"], *at)

    def gradients(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, p_bar: Tensor) -> Any:
        return torch.func.vjp(whole, x, weight, gamma, beta)[1](p_bar)

    at = (given["x"], given["weights"][0], *given["affine"][0])
    along = (torch.zeros_like(given["x"]), given["weights"][1], *given["affine"][1])
    p, p_dot = jvp(whole, at, along)
    bars, bars_dot = jvp(gradients, (*at, given["bars"][0]), (*along, given["bars"][1]))
    names = ("weight_bar", "gamma_bar", "beta_bar")
    expected = {"p": p, "dual p": p, "p_dot": p_dot, "x_bar_dot": bars_dot[0]}
    expected |= dict(zip(names, bars[1:], strict=True))
    expected |= {f"{name}_dot": value for name, value in zip(names, bars_dot[1:], strict=True)}
    assert expected.keys() == actual.keys()
    for name, value in actual.items():
        assert value.shape == expected[name].shape, name
        assert_close(name, value, expected[name], 1e-10, floor=1e-4)
    assert actual["p"].is_contiguous(memory_format=torch.channels_last)
    assert actual["x_bar_dot"].is_contiguous()


def test_a_shift_of_the_images_makes_no_difference() -> None:
    given = block_arguments(BLOCKS[2])
    moved = block_results(given | {"x": given["x"] + 1000})  # padding 0, so that all of the image moves
    for name, value in block_results(given).items():
        assert_close(name, moved[name], value, 1e-9, floor=1e-4)


@pytest.mark.parametrize("precision", get_args(Precision))
def test_patches_have_the_precision_of_the_planes(precision: Any) -> None:
    given = block_arguments(BLOCKS[0])
    patches = kernels.image_patches(given["x"].float(), 1, precision)
    assert patches.images.dtype == HALF_PRECISIONS.get(precision, torch.float32)
    assert patches.gram.dtype == torch.float32
    assert kernels.image_patches(given["x"], 1, precision).images.dtype == torch.float64  # at any precision
    weights = [weight.float() for weight in given["weights"]]
    affine = [Affine(each.gamma.float(), each.beta.float()) for each in given["affine"]]
    p, p_dot, folded = kernels.conv_norm_relu_pool_dual(patches, *weights, *affine, EPS, precision)
    expected = block_results(given)
    for name, value in (("p", p), ("p_dot", p_dot)):
        assert value.dtype == patches.images.dtype
        allowed = {"fp32": 1e-5, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}[precision]
        assert_close(name, value.double(), expected[name], allowed, floor=0.1)
    bars = [each.to(p.dtype) for each in given["bars"]]
    for value in kernels.conv_norm_relu_pool_dual_backward(patches, *weights, *affine, *bars, folded, EPS, precision):
        assert value.dtype == torch.float32


def test_patches_of_a_batch_are_those_of_its_augmented_rows() -> None:
    """Gather with an index that comes again."""
    rows, index = draw(5, 3, 6, 7), torch.tensor([4, 1, 4])
    parameters = draw_warp_parameters((3, 3, 6, 7))
    for given, expected in (
        ((index,), rows[index]),
        ((index, parameters), kernels.colour_warp_mask(rows[index], parameters)),
        ((None, parameters), kernels.colour_warp_mask(rows[:3], parameters)),
    ):
        images = rows if given[0] is not None else rows[:3]
        fused, plain = kernels.image_patches(images, 1, "fp32", *given), kernels.image_patches(expected, 1)
        assert_close("images", fused.images, plain.images, 1e-14)
        assert_close("gram", fused.gram, plain.gram, 1e-14)


def test_divisors_are_taken_out_of_the_gradient_of_the_images_alone() -> None:
    given = block_arguments(BLOCKS[0])
    patches = kernels.image_patches(given["x"], given["padding"])
    arguments = (patches, *given["weights"], *given["affine"], *given["bars"], None, EPS)
    whole = kernels.conv_norm_relu_pool_dual_backward(*arguments)
    four, eighth = torch.tensor(4.0, dtype=torch.float64), torch.tensor(0.125, dtype=torch.float64)
    for divisors, factor in (((four,), 0.25), ((four, eighth), 2.0)):
        x_bar_dot, *parameters = kernels.conv_norm_relu_pool_dual_backward(*arguments, divisors=divisors)
        assert torch.equal(x_bar_dot, factor * whole[0])
        assert all(torch.equal(divided, undivided) for divided, undivided in zip(parameters, whole[1:], strict=True))


def test_which_blocks_have_kernels() -> None:
    assert triton.has_image_block(3, 128)
    assert triton.has_image_block(1, 48)
    assert triton.has_image_block(2, None)
    assert not triton.has_image_block(3, 100)  # no multiple of 16
    assert not triton.has_image_block(4, 128)
    layer = ConvLayer(3, 32, 32, 128, 1)
    assert kernels.has_image_block(layer, torch.device("cuda"))
    assert not kernels.has_image_block(layer._replace(filters=17), torch.device("cuda"))
    assert not kernels.has_image_block(layer, torch.device("cpu"))
    assert not native.OPERATIONS & {"image_patches", "conv_norm_relu_pool"}


def test_candidates_are_whole_rows() -> None:
    """Check that each candidate has all sizes: one that lacks a size fails, and the tuner would leave it out."""
    from mtt_fast.kernels.triton.configurations import NOT_KERNEL_ARGUMENTS, table

    for operation, candidates in CANDIDATES.items():
        known = [row for rows in table()[operation].values() for row in rows.values()]
        for candidate in candidates:
            assert all(candidate.keys() == row.keys() - NOT_KERNEL_ARGUMENTS for row in known), (operation, candidate)


@needs_triton
def test_patches_and_pooled_planes_beyond_the_kernels_offsets_are_refused() -> None:
    """Check patches of 2³¹ numbers a sample, and planes of patches that have fewer: a kernel would write elsewhere."""
    from mtt_fast.kernels.triton import block

    side, filters = 4096, 512
    weight, affine = meta(filters, 3, 3, 3), Affine(meta(filters), meta(filters))
    with recording([block], "sm_90") as launches:
        patches = block.image_patches(meta(1, 3, side, side), 1, "fp16")
        with pytest.raises(ValueError, match=r"less than 2³¹ elements a sample, found shape \(1, 512, 2048, 2048\)"):
            block.conv_norm_relu_pool(patches, weight, affine, EPS, "fp16")
        with pytest.raises(ValueError, match="less than 2³¹ numbers in a sample's patches"):
            block.image_patches(meta(1, 3, 8190, 8190), 1, "fp16")  # 32 numbers for each of 8192² pixels
    assert [launch.kernel.fn.__name__ for launch in launches] == ["gather"]


IMAGES, WEIGHT = torch.zeros(2, 3, 6, 5), torch.zeros(16, 3, 3, 3)
AFFINE = Affine(torch.zeros(16), torch.zeros(16))
PATCHES = kernels.image_patches(IMAGES, 1)
POOLED = torch.zeros(2, 16, 3, 2).contiguous(memory_format=torch.channels_last)
INDEX, ZEROS, LAST = torch.tensor([1, 0, 1]), torch.zeros(3, 13), IMAGES.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("operation", "arguments", "reason"),
    [
        refused("image_patches", "at least 4×4 pixels", IMAGES[:, :, :1], 1),
        refused("image_patches", "at least 4×4 pixels", IMAGES[0], 1),
        refused("image_patches", "padding -1", IMAGES.repeat(1, 1, 2, 2), -1),
        refused("image_patches", "float32 or float64", IMAGES.bfloat16(), 1),
        refused("image_patches", "strides", IMAGES[:, :, :, ::2], 3),
        refused("image_patches", "indices 0 … 1, found 1 … 2", IMAGES, 1, "fp32", INDEX + 1),
        refused("image_patches", "at least one index", IMAGES, 1, "fp32", INDEX[:0]),
        refused("image_patches", "int64 indices", IMAGES, 1, "fp32", INDEX.int()),
        refused("image_patches", "int64 indices", IMAGES, 1, "fp32", INDEX[None]),
        refused("image_patches", "parameters of shape", IMAGES, 1, "fp32", None, ZEROS),
        refused("image_patches", "floating dtype torch.float32", IMAGES, 1, "fp32", INDEX, ZEROS.double()),
        refused("image_patches", "x contiguous", LAST, 1, "fp32", INDEX, ZEROS),
        refused("conv_norm_relu_pool", "3×3 weights of 3 channels", PATCHES, WEIGHT[:, :2], AFFINE, EPS),
        refused("conv_norm_relu_pool", "floating dtype", PATCHES, WEIGHT.double(), AFFINE, EPS),
        refused("conv_norm_relu_pool", "gamma of shape", PATCHES, WEIGHT, Affine(WEIGHT[:3, 0, 0, 0], AFFINE.beta), EPS),
        refused("conv_norm_relu_pool_backward", "p_bar of shape", PATCHES, WEIGHT, AFFINE, POOLED[:1], None, EPS),
        refused("conv_norm_relu_pool_backward", "strides", PATCHES, WEIGHT, AFFINE, POOLED.contiguous(), None, EPS),
        refused(
            "conv_norm_relu_pool_backward", "a part of p_bar of floating dtype torch.float32",
            PATCHES, WEIGHT, AFFINE, kernels.PartialPlanes(POOLED[None].half(), POOLED), None, EPS,
        ),
        refused("conv_norm_relu_pool_dual", "weight_dot of shape", PATCHES, WEIGHT, WEIGHT[:4], AFFINE, AFFINE, EPS),
        refused(
            "conv_norm_relu_pool_dual_backward", "requires grad",
            PATCHES, WEIGHT, WEIGHT, AFFINE, AFFINE, POOLED, POOLED.clone().requires_grad_(), None, EPS,
        ),
        refused(
            "conv_norm_relu_pool_dual_backward", "divisor 1 of floating dtype torch.float32",
            PATCHES, WEIGHT, WEIGHT, AFFINE, AFFINE, POOLED, POOLED, EPS, "fp32", None, (torch.ones((), dtype=torch.long),),
        ),
        refused(
            "conv_norm_relu_pool_dual_backward", "at most two divisors",
            PATCHES, WEIGHT, WEIGHT, AFFINE, AFFINE, POOLED, POOLED, EPS, "fp32", None, (torch.ones(()),) * 3,
        ),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(operation: str, arguments: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{operation}: .*{reason}"):
        getattr(kernels, operation)(*arguments)


@pytest.mark.slow
def test_triton_equals_the_reference_interpreted() -> None:
    lines = compare("block", "cpu")
    for case in (
        "image_patches",
        "image_patches of a batch",
        "'conv_norm_relu_pool_dual_backward'",
        "'tf32'",
        "'fp16'",
        "'bf16'",
    ):
        assert any(case in line for line in lines)


@pytest.mark.slow
def test_statistics_keep_their_bound_interpreted() -> None:
    """Take edge filters on smooth images, images of low contrast, and constant images."""
    lines = compare("statistics", "cpu")
    for case in ("smooth", "far from zero", "low contrast", "constant", "black"):
        assert any(case in line for line in lines)


@pytest.mark.gpu
@each_part("block")
def test_triton_equals_the_reference_on_a_gpu(part: int) -> None:
    compare("block", "cuda", part)


@pytest.mark.gpu
def test_statistics_keep_their_bound_on_a_gpu() -> None:
    compare("statistics", "cuda")


@pytest.mark.slow
@each_architecture
@each_precision
def test_triton_compiles(architecture: str, precision: Any, tmp_path: Path) -> None:
    """Compile for a block of 128×128 images, and for MNIST's."""
    from mtt_fast.kernels.triton import block

    affine, index = Affine(meta(WIDTH), meta(WIDTH)), torch.zeros(6, dtype=torch.long, device="meta")
    with recording([block], architecture) as launches:
        for channels, side, padding in ((3, 128, 1), (1, 28, 3)):
            weight, options = meta(WIDTH, channels, 3, 3), (EPS, precision)
            patches = block.image_patches(meta(4, channels, side, side), padding, precision)
            block.image_patches(meta(4, channels, side, side), padding, precision, index, meta(6, 13))
            p, folded = block.conv_norm_relu_pool(patches, weight, affine, *options)
            block.conv_norm_relu_pool_backward(patches, weight, affine, p, folded, *options)
            along = (patches, weight, weight, affine, affine)
            p, p_dot, folded = block.conv_norm_relu_pool_dual(*along, *options)
            divisors = (meta(), meta()) if precision == "fp16" else ()
            block.conv_norm_relu_pool_dual_backward(*along, p, p_dot, folded, *options, divisors)
    kernels_of_a_block = ["gather", "gather", "pool", "sum_patches", "finish"]
    kernels_of_a_block += ["pool", "sum_patches", "finish", "spread", "col2im"]
    assert [launch.kernel.fn.__name__ for launch in launches] == 2 * kernels_of_a_block
    for launch, usage in zip(launches, check(launches, architecture, tmp_path), strict=True):
        multiplies = launch.kernel.fn.__name__ in ("gather", "pool", "sum_patches", "finish", "spread")
        assert usage.tensor_cores == (multiplies and precision != "fp32"), usage


@pytest.mark.slow
@each_architecture
@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_kernels_that_add_parts_up_compile(architecture: str, precision: Any, tmp_path: Path) -> None:
    """Compile for ten 32×32 images and ten of MNIST's, with p̄ in as many parts as the table of an H100 makes, and more."""
    from mtt_fast.kernels.triton import block, partial_planes

    affine, options = Affine(meta(WIDTH), meta(WIDTH)), (EPS, precision)
    with recording([block, partial_planes], architecture) as launches:
        for channels, side, padding in ((3, 32, 1), (1, 28, 3)):
            weight, patches = (
                meta(WIDTH, channels, 3, 3),
                block.image_patches(meta(10, channels, side, side), padding, precision),
            )
            p, folded = block.conv_norm_relu_pool(patches, weight, affine, *options)
            along = (patches, weight, weight, affine, affine)
            *_, folded_dual = block.conv_norm_relu_pool_dual(*along, *options)
            for count in (3, 9):
                block.conv_norm_relu_pool_backward(patches, weight, affine, in_parts(p, count), folded, *options)
                for bar in (p, in_parts(p, count)):
                    bars = (bar, in_parts(p, 2 * count))
                    block.conv_norm_relu_pool_dual_backward(*along, *bars, folded_dual, *options)
    sums = [launch for launch in launches if launch.kernel.fn.__name__ == "sum_patches"]
    assert len(sums) == 2 * 2 * 3
    assert not any("_add_planes" in launch.kernel.fn.__name__ for launch in launches)
    assert all(usage.tensor_cores for usage in check(sums, architecture, tmp_path))
