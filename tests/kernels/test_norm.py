"""Check norm, ReLU and pool: the reference against autograd in float64, the other back ends against the reference."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast import kernels
from mtt_fast.kernels import Affine, PartialPlanes, PlaneStats, reference
from mtt_fast.kernels.types import accumulator
from mtt_fast.testing import added_up, assert_close
from tests.kernels.compiling import WIDTH, check, each_architecture, in_parts, meta, recording
from tests.kernels.helpers import EPS, FORMATS, PLANES, assert_same_by_any_threads, jvp, plane_arguments, refused
from tests.kernels.triton_comparison import compare, each_part


def plane_results(ops: Any, given: dict[str, Any], **options: bool) -> dict[str, Tensor]:
    """Return the results of the four operations with a norm, by name."""
    y, y_dot, bars = given["y"], given["y_dot"], (given["p_bar"], given["p_bar_dot"])
    affine, affine_dot = Affine(given["gamma"], given["beta"]), Affine(given["gamma_dot"], given["beta_dot"])
    primal = ops.norm_relu_pool(y, affine, EPS)
    p, p_dot, stats = ops.norm_relu_pool_dual(y, y_dot, affine, affine_dot, EPS)
    # `reuse` destroys what it is given
    back = ops.norm_relu_pool_backward(y.clone(), *primal[1:], affine, bars[0], **options)
    dual_back = ops.norm_relu_pool_dual_backward(y.clone(), y_dot.clone(), stats, affine, affine_dot, *bars, **options)
    back, dual_back = (added_up("norm_relu_pool_backward", each) for each in (back, dual_back))
    names = ["p", "mean", "rstd", "dual p", "p_dot", "dual mean", "dual rstd", "k1", "k2"]
    names += ["y_bar", "gamma_bar", "beta_bar", "dual y_bar", "y_bar_dot", "gamma_bar_dot", "beta_bar_dot"]
    return dict(zip(names, (*primal, p, p_dot, *stats, *back, *dual_back), strict=True))


def block(y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.avg_pool2d(F.relu(F.group_norm(y, y.shape[1], gamma, beta, EPS)), 2)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("shape", PLANES, ids=str)
def test_planes_are_what_autograd_makes_of_the_block(
    shape: tuple[int, int, int, int], layout: torch.memory_format
) -> None:
    given = plane_arguments(shape, torch.float64, layout)
    actual = plane_results(kernels, given)

    def gradients(y: Tensor, gamma: Tensor, beta: Tensor, p_bar: Tensor) -> Any:
        return torch.func.vjp(block, y, gamma, beta)[1](p_bar)

    at = (given["y"].contiguous(), given["gamma"], given["beta"])  # torch's group norm takes no other under jvp
    along = (given["y_dot"].contiguous(), given["gamma_dot"], given["beta_dot"])
    p, p_dot = jvp(block, at, along)
    bars, bars_dot = jvp(gradients, (*at, given["p_bar"]), (*along, given["p_bar_dot"]))
    expected = {"p": p, "dual p": p, "p_dot": p_dot, "y_bar": bars[0], "dual y_bar": bars[0], "gamma_bar": bars[1]}
    expected |= {
        "beta_bar": bars[2],
        "y_bar_dot": bars_dot[0],
        "gamma_bar_dot": bars_dot[1],
        "beta_bar_dot": bars_dot[2],
    }
    for name, value in expected.items():
        assert_close(name, actual[name], value, 1e-10, floor=1e-3)  # where the ReLU lets a pool through whole: a true 0
    for name in ("p", "p_dot", "y_bar", "y_bar_dot"):
        assert actual[name].is_contiguous(memory_format=layout)


def test_the_planes_derivatives_are_numerical_ones() -> None:
    given = plane_arguments((2, 3, 5, 4), torch.float64, torch.contiguous_format)
    step = 1e-6
    ends = []
    for sign in (step, -step):
        y, gamma, beta, p_bar = (given[name] + sign * given[f"{name}_dot"] for name in ("y", "gamma", "beta", "p_bar"))
        p, mean, rstd = reference.norm_relu_pool(y, Affine(gamma, beta), EPS)
        back = reference.norm_relu_pool_backward(y, mean, rstd, Affine(gamma, beta), p_bar)
        ends.append((p, *added_up("norm_relu_pool_backward", back)))
    actual = plane_results(reference, given)
    for name, after, before in zip(("p_dot", "y_bar_dot", "gamma_bar_dot", "beta_bar_dot"), *ends, strict=True):
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
    expected = plane_results(reference, {name: value.double() for name, value in given.items()})
    for name, actual in plane_results(kernels, given, reuse=reuse).items():
        assert actual.dtype == dtype
        assert_close(name, actual, expected[name], 2e-5 if dtype == torch.float32 else 1e-12, floor=1e-2)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_the_relu_keeps_what_is_not_a_number(layout: torch.memory_format) -> None:
    """Zeros in its place would let a network that diverged compute on as if nothing had happened."""
    given = plane_arguments((2, 20, 4, 4), torch.float32, layout)
    given["y"][1, 17] = given["y_dot"][1, 17] = float("nan")
    results = plane_results(kernels, given)
    for name in ("p", "dual p", "p_dot"):
        lost = results[name].isnan().all((2, 3))
        assert lost.nonzero().tolist() == [[1, 17]], name
        assert results[name][~lost].isfinite().all(), name


@pytest.mark.native
@pytest.mark.parametrize("dual", [False, True])
def test_gradients_take_the_memory_of_what_they_may_reuse(dual: bool) -> None:
    given = plane_arguments((2, 20, 4, 5), torch.float32, torch.channels_last)
    affine, affine_dot = Affine(given["gamma"], given["beta"]), Affine(given["gamma_dot"], given["beta_dot"])
    bars, planes = (given["p_bar"], given["p_bar_dot"]), (given["y"], given["y_dot"]) if dual else (given["y"],)
    _, _, stats = kernels.norm_relu_pool_dual(given["y"], given["y_dot"], affine, affine_dot, EPS)
    operation: Any = kernels.norm_relu_pool_dual_backward if dual else kernels.norm_relu_pool_backward
    arguments = (stats, affine, affine_dot, *bars) if dual else (stats.mean, stats.rstd, affine, bars[0])
    versions, before = [each._version for each in planes], [each.clone() for each in planes]
    kept = operation(*planes, *arguments)
    assert all(map(torch.equal, planes, before))
    reused = operation(*planes, *arguments, reuse=True)
    for plane, version, new, old in zip(planes, versions, reused, kept, strict=False):
        assert new.data_ptr() == plane.data_ptr() != old.data_ptr()
        assert plane._version > version  # autograd must see that it is no longer what it was
    assert all(map(torch.equal, kept, reused))


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_the_relu_passes_nothing_at_zero(layout: torch.memory_format) -> None:
    given = plane_arguments((2, 20, 4, 4), torch.float64, layout)
    given["gamma"] = torch.zeros(20, dtype=torch.float64)
    given["beta"] = torch.zeros(20, dtype=torch.float64)  # u is 0 everywhere, exactly, though u_dot is not
    for name, value in plane_results(kernels, given).items():
        if name not in ("mean", "rstd", "dual mean", "dual rstd", "k1", "k2"):
            assert torch.count_nonzero(value) == 0, name


@pytest.mark.usefixtures("either_backend")
def test_a_constant_plane_is_finite() -> None:
    given = plane_arguments((2, 20, 4, 5), torch.float32, torch.channels_last)
    given["y"] = torch.full_like(given["y"], 3)
    for name, value in plane_results(kernels, given).items():
        assert torch.isfinite(value).all(), name


@pytest.mark.native
def test_native_results_do_not_depend_on_threads() -> None:
    given = plane_arguments((9, 70, 8, 9), torch.float32, torch.channels_last)
    assert_same_by_any_threads(lambda: plane_results(kernels, given).values())


ZEROS, CHANNEL, STATISTIC = torch.zeros(2, 4, 6, 6), torch.zeros(4), torch.zeros(2, 4)
LAST, AFFINE = ZEROS.contiguous(memory_format=torch.channels_last), Affine(CHANNEL, CHANNEL)
POOLED, STATS = torch.zeros(2, 4, 3, 3), PlaneStats(*[STATISTIC] * 4)
PARTS = PartialPlanes(ZEROS[None], LAST[:, :, :3, :3].contiguous(memory_format=torch.channels_last))  # of another size


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize(
    ("op", "arguments", "reason"),
    [
        refused("norm_relu_pool", "strides", ZEROS[:, :, ::2], AFFINE, EPS),
        refused("norm_relu_pool", "beta of shape", ZEROS, Affine(CHANNEL, torch.zeros(3)), EPS),
        refused("norm_relu_pool", "at least 2×2", ZEROS[:, :, :1].contiguous(), AFFINE, EPS),
        refused("norm_relu_pool", "expected y", ZEROS[:0], AFFINE, EPS),
        refused("norm_relu_pool", "float64", ZEROS, Affine(CHANNEL.double(), CHANNEL), EPS),
        refused("norm_relu_pool", "int64", ZEROS.long(), Affine(CHANNEL.long(), CHANNEL.long()), EPS),
        refused("norm_relu_pool", "one device", ZEROS, Affine(CHANNEL.to("meta"), CHANNEL), EPS),
        refused("norm_relu_pool", "requires grad", ZEROS, Affine(CHANNEL.clone().requires_grad_(), CHANNEL), EPS),
        refused("norm_relu_pool_backward", "p_bar of shape", ZEROS, STATISTIC, STATISTIC, AFFINE, ZEROS),
        refused("norm_relu_pool_backward", "rstd of shape", ZEROS, STATISTIC, CHANNEL, AFFINE, POOLED),
        refused("norm_relu_pool_backward", "a part of p_bar", LAST, STATISTIC, STATISTIC, AFFINE, PARTS),
        refused("norm_relu_pool_dual", "y_dot channels_last", LAST, ZEROS, AFFINE, AFFINE, EPS),
        refused("norm_relu_pool_dual", "gamma_dot of shape", ZEROS, ZEROS, AFFINE, Affine(STATISTIC, CHANNEL), EPS),
        refused(
            "norm_relu_pool_dual_backward", "y_dot of shape", ZEROS, ZEROS[:1], STATS, AFFINE, AFFINE, POOLED, POOLED
        ),
        refused(
            "norm_relu_pool_dual_backward",
            "beta_dot of shape",
            *(ZEROS, ZEROS, STATS, AFFINE, Affine(CHANNEL, STATISTIC), POOLED, POOLED),
        ),
        refused(
            "norm_relu_pool_dual_backward", "p_bar_dot of shape", ZEROS, ZEROS, STATS, AFFINE, AFFINE, POOLED, ZEROS
        ),
        refused(
            "norm_relu_pool_dual_backward",
            "k2 of shape",
            *(ZEROS, ZEROS, PlaneStats(STATISTIC, STATISTIC, STATISTIC, CHANNEL), AFFINE, AFFINE),
            *(ZEROS[:, :, :3, :3].contiguous(), ZEROS[:, :, :3, :3].contiguous()),
        ),
    ],
)
def test_refuses(op: str, arguments: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{op}: .*{reason}"):
        getattr(kernels, op)(*arguments)


@pytest.mark.slow
def test_triton_equals_the_reference_interpreted() -> None:
    assert any("refused: expected contiguous or channels_last" in line for line in compare("norm", "cpu"))


@pytest.mark.gpu
@each_part("norm")
def test_triton_equals_the_reference_on_a_gpu(part: int) -> None:
    compare("norm", "cuda", part)


@pytest.mark.slow
@each_architecture
def test_triton_compiles(architecture: str, tmp_path: Path) -> None:
    """Compile for the planes of 32×32 images' blocks, and for those of 128×128 images' first block, which go in parts."""
    from mtt_fast.kernels.triton import channels_last_planes, norm

    cases = [*itertools.product((8, 16, 32, 128), (torch.float32, torch.bfloat16))]
    cases += itertools.product((32, 128), [torch.float64])
    with recording([channels_last_planes], architecture) as launches:
        for side, dtype in cases:
            y, p_bar = (meta(4, WIDTH, size, size, form=torch.channels_last).to(dtype) for size in (side, side // 2))
            plane, channel = (meta(*size).to(accumulator(dtype)) for size in ((4, WIDTH), (WIDTH,)))
            affine, stats = Affine(channel, channel), PlaneStats(*[plane] * 4)
            norm.norm_relu_pool(y, affine, 1e-5)
            norm.norm_relu_pool_backward(y, plane, plane, affine, p_bar)
            norm.norm_relu_pool_dual(y, y, affine, affine, 1e-5)
            norm.norm_relu_pool_dual_backward(y, y, stats, affine, affine, p_bar, p_bar)
    in_parts = [launch for launch in launches if "PARTS" in launch.constants]
    assert (len(launches) - len(in_parts), len(in_parts)) == (4 * (6 + 1), 4 * 3 * 3)
    for launch, usage in zip(launches, check(launches, architecture, tmp_path), strict=True):
        if usage.kernel in ("_pool", "_gradients"):
            # Threads exchange nothing but, before they walk, a line of channels.
            assert usage.shared <= 4 * launch.constants["BLOCK_C"], usage


@pytest.mark.slow
@each_architecture
def test_kernels_that_add_parts_up_compile(architecture: str, tmp_path: Path) -> None:
    """Compile for planes of ten 32×32 images, in as many parts as the table of an H100 makes; none are added up before."""
    from mtt_fast.kernels.triton import channels_last_planes, norm, partial_planes

    plane, channel = meta(10, WIDTH), meta(WIDTH)
    affine, stats = Affine(channel, channel), PlaneStats(*[plane] * 4)
    with recording([channels_last_planes, partial_planes], architecture) as launches:
        for side, dtype in itertools.product((16, 8), (torch.float32, torch.float16)):
            y, p_bar = (meta(10, WIDTH, size, size, form=torch.channels_last).to(dtype) for size in (side, side // 2))
            y_parts, y_dot_parts = in_parts(y, 3), in_parts(y, 6)
            bar, bar_dot = in_parts(p_bar, 3), in_parts(p_bar, 6)
            norm.norm_relu_pool(y_parts, affine, 1e-5)
            norm.norm_relu_pool_backward(y, plane, plane, affine, bar)
            norm.norm_relu_pool_dual(y_parts, y_dot_parts, affine, affine, 1e-5)
            norm.norm_relu_pool_dual_backward(y, y, stats, affine, affine, bar, bar_dot)
        norm.norm_relu_pool(in_parts(y, 9), affine, 1e-5)
        norm.norm_relu_pool_backward(y, plane, plane, affine, in_parts(p_bar, 9))
        norm.norm_relu_pool_dual(y, y_dot_parts, affine, affine, 1e-5)
        norm.norm_relu_pool_dual_backward(y, y, stats, affine, affine, p_bar, bar_dot)
    assert {launch.kernel.fn.__name__ for launch in launches} == {"_forward", "_backward"}
    assert all(launch.constants["COUNT"] or launch.constants["COUNT_DOT"] for launch in launches)
    check(launches, architecture, tmp_path)
