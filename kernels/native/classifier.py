"""Call the native kernels of `linear_cross_entropy` and its derivative (cpp/classifier.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import LabelKind, in_format_of
from .extension import extension

# The products of the classifier are torch's: at a student's shapes its library comes close to the processor's peak.
# Between the products lies one pass over the logits, which become their gradients. Planes of float16 and
# bfloat16, and the scale that float16 needs, are left to the reference.


def linear_cross_entropy(
    p: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, label_kind: LabelKind
) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    """See `mtt_fast.kernels.linear_cross_entropy`."""
    features = p.contiguous().flatten(1)
    o = features.mm(weight.t())
    loss, bias_bar = features.new_empty(()), torch.empty_like(bias)
    results = (loss, bias_bar, None, torch.get_num_threads())
    extension().cross_entropy(o, None, bias, None, *_labels(labels, label_kind), *results)
    features_bar, weight_bar = o.mm(weight), o.t().mm(features)
    del features
    return loss, _pixels(features_bar, p), weight_bar, bias_bar, None


def linear_cross_entropy_dual(
    p: Tensor,
    p_dot: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_dot: Tensor,
    bias_dot: Tensor,
    labels: Tensor,
    label_kind: LabelKind,
    scale: None,
    direction_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, None]:
    """See `mtt_fast.kernels.linear_cross_entropy_dual`."""
    features, features_dot = p.contiguous().flatten(1), p_dot.contiguous().flatten(1)
    o = features.mm(weight.t())
    o_dot = features.mm(weight_dot.t()).addmm_(features_dot, weight.t())
    loss_dot, bias_bar_dot = features.new_empty(()), torch.empty_like(bias)
    labels_bar_dot = None if label_kind == "indices" else torch.empty_like(labels)
    results = (loss_dot, bias_bar_dot, labels_bar_dot, torch.get_num_threads())
    extension().cross_entropy(o, o_dot, bias, bias_dot, *_labels(labels, label_kind), *results)
    features_bar_dot = o_dot.mm(weight).addmm_(o, weight_dot)
    weight_bar_dot = o_dot.t().mm(features).addmm_(o.t(), features_dot)
    del features, features_dot
    if direction_scale is not None:
        for result in (loss_dot, labels_bar_dot):
            if result is not None:
                result.div_(direction_scale)
    p_bar, p_bar_dot = _pixels(o.mm(weight), p), _pixels(features_bar_dot, p)
    return loss_dot, p_bar, p_bar_dot, weight_bar_dot, bias_bar_dot, labels_bar_dot, None


def _pixels(features: Tensor, like: Tensor) -> Tensor:
    return in_format_of(like, features.view(like.shape))


def _labels(labels: Tensor, label_kind: LabelKind) -> tuple[Tensor | None, Tensor | None, bool]:
    """Return indices or soft labels, and whether the target is the softmax of the latter."""
    return (labels, None, False) if label_kind == "indices" else (None, labels, label_kind == "logits")
