"""Check bias, ReLU and pool: the reference against autograd in float64, the other back ends against the reference."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast import kernels
from mtt_fast.kernels import reference
from mtt_fast.testing import added_up, assert_close
from tests.kernels.compiling import WIDTH, check, each_architecture, meta, recording
from tests.kernels.helpers import FORMATS, PLANES, assert_same_by_any_threads, jvp, plane_arguments, refused
from tests.kernels.triton_comparison import compare, each_part


def bias_results(ops: Any, given: dict[str, Any], **options: bool) -> dict[str, Tensor]:
    """Return the results of the four operations without a norm, by name."""
    y, beta, bars = given["y"], given["beta"], (given["p_bar"], given["p_bar_dot"])
    p = ops.bias_relu_pool(y, beta)
    p_and_dot = ops.bias_relu_pool_dual(y, given["y_dot"], beta, given["beta_dot"])
    back = ops.bias_relu_pool_backward(y.clone(), beta, bars[0], **options)
    dual_back = ops.bias_relu_pool_dual_backward(y.clone(), beta, *bars, **options)
    back, dual_back = (added_up("bias_relu_pool_backward", each) for each in (back, dual_back))
    names = ["p", "dual p", "p_dot", "y_bar", "beta_bar", "dual y_bar", "y_bar_dot", "beta_bar_dot"]
    return dict(zip(names, (p, *p_and_dot, *back, *dual_back), strict=True))


def block_without_norm(y: Tensor, beta: Tensor) -> Tensor:
    return F.avg_pool2d(F.relu(y + beta[:, None, None]), 2)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("shape", PLANES, ids=str)
def test_bias_relu_pool_is_what_autograd_makes_of_the_block(
    shape: tuple[int, int, int, int], layout: torch.memory_format
) -> None:
    given = plane_arguments(shape, torch.float64, layout)

    def gradients(y: Tensor, beta: Tensor, p_bar: Tensor) -> Any:
        return torch.func.vjp(block_without_norm, y, beta)[1](p_bar)

    at, along = (given["y"], given["beta"]), (given["y_dot"], given["beta_dot"])
    p, p_dot = jvp(block_without_norm, at, along)
    (y_bar, beta_bar), (y_bar_dot, beta_bar_dot) = jvp(gradients, (*at, given["p_bar"]), (*along, given["p_bar_dot"]))
    expected = [p, p, p_dot, y_bar, beta_bar, y_bar, y_bar_dot, beta_bar_dot]
    for (name, actual), by_autograd in zip(bias_results(kernels, given).items(), expected, strict=True):
        assert_close(name, actual, by_autograd, 1e-12)
        assert actual.dim() == 1 or actual.is_contiguous(memory_format=layout)


def test_the_derivatives_of_bias_relu_pool_are_numerical_ones() -> None:
    given = plane_arguments((2, 3, 5, 4), torch.float64, torch.contiguous_format)
    step = 1e-6
    ends = []
    for sign in (step, -step):
        y, beta, p_bar = (given[name] + sign * given[f"{name}_dot"] for name in ("y", "beta", "p_bar"))
        back = added_up("bias_relu_pool_backward", reference.bias_relu_pool_backward(y, beta, p_bar))
        ends.append((reference.bias_relu_pool(y, beta), *back))
    actual = bias_results(reference, given)
    for name, after, before in zip(("p_dot", "y_bar_dot", "beta_bar_dot"), *ends, strict=True):
        assert_close(name, actual[name], (after - before) / (2 * step), 1e-7)


@pytest.mark.native
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", PLANES, ids=str)
def test_native_is_the_reference(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: torch.memory_format, reuse: bool
) -> None:
    given = plane_arguments(shape, dtype, layout)
    expected = bias_results(reference, {name: value.double() for name, value in given.items()})
    for name, actual in bias_results(kernels, given, reuse=reuse).items():
        assert actual.dtype == dtype
        assert_close(name, actual, expected[name], 2e-5 if dtype == torch.float32 else 1e-12, floor=1e-2)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_the_relu_passes_nothing_at_zero(layout: torch.memory_format) -> None:
    given = plane_arguments((2, 20, 4, 4), torch.float64, layout)
    given["beta"] = torch.arange(20, dtype=torch.float64) - 10
    given["y"] = (0 * given["y"] - given["beta"][:, None, None]).contiguous(memory_format=layout)
    for name, value in bias_results(kernels, given).items():
        assert torch.count_nonzero(value) == 0, name


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_the_relu_keeps_what_is_not_a_number(layout: torch.memory_format) -> None:
    """Zeros in its place would let a network that diverged compute on as if nothing had happened."""
    given = plane_arguments((2, 20, 4, 4), torch.float32, layout)
    given["y"][1, 17] = given["y_dot"][1, 17] = float("nan")
    results = bias_results(kernels, given)
    for name in ("p", "dual p", "p_dot"):
        lost = results[name].isnan().all((2, 3))
        assert lost.nonzero().tolist() == [[1, 17]], name
        assert results[name][~lost].isfinite().all(), name


@pytest.mark.usefixtures("either_backend")
def test_the_relu_of_minus_infinity_is_zero() -> None:
    assert torch.count_nonzero(kernels.bias_relu_pool(torch.full((1, 2, 4, 4), -torch.inf), torch.zeros(2))) == 0


@pytest.mark.native
@pytest.mark.parametrize("dual", [False, True])
def test_the_gradient_takes_the_memory_of_what_it_may_reuse(dual: bool) -> None:
    given = plane_arguments((2, 20, 4, 5), torch.float32, torch.channels_last)
    y, beta, bars = given["y"], given["beta"], (given["p_bar"], given["p_bar_dot"])
    operation: Any = kernels.bias_relu_pool_dual_backward if dual else kernels.bias_relu_pool_backward
    arguments = (beta, *bars) if dual else (beta, bars[0])
    kept = operation(y, *arguments)
    version = y._version
    reused = operation(y, *arguments, reuse=True)
    assert reused[0].data_ptr() == y.data_ptr() != kept[0].data_ptr()
    assert y._version > version  # autograd must see that y is no longer what it was
    assert all(torch.equal(a, b) for a, b in zip(kept, reused, strict=True))


@pytest.mark.native
def test_native_results_do_not_depend_on_threads() -> None:
    given = plane_arguments((9, 70, 8, 9), torch.float32, torch.channels_last)
    assert_same_by_any_threads(lambda: bias_results(kernels, given).values())


ZEROS, CHANNEL = torch.zeros(2, 4, 6, 6), torch.zeros(4)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize(
    ("op", "arguments", "reason"),
    [
        refused("bias_relu_pool", "strides", ZEROS[:, :, ::2], CHANNEL),
        refused("bias_relu_pool", "beta of shape", ZEROS, torch.zeros(2, 4)),
        refused("bias_relu_pool", "at least 2×2", ZEROS[:, :, :, :1].contiguous(), CHANNEL),
        refused("bias_relu_pool", "requires grad", ZEROS.clone().requires_grad_(), CHANNEL),
        refused("bias_relu_pool_backward", "p_bar of shape", ZEROS, CHANNEL, ZEROS),
        refused("bias_relu_pool_dual", "y_dot of shape", ZEROS, ZEROS[:1], CHANNEL, CHANNEL),
        refused("bias_relu_pool_dual", "beta_dot of floating dtype", ZEROS, ZEROS, CHANNEL, CHANNEL.double()),
        refused(
            "bias_relu_pool_dual_backward",
            "p_bar_dot channels_last",
            *(ZEROS.contiguous(memory_format=torch.channels_last), CHANNEL),
            *(ZEROS[:, :, :3, :3].contiguous(memory_format=torch.channels_last), ZEROS[:, :, :3, :3].contiguous()),
        ),
    ],
)
def test_refuses(op: str, arguments: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{op}: .*{reason}"):
        getattr(kernels, op)(*arguments)


@pytest.mark.slow
def test_triton_equals_the_reference_interpreted() -> None:
    assert any("refused: expected contiguous or channels_last" in line for line in compare("bias", "cpu"))


@pytest.mark.gpu
@each_part("bias")
def test_triton_equals_the_reference_on_a_gpu(part: int) -> None:
    compare("bias", "cuda", part)


@pytest.mark.slow
@each_architecture
def test_triton_compiles(architecture: str, tmp_path: Path) -> None:
    """Compile for the smallest and the largest of those planes; the table's rows for the others are these too."""
    from mtt_fast.kernels.triton import bias, channels_last_planes

    beta = meta(WIDTH)
    with recording([channels_last_planes], architecture) as launches:
        for side, dtype in itertools.product((8, 128), (torch.float32, torch.bfloat16)):
            y, p_bar = (meta(4, WIDTH, size, size, form=torch.channels_last).to(dtype) for size in (side, side // 2))
            bias.bias_relu_pool(y, beta)
            bias.bias_relu_pool_backward(y, beta, p_bar)
            bias.bias_relu_pool_dual(y, y, beta, beta)
            bias.bias_relu_pool_dual_backward(y, beta, p_bar, p_bar)
    assert len(launches) == 2 * 2 * 4
    for launch, usage in zip(launches, check(launches, architecture, tmp_path), strict=True):
        if usage.kernel == "_forward":
            # Threads exchange nothing but, before they walk, a line of channels.
            assert usage.shared <= 4 * launch.constants["BLOCK_C"], usage
