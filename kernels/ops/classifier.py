"""Compute the cross-entropy of a linear classifier, with derivatives."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..checks import check_classifier
from ..types import LabelKind


def linear_cross_entropy(
    p: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, label_kind: LabelKind
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the mean cross-entropy () of a linear classifier of planes, its gradients p̄, Ā, c̄, and their factor `scale`.

    `p` (B, C, h, w), contiguous or channels_last, float32, float64, float16 or bfloat16; p̄ is like `p`. Column c·h·w + pixel of
    `weight` (K, C·h·w), contiguous, belongs to that pixel of channel c. `weight`, `bias` (K,), Ā, c̄ and the loss are float64 for
    float64 planes and else float32. `labels` are indices (B,) int64, or (B, K) of the weight's dtype: probabilities, which need
    not sum to one, or logits, whose softmax is taken.

    `scale` is None, and the gradients have no factor, unless planes are float16, whose range is narrow. Then the three gradients
    are multiplied by `scale` (), the power of two that brings the largest magnitude in p̄ to at most `LARGEST_COTANGENT` and over
    half of it, as `pack_parameters` scales a direction.

    Raises `ValueError` for anything else, and for an index that is not a class. On a GPU values are not checked, since that would
    synchronise: such an index makes the loss NaN or fails as torch's own look-ups do.
    """
    check_classifier("linear_cross_entropy", [p], [weight], [bias], labels, label_kind)
    implementation = dispatch.implementation_of("linear_cross_entropy", p)
    loss, p_bar, weight_bar, bias_bar, scale = implementation(p, weight, bias, labels, label_kind)
    return loss, p_bar, weight_bar, bias_bar, scale


def linear_cross_entropy_dual(
    p: Tensor,
    p_dot: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_dot: Tensor,
    bias_dot: Tensor,
    labels: Tensor,
    label_kind: LabelKind,
    scale: Tensor | None = None,
    direction_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the loss's derivative () in the direction of the `_dot` arguments, p̄, p̄̇, Ā̇, c̄̇, the labels' derivative, and `scale`.

    p̄ is the gradient of `p`, and p̄̇, Ā̇, c̄̇ are the derivatives of the gradients. The labels' derivative (B, K) is the
    derivative of their gradient; None for indices.

    `scale` is the factor of p̄, p̄̇, Ā̇ and c̄̇ for float16 planes. A given `scale`, that of an earlier p̄, is used again; else
    it is chosen for p̄ and p̄̇ together. `direction_scale` (), None for 1, is the power of two, 2⁻¹²⁶ … 2¹²⁶, by which the `_dot`
    arguments were multiplied. The derivatives of the loss and of the labels' gradient are divided by it; the others keep it.
    Shapes and errors are those of `linear_cross_entropy`.
    """
    scales = {"scale": scale, "direction_scale": direction_scale}
    weights, biases = [weight, weight_dot], [bias, bias_dot]
    check_classifier("linear_cross_entropy_dual", [p, p_dot], weights, biases, labels, label_kind, scales)
    return dispatch.implementation_of("linear_cross_entropy_dual", p)(  # type: ignore[no-any-return]
        p, p_dot, weight, bias, weight_dot, bias_dot, labels, label_kind, scale, direction_scale
    )
