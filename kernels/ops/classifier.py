"""Classify linearly under cross-entropy, and the derivatives."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..checks import check_classifier
from ..types import LabelKind


def linear_cross_entropy(
    features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, label_kind: LabelKind
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mean cross-entropy () of a linear classifier and its gradients: f̄ (B, D), Ā (K, D), c̄ (K,).

    `features` (B, D), `weight` (K, D), `bias` (K,), contiguous, of one floating dtype and device; `labels`: indices
    (B,) int64, or (B, K) of that dtype: probabilities, which need not sum to one, or logits, of which the softmax is
    taken. Raises `ValueError` for anything else, and for an index that is no class; on an accelerator, where nothing
    waits for the values, such an index makes the loss NaN or fails as torch's own look-ups do.
    """
    check_classifier("linear_cross_entropy", [features], [weight], [bias], labels, label_kind)
    implementation = dispatch.implementation_of("linear_cross_entropy", features)
    loss, features_bar, weight_bar, bias_bar = implementation(features, weight, bias, labels, label_kind)
    return loss, features_bar, weight_bar, bias_bar


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
    """Return the loss's derivative () in the direction of the dots, f̄, and the derivatives f̄̇, Ā̇, c̄̇ of the gradients.

    Last comes the derivative of the gradient to the labels (B, K), None for indices. Shapes, errors: `linear_cross_entropy`.
    """
    check_classifier(
        "linear_cross_entropy_dual",
        [features, features_dot],
        [weight, weight_dot],
        [bias, bias_dot],
        labels,
        label_kind,
    )
    return dispatch.implementation_of("linear_cross_entropy_dual", features)(  # type: ignore[no-any-return]
        features, features_dot, weight, bias, weight_dot, bias_dot, labels, label_kind
    )
