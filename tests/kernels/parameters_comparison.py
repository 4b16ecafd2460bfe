"""Hold what Triton does to all parameters of a step at once to the reference: a family of triton_comparison.py."""

from __future__ import annotations

import itertools
from typing import get_args

import torch

from bench.kernels import tensors_of
from mtt_fast.kernels import HALF_PRECISIONS, PartialSums, Precision, WeightPlace


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
        moved.append(torch.randn(4, 6, 11, dtype=dtype, device=device)[:, 2])  # a summand is part of a row
        pieces.append(moved[-1].cpu())
        scalars = tuple(torch.tensor(factor, dtype=dtype) for factor in factors)
        expected = PartialSums(tuple(pieces), scalars).vector()
        sums = PartialSums(tuple(moved), tuple(scalar.to(device) for scalar in scalars))
        vector = triton.add_up(sums)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-13  # of sums of a hundred
        torch.testing.assert_close(vector.cpu(), expected, rtol=tolerance, atol=tolerance)
        a, b = (torch.randn(len(vector), dtype=dtype, device=device) for _ in range(2))
        rate, out, also = torch.tensor(0.3, dtype=dtype, device=device), torch.empty_like(a), torch.empty_like(a)
        triton.sgd_step(a, sums, rate, out, b, None, 0.9, 0.05)
        assert torch.equal(out, triton.sgd_step(a, vector, rate, also, b, None, 0.9, 0.05))
        triton.adjoint_step(a, sums, b, rate, out, None, 0.05)
        assert torch.equal(out, triton.adjoint_step(a, vector, b, rate, also, None, 0.05))
        print("passed: partial sums", dtype, factors)


def packed_parameters(device: str) -> None:
    """Check the copies of weights, and the direction that fp16 scales."""
    from mtt_fast.kernels import reference, triton

    torch.manual_seed(0)
    places = (WeightPlace(3, 20, 3), WeightPlace(600, 16, 20))
    for dtype, precision in itertools.product((torch.float32, torch.float64), get_args(Precision)):
        theta = torch.randn(600 + 9 * 16 * 20 + 5, dtype=dtype, device=device)
        for direction in (None, theta * 1e-7, torch.zeros_like(theta), theta * float("inf")):
            found = triton.pack_parameters(theta, direction, places, precision, 1.0)
            wanted = reference.pack_parameters(theta, direction, places, precision, 1.0)
            if direction is not None and dtype == torch.float32:
                assert (found.scale is None) == (precision != "fp16")
            products = HALF_PRECISIONS.get(precision, dtype) if dtype == torch.float32 else dtype
            for ours, theirs in zip(tensors_of(found), tensors_of(wanted), strict=True):
                rounded = theirs.to(ours.dtype) if device != "cpu" or ours.dtype != torch.bfloat16 else theirs
                close = 2**-7 if ours.dtype == torch.bfloat16 else 0  # interpreted, bfloat16 is cut off
                torch.testing.assert_close(ours.to(dtype), rounded.to(dtype), rtol=close, atol=0, equal_nan=True)
            assert {weight.straight.dtype for weight in found.weights} == {products}
            assert all(
                torch.equal(weight.weight, plain) for weight, plain in zip(found.weights, wanted.weights, strict=True)
            )
        print("passed: packed parameters", dtype, precision)
