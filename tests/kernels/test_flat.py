"""Check the steps along flat vectors against torch.optim and autograd, and their distance against exact arithmetic."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtt_fast.kernels import (
    Affine,
    BatchGradient,
    BatchImages,
    PackedParameters,
    PartialSums,
    Precision,
    WeightPlace,
    add_up,
    adjoint_step,
    colour_warp_mask_transpose,
    image_patches,
    index_add,
    native,
    pack_parameters,
    reference,
    sgd_step,
    squared_distance,
)
from mtt_fast.kernels.reference.flat import power_of_two
from mtt_fast.testing import assert_close
from tests.kernels.compiling import WIDTH, check, each_architecture, meta, needs_triton, recording
from tests.kernels.helpers import assert_same_by_any_threads
from tests.kernels.triton_comparison import compare, each_part

SIZES = [0, 1, 15, 1003, (1 << 14) + 1, 400_003]  # less than a vector, around a block, several threads' shares
DTYPES = [torch.float32, torch.float64]
DISTANCE_DTYPES = [torch.float32, torch.float64, torch.bfloat16]
DISTANCES = [pytest.param(native.squared_distance, id="native", marks=pytest.mark.native), reference.squared_distance]

Distance = Callable[[Tensor, Tensor], Tensor]


def vectors(size: int, count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(size, dtype=torch.float64).to(dtype) for _ in range(count)]


def unwritten(like: Tensor) -> Tensor:
    return torch.full_like(like, float("nan"))


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_three_sgd_steps_are_those_of_torch_optim(
    size: int, dtype: torch.dtype, momentum: float, weight_decay: float
) -> None:
    gradients = vectors(size, 3, dtype)
    (start,) = vectors(size, 1, dtype)
    lr = torch.tensor(0.3, dtype=dtype)
    parameters = start.double().clone().requires_grad_()
    optimizer = torch.optim.SGD([parameters], lr.item(), momentum=momentum, weight_decay=weight_decay)
    theta, velocity = start, None
    for gradient in gradients:
        parameters.grad = gradient.double()
        optimizer.step()
        out = unwritten(start)
        velocity_out = unwritten(start) if momentum else None
        factors = {"momentum": momentum, "weight_decay": weight_decay}
        assert sgd_step(theta, gradient, lr, out, velocity, velocity_out, **factors) is out
        theta, velocity = out, velocity_out
        moved, expected = theta.double() - start.double(), parameters.detach() - start.double()
        assert_close("displacement", moved, expected, 1e-6 if dtype == torch.float32 else 1e-13)
        if velocity is not None:
            buffer = optimizer.state[parameters]["momentum_buffer"]
            assert_close("velocity", velocity, buffer, 1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("with_incoming", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_an_adjoint_step_is_an_sgd_step_transposed(
    size: int, dtype: torch.dtype, weight_decay: float, with_incoming: bool
) -> None:
    """Take the loss Σ θ⁴ / 12, whose Hessian is the diagonal of θ²."""
    theta, adjoint, incoming = vectors(size, 3, dtype)
    lr = torch.tensor(0.3, dtype=dtype)
    leaf = theta.double().clone().requires_grad_()
    stepped = leaf - lr.double() * (leaf**3 / 3 + weight_decay * leaf)
    (expected,) = torch.autograd.grad(stepped, leaf, adjoint.double())
    out = unwritten(theta)
    given = incoming if with_incoming else None
    result = adjoint_step(adjoint, theta.square() * adjoint, adjoint, -lr, out, given, weight_decay)
    assert result is out
    if with_incoming:
        expected = expected + incoming.double()
    assert_close("adjoint", out, expected, 1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_may_take_the_place_of_arguments(dtype: torch.dtype) -> None:
    theta, gradient, velocity, incoming = vectors((1 << 14) + 1003, 4, dtype)  # more than a block
    lr = torch.tensor(0.3, dtype=dtype)
    out, velocity_out = unwritten(theta), unwritten(theta)
    sgd_step(theta, gradient, lr, out, velocity, velocity_out, 0.9, 0.05)
    expected = adjoint_step(out, gradient, out, lr, unwritten(theta), incoming, 0.05)

    versions = theta._version, velocity._version
    sgd_step(theta, gradient, lr, theta, velocity, velocity, 0.9, 0.05)
    assert torch.equal(theta, out)
    assert torch.equal(velocity, velocity_out)
    assert theta._version > versions[0]  # autograd is told
    assert velocity._version > versions[1]
    adjoint_step(theta, gradient, theta, lr, theta, incoming, 0.05)
    assert torch.equal(theta, expected)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("warped", [False, True])
def test_an_adjoint_step_adds_the_gradient_of_a_batch_on_the_way(dtype: torch.dtype, warped: bool) -> None:
    adjoint, curvature = vectors(17, 2, dtype)
    y_bar, images_bar = torch.randn(3, 2, 5, 4, dtype=dtype), torch.randn(6, 2, 5, 4, dtype=dtype)
    parameters = None
    if warped:
        parameters = torch.zeros(3, 13, dtype=dtype)
        parameters[:, 2], parameters[:, 5] = 0.3, -1.25  # contrast, and a displacement down
    rows, scale = torch.tensor([[4, 9], [0, 9], [4, 9]])[:, 0], torch.tensor(-0.3, dtype=dtype)
    moved = -scale * y_bar if parameters is None else colour_warp_mask_transpose(-scale * y_bar, parameters)
    expected = index_add(images_bar.clone(), rows, moved, alpha=-1)
    batch = BatchGradient(images_bar, rows, y_bar, parameters)
    stepped = adjoint_step(adjoint, curvature, adjoint, scale, unwritten(adjoint), batch=batch)
    assert torch.equal(images_bar, expected)
    assert torch.equal(stepped, adjoint_step(adjoint, curvature, adjoint, scale, unwritten(adjoint)))


@pytest.mark.usefixtures("either_backend")
def test_results_do_not_depend_on_threads() -> None:
    a, b, c, d = vectors(400_003, 4, torch.float32)
    lr = torch.tensor(0.3)

    def steps() -> tuple[Tensor, ...]:
        velocity = unwritten(a)
        theta = sgd_step(a, b, lr, unwritten(a), c, velocity, 0.9, 0.05)
        return theta, velocity, adjoint_step(a, b, c, lr, unwritten(a), d, 0.05)

    assert_same_by_any_threads(steps)


V, LR = torch.zeros(6), torch.zeros(())
IMAGES, ROWS = torch.zeros(4, 3, 5, 5), torch.tensor([3, 0])


def of_batch(**changed: Any) -> BatchGradient:
    """Return a batch's gradient that fits V and RATE, but for what is changed."""
    return BatchGradient(IMAGES, ROWS, IMAGES[:2], None)._replace(**changed)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize(
    ("step", "arguments", "reason"),
    [
        (sgd_step, (V[:5], V, LR, V), "expected gradient of shape"),
        (sgd_step, (V.view(2, 3), V, LR, V), "expected theta of shape"),
        (sgd_step, (V, V, torch.zeros(1), V), "expected lr of shape"),
        (sgd_step, (V, V, LR.double(), V), "expected lr of floating dtype torch.float32, found torch.float64"),
        (sgd_step, (V.long(), V.long(), LR, V), "expected theta of floating dtype"),
        (sgd_step, (torch.zeros(12)[::2], V, LR, V), "expected theta contiguous"),
        (sgd_step, (V, V, LR, torch.zeros(12)[::2]), "expected out contiguous"),
        (sgd_step, (V, V, LR, V, V.double()), "expected velocity of floating dtype"),
        (sgd_step, (V, V.clone().requires_grad_(), LR, V), "found gradient that requires grad"),
        (sgd_step, (V, V, LR.to("meta"), V), "expected one device"),
        (adjoint_step, (V, V, V[:5], LR, V), "expected direction of shape"),
        (adjoint_step, (V, V, V, LR, V, V[:5]), "expected incoming of shape"),
        (adjoint_step, (V, V, V, V, V), "expected scale of shape"),
        (adjoint_step, (V, torch.zeros(12)[::2], V, LR, V), "expected hessian_v contiguous"),
        (adjoint_step, (V, V, V, LR, V, None, 0.0, of_batch(y_bar=IMAGES)), r"int64 indices \(4,\)"),
        (
            adjoint_step,
            (V, V, V, LR, V, None, 0.0, of_batch(indices=ROWS.to("meta"))),
            r"int64 indices \(2,\) on cpu",
        ),
        (adjoint_step, (V, V, V, LR, V, None, 0.0, of_batch(indices=ROWS + 1)), "indices 0 … 3, found 1 … 4"),
        (adjoint_step, (V, V, V, LR, V, None, 0.0, of_batch(out=IMAGES.double())), "out of floating dtype"),
        (adjoint_step, (V, V, V, LR, V, None, 0.0, of_batch(warp=IMAGES[0, 0])), "parameters of shape"),
        (pack_parameters, (V.half(), None, (), "fp32"), "expected float32 or float64, found torch.float16"),
        (pack_parameters, (V, None, (), "fp32", 1.0, BatchImages(IMAGES[:, :, :1], 1)), "at least 4×4 pixels"),
        (pack_parameters, (V, None, (), "fp32", 1.0, BatchImages(IMAGES, 1, ROWS + 1)), "indices 0 … 3, found 1 … 4"),
        (pack_parameters, (V, None, (), "fp32", 1.0, BatchImages(IMAGES.double(), 1)), "x of floating dtype"),
        (sgd_step, (V, PartialSums((V[None, :5],)), LR, V), "expected gradient of 6 numbers, found pieces of 5"),
        (sgd_step, (V, PartialSums((torch.zeros(2, 12)[:, ::2],)), LR, V), "summands of gradient contiguous"),
        (sgd_step, (V, PartialSums((V[None].double(),)), LR, V), "expected gradient of torch.float32 on cpu"),
        (sgd_step, (V, PartialSums((V[None].to("meta"),)), LR, V), "found torch.float32 on meta"),
        (sgd_step, (V, PartialSums((V[None].clone().requires_grad_(),)), LR, V), "found gradient that requires grad"),
        (sgd_step, (V, PartialSums((V[None],), (V,)), LR, V), "expected a divisor of gradient of shape"),
        (sgd_step, (V, PartialSums((V[None],), (LR, V)), LR, V), "expected a divisor of gradient of shape"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_steps_refuse(step: Callable[..., Tensor], arguments: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{step.__name__}: .*{reason}"):
        step(*arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [1.0, -1.0])
@pytest.mark.parametrize("index", [[2, 0, 2, 2, 4], [3], []])
def test_rows_are_added_in_their_order(index: list[int], alpha: float, dtype: torch.dtype) -> None:
    out, rows = torch.randn(5, 3, 2, dtype=dtype), torch.randn(len(index), 3, 2, dtype=dtype)
    expected = out.clone()
    for place, row in zip(index, rows, strict=True):
        expected[place] += alpha * row
    assert index_add(out, torch.tensor(index, dtype=torch.long), rows, alpha) is out
    assert torch.equal(out, expected)


def test_a_back_end_gets_the_indices_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    def noted(theta: Any, direction: Any, places: Any, *, largest: float, batch: BatchImages) -> None:
        assert batch.indices is not None
        given.append(batch.indices)

    operations = {"index_add": lambda out, index, *_: given.append(index), "pack_parameters": noted}
    monkeypatch.setattr("mtt_fast.kernels.dispatch.implementation_of", lambda name, *_: operations[name])
    index = torch.arange(8)[::2]
    index_add(torch.zeros(8, 3), index, torch.zeros(4, 3))
    pack_parameters(torch.zeros(9), None, [], "fp32", batch=BatchImages(torch.zeros(8, 3, 6, 5), 1, index))
    for indices in given:
        assert indices.is_contiguous()
        assert torch.equal(indices, index)
    assert len(given) == 2


@pytest.mark.parametrize(
    ("index", "rows", "reason"),
    [
        ([0, 5], torch.zeros(2, 3), "expected indices 0 … 4, found 0 … 5"),
        ([-1, 0], torch.zeros(2, 3), "found -1 … 0"),
        ([0], torch.zeros(2, 3), r"int64 indices \(2,\)"),
        ([0.0, 1.0], torch.zeros(2, 3), "found torch.float32"),
        ([0, 1], torch.zeros(2, 4), r"rows of shape \(2, 3\)"),
        ([0, 1], torch.zeros(2, 3, dtype=torch.float64), "rows of floating dtype torch.float32"),
        ([0, 1], torch.zeros(3, 2).T, "rows contiguous"),
    ],
)
def test_adding_rows_refuses(index: list[float], rows: Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^index_add: .*{reason}"):
        index_add(torch.zeros(5, 3), torch.tensor(index), rows)
    with pytest.raises(ValueError, match=r"^index_add: expected out contiguous"):
        index_add(torch.zeros(3, 5).T, torch.tensor([0]), torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("magnitude", "factor"), [(1.0, 32.0), (0.75, 64.0), (63.0, 1.0), (1e-30, 2.0**66), (0.0, 1.0)]
)
def test_power_of_two(magnitude: float, factor: float) -> None:
    value = power_of_two(64.0, torch.tensor([[magnitude / 2, -magnitude]]), torch.tensor([0.0]))
    assert value.shape == ()
    assert float(value) == factor


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_power_of_two_of_what_is_not_finite(number: float) -> None:
    assert float(power_of_two(64.0, torch.tensor([1.0, number]))) == 1


def two_vectors(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    a = torch.randn(size, generator=generator, dtype=torch.float64)
    b = a + torch.randn(size, generator=generator, dtype=torch.float64) / 8
    return a.to(dtype), b.to(dtype)


@pytest.mark.parametrize("dtype", DISTANCE_DTYPES, ids=str)
@pytest.mark.parametrize(
    "size",
    [
        0,
        1,
        15,  # less than the lanes of one vector loop
        16,
        1003,
        (1 << 15) - 1,  # around one block
        (1 << 15) + 1,
        1_200_007,  # more than one thread's share
    ],
)
@pytest.mark.usefixtures("either_backend")
def test_the_distance_agrees_with_float64(size: int, dtype: torch.dtype) -> None:
    a, b = two_vectors(size, dtype)
    result = squared_distance(a, b)
    assert result.shape == ()
    assert result.dtype == torch.float64
    expected = (a.double() - b.double()).square().sum()
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("distance", DISTANCES)
@given(
    pairs=st.lists(
        st.tuples(*[st.floats(width=32, min_value=-(2.0**60), max_value=2.0**60, allow_subnormal=False)] * 2),
        max_size=100,
    )
)
def test_the_distance_is_exact_to_rounding(distance: Distance, pairs: list[tuple[float, float]]) -> None:
    a, b = (torch.tensor([pair[side] for pair in pairs], dtype=torch.float32) for side in (0, 1))
    exact = sum(((Fraction(x) - Fraction(y)) ** 2 for x, y in pairs), Fraction(0))
    assert abs(Fraction(distance(a, b).item()) - exact) <= exact * (len(pairs) + 4) * Fraction(2) ** -52


@pytest.mark.native
@pytest.mark.parametrize("dtype", DISTANCE_DTYPES, ids=str)
def test_the_native_distance_does_not_depend_on_threads(dtype: torch.dtype) -> None:
    a, b = two_vectors(3_000_001, dtype)
    assert_same_by_any_threads(lambda: [squared_distance(a, b)])


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 40, 99])
def test_the_distance_does_not_hide_what_is_not_finite(distance: Distance, value: float, position: int) -> None:
    a, b = two_vectors(100, torch.float32)
    a[position] = value
    assert not torch.isfinite(distance(a, b))


@pytest.mark.usefixtures("either_backend")
def test_the_distance_reads_views_and_memory_maps(tmp_path: Path) -> None:
    a, b = two_vectors(5000, torch.float32)
    torch.stack([a, b]).numpy().tofile(tmp_path / "vectors")
    mapped = torch.from_file(str(tmp_path / "vectors"), size=10000)
    expected = (a[7:].double() - b[7:].double()).square().sum()  # 7: not at the start of an allocation
    torch.testing.assert_close(squared_distance(mapped[7:5000], mapped[5007:]), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        (torch.zeros(3), torch.zeros(4), "one size"),
        (torch.zeros(2, 2), torch.zeros(2, 2), "vectors"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.float64), "float64"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), "int64"),
        (torch.zeros(3, dtype=torch.float16), torch.zeros(3, dtype=torch.float16), "float16"),
        (torch.zeros(6)[::2], torch.zeros(3), "contiguous"),
        (torch.zeros(3), torch.zeros(3, device="meta"), "one device"),
        (torch.zeros(3), torch.zeros(3, requires_grad=True), "requires grad"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
@pytest.mark.usefixtures("either_backend")
def test_the_distance_refuses(a: Tensor, b: Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^squared_distance: .*{reason}"):
        squared_distance(a, b)


@pytest.mark.gpu
def test_the_distance_on_a_gpu_agrees_with_the_cpu() -> None:
    a, b = two_vectors(100_003, torch.float32)
    result = squared_distance(a.cuda(), b.cuda())
    assert result.device.type == "cuda"
    torch.testing.assert_close(result.cpu(), squared_distance(a, b), rtol=1e-12, atol=0)


def test_partial_sums_are_a_vector() -> None:
    weights, nothing, biases = torch.randn(3, 2, 5, 3, 3), torch.empty(0, 4), torch.randn(2, 7)
    expected = torch.cat([weights.sum(0).flatten(), torch.zeros(4), biases.sum(0)]) / 8
    for laid_out in (weights, weights.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)):
        sums = PartialSums((laid_out, nothing, biases), (torch.tensor(4.0), torch.tensor(2.0)))
        torch.testing.assert_close(add_up(sums), expected)
        zeros, out = torch.zeros(len(expected)), torch.empty(len(expected))
        torch.testing.assert_close(sgd_step(zeros, sums, torch.tensor(-1.0), out), expected)
        torch.testing.assert_close(adjoint_step(zeros, sums, zeros, torch.tensor(1.0), out), expected)


@pytest.mark.parametrize("precision", get_args(Precision))
def test_parameters_are_packed_in_the_directions_range(precision: Any) -> None:
    theta = torch.arange(100.0)
    packed = pack_parameters(theta, theta * 2**20, [WeightPlace(5, 2, 3)], precision)
    assert isinstance(packed, PackedParameters)
    assert packed.direction is not None
    assert torch.equal(packed.weights[0], theta[5:59].view(2, 3, 3, 3))
    scale = 2.0**-27 if precision == "fp16" else 1.0
    assert (packed.scale is None) == (precision != "fp16")
    assert torch.equal(packed.direction, theta * 2**20 * scale)
    assert torch.equal(packed.weights_dot[0], packed.direction[5:59].view(2, 3, 3, 3))


def test_parameters_are_packed_beside_the_patches_of_a_batch() -> None:
    theta, batch = torch.arange(100.0), BatchImages(torch.randn(4, 3, 6, 5), 1, torch.tensor([[2, 0], [0, 0]])[:, 0])
    packed = pack_parameters(theta, None, [WeightPlace(5, 2, 3)], "tf32", batch=batch)
    assert torch.equal(packed.weights[0], theta[5:59].view(2, 3, 3, 3))
    assert packed.patches is not None
    expected = image_patches(batch.x[[2, 0]], 1, "tf32")
    assert torch.equal(packed.patches.images, expected.images)
    assert torch.equal(packed.patches.gram, expected.gram)


@pytest.mark.parametrize(("value", "expected"), [("0", "False"), pytest.param("1", "True", marks=pytest.mark.native)])
def test_the_environment_turns_the_native_kernels_off(value: str, expected: str) -> None:
    code = (
        "import torch, mtt_fast.kernels as k;"
        "print(k.native_available(), k.squared_distance(torch.ones(3), torch.zeros(3)).item())"
    )
    environment = os.environ | {"MTT_FAST_NATIVE": value}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == [expected, "3.0"]


@pytest.mark.slow
def test_triton_equals_the_reference_interpreted() -> None:
    lines = compare("flat", "cpu")
    for dtype, compared in itertools.product(
        ("float32", "float64", "bfloat16"), ("the distance of vectors", "vectors")
    ):
        assert len([line for line in lines if line.startswith(f"passed: {compared}") and dtype in line]) == 4
    assert len([line for line in lines if line.startswith("passed: rows")]) == 2 * 4
    assert "passed: powers of two" in lines
    assert len([line for line in lines if line.startswith("passed: partial sums")]) == 2 * 3
    assert len([line for line in lines if line.startswith("passed: packed parameters")]) == 2 * 4
    assert len([line for line in lines if line.startswith("passed: gradients of batches")]) == 2 * 2
    assert len([line for line in lines if line.startswith("passed: patches beside parameters")]) == 5


@pytest.mark.gpu
@each_part("flat")
def test_triton_equals_the_reference_on_a_gpu(part: int) -> None:
    compare("flat", "cuda", part)


@each_architecture
def test_triton_compiles(architecture: str, tmp_path: Path) -> None:
    from mtt_fast.kernels.triton import block, flat, powers, weights

    with recording([block, flat, powers, weights], architecture) as launches:
        a, index = meta(1003), torch.empty(100, dtype=torch.long, device="meta")
        flat.sgd_step(a, a, meta(), a, None, None, 0.0, 0.0)
        flat.sgd_step(a, a, meta(), a, a, a, 0.9, 5e-4)
        flat.adjoint_step(a, a, a, meta(), a, a, 5e-4)
        for parameters in (None, meta(100, 13)):
            batch = BatchGradient(meta(500, 3, 32, 32), index, meta(100, 3, 32, 32), parameters)
            flat.adjoint_step(a, a, a, meta(), a, None, 0.0, batch)
        flat.squared_distance(a, a)
        flat.index_add(meta(500, 3, 32, 32), index, meta(100, 3, 32, 32), -1.0)
        of_weights = meta(40, WIDTH, 3, 3, WIDTH).permute(0, 1, 4, 2, 3)
        sums = PartialSums((of_weights, meta(0, WIDTH), meta(100, 2, WIDTH)[:, 1], meta(1, 10, 2048)), (meta(), meta()))
        vector = flat.add_up(sums)
        flat.sgd_step(vector, sums, meta(), vector, None, None, 0.0, 0.0)
        flat.adjoint_step(vector, sums, vector, meta(), vector, None, 0.0)
        for precision in get_args(Precision):
            place = WeightPlace(27 * WIDTH, WIDTH, WIDTH)
            weights.pack_parameters(vector, vector, [place], precision, 1.0)
            batch = BatchImages(meta(500, 3, 32, 32), 1, index, meta(100, 13))
            for direction in (None, vector):
                weights.pack_parameters(vector, direction, [place], precision, 1.0, batch)
    assert len(launches) == 6 + 2 + 3 + 3 * 4 + 2
    check(launches, architecture, tmp_path)


@needs_triton
def test_powers_of_two_are_divided_by_exactly_and_at_once(tmp_path: Path) -> None:
    """Check that kernels multiply by the inverse: a GPU's `/` of float32 is an approximation, an exact division many instructions."""
    from mtt_fast.kernels.triton import block, flat

    affine, weight, vector = Affine(meta(WIDTH), meta(WIDTH)), meta(WIDTH, 3, 3, 3), meta(1003)
    divisors, sums = (meta(), meta()), PartialSums((vector[None],), (meta(), meta()))
    with recording([block, flat], "sm_90") as launches:
        flat.add_up(sums)
        flat.sgd_step(vector, sums, meta(), vector, None, None, 0.0, 0.0)
        flat.adjoint_step(vector, sums, vector, meta(), vector, None, 0.0)
        along = (block.image_patches(meta(4, 3, 32, 32), 1, "fp16"), weight, weight, affine, affine)
        p, p_dot, folded = block.conv_norm_relu_pool_dual(*along, 1e-5, "fp16")
        block.conv_norm_relu_pool_dual_backward(*along, p, p_dot, folded, 1e-5, "fp16", divisors)
    dividing = [launch for launch in launches if launch.kernel.fn.__name__ not in ("gather", "pool", "finish")]
    for usage in check(dividing, "sm_90", tmp_path):
        assert not usage.divides, usage


@needs_triton
def test_triton_makes_no_patches_of_many_channels() -> None:
    from mtt_fast.kernels.triton import block, weights

    with (
        recording([block, weights], "sm_90"),
        pytest.raises(ValueError, match="expected images of fewer channels, found 5"),
    ):
        weights.pack_parameters(meta(9), None, (), "tf32", 1.0, BatchImages(meta(2, 5, 8, 8), 1))
