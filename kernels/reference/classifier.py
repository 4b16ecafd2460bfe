"""Compute `linear_cross_entropy` and its derivative in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import LARGEST_COTANGENT, LabelKind, accumulator, in_format_of
from .flat import power_of_two

# o = f Aᵀ + c, π = softmax(o), loss = −Σ t log π / B. Probabilities that are being learned need not sum to one.


def linear_cross_entropy(
    p: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, label_kind: LabelKind
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the mean loss (), p̄ (B, C, h, w), Ā (K, C·h·w), c̄ (K,), and the factor that these have, None for 1."""
    features = _features(p)
    log_pi = F.linear(features, weight, bias).log_softmax(1)
    target = _target(labels, label_kind, log_pi)
    o_bar = (log_pi.exp() * target.sum(1, keepdim=True) - target) / len(features)
    loss = -(target * log_pi).sum() / len(features)
    features_bar = o_bar @ weight
    scale = power_of_two(LARGEST_COTANGENT, features_bar) if p.dtype == torch.float16 else None
    weight_bar, bias_bar = _scaled(o_bar.T @ features, scale), _scaled(o_bar.sum(0), scale)
    return loss, _pixels(_scaled(features_bar, scale), p), weight_bar, bias_bar, scale


def linear_cross_entropy_dual(
    p: Tensor,
    p_dot: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_dot: Tensor,
    bias_dot: Tensor,
    labels: Tensor,
    label_kind: LabelKind,
    scale: Tensor | None,
    direction_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the loss's derivative (), p̄, p̄̇, Ā̇, c̄̇, of the labels (B, K), None for indices, and the factor, None for 1."""
    features, features_dot, batch = _features(p), _features(p_dot), len(p)
    pi = F.linear(features, weight, bias).softmax(1)
    target = _target(labels, label_kind, pi)
    mass = target.sum(1, keepdim=True)
    o_dot = F.linear(features, weight_dot, bias_dot) + F.linear(features_dot, weight)
    log_pi_dot = o_dot - (pi * o_dot).sum(1, keepdim=True)
    o_bar = (pi * mass - target) / batch
    o_bar_dot = pi * mass * log_pi_dot / batch
    loss_dot, labels_bar_dot = -(target * log_pi_dot).sum() / batch, None
    if label_kind == "probabilities":
        labels_bar_dot = -log_pi_dot / batch
    elif label_kind == "logits":  # through t = softmax(labels)
        labels_bar_dot = target * ((target * log_pi_dot).sum(1, keepdim=True) - log_pi_dot) / batch
    if direction_scale is not None:
        loss_dot = loss_dot / direction_scale
        labels_bar_dot = None if labels_bar_dot is None else labels_bar_dot / direction_scale
    features_bar, features_bar_dot = o_bar @ weight, o_bar_dot @ weight + o_bar @ weight_dot
    if p.dtype == torch.float16 and scale is None:
        scale = power_of_two(LARGEST_COTANGENT, features_bar, features_bar_dot)
    return (
        loss_dot,
        _pixels(_scaled(features_bar, scale), p),
        _pixels(_scaled(features_bar_dot, scale), p),
        _scaled(o_bar_dot.T @ features + o_bar.T @ features_dot, scale),
        _scaled(o_bar_dot.sum(0), scale),
        labels_bar_dot,
        scale,
    )


def _features(p: Tensor) -> Tensor:
    return p.to(accumulator(p.dtype)).contiguous().flatten(1)  # (B, C, h, w) -> (B, C·h·w), in the public code's order


def _pixels(features: Tensor, like: Tensor) -> Tensor:
    return in_format_of(like, features.view(like.shape).to(like.dtype))


def _scaled(bar: Tensor, scale: Tensor | None) -> Tensor:
    return bar if scale is None else bar * scale


def _target(labels: Tensor, label_kind: LabelKind, like: Tensor) -> Tensor:
    if label_kind == "indices":
        return torch.zeros_like(like).scatter_(1, labels[:, None], 1)
    return labels.softmax(1) if label_kind == "logits" else labels
