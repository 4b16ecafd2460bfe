"""Compute the first block, from images to pooled planes, and its derivatives in plain torch, one operation at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Affine, Convolved, Patches, Precision, plane_dtype
from .conv import (
    add_planes,
    conv3x3,
    conv3x3_dual,
    conv3x3_dual_weight_gradient,
    conv3x3_input_gradient_tangent,
    conv3x3_weight_gradient,
    rounded,
)
from .norm import norm_relu_pool, norm_relu_pool_backward, norm_relu_pool_dual, norm_relu_pool_dual_backward
from .warp import colour_warp_mask

PROBES = 256
"""Number of pixels whose mean is subtracted from each channel, since values near zero lose less to rounding."""


def image_patches(
    x: Tensor,
    padding: int,
    precision: Precision = "fp32",
    index: Tensor | None = None,
    parameters: Tensor | None = None,
) -> Patches:
    """Return the patches of images (n, C, H, W), gathered and augmented, less the mean of PROBES pixels of each channel."""
    if index is not None:
        x = x[index]
    if parameters is not None:
        x = colour_warp_mask(x, parameters)
    height, width = x.shape[2:]
    probes = torch.arange(PROBES, device=x.device) * (height * width) // PROBES
    images = F.pad(x, (padding,) * 4) - x.flatten(2)[:, :, probes].mean(2)[:, :, None, None]
    images = rounded(images, precision).permute(0, 2, 3, 1).contiguous()
    dtype = plane_dtype(x.dtype, precision)
    return Patches(images.to(dtype), gram_of(images), padding)


def gram_of(images: Tensor) -> Tensor:
    """Return the sums (B, 1, 9·C + 1, 9·C + 1) of `Patches` of padded images (B, H + 2·padding, W + 2·padding, C)."""
    terms = F.unfold(images.permute(0, 3, 1, 2), 3).unflatten(1, (images.shape[-1], 9)).transpose(1, 2).flatten(1, 2)
    terms = torch.cat([terms, torch.ones_like(terms[:, :1])], 1)  # (B, 9·C + 1, pixels)
    return (terms @ terms.mT)[:, None]


def conv_norm_relu_pool(
    patches: Patches, weight: Tensor, affine: Affine, eps: float, precision: Precision = "fp32"
) -> tuple[Tensor, None]:
    """Return p (B, K, H'//2, W'//2); nothing is folded."""
    y = conv3x3(_planes(patches), weight, 0, precision)
    return norm_relu_pool(y, affine, eps)[0], None


def conv_norm_relu_pool_backward(
    patches: Patches,
    weight: Tensor,
    affine: Affine,
    p_bar: Convolved,
    folded: None,
    eps: float,
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return summands of W̄ (S, K, C, 3, 3), γ̄, β̄ (S, K)."""
    x = _planes(patches)
    y = conv3x3(x, weight, 0, precision)
    _, mean, rstd = norm_relu_pool(y, affine, eps)
    (p_bar,) = add_planes(p_bar)
    y_bar, gamma_bar, beta_bar = norm_relu_pool_backward(y, mean, rstd, affine, p_bar)
    return conv3x3_weight_gradient(x, y_bar, 0, precision), gamma_bar, beta_bar


def conv_norm_relu_pool_dual(
    patches: Patches,
    weight: Tensor,
    weight_dot: Tensor,
    affine: Affine,
    affine_dot: Affine,
    eps: float,
    precision: Precision = "fp32",
) -> tuple[Tensor, Tensor, None]:
    """Return p, ṗ (B, K, H'//2, W'//2); nothing is folded."""
    y, y_dot = conv3x3_dual(_planes(patches), None, weight, weight_dot, 0, precision)
    p, p_dot, _ = norm_relu_pool_dual(y, y_dot, affine, affine_dot, eps)
    return p, p_dot, None


def conv_norm_relu_pool_dual_backward(
    patches: Patches,
    weight: Tensor,
    weight_dot: Tensor,
    affine: Affine,
    affine_dot: Affine,
    p_bar: Convolved,
    p_bar_dot: Convolved,
    folded: None,
    eps: float,
    precision: Precision = "fp32",
    divisors: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x̄̇ (B, C, H, W), divided by the divisors, and summands of W̄̇ (S, K, C, 3, 3), γ̄̇, β̄̇ (S, K)."""
    x, padding = _planes(patches), patches.padding
    y, y_dot = conv3x3_dual(x, None, weight, weight_dot, 0, precision)
    stats = norm_relu_pool_dual(y, y_dot, affine, affine_dot, eps)[2]
    p_bar, p_bar_dot = add_planes(p_bar, p_bar_dot)
    y_bar, y_bar_dot, gamma_bar_dot, beta_bar_dot = norm_relu_pool_dual_backward(
        y, y_dot, stats, affine, affine_dot, p_bar, p_bar_dot
    )
    weight_bar_dot = conv3x3_dual_weight_gradient(x, None, y_bar, y_bar_dot, 0, precision)
    x_bar_dot = conv3x3_input_gradient_tangent(y_bar, y_bar_dot, weight, weight_dot, 0, precision)
    x_bar_dot = F.pad(x_bar_dot, (-padding,) * 4).to(weight.dtype).contiguous()
    for divisor in divisors:
        x_bar_dot = x_bar_dot / divisor
    return x_bar_dot, weight_bar_dot, gamma_bar_dot, beta_bar_dot


def _planes(patches: Patches) -> Tensor:
    """Return the padded images (B, C, H + 2·padding, W + 2·padding). Their shift makes no difference after a norm."""
    return patches.images.permute(0, 3, 1, 2)
