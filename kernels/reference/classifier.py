"""Compute `linear_cross_entropy` and its derivative in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import LabelKind
from .linear import linear, linear_backward, linear_dual, linear_dual_backward

# o = f Aᵀ + c, π = softmax(o), loss = −Σ t log π / B. Learned probabilities need not sum to one.


def linear_cross_entropy(
    p: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, label_kind: LabelKind
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the mean loss (), p̄ (B, C, h, w), Ā (K, C·h·w), c̄ (K,), and their factor `scale` (None for 1)."""
    log_pi = linear(p, weight, bias).log_softmax(1)
    target = _target(labels, label_kind, log_pi)
    o_bar = (log_pi.exp() * target.sum(1, keepdim=True) - target) / len(p)
    return -(target * log_pi).sum() / len(p), *linear_backward(p, weight, o_bar)


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
    """Return the loss's derivative (), p̄, p̄̇, Ā̇, c̄̇, the labels' derivative (B, K) (None for indices), and `scale` (None for 1)."""
    batch = len(p)
    o, o_dot = linear_dual(p, p_dot, weight, bias, weight_dot, bias_dot)
    pi = o.softmax(1)
    target = _target(labels, label_kind, pi)
    mass = target.sum(1, keepdim=True)
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
    *bars, scale = linear_dual_backward(p, p_dot, weight, weight_dot, o_bar, o_bar_dot, scale)
    p_bar, p_bar_dot, weight_bar_dot, bias_bar_dot = bars
    return loss_dot, p_bar, p_bar_dot, weight_bar_dot, bias_bar_dot, labels_bar_dot, scale


def _target(labels: Tensor, label_kind: LabelKind, like: Tensor) -> Tensor:
    if label_kind == "indices":
        return torch.zeros_like(like).scatter_(1, labels[:, None], 1)
    return labels.softmax(1) if label_kind == "logits" else labels
