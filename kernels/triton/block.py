"""Compute the first block, from images to pooled planes, with derivatives, and store no planes in between.

The convolution is linear in the patch x̃ of a pixel (patches.py). So all statistics of the norm follow from the sums Σ x̃x̃ᵀ,
which are small. The norm is folded into weights of each sample: u = f·x̃ and u̇ = ḟ·x̃. All sums of the backward over a plane
follow from U = Σ x̃ū and U̇ = Σ x̃ū̇. The gradient x̄̇ follows from T = ū·ḟᵀ + ū̇·fᵀ + x̃·M, which is a patch at each pixel.
docs/adjoint.md derives this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..types import (
    Affine,
    BatchImages,
    ConvLayer,
    Convolved,
    Folded,
    ImageBlockBytes,
    Patches,
    Precision,
    accumulator,
    plane_dtype,
    planes_of,
)
from . import has_image_block
from .block_kernels import col2im, finish, pool, spread, sum_patches
from .configurations import BATCHES, Configuration, configuration, rounded_up
from .launch import architecture, launch, tl, triton
from .partial_planes import part_arguments, part_counts
from .patches import ONES, gather
from .planes import OFFSETS, Planes

MOST_REGISTERS = 255  # that a thread can have
SIZES = (256, 1024, 4096, 16384)  # pixels that separate the classes of shapes; the last has larger planes too


@dataclass(frozen=True)
class _Block:
    """Sizes and precision of a block, named as the constexpr parameters of the kernels."""

    C: int
    K: int
    HP: int
    WP: int
    TERMS: int
    PRECISION: str
    ACC: Any

    @classmethod
    def from_operands(cls, patches: Patches, weight: Tensor, precision: Precision) -> _Block:
        """Return the sizes of the block that convolves `patches` with `weight` (K, C, 3, 3)."""
        _, height, width, channels = patches.images.shape
        return cls.of_layer(ConvLayer(channels, height, width, len(weight), 0), weight.dtype, precision)

    @classmethod
    def of_layer(cls, layer: ConvLayer, dtype: torch.dtype, precision: Precision) -> _Block:
        """Return the sizes of the block that convolves as `layer` does, with parameters of `dtype`."""
        effective, acc = ("fp64", tl.float64) if dtype == torch.float64 else (precision, tl.float32)
        height, width, terms = layer.out_height + 2, layer.out_width + 2, _patch_terms(layer.channels)
        return cls(layer.channels, layer.filters, height, width, terms, effective, acc)

    @property
    def pooled(self) -> tuple[int, int]:
        """Return the height and width of the pooled planes."""
        return (self.HP - 2) // 2, (self.WP - 2) // 2

    def row(self, operation: str, batch: int, device: torch.device) -> Configuration:
        """Return the configuration of `operation` for `batch` samples, with a BLOCK_C that divides the number of filters."""
        row = _row(operation, self.PRECISION, (self.HP - 2) * (self.WP - 2), batch, device)
        row["BLOCK_C"] = min(row["BLOCK_C"], self.K & -self.K)
        return row


def image_patches(
    x: Tensor, padding: int, precision: Precision, index: Tensor | None = None, parameters: Tensor | None = None
) -> Patches:
    """See `mtt_fast.kernels.image_patches`."""
    gathering = gathering_of(BatchImages(x, padding, index, parameters), precision)
    launch(gather, gathering.programs, *gathering.arguments, **gathering.sizes._asdict(), **gathering.options)
    return gathering.patches


class PatchSizes(NamedTuple):
    """The constexpr parameters of `gather`."""

    C: int
    H: int
    W: int
    PADDING: int
    CHANNELS_LAST: bool
    TERMS: int
    PRECISION: str
    BLOCK_C: int
    BLOCK_M: int
    ELEMENTS: int


class Gathering(NamedTuple):
    """A launch of `gather`, and the patches that it fills."""

    patches: Patches
    programs: int
    arguments: tuple[Any, ...]
    sizes: PatchSizes
    options: dict[str, int]  # of the launch: num_warps, num_stages


def gathering_of(batch: BatchImages, precision: Precision) -> Gathering:
    """Return the launch that makes the patches of a batch. Raises `ValueError` for more channels than a patch has terms for."""
    x, padding, indices, warp = batch
    channels, height, width = x.shape[1:]
    if not has_image_block(channels, None):
        raise ValueError(f"expected images of fewer channels, found {channels}; use mtt_fast.kernels.image_patches")
    samples = len(x) if indices is None else len(indices)
    padded = (height + 2 * padding, width + 2 * padding)
    terms = _patch_terms(channels)
    if terms * padded[0] * padded[1] >= OFFSETS:
        raise ValueError(f"expected less than 2³¹ numbers in a sample's patches, found shape {tuple(x.shape)}")
    effective = "fp64" if x.dtype == torch.float64 else precision
    dtype = plane_dtype(x.dtype, precision)
    images = torch.empty((samples, *padded, channels), dtype=dtype, device=x.device)
    pixels = (padded[0] - 2) * (padded[1] - 2)
    row = _row("image_patches", effective, pixels, samples, x.device)
    parts, tiles = _split_pixels(row, pixels, samples)
    gram = _empty(x, (samples, parts, 9 * channels + 1, 9 * channels + 1))
    sizes = PatchSizes(
        C=channels,
        H=height,
        W=width,
        PADDING=padding,
        CHANNELS_LAST=not x.is_contiguous(),
        TERMS=terms,
        PRECISION=effective,
        BLOCK_C=triton.next_power_of_2(channels),
        BLOCK_M=row.pop("BLOCK_M"),
        ELEMENTS=row.pop("ELEMENTS"),
    )
    arguments = (x, indices, warp, images, gram, parts, tiles)
    return Gathering(Patches(images, gram, padding), samples * parts, arguments, sizes, row)


def conv_norm_relu_pool(
    patches: Patches, weight: Tensor, affine: Affine, eps: float, precision: Precision
) -> tuple[Tensor, Folded]:
    """See `mtt_fast.kernels.conv_norm_relu_pool`."""
    p, _, folded = _pool("conv_norm_relu_pool", patches, weight, None, affine, None, eps, precision)
    return p, folded


def conv_norm_relu_pool_backward(
    patches: Patches,
    weight: Tensor,
    affine: Affine,
    p_bar: Convolved,
    folded: Folded,
    eps: float,
    precision: Precision,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.conv_norm_relu_pool_backward`."""
    block = _Block.from_operands(patches, weight, precision)
    sums = _sum_patches("conv_norm_relu_pool_backward", block, patches, folded, p_bar, None)
    gradients, _ = _parameter_gradients(block, patches, folded, weight, None, affine, None, *sums)
    return gradients


def conv_norm_relu_pool_dual(
    patches: Patches,
    weight: Tensor,
    weight_dot: Tensor,
    affine: Affine,
    affine_dot: Affine,
    eps: float,
    precision: Precision,
) -> tuple[Tensor, Tensor, Folded]:
    """See `mtt_fast.kernels.conv_norm_relu_pool_dual`."""
    name = "conv_norm_relu_pool_dual"
    p, p_dot, folded = _pool(name, patches, weight, weight_dot, affine, affine_dot, eps, precision)
    assert p_dot is not None
    return p, p_dot, folded


def conv_norm_relu_pool_dual_backward(
    patches: Patches,
    weight: Tensor,
    weight_dot: Tensor,
    affine: Affine,
    affine_dot: Affine,
    p_bar: Convolved,
    p_bar_dot: Convolved,
    folded: Folded,
    eps: float,
    precision: Precision,
    divisors: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.conv_norm_relu_pool_dual_backward`."""
    block = _Block.from_operands(patches, weight, precision)
    sums = _sum_patches("conv_norm_relu_pool_dual_backward", block, patches, folded, p_bar, p_bar_dot)
    gradients, linear = _parameter_gradients(block, patches, folded, weight, weight_dot, affine, affine_dot, *sums)
    del sums
    assert linear is not None
    bars = (planes_of(p_bar), planes_of(p_bar_dot))  # `_sum_patches` has stored the sums of parts in these
    return _image_gradient(block, patches, folded, linear, *bars, divisors), *gradients


def image_block_bytes(
    batch: int, layer: ConvLayer, dtype: torch.dtype, device: torch.device, precision: Precision
) -> ImageBlockBytes:
    """See `mtt_fast.kernels.image_block_bytes`."""
    wide = accumulator(dtype)
    block = _Block.of_layer(layer, wide, precision)
    pixels, folded = layer.out_height * layer.out_width, block.TERMS * block.K
    gram_parts, _ = _split_pixels(_row("image_patches", block.PRECISION, pixels, batch, device), pixels, batch)
    parts, dual_parts = (
        _split_windows(block, block.row(operation, batch, device), batch)[1]
        for operation in ("conv_norm_relu_pool_backward", "conv_norm_relu_pool_dual_backward")
    )
    blocks = block.K // block.row("conv_norm_relu_pool_finish", batch, device)["BLOCK_C"]
    padded = block.C * block.HP * block.WP
    sample = ImageBlockBytes(
        patches=dtype.itemsize * padded + wide.itemsize * gram_parts * (9 * block.C + 1) ** 2,
        folded=dtype.itemsize * folded,
        sums=wide.itemsize * parts * folded,
        dual_sums=wide.itemsize * 2 * dual_parts * folded,
        linear=wide.itemsize * blocks * block.TERMS**2,
        columns=dtype.itemsize * block.TERMS * pixels,
    )
    return ImageBlockBytes(*(batch * size for size in sample))


def _pool(
    operation: str,
    patches: Patches,
    weight: Tensor,
    weight_dot: Tensor | None,
    affine: Affine,
    affine_dot: Affine | None,
    eps: float,
    precision: Precision,
) -> tuple[Tensor, Tensor | None, Folded]:
    """Return p and, with a direction, ṗ, both (B, K, H'//2, W'//2), channels_last, and the folded norm for the backward."""
    block, batch = _Block.from_operands(patches, weight, precision), len(patches.images)
    row = block.row(operation, batch, weight.device)
    images, planes = patches.images, Planes(batch, block.K, *block.pooled, torch.channels_last)
    folded, folded_dot, p_dot = _empty(images, (batch, block.TERMS, block.K)), None, None
    if weight_dot is None:
        p = planes.empty(images, block.K, *block.pooled)
    else:
        p, p_dot = planes.empty_pair(images, block.K, *block.pooled)
        folded_dot = torch.empty_like(folded)
    stats = _empty(weight, (batch, 4, block.K))
    blocks, parts, tiles = _split_windows(block, row, batch)
    launch(
        pool,
        batch * parts * blocks,
        *(images, patches.gram, patches.gram.shape[1]),
        *(weight, weight_dot, *affine, *(affine_dot or (None, None))),
        *(folded, folded_dot, stats, p, p_dot, parts, tiles),
        EPS=eps,
        **vars(block),
        **row,
    )
    return p, p_dot, Folded(folded, folded_dot, stats)


def _sum_patches(
    operation: str, block: _Block, patches: Patches, folded: Folded, p_bar: Convolved, p_bar_dot: Convolved | None
) -> tuple[Tensor, Tensor | None]:
    """Return U and, with a direction, U̇ of each part of the windows, (B, parts, TERMS, K).

    Partial sums of p̄ and p̄̇ are added up too, and stored in their `planes`.
    """
    batch, bars = len(patches.images), (planes_of(p_bar), None if p_bar_dot is None else planes_of(p_bar_dot))
    row = block.row(operation, batch, folded.stats.device)
    blocks, parts, tiles = _split_windows(block, row, batch)
    shape = (batch, parts, block.TERMS, block.K)
    sums = _empty(folded.stats, shape)
    sums_dot = None if p_bar_dot is None else _empty(folded.stats, shape)
    counts = part_counts(p_bar, p_bar_dot)
    if any(counts.values()):
        row["maxnreg"] = MOST_REGISTERS  # else ptxas spills registers in order to use no more than half of them
    launch(
        sum_patches,
        batch * parts * blocks,
        *(patches.images, folded.weight, *bars, sums, sums_dot, parts, tiles),
        *part_arguments(p_bar, p_bar_dot),
        **counts,
        PARTS_AT_ONCE=math.gcd(3, *counts.values()),
        **vars(block),
        **row,
    )
    return sums, sums_dot


def _parameter_gradients(
    block: _Block,
    patches: Patches,
    folded: Folded,
    weight: Tensor,
    weight_dot: Tensor | None,
    affine: Affine,
    affine_dot: Affine | None,
    sums: Tensor,
    sums_dot: Tensor | None,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """Return the gradients of the weight (B, K, C, 3, 3), γ and β (B, K) of each sample, and None.

    With a direction, return the derivatives of these gradients, and M as a summand (B, blocks, TERMS, TERMS) for each block of
    filters.
    """
    row = block.row("conv_norm_relu_pool_finish", len(sums), weight.device)
    batch, blocks = len(sums), block.K // row["BLOCK_C"]
    gradients = _empty(weight, (batch, weight.numel() + 2 * block.K))
    linear = None if weight_dot is None else _empty(weight, (batch, blocks, block.TERMS, block.TERMS))
    launch(
        finish,
        batch * blocks,
        *(patches.gram, patches.gram.shape[1], folded.stats, weight, weight_dot),
        *(affine.gamma, affine_dot and affine_dot.gamma),
        *(sums, sums_dot, sums.shape[1], gradients, linear),
        **vars(block),
        **row,
    )
    weight_bar, gamma_bar, beta_bar = gradients.split([weight.numel(), block.K, block.K], dim=1)
    return (weight_bar.unflatten(1, weight.shape), gamma_bar, beta_bar), linear


def _image_gradient(
    block: _Block,
    patches: Patches,
    folded: Folded,
    linear: Tensor,
    p_bar: Tensor,
    p_bar_dot: Tensor,
    divisors: tuple[Tensor, ...],
) -> Tensor:
    """Return x̄̇ (B, C, H, W), divided by at most two divisors, given M as `linear` and the gradients p̄ and p̄̇."""
    batch, device = len(p_bar), p_bar.device
    height, width = block.HP - 2, block.WP - 2
    row = block.row("conv_norm_relu_pool_columns", batch, device)
    columns = _empty(patches.images, (batch, height, width, block.TERMS))
    windows = triton.cdiv(height, 2) * triton.cdiv(width, 2)
    tensors = (patches.images, folded.weight, folded.weight_dot, p_bar, p_bar_dot, linear, columns)
    programs = batch * triton.cdiv(windows, row["WINDOWS"])
    launch(spread, programs, *tensors, linear.shape[1], **vars(block), **row)

    sides = (block.HP - 2 * patches.padding, block.WP - 2 * patches.padding)
    x_bar_dot = _empty(linear, (batch, block.C, *sides))
    row = _row("conv_norm_relu_pool_col2im", block.PRECISION, math.prod(sides), batch, device)
    launch(
        col2im,
        batch * triton.cdiv(math.prod(sides), row["BLOCK_M"]),
        columns,
        *(*divisors, None, None)[:2],
        x_bar_dot,
        C=block.C,
        H=sides[0],
        W=sides[1],
        PADDING=patches.padding,
        TERMS=block.TERMS,
        **row,
    )
    return x_bar_dot


def _patch_terms(channels: int) -> int:
    """Return TERMS, the size of a patch in the kernels: its numbers and ONES ones, rounded up to a power of two."""
    terms: int = triton.next_power_of_2(9 * channels + ONES.value)
    return terms


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Allocate a tensor of `shape` with the dtype and device of `like`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def shape_classes(precision: str, pixels: int, batch: int) -> tuple[str, str, str]:
    """Return the table's classes for `batch` planes of `pixels` pixels, the closest first. fp16 uses the classes of bf16."""
    precision = "bf16" if precision == "fp16" else precision
    closely = f"{precision}-{rounded_up(pixels, SIZES)}"
    return f"{closely}-{rounded_up(batch, BATCHES)}", closely, precision


def _row(operation: str, precision: str, pixels: int, batch: int, device: torch.device) -> Configuration:
    """Return a new copy of the configuration of `operation`."""
    return configuration(operation, architecture(device), *shape_classes(precision, pixels, batch))


def _split_pixels(row: Configuration, pixels: int, batch: int) -> tuple[int, int]:
    """Return the parts of a sample's pixels, for about PROGRAMS programs in all, and the tiles in a part. Removes PROGRAMS."""
    return _split_tiles(triton.cdiv(pixels, row["BLOCK_M"]), row.pop("PROGRAMS") // batch)


def _split_windows(block: _Block, row: Configuration, batch: int) -> tuple[int, int, int]:
    """Return the blocks of filters, the parts of the windows, and the tiles in a part, for about PROGRAMS programs in all.

    PROGRAMS is removed from `row`, since it is not a parameter of a kernel.
    """
    blocks = block.K // row["BLOCK_C"]
    tiles = triton.cdiv(math.prod(block.pooled), row["WINDOWS"])
    return blocks, *_split_tiles(tiles, row.pop("PROGRAMS") // (batch * blocks))


def _split_tiles(tiles: int, most: int) -> tuple[int, int]:
    """Return the number of parts for `tiles`, about `most`, and the number of tiles in each part but the last."""
    each = triton.cdiv(tiles, max(1, min(tiles, most)))
    return triton.cdiv(tiles, each), each
