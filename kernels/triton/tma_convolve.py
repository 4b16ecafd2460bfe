"""Convolve 3×3 as implicit_gemm.py does, with operands that TMA loads (tma_descriptors.py).

A box is pixels × channels, moved by the offset of a tap. The value and the derivative of a result share the boxes that are
loaded. Each product has its own accumulator: two products into one accumulator would wait for each other. Where there are too
few results to fill a GPU, the taps of a tile are split (split-K), and the first operation that reads the result adds up the
partial sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Convolved, PartialPlanes, Precision
from .implicit_gemm import add_product, effective_precision
from .launch import launch, tl, triton
from .planes import Planes
from .tma_descriptors import BOX, box_of, box_origin, count_boxes, describe, describe_planes, describe_weights, tile_of


@triton.jit
def _add_product(xs: tl.tensor, ws: tl.tensor, total: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Return `total` (N, M) plus the product of weights (N, K) and pixels (M, K).

    The tensor core reads both factors from the shared memory where TMA put them. As the first factor, the pixels would go
    through registers, since their box is reshaped. Triton 3.6 and 3.7 load the next pixels into these registers while products
    still read them (docs/gpu.md, Faults).
    """
    return add_product(ws, tl.trans(xs), total, PRECISION)


@triton.jit
def _output_tile(total: tl.tensor, y: tl.tensor_descriptor) -> tl.tensor:
    """Return the accumulator `total` (N, M) as a tile (M, N), in the dtype of `y`."""
    return tl.trans(total).to(y.dtype)


@triton.jit
def _convolve(
    x: tl.tensor_descriptor,  # descriptors: (B, H, W, CI), as is x_dot
    x_dot: tl.tensor_descriptor | None,
    weight: tl.tensor_descriptor | None,  # (CO, 9·CI), as is weight_dot
    weight_dot: tl.tensor_descriptor,
    y: tl.tensor_descriptor | None,  # (B, HO, WO, CO), as is y_dot
    y_dot: tl.tensor_descriptor,
    CI: tl.constexpr,
    CO: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
    BOX_B: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Store a tile of ẏ and, unless `y` is None, of y: a box of pixels × BLOCK_N output channels."""
    BLOCK_M: tl.constexpr = BOX_B * BOX_H * BOX_W
    BLOCKS: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (CI + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    o = program % BLOCKS * BLOCK_N
    n, row, column = box_origin(program // BLOCKS, HO, WO, BOX_B, BOX_H, BOX_W)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    total_w_dot = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    total_x_dot = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(9 * STEPS):
        tap, c = step // STEPS, step % STEPS * BLOCK_K
        down, right = row + tap // 3 - PADDING, column + tap % 3 - PADDING
        xs = x.load([n, down, right, c]).reshape(BLOCK_M, BLOCK_K)
        ws_dot = weight_dot.load([o, tap * CI + c])
        total_w_dot = _add_product(xs, ws_dot, total_w_dot, PRECISION)
        if weight is not None:
            ws = weight.load([o, tap * CI + c])
            if y is not None:
                total = _add_product(xs, ws, total, PRECISION)
            if x_dot is not None:
                xs_dot = x_dot.load([n, down, right, c]).reshape(BLOCK_M, BLOCK_K)
                total_x_dot = _add_product(xs_dot, ws, total_x_dot, PRECISION)
    if y is not None:
        y.store([n, row, column, o], _output_tile(total, y).reshape(BOX_B, BOX_H, BOX_W, BLOCK_N))
    if x_dot is not None:
        total_w_dot += total_x_dot
    y_dot.store([n, row, column, o], _output_tile(total_w_dot, y_dot).reshape(BOX_B, BOX_H, BOX_W, BLOCK_N))


@triton.jit
def _sum_taps(
    x: tl.tensor_descriptor,
    weight: tl.tensor_descriptor,
    n: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    o: tl.tensor,
    first: tl.tensor,
    CI: tl.constexpr,
    PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Return the sum over TAPS taps, from tap `first` on, of one product, (BLOCK_N, BLOCK_M)."""
    STEPS: tl.constexpr = (CI + BLOCK_K - 1) // BLOCK_K
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(TAPS * STEPS):
        tap, c = first + step // STEPS, step % STEPS * BLOCK_K
        xs = x.load([n, row + tap // 3 - PADDING, column + tap % 3 - PADDING, c]).reshape(BLOCK_M, BLOCK_K)
        ws = weight.load([o, tap * CI + c])
        total = _add_product(xs, ws, total, PRECISION)
    return total


@triton.jit
def _convolve_parts(
    x: tl.tensor_descriptor,  # as in _convolve
    x_dot: tl.tensor_descriptor | None,
    weight: tl.tensor_descriptor | None,
    weight_dot: tl.tensor_descriptor,
    parts: tl.tensor_descriptor,  # descriptor: (PARTS, B, HO, WO, CO), first those of W∗x, then Ẇ∗x, then W∗ẋ
    PRIMAL: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    TAPS: tl.constexpr,
    BOX_B: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Store one part of a tile: the sum over TAPS taps of one product. This is for results too few to fill a GPU."""
    BLOCK_M: tl.constexpr = BOX_B * BOX_H * BOX_W
    BLOCKS: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    EACH: tl.constexpr = 9 // TAPS
    program = tl.program_id(0)
    o = program % BLOCKS * BLOCK_N
    part = program // BLOCKS % PARTS
    n, row, column = box_origin(program // (BLOCKS * PARTS), HO, WO, BOX_B, BOX_H, BOX_W)
    which = part // EACH if PRIMAL else part // EACH + 1
    first = part % EACH * TAPS
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if PRIMAL:  # noqa: SIM102 - this is known when the kernel is compiled, and `which` is not
        if which == 0:
            total = _sum_taps(
                x, weight, n, row, column, o, first,
                CI, PADDING, PRECISION, TAPS, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    if which == 1:
        total = _sum_taps(
            x, weight_dot, n, row, column, o, first,
            CI, PADDING, PRECISION, TAPS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if x_dot is not None:  # noqa: SIM102
        if which == 2:
            total = _sum_taps(
                x_dot, weight, n, row, column, o, first,
                CI, PADDING, PRECISION, TAPS, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    parts.store([part, n, row, column, o], _output_tile(total, parts).reshape(1, BOX_B, BOX_H, BOX_W, BLOCK_N))


def convolve(
    operation: str,
    x: Tensor,
    x_dot: Tensor | None,
    weight: Tensor,
    weight_dot: Tensor,
    y: Tensor | None,
    y_dot: Tensor,
    padding: int,
    precision: Precision,
) -> tuple[Convolved | None, Convolved]:
    """Return W∗x, None if `y` is None, and Ẇ∗x + W∗ẋ, each in `y` and `y_dot` or as partial sums for these.

    The weights are (CO, 3, 3, CI). Raises `ValueError` for planes that TMA cannot load.
    """
    inputs, outputs = Planes.from_tensors(x, x_dot), Planes.from_tensors(y_dot, y)
    tensors = [tensor for tensor in (x, x_dot, y_dot, y) if tensor is not None]
    tile = tile_of(operation, inputs, outputs, precision, tensors)
    box = box_of(tile.pop("BLOCK_M"), outputs)
    taps, widths = tile.pop("TAPS", None), (tile["BLOCK_N"], tile["BLOCK_K"])
    products = 1 + (y is not None) + (x_dot is not None)
    factors = (
        describe_planes(x, box, tile["BLOCK_K"]),
        None if x_dot is None else describe_planes(x_dot, box, tile["BLOCK_K"]),
        describe_weights(weight, *widths) if products > 1 else None,
        describe_weights(weight_dot, *widths),
    )
    constants = {
        "CI": inputs.channels,
        "CO": outputs.channels,
        "HO": outputs.height,
        "WO": outputs.width,
        "PADDING": padding,
        "PRECISION": effective_precision(x.dtype, precision),
        **dict(zip(BOX, box, strict=True)),
        **tile,
    }
    programs = count_boxes(outputs, box) * triton.cdiv(outputs.channels, tile["BLOCK_N"])
    if taps is None:
        results = (
            None if y is None else describe_planes(y, box, tile["BLOCK_N"]),
            describe_planes(y_dot, box, tile["BLOCK_N"]),
        )
        launch(_convolve, programs, *factors, *results, **constants)
        return y, y_dot
    count = _count_parts(taps, products)
    shape = (count, outputs.samples, outputs.height, outputs.width, outputs.channels)
    parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    results_of_parts = describe(parts, shape, (1, *box, tile["BLOCK_N"]))
    constants |= {"PRIMAL": y is not None, "PARTS": count, "TAPS": taps}
    launch(_convolve_parts, programs * count, *factors, results_of_parts, **constants)
    parts = parts.permute(0, 1, 4, 2, 3)
    if y is None:
        return None, PartialPlanes(parts, y_dot)
    y_parts = 9 // taps
    return PartialPlanes(parts[:y_parts], y), PartialPlanes(parts[y_parts:], y_dot)


def part_bytes(operation: str, inputs: Planes, outputs: Planes, precision: Precision, x: Tensor, products: int) -> int:
    """Return the bytes of the partial sums that `convolve` returns for so many products, 0 where it splits no sum.

    Dtype and device are those of `x`.
    """
    taps = tile_of(operation, inputs, outputs, precision, [x]).get("TAPS")
    return 0 if taps is None else 4 * _count_parts(taps, products) * outputs.samples * outputs.sample_size


def _count_parts(taps: int, products: int) -> int:
    """Return the number of partial sums of `products` whose taps are split into parts of `taps`."""
    return products * 9 // taps
