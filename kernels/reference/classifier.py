"""Compute `linear_cross_entropy` and its derivative in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import LabelKind

# o = f Aᵀ + c, π = softmax(o), loss = −Σ t log π / B. Probabilities that are being learned need not sum to one.


def linear_cross_entropy(
    features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, label_kind: LabelKind
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mean loss () and f̄ (B, D), Ā (K, D), c̄ (K,). `features`: (B, D); `labels`: (B,) or (B, K)."""
    log_pi = F.linear(features, weight, bias).log_softmax(1)
    target = _target(labels, label_kind, log_pi)
    o_bar = (log_pi.exp() * target.sum(1, keepdim=True) - target) / len(features)
    loss = -(target * log_pi).sum() / len(features)
    return loss, o_bar @ weight, o_bar.T @ features, o_bar.sum(0)


def linear_cross_entropy_dual(
    features: Tensor,
    features_dot: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_dot: Tensor,
    bias_dot: Tensor,
    labels: Tensor,
    label_kind: LabelKind,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the loss's derivative (), f̄, f̄̇ (B, D), Ā̇ (K, D), c̄̇ (K,), and of the labels (B, K), None for indices."""
    batch = len(features)
    pi = F.linear(features, weight, bias).softmax(1)
    target = _target(labels, label_kind, pi)
    mass = target.sum(1, keepdim=True)
    o_dot = F.linear(features, weight_dot, bias_dot) + F.linear(features_dot, weight)
    log_pi_dot = o_dot - (pi * o_dot).sum(1, keepdim=True)
    o_bar = (pi * mass - target) / batch
    o_bar_dot = pi * mass * log_pi_dot / batch
    labels_bar_dot = None
    if label_kind == "probabilities":
        labels_bar_dot = -log_pi_dot / batch
    elif label_kind == "logits":  # through t = softmax(labels)
        labels_bar_dot = target * ((target * log_pi_dot).sum(1, keepdim=True) - log_pi_dot) / batch
    return (
        -(target * log_pi_dot).sum() / batch,
        o_bar @ weight,
        o_bar_dot @ weight + o_bar @ weight_dot,
        o_bar_dot.T @ features + o_bar.T @ features_dot,
        o_bar_dot.sum(0),
        labels_bar_dot,
    )


def _target(labels: Tensor, label_kind: LabelKind, like: Tensor) -> Tensor:
    if label_kind == "indices":
        return torch.zeros_like(like).scatter_(1, labels[:, None], 1)
    return labels.softmax(1) if label_kind == "logits" else labels
