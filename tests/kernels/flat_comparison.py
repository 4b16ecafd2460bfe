"""Hold Triton's operations on flat vectors and on parameters to the reference: a family of triton_comparison.py."""

from __future__ import annotations

import itertools
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from bench.kernels import tensors_of
from mtt_fast.kernels import (
    HALF_PRECISIONS,
    BatchGradient,
    BatchImages,
    PackedParameters,
    PartialSums,
    Precision,
    WeightPlace,
)
from mtt_fast.testing import relative_error
from tests.kernels.block_comparison import PATCH_TOLERANCES
from tests.kernels.comparison import Case, with_sizes
from tests.kernels.warp_comparison import warp_rows

VECTORS = list(itertools.product((torch.float32, torch.float64, torch.bfloat16), (0, 1, 1003, 600_001)))
"""Dtypes and sizes of vectors."""


def size_on(device: str, size: int) -> int:
    """Return a size of vectors for a device: interpreted programs take milliseconds each."""
    return min(size, 5_000) if device == "cpu" else size


def distances(device: str) -> None:
    """Compare the distance of two vectors."""
    from mtt_fast.kernels import reference, triton

    for dtype, each in VECTORS:
        size = size_on(device, each)
        a, b = (torch.randn(size).to(device, dtype) for _ in range(2))
        distance = triton.squared_distance(a, b)
        expected = reference.squared_distance(a, b)
        assert distance.dtype == torch.float64
        assert torch.equal(distance, triton.squared_distance(a, b))
        torch.testing.assert_close(distance, expected, rtol=1e-13, atol=0)
        print("passed: the distance of vectors", size, dtype)


def vectors(device: str) -> None:
    """Compare steps along vectors, out of place and in place."""
    from mtt_fast.kernels import reference, triton

    torch.manual_seed(0)
    for dtype, each in VECTORS:
        size = size_on(device, each)
        a, b = (torch.randn(size).to(device, dtype) for _ in range(2))
        # each kernel rounds once, at the end (the interpreter cuts bfloat16 off), so the reference computes in float64
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-15, torch.bfloat16: 2**-7}[dtype]
        lr, c = torch.tensor(0.03, dtype=dtype, device=device), torch.randn(size).to(device, dtype)

        def assert_close(actual: Tensor, expected: Tensor, tolerance: float = tolerance) -> None:
            torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=min(tolerance, 1e-6))

        def in_float64(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.double()

        for velocity, decay in ((None, 0.0), (None, 0.0503), (c, 0.0503)):
            out, moved = torch.empty_like(a), torch.empty_like(a)
            expected_out, expected_moved = torch.empty_like(a).double(), torch.empty_like(a).double()
            versions = out._version, moved._version
            assert triton.sgd_step(a, b, lr, out, velocity, moved, 0.9, decay) is out
            assert out._version > versions[0]  # autograd is told
            assert moved._version > versions[1]
            reference.sgd_step(
                a.double(), b.double(), lr.double(), expected_out, in_float64(velocity), expected_moved, 0.9, decay
            )
            assert_close(out, expected_out)
            assert_close(moved, expected_moved)
            assert triton.adjoint_step(a, b, c, lr, out, velocity, decay) is out
            reference.adjoint_step(
                a.double(), b.double(), c.double(), lr.double(), expected_out, in_float64(velocity), decay
            )
            assert_close(out, expected_out)
        reference.adjoint_step(a.double(), b.double(), a.double(), lr.double(), expected_out, c.double(), 0.0503)
        version = a._version
        assert triton.adjoint_step(a, b, a, lr, a, c, 0.0503) is a  # in place
        assert a._version > version
        assert_close(a, expected_out)
        print("passed: vectors", size, dtype)


def rows(device: str) -> None:
    """Check that rows are added to rows with the same bits as the reference, also where an index comes again."""
    from mtt_fast.kernels import reference, triton

    torch.manual_seed(0)
    for dtype, (count, batch, width) in itertools.product(
        (torch.float32, torch.float64), ((5, 7, 3), (1, 4, 600), (9, 2, 1), (3, 0, 4))
    ):
        out, added = torch.randn(count, width, dtype=dtype), torch.randn(batch, width, dtype=dtype)
        index = torch.randint(count, (batch,))
        for alpha in (1.0, -1.0):
            expected = reference.index_add(out.clone(), index, added, alpha)
            actual = out.to(device, copy=True)
            version = actual._version
            assert triton.index_add(actual, index.to(device), added.to(device), alpha) is actual
            assert actual._version > version  # autograd is told
            assert torch.equal(actual.cpu(), expected), (dtype, count, batch, width, alpha)
        print("passed: rows", (count, batch, width), dtype)


def powers(device: str) -> None:
    """Check the power of two that brings a direction into fp16's range, and that sums are divided by one exactly."""
    from mtt_fast.kernels import reference, triton

    numbers = (0.0, 1e-45, 1e-30, 0.3, 1.0, 64.0, 1e5, 3e38, float("inf"), float("nan"))
    # a program searches several tiles of many numbers, so the largest comes first or last
    for number, (size, place) in itertools.product(numbers, ((1, 0), (70_000, 0), (70_000, -1))):
        theta, direction = torch.zeros(size, device=device), torch.full((size,), number / 2, device=device)
        direction[place] = -number
        actual, expected = (
            back_end.pack_parameters(theta, direction, (), "fp16", 64.0).scale for back_end in (triton, reference)
        )
        assert actual is not None
        assert expected is not None
        assert torch.equal(actual, expected), (number, size, place)
    sums = torch.randn(1, 100, generator=torch.Generator().manual_seed(0)).to(device)
    for exponent in (*range(-60, 61, 5), 66):
        divisor = torch.tensor(2.0**exponent, device=device)
        assert torch.equal(triton.add_up(PartialSums((sums,), (divisor,))), sums[0] * 2.0**-exponent), exponent
    print("passed: powers of two")


def partial_sums(device: str) -> None:
    """Check that a step along partial sums is one along their vector, whatever their summands, layouts and factors."""
    from mtt_fast.kernels import triton

    torch.manual_seed(0)
    for dtype, factors in itertools.product((torch.float32, torch.float64), ((), (4.0,), (0.5, 64.0))):
        pieces = [torch.randn(size, dtype=dtype) for size in ((40, 9, 5, 3, 3), (1, 4, 40, 3, 3), (100, 7), (2, 2, 33))]
        pieces.insert(2, torch.empty(0, 7, dtype=dtype))
        products = [piece.permute(0, 1, 3, 4, 2).contiguous() for piece in pieces[:2]]
        moved = [piece.to(device).permute(0, 1, 4, 2, 3) for piece in products] + [
            each.to(device) for each in pieces[2:]
        ]
        # a summand is part of a row, of weights too, as the first block leaves them
        parts_of_rows = torch.randn(4, 6, 11, dtype=dtype), torch.randn(4, 100, dtype=dtype)
        moved.append(parts_of_rows[0].to(device)[:, 2])
        moved.append(parts_of_rows[1].to(device)[:, :90].unflatten(1, (2, 5, 3, 3)))
        pieces += [each.cpu() for each in moved[-2:]]
        scalars = tuple(torch.tensor(factor, dtype=dtype) for factor in factors)
        expected = PartialSums(tuple(pieces), scalars).vector()
        sums = PartialSums(tuple(moved), tuple(scalar.to(device) for scalar in scalars))
        vector = triton.add_up(sums)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-13  # of sums of a hundred
        torch.testing.assert_close(vector.cpu(), expected, rtol=tolerance, atol=tolerance)
        a, b = (torch.randn(len(vector), dtype=dtype, device=device) for _ in range(2))
        lr, out, also = torch.tensor(0.3, dtype=dtype, device=device), torch.empty_like(a), torch.empty_like(a)
        triton.sgd_step(a, sums, lr, out, b, None, 0.9, 0.05)
        assert torch.equal(out, triton.sgd_step(a, vector, lr, also, b, None, 0.9, 0.05))
        triton.adjoint_step(a, sums, b, lr, out, None, 0.05)
        assert torch.equal(out, triton.adjoint_step(a, vector, b, lr, also, None, 0.05))
        print("passed: partial sums", dtype, factors)


def packed_parameters(device: str) -> None:
    """Check the copies of weights, and the direction that fp16 scales."""
    from mtt_fast.kernels import reference, triton

    torch.manual_seed(0)
    # a part of a tile and whole tiles, of filters and of channels
    places = (WeightPlace(3, 16, 3), WeightPlace(600, 20, 32))
    for dtype, precision in itertools.product((torch.float32, torch.float64), get_args(Precision)):
        theta = torch.randn(600 + 9 * 32 * 20 + 5, dtype=dtype, device=device)
        for direction in (None, theta * 1e-7, torch.zeros_like(theta), theta * float("inf")):
            actual = triton.pack_parameters(theta, direction, places, precision, 1.0)
            expected = reference.pack_parameters(theta, direction, places, precision, 1.0)
            if direction is not None and dtype == torch.float32:
                assert (actual.scale is None) == (precision != "fp16")
            products = HALF_PRECISIONS.get(precision, dtype) if dtype == torch.float32 else dtype
            for packed, plain in zip(tensors_of(actual), tensors_of(expected), strict=True):
                rounded = plain.to(packed.dtype) if device != "cpu" or packed.dtype != torch.bfloat16 else plain
                rtol = 2**-7 if packed.dtype == torch.bfloat16 else 0  # interpreted, bfloat16 is cut off
                torch.testing.assert_close(packed.to(dtype), rounded.to(dtype), rtol=rtol, atol=0, equal_nan=True)
            assert {weight.straight.dtype for weight in actual.weights} == {products}
            copies = [copy for weight in actual.weights for copy in (weight.straight, weight.rotated)]
            # as TMA needs it: the first begins where memory was allocated
            assert all((copy.data_ptr() - copies[0].data_ptr()) % 128 == 0 for copy in copies)
            assert all(
                torch.equal(weight.weight, plain)
                for weight, plain in zip(actual.weights, expected.weights, strict=True)
            )
        print("passed: packed parameters", dtype, precision)


def gradients_of_batches(device: str) -> None:
    """Check that a step of the adjoint adds a batch's gradient as the reference does, and moves as without it."""
    from mtt_fast.kernels import reference, triton

    torch.manual_seed(0)
    for dtype, (count, channels, height, width) in itertools.product(
        (torch.float32, torch.float64), ((4, 3, 19, 17), (2, 1, 5, 6))
    ):
        a, b, out, also = (torch.randn(5_000, dtype=dtype, device=device) for _ in range(4))
        scale, shape = torch.tensor(-0.37, dtype=dtype, device=device), (channels, height, width)
        images_bar, y_bar = (torch.randn(each, *shape, dtype=dtype, device=device) for each in (5, count))
        rows = torch.tensor([3, 0, 3, 4], device=device)[:count]
        for parameters in (warp_rows((count, *shape)).to(a), None):
            given = (rows, y_bar, parameters)
            expected = BatchGradient(images_bar.clone(), *given)
            reference.adjoint_step(a, b, a, scale, also, None, 0.05, expected)
            batch = BatchGradient(images_bar.clone(), *given)
            version = batch.out._version
            triton.adjoint_step(a, b, a, scale, out, None, 0.05, batch)
            tolerance = 1e-6 if dtype == torch.float32 else 1e-14  # of a mean that more programs add up otherwise
            assert batch.out._version > version  # autograd is told
            assert relative_error(batch.out, expected.out) <= tolerance
            assert torch.equal(batch.out[1:3], images_bar[1:3])
            assert_same(out, triton.adjoint_step(a, b, a, scale, also, None, 0.05), tolerance)
        print("passed: gradients of batches", dtype, shape)


def patches_beside_parameters(device: str) -> None:
    """Check that patches that are made beside packed parameters, and these, are what they are by themselves."""
    from mtt_fast.kernels import triton

    torch.manual_seed(0)
    places, shape = (WeightPlace(3, 16, 3), WeightPlace(600, 20, 32)), (4, 3, 9, 8)
    kinds = [(torch.float64, "fp32"), *((torch.float32, precision) for precision in get_args(Precision))]
    for dtype, precision in kinds:
        theta = torch.randn(600 + 9 * 32 * 20 + 5, dtype=dtype, device=device)
        x, rows = torch.randn(shape, dtype=dtype, device=device), torch.tensor([3, 0, 3], device=device)
        warp = warp_rows(shape).to(theta)[:3]
        for direction, batch in ((None, BatchImages(x, 1)), (theta * 1e-7, BatchImages(x, 3, rows, warp))):
            both = triton.pack_parameters(theta, direction, places, precision, 1.0, batch)
            alone = triton.pack_parameters(theta, direction, places, precision, 1.0)
            patches = triton.image_patches(batch.x, batch.padding, precision, batch.indices, batch.warp)
            assert all(torch.equal(a, b) for a, b in zip(copies_in(both), copies_in(alone), strict=True))
            assert both.patches is not None
            tolerance = PATCH_TOLERANCES["fp64" if dtype == torch.float64 else precision]
            for made, expected in zip(both.patches[:2], patches[:2], strict=True):
                assert_same(made, expected, tolerance)
        print("passed: patches beside parameters", dtype, precision)


def copies_in(packed: PackedParameters) -> list[Tensor]:
    """Return the tensors of packed parameters but for patches."""
    return tensors_of(packed._replace(patches=None))


def assert_same(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Check that results of one function in two kernels are the same to the bit, compiled within a relative `tolerance`.

    LLVM may contract a product and a sum to one rounding in one kernel and not in the other.
    """
    if actual.is_cuda:
        assert relative_error(actual, expected) <= tolerance
    else:
        assert torch.equal(actual, expected)


def flat_cases(device: str) -> list[Case]:
    """Return the comparisons of flat vectors, of rows, and of parameters."""
    families = (vectors, rows, powers, partial_sums, packed_parameters, gradients_of_batches, patches_beside_parameters)
    of_distances: Case = partial(distances, device)
    if device == "cpu":  # a program adds up several tiles, as it does of a long vector
        of_distances = partial(with_sizes, "flat", of_distances, SIZE=64, PARTIALS=16)
    return [of_distances, *(partial(check, device) for check in families)]
