"""Hold Triton's ends of a block, with a norm and with a bias, to the reference: two families of triton_comparison.py."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mtt_fast.kernels import Affine
from mtt_fast.testing import added_up
from tests.kernels.comparison import Case, Operation, as_tuple, in_float64

# (B, C, H, W): even sizes, odd sizes, 1×1 after the pool and more channels than a block, odd rows alone, more windows
PLANES = [(2, 3, 4, 4), (2, 5, 7, 5), (2, 33, 2, 2), (3, 4, 3, 8), (1, 2, 18, 20)]
# planes larger than a tile of BLOCK_C × WINDOWS, that go in parts of TILES tiles
PARTS: list[tuple[tuple[int, int, int, int], dict[str, int]]] = [
    ((2, 4, 4, 4), {"BLOCK_C": 4, "WINDOWS": 2, "TILES": 1, "num_warps": 1}),  # nothing to mask
    ((2, 5, 7, 5), {"BLOCK_C": 4, "WINDOWS": 4, "TILES": 2, "num_warps": 1}),  # odd sizes, two blocks of channels
    ((1, 1, 3, 9), {"BLOCK_C": 16, "WINDOWS": 4, "TILES": 1, "num_warps": 1}),  # one channel, a short last part
    ((1, 4, 6, 4), {"BLOCK_C": 4, "WINDOWS": 2, "TILES": 2, "num_warps": 1}),  # even sizes, a last part of one tile
    ((1, 4, 3, 4), {"BLOCK_C": 4, "WINDOWS": 2, "TILES": 1, "num_warps": 1}),  # odd rows alone, full tiles
]
LARGE_PLANES = [(7, 128, 32, 32), (5, 128, 16, 16), (3, 100, 8, 8), (2, 128, 128, 128), (2, 63, 31, 33)]


def far_planes(device: str) -> None:
    """Check the statistics of planes in parts where sums of squares would cancel.

    The planes are far from zero, or their first pixel is far from the rest.
    """
    from mtt_fast.kernels import reference, triton
    from mtt_fast.kernels.triton import channels_last_planes

    y, y_dot = (torch.randn(1, 2, 7, 5).to(device, memory_format=torch.channels_last) for _ in range(2))
    affine = Affine(torch.ones(2, device=device), torch.zeros(2, device=device))
    first = torch.zeros_like(y)
    first[:, :, 0, 0] = 1e3
    for far in (torch.full_like(y, 1e3), first):
        expected = reference.norm_relu_pool_dual(*map(in_float64, (y + far, y_dot - far, affine, affine)), 1e-5)[2]
        with patch.object(channels_last_planes, "configuration", return_value=PARTS[1][1]):
            stats = triton.norm_relu_pool_dual(y + far, y_dot - far, affine, affine, 1e-5)[2]
        for actual, wanted in zip(stats, expected, strict=True):
            torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5)
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
    """Return the comparisons by `check`: of planes by the table's tiles, of contiguous ones, which are copied, and of planes in parts."""
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
    """Call `check` with random planes."""
    check((*shape, *label), draw_planes(device, shape, form, dtype))


def check_in_parts(
    check: Operation, device: str, shape: tuple[int, ...], dtype: torch.dtype, tile: dict[str, int]
) -> None:
    """Compare channels_last planes that go in parts of `tile`, more than are combined at a time."""
    from mtt_fast.kernels.triton import channels_last_planes

    with (
        patch.object(channels_last_planes, "configuration", return_value=tile),
        patch.object(channels_last_planes, "COMBINED_PARTS", 2),
    ):
        check_drawn(check, device, shape, torch.channels_last, dtype, "in parts")


def draw_planes(
    device: str, shape: tuple[int, ...], form: torch.memory_format, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the arguments of all operations, by name. In channel 0 every u is exactly 0, where ReLU has its kink."""
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
        results = as_tuple(getattr(triton, name)(*arguments))
        # interpreted, a second run could not differ
        repeated = as_tuple(getattr(triton, name)(*arguments)) if y.is_cuda else results
        expected = as_tuple(getattr(reference, name)(*map(in_float64, arguments)))
        summed, repeated, expected = (added_up(name, each) for each in (results, repeated, expected))
        for place, (actual, again, wanted) in enumerate(zip(summed, repeated, expected, strict=True)):
            case = (name, place, shape, str(y.dtype), str(memory_format(y)))
            error = float((actual.double() - wanted).norm() / wanted.norm().clamp_min(1e-3))
            # Among many units there may be one that rounding carries over ReLU's kink.
            flips = 1e-2 if y.numel() > 100_000 and y.dtype != torch.float64 else 0
            assert error <= max(tolerances[actual.dtype], flips), (*case, error)
            assert actual.dtype == (y.dtype if actual.dim() == 4 else accumulator(y.dtype)), case
            assert actual.dim() < 4 or actual.is_contiguous(memory_format=memory_format(y)), case
            assert torch.equal(actual, again), f"{case} differs from one run to the next"
        if name.endswith("backward") and (y.is_cuda or y.dtype == torch.float32):
            check_reuse(name, arguments, results)
        print("passed:", (name, shape, str(y.dtype)))


def check_reuse(name: str, arguments: tuple[Any, ...], expected: tuple[Tensor, ...]) -> None:
    """Check that with `reuse` a backward writes the same gradients, and those of channels_last planes into the planes' memory."""
    from mtt_fast.kernels import triton
    from mtt_fast.kernels.types import memory_format

    given = [copied(argument) for argument in arguments]
    planes = [*given[:2]] if name == "norm_relu_pool_dual_backward" else [given[0]]  # y and, if it is needed, ẏ
    versions = [each._version for each in planes]
    results = as_tuple(getattr(triton, name)(*given, reuse=True))
    for place, (before, each) in enumerate(zip(versions, planes, strict=True)):
        if memory_format(each) != torch.channels_last:
            continue  # the kernel wrote over a copy
        assert results[place].data_ptr() == each.data_ptr(), name
        assert each._version > before, "autograd must see that the planes are no longer what they were"
    assert all(torch.equal(actual, wanted) for actual, wanted in zip(results, expected, strict=True)), name


def copied(argument: Any) -> Any:
    """Return a copy of a tensor, strides included, and anything else as it is."""
    return argument.clone(memory_format=torch.preserve_format) if isinstance(argument, Tensor) else argument


def lost_planes(family: str, device: str) -> None:
    """Check that a plane of NaN stays NaN when it is pooled, and that no other one does: ReLU must not make it zero."""
    from mtt_fast.kernels import triton
    from mtt_fast.kernels.triton import channels_last_planes

    affine = Affine(torch.ones(5, device=device), torch.zeros(5, device=device))
    last = torch.channels_last
    for form, tile in ((torch.contiguous_format, None), (last, None), (last, PARTS[1][1])):
        y, y_dot = (torch.randn(2, 5, 7, 5).to(device, memory_format=form) for _ in range(2))
        y[1, 3] = y_dot[1, 3] = float("nan")
        with nullcontext() if tile is None else patch.object(channels_last_planes, "configuration", return_value=tile):
            if family == "norm":
                planes = triton.norm_relu_pool(y, affine, 1e-5)[:1]
                planes += triton.norm_relu_pool_dual(y, y_dot, affine, affine, 1e-5)[:2]
            else:
                planes = triton.bias_relu_pool(y, affine.beta), *triton.bias_relu_pool_dual(y, y_dot, *affine)
        for p in planes:
            lost = p.isnan().all((2, 3))
            assert lost.nonzero().tolist() == [[1, 3]], (family, form, tile)
            assert p[~lost].isfinite().all()
    print("passed: planes that are not numbers", family)


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


def norm_cases(device: str) -> list[Case]:
    """Return the comparisons of the end with a norm."""
    return plane_cases(check_norm, device)


def norm_checks(device: str) -> list[Case]:
    """Return the checks of a norm's statistics far from zero, of NaN, and of its refusals."""
    checks = [partial(check, "norm", device) for check in (lost_planes, refused_planes)]
    return [partial(far_planes, device), *checks]


def bias_cases(device: str) -> list[Case]:
    """Return the comparisons of the end with a bias, and the checks of NaN and of its refusals."""
    checks = [partial(check, "bias", device) for check in (lost_planes, refused_planes)]
    return [*plane_cases(check_bias, device), *checks]
