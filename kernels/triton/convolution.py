"""3×3 convolutions of a mixed step as implicit matrix products: a value and its tangent in one pass over the operands.

Forward and input gradient are one kernel, since the latter is the convolution of ȳ with the weights turned by half a
circle: results (pixel, output channel) are sums over terms (tap, input channel). The weight gradient is the product the
other way: results (term, output channel) are sums over pixels, cut into parts that are added up by a second pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Precision
from .configurations import Configuration, configuration
from .entry import architecture, launch, tl, triton
from .planes import OFFSETS, Planes, accumulator

NARROW = 16  # channels up to which an input counts as images


@triton.jit
def _pixels(
    start: tl.tensor,
    PIXELS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The first pixel's sample (int64), and for (PIXELS,) pixels from `start` on: samples after it, row, column."""
    first = start // (H * W)
    pixel = (start % (H * W)).to(tl.int32) + tl.arange(0, PIXELS)
    return first.to(tl.int64), pixel // (H * W), pixel % (H * W) // W, pixel % W


@triton.jit
def _terms(
    start: tl.tensor, TERMS: tl.constexpr, CI: tl.constexpr, PADDING: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """For the (TERMS,) terms from `start` on: their number, input channel, and steps down and right to the pixel read."""
    term = start + tl.arange(0, TERMS)
    tap = term // CI
    return term, term % CI, tap // 3 - PADDING, tap % 3 - PADDING


@triton.jit
def _rounded(tile: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    return tile.to(tl.bfloat16) if PRECISION == "bf16" else tile


@triton.jit
def _product(a: tl.tensor, b: tl.tensor, total: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    precision: tl.constexpr = "tf32" if PRECISION == "tf32" else "ieee"
    return tl.dot(a, b, total, input_precision=precision, out_dtype=total.dtype)


@triton.jit
def _dual(
    x: tl.tensor,  # (B, CI, H, W)
    x_dot: tl.tensor | None,
    weight: tl.tensor,  # (CO, 3, 3, CI)
    weight_dot: tl.tensor,
    y: tl.tensor | None,  # (B, CO, HO, WO)
    y_dot: tl.tensor,
    pixels: tl.tensor,  # B · HO · WO
    CI: tl.constexpr,
    CO: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    PADDING: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TERMS: tl.constexpr,
) -> None:
    # Programs side by side read the same pixels, which stay in the cache, for other outputs.
    blocks: tl.constexpr = (CO + OUTPUTS - 1) // OUTPUTS
    program = tl.program_id(0)
    begin = (program // blocks).to(tl.int64) * PIXELS
    output = (program % blocks) * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    first, sample, row, column = _pixels(begin, PIXELS, HO, WO)
    sample, row, column = sample[:, None], row[:, None], column[:, None]
    exists = begin + tl.arange(0, PIXELS)[:, None] < pixels
    x += first * (CI * H * W)
    if x_dot is not None:
        x_dot += first * (CI * H * W)

    total = tl.zeros((PIXELS, OUTPUTS), ACC)
    total_dot = tl.zeros((PIXELS, OUTPUTS), ACC)
    for start in range(0, 9 * CI, TERMS):
        term, channel, down, right = _terms(start, TERMS, CI, PADDING)
        source_row = row + down[None, :]
        source_column = column + right[None, :]
        pixel = source_row * W + source_column
        place = pixel * CI + channel[None, :] if CHANNELS_LAST else channel[None, :] * (H * W) + pixel
        inside = (source_row >= 0) & (source_row < H) & (source_column >= 0) & (source_column < W)
        mask = exists & inside & (term[None, :] < 9 * CI)
        factors = output * (9 * CI) + term[:, None]
        factors_mask = (output < CO) & (term[:, None] < 9 * CI)

        xs = _rounded(tl.load(x + sample * (CI * H * W) + place, mask, 0), PRECISION)
        ws = tl.load(weight + factors, factors_mask, 0)
        ws_dot = tl.load(weight_dot + factors, factors_mask, 0)
        if y is not None:
            total = _product(xs, ws, total, PRECISION)
        total_dot = _product(xs, ws_dot, total_dot, PRECISION)
        if x_dot is not None:
            xs_dot = _rounded(tl.load(x_dot + sample * (CI * H * W) + place, mask, 0), PRECISION)
            total_dot = _product(xs_dot, ws, total_dot, PRECISION)

    pixel = row * WO + column
    place = pixel * CO + output if CHANNELS_LAST else output * (HO * WO) + pixel
    place += sample * (CO * HO * WO)
    mask = exists & (output < CO)
    if y is not None:
        tl.store(y + first * (CO * HO * WO) + place, total, mask)
    tl.store(y_dot + first * (CO * HO * WO) + place, total_dot, mask)


@triton.jit
def _dual_weight_gradient(
    x: tl.tensor,  # (B, CI, H, W)
    x_dot: tl.tensor | None,
    y_bar: tl.tensor,  # (B, CO, HO, WO)
    y_bar_dot: tl.tensor,
    parts: tl.tensor,  # (PARTS, CO, 3, 3, CI)
    pixels: tl.tensor,  # B · HO · WO
    share: tl.tensor,  # pixels of a part, a multiple of PIXELS
    CI: tl.constexpr,
    CO: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    PADDING: tl.constexpr,
    X_CHANNELS_LAST: tl.constexpr,
    Y_CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TERMS: tl.constexpr,
) -> None:
    ACC: tl.constexpr = parts.dtype.element_ty
    output_blocks: tl.constexpr = (CO + OUTPUTS - 1) // OUTPUTS
    term_blocks: tl.constexpr = (9 * CI + TERMS - 1) // TERMS
    program = tl.program_id(0)
    part = (program // (output_blocks * term_blocks)).to(tl.int64)
    output = (program % output_blocks) * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    term_block = program // output_blocks % term_blocks
    term, channel, down, right = _terms(term_block * TERMS, TERMS, CI, PADDING)
    term, channel, down, right = term[:, None], channel[:, None], down[:, None], right[:, None]

    total = tl.zeros((TERMS, OUTPUTS), ACC)
    end = tl.minimum((part + 1) * share, pixels)
    for step in range(tl.cdiv(end - part * share, PIXELS)):
        begin = part * share + step * PIXELS
        first, sample, row, column = _pixels(begin, PIXELS, HO, WO)
        exists = begin + tl.arange(0, PIXELS) < end
        source_row = row[None, :] + down
        source_column = column[None, :] + right
        pixel = source_row * W + source_column
        place = pixel * CI + channel if X_CHANNELS_LAST else channel * (H * W) + pixel
        place += sample[None, :] * (CI * H * W)
        inside = (source_row >= 0) & (source_row < H) & (source_column >= 0) & (source_column < W)
        mask = exists[None, :] & inside & (term < 9 * CI)
        y_pixel = (row * WO + column)[:, None]
        y_place = y_pixel * CO + output if Y_CHANNELS_LAST else output * (HO * WO) + y_pixel
        y_place += sample[:, None] * (CO * HO * WO)
        y_mask = exists[:, None] & (output < CO)

        xs = tl.load(x + first * (CI * H * W) + place, mask, 0)
        gs_dot = tl.load(y_bar_dot + first * (CO * HO * WO) + y_place, y_mask, 0)
        total = _product(_rounded(xs, PRECISION), _rounded(gs_dot, PRECISION), total, PRECISION)
        if x_dot is not None:
            xs_dot = tl.load(x_dot + first * (CI * H * W) + place, mask, 0)
            gs = tl.load(y_bar + first * (CO * HO * WO) + y_place, y_mask, 0)
            total = _product(_rounded(xs_dot, PRECISION), _rounded(gs, PRECISION), total, PRECISION)
    tl.store(parts + (part * CO + output) * (9 * CI) + term, total, (term < 9 * CI) & (output < CO))


def conv3x3_dual(
    x: Tensor,
    x_dot: Tensor | None,
    weight: Tensor,
    weight_dot: Tensor,
    padding: int,
    precision: Precision = "tf32",
) -> tuple[Tensor, Tensor]:
    """See `mtt_fast.kernels.conv3x3_dual`. `precision` holds for float32 tensors, here and below."""
    planes = Planes.of(x, x_dot)
    grown = (planes.height + 2 * padding - 2, planes.width + 2 * padding - 2)
    y, y_dot = (planes.empty(x, len(weight), *grown) for _ in range(2))
    _launch_dual(x, x_dot, _terms_last(weight), _terms_last(weight_dot), y, y_dot, padding, precision)
    return y, y_dot


def conv3x3_tangent(
    x: Tensor,
    x_dot: Tensor | None,
    weight: Tensor,
    weight_dot: Tensor,
    padding: int,
    precision: Precision = "tf32",
) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_tangent`."""
    planes = Planes.of(x, x_dot)
    y_dot = planes.empty(x, len(weight), planes.height + 2 * padding - 2, planes.width + 2 * padding - 2)
    _launch_dual(x, x_dot, _terms_last(weight), _terms_last(weight_dot), None, y_dot, padding, precision)
    return y_dot


def conv3x3_dual_input_gradient(
    y_bar: Tensor,
    y_bar_dot: Tensor,
    weight: Tensor,
    weight_dot: Tensor,
    padding: int,
    precision: Precision = "tf32",
) -> tuple[Tensor, Tensor]:
    """See `mtt_fast.kernels.conv3x3_dual_input_gradient`."""
    x_bar, x_bar_dot = (_empty_input(y_bar, y_bar_dot, weight, padding) for _ in range(2))
    turned = (_terms_last(_turned(weight)), _terms_last(_turned(weight_dot)))
    _launch_dual(y_bar, y_bar_dot, *turned, x_bar, x_bar_dot, 2 - padding, precision)
    return x_bar, x_bar_dot


def conv3x3_input_gradient_tangent(
    y_bar: Tensor,
    y_bar_dot: Tensor,
    weight: Tensor,
    weight_dot: Tensor,
    padding: int,
    precision: Precision = "tf32",
) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_input_gradient_tangent`."""
    x_bar_dot = _empty_input(y_bar, y_bar_dot, weight, padding)
    turned = (_terms_last(_turned(weight)), _terms_last(_turned(weight_dot)))
    _launch_dual(y_bar, y_bar_dot, *turned, None, x_bar_dot, 2 - padding, precision)
    return x_bar_dot


def conv3x3_dual_weight_gradient(
    x: Tensor,
    x_dot: Tensor | None,
    y_bar: Tensor,
    y_bar_dot: Tensor,
    padding: int,
    precision: Precision = "tf32",
) -> Tensor:
    """See `mtt_fast.kernels.conv3x3_dual_weight_gradient`."""
    inputs, outputs = Planes.of(x, x_dot), Planes.of(y_bar, y_bar_dot)
    row = _configuration("conv3x3_dual_weight_gradient", x, precision)
    wanted = row.pop("PROGRAMS")
    tiles = triton.cdiv(9 * inputs.channels, row["TERMS"]) * triton.cdiv(outputs.channels, row["OUTPUTS"])
    pixels = outputs.samples * outputs.height * outputs.width
    steps = triton.cdiv(pixels, row["PIXELS"])
    share = triton.cdiv(steps, max(1, min(steps, wanted // tiles))) * row["PIXELS"]
    _check_offsets(row["PIXELS"], inputs, outputs)
    shape = (triton.cdiv(pixels, share), outputs.channels, 3, 3, inputs.channels)
    parts = torch.empty(shape, dtype=accumulator(x.dtype), device=x.device)
    launch(
        _dual_weight_gradient,
        shape[0] * tiles,
        x,
        x_dot,
        y_bar,
        y_bar_dot,
        parts,
        pixels,
        share,
        CI=inputs.channels,
        CO=outputs.channels,
        H=inputs.height,
        W=inputs.width,
        HO=outputs.height,
        WO=outputs.width,
        PADDING=padding,
        X_CHANNELS_LAST=inputs.channels_last,
        Y_CHANNELS_LAST=outputs.channels_last,
        PRECISION=_effective(x.dtype, precision),
        **row,
    )
    return parts.sum(0).permute(0, 3, 1, 2).to(x.dtype, memory_format=torch.contiguous_format)


def _launch_dual(
    x: Tensor,
    x_dot: Tensor | None,
    weight: Tensor,
    weight_dot: Tensor,
    y: Tensor | None,
    y_dot: Tensor,
    padding: int,
    precision: Precision,
) -> None:
    inputs, outputs = Planes.of(x), Planes.of(y_dot)
    row = _configuration("conv3x3_tangent" if y is None else "conv3x3_dual", x, precision)
    row["OUTPUTS"] = min(row["OUTPUTS"], max(16, triton.next_power_of_2(outputs.channels)))  # images have three
    _check_offsets(row["PIXELS"], inputs, outputs)
    effective = _effective(x.dtype, precision)
    if effective == "bf16":  # once here, not in every program
        weight, weight_dot = weight.bfloat16(), weight_dot.bfloat16()
    pixels = outputs.samples * outputs.height * outputs.width
    launch(
        _dual,
        triton.cdiv(pixels, row["PIXELS"]) * triton.cdiv(outputs.channels, row["OUTPUTS"]),
        x,
        x_dot,
        weight,
        weight_dot,
        y,
        y_dot,
        pixels,
        CI=inputs.channels,
        CO=outputs.channels,
        H=inputs.height,
        W=inputs.width,
        HO=outputs.height,
        WO=outputs.width,
        PADDING=padding,
        CHANNELS_LAST=inputs.channels_last,
        PRECISION=effective,
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        **row,
    )


def _terms_last(weight: Tensor) -> Tensor:
    """(CO, CI, 3, 3) -> (CO, 3, 3, CI): the terms of an output side by side, as tensor cores want tf32 factors."""
    return weight.permute(0, 2, 3, 1).contiguous()


def _turned(weight: Tensor) -> Tensor:
    """(CO, CI, 3, 3) -> (CI, CO, 3, 3), turned by half a circle: the weights of the input gradient."""
    return weight.flip(2, 3).transpose(0, 1)


def _empty_input(y_bar: Tensor, y_bar_dot: Tensor, weight: Tensor, padding: int) -> Tensor:
    planes = Planes.of(y_bar, y_bar_dot)
    return planes.empty(y_bar, weight.shape[1], planes.height + 2 - 2 * padding, planes.width + 2 - 2 * padding)


def _effective(dtype: torch.dtype, precision: Precision) -> str:
    """Only float32 leaves a choice."""
    return {torch.float32: str(precision), torch.bfloat16: "bf16"}.get(dtype, "fp32")


def _configuration(operation: str, x: Tensor, precision: Precision) -> Configuration:
    width = "narrow" if x.shape[1] <= NARROW else "wide"
    return dict(configuration(operation, f"{_effective(x.dtype, precision)}-{width}", architecture(x.device)))


def _check_offsets(pixels: int, inputs: Planes, outputs: Planes) -> None:
    """A tile's pixels are of so many samples, and those must be within reach of int32."""
    samples = pixels // (outputs.height * outputs.width) + 2
    if samples * max(inputs.sample_size, outputs.sample_size) >= OFFSETS:
        raise ValueError(f"expected less than 2³¹ elements in {samples} samples, found {inputs}, {outputs}")
