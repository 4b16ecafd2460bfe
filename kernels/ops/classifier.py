"""Classify linearly under cross-entropy, and the derivatives."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..checks import check_classifier
from ..types import LabelKind


def linear_cross_entropy(
    p: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, label_kind: LabelKind
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the mean cross-entropy () of a linear classifier of planes, its gradients p̄, Ā, c̄, and the factor `scale` of these.

    `p` (B, C, h, w), contiguous or channels_last, float32, float64, float16 or bfloat16, as p̄ is; feature c·h·w + pixel has
    column c·h·w + pixel of `weight` (K, C·h·w), contiguous, which with `bias` (K,), Ā, c̄ and the loss is float32, float64 for
    such planes. `labels`: indices (B,) int64, or (B, K) of the weight's dtype: probabilities, which need not sum to one, or
    logits, of which the softmax is taken. Planes of float16 have a narrow range, so then the three gradients are multiplied
    with a power of two () that brings the largest magnitude in p̄ to at most `LARGEST_COTANGENT`, and over half of it, as
    `pack_parameters` does for a direction; otherwise it is None and there is no factor.

    Raises `ValueError` for anything else, and for an index that is no class; on an accelerator, where nothing waits for the
    values, such an index makes the loss NaN or fails as torch's own look-ups do.
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
    """Return the loss's derivative () in the direction of the dots, p̄, the derivatives p̄̇, Ā̇, c̄̇ of the gradients, and more.

    These are the derivative of the gradient to the labels (B, K), None for indices, and the factor `scale` of p̄, p̄̇, Ā̇ and c̄̇:
    the one that is given for planes of float16, as one that an earlier p̄ has, else the power of two for p̄ and p̄̇ together.
    `direction_scale` (), None for 1, is a power of two that the dots were multiplied with: it is taken out of the loss's and the
    labels' derivatives, and the others keep it. Shapes, errors: `linear_cross_entropy`.
    """
    scales = {"scale": scale, "direction_scale": direction_scale}
    weights, biases = [weight, weight_dot], [bias, bias_dot]
    check_classifier("linear_cross_entropy_dual", [p, p_dot], weights, biases, labels, label_kind, scales)
    return dispatch.implementation_of("linear_cross_entropy_dual", p)(  # type: ignore[no-any-return]
        p, p_dot, weight, bias, weight_dot, bias_dot, labels, label_kind, scale, direction_scale
    )
