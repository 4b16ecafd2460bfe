"""Compute a linear classifier of planes and its derivatives, given those of the logits, in plain torch on any device.

The reference's `linear_cross_entropy` uses these functions, and so does the engine's classifier with a user's loss. A name with
`_dot` is the derivative in a direction, one with `_bar` the gradient of the loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import LARGEST_COTANGENT, accumulator, in_format_of
from .flat import power_of_two


def linear(p: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the logits o (B, K) of planes `p` (B, C, h, w), with `weight` (K, C·h·w) and `bias` (K,)."""
    return F.linear(_features(p), weight, bias)


def linear_dual(
    p: Tensor, p_dot: Tensor, weight: Tensor, bias: Tensor, weight_dot: Tensor, bias_dot: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the logits o and their derivative ȯ, both (B, K)."""
    features = _features(p)
    o_dot = F.linear(features, weight_dot, bias_dot) + F.linear(_features(p_dot), weight)
    return F.linear(features, weight, bias), o_dot


def linear_backward(p: Tensor, weight: Tensor, o_bar: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return p̄ (like `p`), Ā (K, C·h·w), c̄ (K,), and their factor `scale` (None for 1), from ō (B, K)."""
    features_bar = o_bar @ weight
    scale = power_of_two(LARGEST_COTANGENT, features_bar) if p.dtype == torch.float16 else None
    weight_bar, bias_bar = _scaled(o_bar.T @ _features(p), scale), _scaled(o_bar.sum(0), scale)
    return _pixels(_scaled(features_bar, scale), p), weight_bar, bias_bar, scale


def linear_dual_backward(
    p: Tensor,
    p_dot: Tensor,
    weight: Tensor,
    weight_dot: Tensor,
    o_bar: Tensor,
    o_bar_dot: Tensor,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return p̄, p̄̇, Ā̇, c̄̇, and their factor `scale` (None for 1), from ō and ō̇ (B, K). A given `scale` is used again."""
    features_bar, features_bar_dot = o_bar @ weight, o_bar_dot @ weight + o_bar @ weight_dot
    if p.dtype == torch.float16 and scale is None:
        scale = power_of_two(LARGEST_COTANGENT, features_bar, features_bar_dot)
    return (
        _pixels(_scaled(features_bar, scale), p),
        _pixels(_scaled(features_bar_dot, scale), p),
        _scaled(o_bar_dot.T @ _features(p) + o_bar.T @ _features(p_dot), scale),
        _scaled(o_bar_dot.sum(0), scale),
        scale,
    )


def _features(p: Tensor) -> Tensor:
    return p.to(accumulator(p.dtype)).contiguous().flatten(1)  # (B, C, h, w) -> (B, C·h·w), in the public code's order


def _pixels(features: Tensor, like: Tensor) -> Tensor:
    return in_format_of(like, features.view(like.shape).to(like.dtype))


def _scaled(bar: Tensor, scale: Tensor | None) -> Tensor:
    return bar if scale is None else bar * scale
