"""Check whole blocks: the operations against their parts, and the other back ends against the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast import kernels
from mtt_fast.kernels import Activations, Affine, reference
from mtt_fast.testing import assert_close
from tests.kernels.compiling import WIDTH, check, check_products, each_architecture, meta, planes_of, recording
from tests.kernels.helpers import CONVOLUTIONS, EPS, convolution_arguments, draw
from tests.kernels.triton_comparison import compare

BLOCKS = [case for case in CONVOLUTIONS if min(case[2:4]) + 2 * case[5] - 2 >= 2]


def block_arguments(case: tuple[int, ...], dtype: torch.dtype, images: bool) -> dict[str, Any]:
    given = convolution_arguments(case, dtype if dtype != torch.bfloat16 else torch.float32)
    batch, _, height, width, filters, padding = case
    sides = [(side + 2 * padding - 2) // 2 for side in (height, width)]
    wide = torch.float32 if dtype == torch.bfloat16 else dtype

    def planes(tensor: Tensor) -> Tensor:
        return tensor.to(dtype, memory_format=torch.channels_last)

    return {
        "x": planes(given["x"]),
        "x_dot": None if images else planes(given["x_dot"]),
        "weights": [given["weight"], given["weight_dot"]],
        "affine": [Affine(draw(filters, dtype=wide), draw(filters, dtype=wide)) for _ in range(2)],
        "bars": [planes(draw(batch, filters, *sides, dtype=wide)) for _ in range(2)],
        "padding": padding,
    }


def block_results(ops: Any, given: dict[str, Any], precision: Any = "fp32", known: bool = False) -> dict[str, Tensor]:
    x, x_dot, weights, affine, bars, padding = given.values()
    parameters = (*weights, *affine)
    y = ops.conv3x3(x, weights[0], padding, precision) if known else None
    p, p_dot, activations = ops.conv_norm_relu_pool_dual(x, x_dot, *parameters, padding, EPS, precision, y)
    stats = activations.stats
    forward = {"p": p, "p_dot": p_dot, "y_dot": activations.y_dot.clone(), "mean": stats.mean, "k2": stats.k2}
    back = ops.conv_norm_relu_pool_dual_backward(activations, *parameters, *bars, padding, precision, x_dot is not None)
    names = ("x_bar", "x_bar_dot", "weight_bar_dot", "gamma_bar_dot", "beta_bar_dot")
    return forward | {name: value for name, value in zip(names, back, strict=True) if value is not None}


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_a_whole_block_is_its_parts(case: tuple[int, ...], images: bool, known: bool) -> None:
    given = block_arguments(case, torch.float64, images)
    expected = block_results(reference, given)
    for name, found in block_results(kernels, given, known=known).items():
        assert_close(name, found, expected[name], 1e-11, floor=1e-4)
    assert ("x_bar" in expected) != images


@pytest.mark.usefixtures("either_backend")
def test_the_backward_takes_the_activations() -> None:
    given = block_arguments(BLOCKS[0], torch.float64, False)
    x, x_dot, weights, affine, bars, padding = given.values()
    parameters = (*weights, *affine)
    activations = kernels.conv_norm_relu_pool_dual(x, x_dot, *parameters, padding, EPS)[2]
    kernels.conv_norm_relu_pool_dual_backward(activations, *parameters, *bars, padding)
    assert activations.is_empty
    with pytest.raises(ValueError, match=r"^conv_norm_relu_pool_dual_backward: .*used twice"):
        kernels.conv_norm_relu_pool_dual_backward(activations, *parameters, *bars, padding)


def test_activations_of_a_block_without_a_norm_are_refused() -> None:
    given = block_arguments(BLOCKS[0], torch.float64, False)
    x, x_dot, weights, affine, bars, padding = given.values()
    activations = Activations(x, x_dot, kernels.conv3x3(x, weights[0], padding))
    with pytest.raises(ValueError, match=r"^conv_norm_relu_pool_dual_backward: .*without a norm"):
        kernels.conv_norm_relu_pool_dual_backward(activations, *weights, *affine, *bars, padding)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_bfloat16_planes_have_float32_sums(case: tuple[int, ...], images: bool) -> None:
    given = block_arguments(case, torch.bfloat16, images)
    exact = {
        **{name: given[name] for name in ("x_dot", "padding")},
        "x": given["x"].double(),
        **{name: [each.double() for each in given[name]] for name in ("weights", "bars")},
        "affine": [Affine(each.gamma.double(), each.beta.double()) for each in given["affine"]],
    }
    if not images:
        exact["x_dot"] = given["x_dot"].double()
    exact = {name: exact[name] for name in given}  # in the order of the arguments
    expected = block_results(reference, exact)
    for name, found in block_results(kernels, given, "bf16").items():
        assert found.dtype == (torch.bfloat16 if found.dim() == 4 and found.shape[2:] != (3, 3) else torch.float32), (
            name
        )
        assert_close(name, found.double(), expected[name], 0.3, floor=0.3)


@pytest.mark.slow
def test_triton_equals_the_reference_interpreted() -> None:
    lines = compare("block", "cpu")
    for case in ("features", "images"):
        assert any("'block'" in line and case in line for line in lines)
        assert any("block's backward" in line and case in line for line in lines)


@pytest.mark.gpu
def test_triton_equals_the_reference_on_a_gpu() -> None:
    compare("block", "cuda")


@pytest.mark.slow
@each_architecture
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_triton_compiles(architecture: str, precision: Any, tmp_path: Path) -> None:
    """The first block of 128×128 images and the last of 32×32 ones, forward and back."""
    from mtt_fast.kernels.triton import block, implicit_gemm, windows

    with recording([implicit_gemm], architecture) as launches, recording([block, windows], architecture) as others:
        for channels, side in ((3, 128), (WIDTH, 8)):
            x, y = planes_of(precision, 4, channels, side, side), planes_of(precision, 4, WIDTH, side, side)
            x_dot, p_bar = x if channels > 3 else None, planes_of(precision, 4, WIDTH, side // 2, side // 2)
            weight, affine = meta(WIDTH, channels, 3, 3), Affine(meta(WIDTH), meta(WIDTH))
            arguments = (x, x_dot, weight, weight, affine, affine, 1, 1e-5, precision)
            _, _, activations = block.conv_norm_relu_pool_dual(*arguments)
            block.conv_norm_relu_pool_dual(*arguments, y=y)
            options = (weight, weight, affine, affine, p_bar, p_bar, 1, precision, channels > 3)
            block.conv_norm_relu_pool_dual_backward(activations, *options)
    assert len(launches) == 2 * 4
    assert len(others) == 2 * 5
    check_products(launches, architecture, tmp_path, precision)
    check(others, architecture, tmp_path)
