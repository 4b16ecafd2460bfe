"""Compute the first block, from images to pooled planes, with derivatives.

The block convolves 3×3, normalises each plane, scales, takes ReLU and pools 2×2. A back end that fuses these stores no planes in
between. `dispatch.has_image_block` tells for which blocks there is one; the reference computes the others. Images have no
tangent, since they do not depend on the parameters.
"""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..checks import check_batch_images, check_parts, check_tensors
from ..types import Affine, BatchImages, Convolved, Folded, Patches, Precision, accumulator, planes_of
from .norm import with_dots


def image_patches(
    x: Tensor,
    padding: int,
    precision: Precision = "fp32",
    index: Tensor | None = None,
    parameters: Tensor | None = None,
) -> Patches:
    """Return the patches of images `x` (B, C, H, W), float32 or float64, contiguous or channels_last, for the first block.

    With `index` (B,) int64 the images are those rows of `x` (n, C, H, W). With `parameters` (B, 13) `colour_warp_mask` augments
    them, and `x` is contiguous. `padding` is that of the convolution. The block's planes have the images' dtype; with fp16 or
    bf16, those of float32 images are float16 or bfloat16. Raises `ValueError` for anything else, and for images too small to
    convolve and pool. On a GPU an index out of range is not checked, since that would synchronise.
    """
    op = "image_patches"
    check_batch_images(op, BatchImages(x, padding, index, parameters))
    index = None if index is None else index.contiguous()
    implementation = dispatch.block_implementation_of(op, x.shape[1], None, x.device, precision)
    patches: Patches = implementation(x, padding, index=index, parameters=parameters)
    return patches


def conv_norm_relu_pool(
    patches: Patches, weight: Tensor, affine: Affine, eps: float, precision: Precision = "fp32"
) -> tuple[Tensor, Folded | None]:
    """Return the pooled planes p (B, K, H'//2, W'//2), channels_last, and the folded norm that the backward takes.

    `weight` (K, C, 3, 3), `affine` (K,) each, float64 for float64 planes and else float32; H' = H + 2·padding − 2. `precision`
    is that of the patches. An odd last row or column counts in the statistics and is not pooled.
    Raises `ValueError` for anything else.
    """
    op = "conv_norm_relu_pool"
    _check(op, patches, {"weight": weight}, affine._asdict(), {})
    p, folded = _implementation(op, weight, precision)(patches, weight, affine, eps)
    return p, folded


def conv_norm_relu_pool_backward(
    patches: Patches,
    weight: Tensor,
    affine: Affine,
    p_bar: Convolved,
    folded: Folded | None,
    eps: float,
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return summands of the gradients W̄ (S, K, C, 3, 3), γ̄ and β̄ (S, K), given the gradient `p_bar`.

    `p_bar` (B, K, H'//2, W'//2) is channels_last, of the planes' dtype, and may be partial sums (`PartialPlanes`), which are
    added up. `folded` is the result of `conv_norm_relu_pool` for the same arguments. Errors are those of
    `conv_norm_relu_pool`.
    """
    op = "conv_norm_relu_pool_backward"
    _check(op, patches, {"weight": weight}, affine._asdict(), {"p_bar": p_bar})
    implementation = _implementation(op, weight, precision)
    weight_bar, gamma_bar, beta_bar = implementation(patches, weight, affine, p_bar, folded, eps)
    return weight_bar, gamma_bar, beta_bar


def conv_norm_relu_pool_dual(
    patches: Patches,
    weight: Tensor,
    weight_dot: Tensor,
    affine: Affine,
    affine_dot: Affine,
    eps: float,
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor, Folded | None]:
    """Return p and its derivative ṗ (B, K, H'//2, W'//2), and the folded norm that the backward takes.

    Shapes and errors are those of `conv_norm_relu_pool`.
    """
    op = "conv_norm_relu_pool_dual"
    _check(op, patches, {"weight": weight, "weight_dot": weight_dot}, with_dots(affine, affine_dot), {})
    implementation = _implementation(op, weight, precision)
    p, p_dot, folded = implementation(patches, weight, weight_dot, affine, affine_dot, eps)
    return p, p_dot, folded


def conv_norm_relu_pool_dual_backward(
    patches: Patches,
    weight: Tensor,
    weight_dot: Tensor,
    affine: Affine,
    affine_dot: Affine,
    p_bar: Convolved,
    p_bar_dot: Convolved,
    folded: Folded | None,
    eps: float,
    precision: Precision = "fp32",
    divisors: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the derivatives of the gradients: x̄̇ (B, C, H, W), contiguous, and summands of W̄̇ (S, K, C, 3, 3), γ̄̇, β̄̇ (S, K).

    All have the parameters' dtype. Only x̄̇ is divided by the `divisors`: at most two, each a power of two () of that dtype, in
    2⁻¹²⁶ … 2¹²⁶. `folded` is what `conv_norm_relu_pool_dual` returned for the same arguments. `p_bar`, `p_bar_dot` and errors are
    those of `conv_norm_relu_pool_backward`.
    """
    op = "conv_norm_relu_pool_dual_backward"
    weights, bars = {"weight": weight, "weight_dot": weight_dot}, {"p_bar": p_bar, "p_bar_dot": p_bar_dot}
    _check(op, patches, weights, with_dots(affine, affine_dot), bars)
    if len(divisors) > 2:
        raise ValueError(f"{op}: expected at most two divisors, found {len(divisors)}")
    check_tensors(op, weight, {f"divisor {number}": each for number, each in enumerate(divisors, 1)}, ())
    implementation = _implementation(op, weight, precision)
    directions = (weight, weight_dot, affine, affine_dot)
    x_bar_dot, *parameters = implementation(patches, *directions, p_bar, p_bar_dot, folded, eps, divisors=divisors)
    weight_bar_dot, gamma_bar_dot, beta_bar_dot = parameters
    return x_bar_dot, weight_bar_dot, gamma_bar_dot, beta_bar_dot


def _check(
    op: str, patches: Patches, weights: dict[str, Tensor], channels: dict[str, Tensor], pooled: dict[str, Convolved]
) -> None:
    """Raise `ValueError` unless parameters and pooled planes fit the patches (B, H + 2·padding, W + 2·padding, C)."""
    batch, height, width, image_channels = patches.images.shape
    weight, wide = weights["weight"], accumulator(patches.images.dtype)
    if weight.dim() != 4 or len(weight) < 1 or weight.shape[1:] != (image_channels, 3, 3):
        raise ValueError(f"{op}: expected 3×3 weights of {image_channels} channels, found {tuple(weight.shape)}")
    check_tensors(op, patches.images, weights, weight.shape, dtype=wide)
    check_tensors(op, patches.images, channels, (len(weight),), dtype=wide)
    pooled_shape = (batch, len(weight), (height - 2) // 2, (width - 2) // 2)
    bars = {name: planes_of(each) for name, each in pooled.items()}
    check_tensors(op, patches.images, bars, pooled_shape, like_format=patches.images.permute(0, 3, 1, 2))
    for name, each in pooled.items():
        check_parts(op, name, each)


def _implementation(op: str, weight: Tensor, precision: Precision) -> dispatch.Implementation:
    return dispatch.block_implementation_of(op, weight.shape[1], len(weight), weight.device, precision)
