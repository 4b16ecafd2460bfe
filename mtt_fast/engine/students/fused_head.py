"""The classifier of `FusedConvNetStudent` with its loss: cross-entropy by kernels, or a user's loss.

Autograd differentiates a user's loss with respect to the logits (b, classes). These are so few that a step takes hardly longer
than with cross-entropy. A name with `_dot` is the derivative in the direction of the parameters, one with `_bar` the gradient of
the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import mtt_fast.kernels as kernels
from mtt_fast.engine.students.fused_blocks import Tensors
from mtt_fast.engine.students.generic import derivatives_of, loss_graph
from mtt_fast.engine.students.protocol import Loss
from mtt_fast.kernels import LabelKind


class HeadGradient(NamedTuple):
    """The loss, and its gradients multiplied by `scale`."""

    loss: Tensor  # ()
    p_bar: Tensor  # of the classifier's input (B, C, h, w)
    weight_bar: Tensor  # (K, C·h·w)
    bias_bar: Tensor  # (K,)
    scale: Tensor | None  # (); None for 1


class HeadTangent(NamedTuple):
    """The derivatives of the loss and its gradients. `p_bar`, `p_bar_dot`, `weight_bar_dot` and `bias_bar_dot` are multiplied by `scale`."""

    loss_dot: Tensor  # ()
    p_bar: Tensor
    p_bar_dot: Tensor
    weight_bar_dot: Tensor
    bias_bar_dot: Tensor
    labels_bar_dot: Tensor | None  # None for integers
    scale: Tensor | None
    loss: Tensor | None = None  # (); None with cross-entropy


@dataclass(frozen=True)
class Head:
    """Compute a classifier (weight, bias) with its loss. `mtt_fast.kernels.linear_cross_entropy` describes the shapes."""

    label_kind: LabelKind
    loss: Loss | None
    """in place of the cross-entropy with labels of `label_kind`"""

    def gradient(self, p: Tensor, classifier: Tensors, labels: Tensor) -> HeadGradient:
        """Return the loss and its gradients."""
        if self.loss is None:
            return HeadGradient(*kernels.linear_cross_entropy(p, *classifier, labels, self.label_kind))
        graph = loss_graph(self.loss, kernels.linear(p, *classifier), labels)
        bars = kernels.linear_backward(p, classifier[0], graph.gradient.detach())
        return HeadGradient(graph.loss.detach(), *bars)

    def gradient_jvp(
        self,
        p: Tensor,
        p_dot: Tensor,
        classifier: Tensors,
        classifier_dot: Tensors,
        labels: Tensor,
        scale: Tensor | None,
        direction_scale: Tensor | None,
    ) -> HeadTangent:
        """Return the derivatives. A given `scale` is used again; the direction (all `_dot` arguments) was multiplied by `direction_scale`."""
        if self.loss is None:
            given = (labels, self.label_kind, scale, direction_scale)
            return HeadTangent(*kernels.linear_cross_entropy_dual(p, p_dot, *classifier, *classifier_dot, *given))
        o, o_dot = kernels.linear_dual(p, p_dot, *classifier, *classifier_dot)
        graph = loss_graph(self.loss, o, labels)
        o_bar = graph.gradient.detach()
        o_bar_dot, *labels_bar_dot = derivatives_of(graph, o_dot)
        loss_dot = torch.dot(o_bar.flatten(), o_dot.flatten())
        if direction_scale is not None:
            loss_dot, *labels_bar_dot = (each / direction_scale for each in (loss_dot, *labels_bar_dot))
        p_bar, p_bar_dot, weight_bar_dot, bias_bar_dot, scale = kernels.linear_dual_backward(
            p, p_dot, classifier[0], classifier_dot[0], o_bar, o_bar_dot, scale
        )
        to_labels, loss = labels_bar_dot[0] if labels_bar_dot else None, graph.loss.detach()
        return HeadTangent(loss_dot, p_bar, p_bar_dot, weight_bar_dot, bias_bar_dot, to_labels, scale, loss)
