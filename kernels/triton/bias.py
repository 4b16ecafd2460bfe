"""Add a bias, take ReLU and average-pool 2×2, with derivatives: the end of a block without a norm.

A kernel passes over the planes once, in parts (channels_last_planes.py). It computes the primal's values and, with a direction, their
derivatives. Without a direction, all `_dot` arguments are None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import accumulator
from .channels_last_planes import (
    by_channels_last,
    launch_parts,
    parts_of_windows,
    pooled_pixels,
    program_part,
    quarter_pixels,
    tile_of,
)
from .launch import tl, triton
from .planes import Planes, empty_pool, output_buffer


@triton.jit
def _forward(
    y: tl.tensor,  # (B, H, W, C)
    y_dot: tl.tensor | None,
    beta: tl.tensor,  # (C,)
    beta_dot: tl.tensor | None,
    p: tl.tensor,  # (B, H//2, W//2, C)
    p_dot: tl.tensor | None,
    ACC: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WINDOWS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Store p and, with a direction, ṗ of one part of the planes."""
    sample, part, c, channel_mask = program_part(PARTS, C, BLOCK_C)
    y += sample * (H * W * C)
    p += sample * ((H // 2) * (W // 2) * C)
    b = tl.load(beta + c, channel_mask, 0).to(ACC)
    if y_dot is not None:
        y_dot += sample * (H * W * C)
        p_dot += sample * ((H // 2) * (W // 2) * C)
        b_dot = tl.load(beta_dot + c, channel_mask, 0).to(ACC)
    for tile in range(TILES):
        window = (part * TILES + tile) * WINDOWS + tl.arange(0, WINDOWS)[:, None]
        pooled = tl.zeros((WINDOWS, BLOCK_C), ACC)
        pooled_dot = tl.zeros((WINDOWS, BLOCK_C), ACC)
        for quarter in tl.static_range(4):
            pixel, mask = quarter_pixels(window, quarter, H, W, WHOLE)
            u = tl.load(y + pixel * C + c, mask & channel_mask, 0).to(ACC) + b
            pooled += tl.where(u <= 0, 0, u)
            if y_dot is not None:
                u_dot = tl.load(y_dot + pixel * C + c, mask & channel_mask, 0).to(ACC) + b_dot
                pooled_dot += tl.where(u <= 0, 0, u_dot)
        pooled_pixel, mask = pooled_pixels(window, H, W, WHOLE)
        tl.store(p + pooled_pixel * C + c, pooled * 0.25, mask & channel_mask)
        if y_dot is not None:
            tl.store(p_dot + pooled_pixel * C + c, pooled_dot * 0.25, mask & channel_mask)


@triton.jit
def _backward(
    y: tl.tensor,  # (B, H, W, C)
    beta: tl.tensor,  # (C,)
    p_bar: tl.tensor,  # (B, H//2, W//2, C)
    p_bar_dot: tl.tensor | None,
    y_bar: tl.tensor,  # (B, H, W, C); may be the memory of y: a pixel is read before it is written
    y_bar_dot: tl.tensor | None,
    beta_sums: tl.tensor,  # (B, PARTS, C): of ū, with a direction of ū̇; the caller sums over B and PARTS
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WINDOWS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Store ȳ and, with a direction, ȳ̇ of one part of the planes, and the sums for β."""
    ACC: tl.constexpr = beta_sums.dtype.element_ty
    sample, part, c, channel_mask = program_part(PARTS, C, BLOCK_C)
    y += sample * (H * W * C)
    y_bar += sample * (H * W * C)
    p_bar += sample * ((H // 2) * (W // 2) * C)
    if p_bar_dot is not None:
        y_bar_dot += sample * (H * W * C)
        p_bar_dot += sample * ((H // 2) * (W // 2) * C)
    b = tl.load(beta + c, channel_mask, 0).to(ACC)
    total = tl.zeros((WINDOWS, BLOCK_C), ACC)
    for tile in range(TILES):
        window = (part * TILES + tile) * WINDOWS + tl.arange(0, WINDOWS)[:, None]
        # p̄ loads as zero outside the pooled plane, so incomplete windows add nothing to the sums.
        pooled_pixel, mask = pooled_pixels(window, H, W, WHOLE)
        share = tl.load(p_bar + pooled_pixel * C + c, mask & channel_mask, 0).to(ACC) * 0.25
        if p_bar_dot is not None:
            share_dot = tl.load(p_bar_dot + pooled_pixel * C + c, mask & channel_mask, 0).to(ACC) * 0.25
        for quarter in tl.static_range(4):
            pixel, mask = quarter_pixels(window, quarter, H, W, WHOLE)
            active = tl.load(y + pixel * C + c, mask & channel_mask, 0).to(ACC) + b > 0
            u_bar = tl.where(active, share, 0)
            tl.store(y_bar + pixel * C + c, u_bar, mask & channel_mask)
            if p_bar_dot is not None:
                u_bar = tl.where(active, share_dot, 0)
                tl.store(y_bar_dot + pixel * C + c, u_bar, mask & channel_mask)
            total += u_bar
    tl.store(beta_sums + (sample * PARTS + part) * C + c, tl.sum(total, 0, keep_dims=True), channel_mask)


@by_channels_last
def bias_relu_pool(y: Tensor, beta: Tensor) -> Tensor:
    """See `mtt_fast.kernels.bias_relu_pool`."""
    planes = Planes.from_tensors(y)
    p = empty_pool(y, planes)
    _run_forward("bias_relu_pool", planes, y, None, beta, None, p, None)
    return p


@by_channels_last
def bias_relu_pool_backward(y: Tensor, beta: Tensor, p_bar: Tensor, reuse: bool = False) -> tuple[Tensor, Tensor]:
    """See `mtt_fast.kernels.bias_relu_pool_backward`."""
    planes, y_bar = Planes.from_tensors(y, p_bar), output_buffer(y, reuse)
    return y_bar, _run_backward("bias_relu_pool_backward", planes, y, beta, p_bar, None, y_bar, None)


@by_channels_last
def bias_relu_pool_dual(y: Tensor, y_dot: Tensor, beta: Tensor, beta_dot: Tensor) -> tuple[Tensor, Tensor]:
    """See `mtt_fast.kernels.bias_relu_pool_dual`."""
    planes = Planes.from_tensors(y, y_dot)
    p, p_dot = (empty_pool(y, planes) for _ in range(2))
    _run_forward("bias_relu_pool_dual", planes, y, y_dot, beta, beta_dot, p, p_dot)
    return p, p_dot


@by_channels_last
def bias_relu_pool_dual_backward(
    y: Tensor, beta: Tensor, p_bar: Tensor, p_bar_dot: Tensor, reuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.bias_relu_pool_dual_backward`."""
    planes = Planes.from_tensors(y, p_bar, p_bar_dot)
    y_bar, y_bar_dot = output_buffer(y, reuse), torch.empty_like(y)
    arguments = (y, beta, p_bar, p_bar_dot, y_bar, y_bar_dot)
    return y_bar, y_bar_dot, _run_backward("bias_relu_pool_dual_backward", planes, *arguments)


def _run_forward(operation: str, planes: Planes, y: Tensor, *rest: Tensor | None) -> None:
    """Run the forward kernel. `rest` is y_dot, beta, beta_dot, p, p_dot."""
    kind = tl.float64 if accumulator(y.dtype) == torch.float64 else tl.float32
    tile = tile_of(operation, planes, y)
    launch_parts(_forward, planes, tile, parts_of_windows(planes, tile), y, *rest, ACC=kind)


def _run_backward(operation: str, planes: Planes, y: Tensor, *rest: Tensor | None) -> Tensor:
    """Run the backward kernel. Return the summands (S, C) of the sum of ū or, with a direction, of ū̇."""
    tile = tile_of(operation, planes, y)
    parts = parts_of_windows(planes, tile)
    shape = (planes.samples * parts, planes.channels)
    beta_sums = torch.empty(shape, dtype=accumulator(y.dtype), device=y.device)
    launch_parts(_backward, planes, tile, parts, y, *rest, beta_sums)
    return beta_sums
