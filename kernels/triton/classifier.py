"""Compute the cross-entropy of a linear classifier, with gradients and derivatives, in two kernels for any number of classes.

float16 planes need a third kernel, `measure`, where the classes of a row do not fit in one tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import LARGEST_COTANGENT, LabelKind
from .classifier_kernels import differentiate, measure, score
from .configurations import Configuration, configuration
from .launch import architecture, launch, triton
from .planes import Planes
from .softmax import PARTS

WIDE = 4096  # most features of the usual classes of shapes; more features have classes of their own in the table


def linear_cross_entropy(
    p: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, label_kind: LabelKind
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """See `mtt_fast.kernels.linear_cross_entropy`. An index that is not a class makes the loss NaN."""
    results = _launch(p, None, weight, None, bias, None, labels, label_kind, None, None)
    loss, p_bar, _, weight_bar, bias_bar, _, scale = results
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
    scale: Tensor | None,
    direction_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """See `mtt_fast.kernels.linear_cross_entropy_dual`. An index that is not a class makes the results NaN."""
    results = _launch(p, p_dot, weight, weight_dot, bias, bias_dot, labels, label_kind, scale, direction_scale)
    loss_dot, p_bar, p_bar_dot, weight_bar_dot, bias_bar_dot, labels_bar_dot, scale = results
    assert p_bar_dot is not None
    return loss_dot, p_bar, p_bar_dot, weight_bar_dot, bias_bar_dot, labels_bar_dot, scale


def _launch(
    p: Tensor,
    p_dot: Tensor | None,
    weight: Tensor,
    weight_dot: Tensor | None,
    bias: Tensor,
    bias_dot: Tensor | None,
    labels: Tensor,
    label_kind: LabelKind,
    scale: Tensor | None,
    direction_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the loss, p̄, p̄̇, Ā, c̄, the derivative of the labels' gradient, and the scale.

    With a `p_dot`, the first, fourth and fifth are the derivatives of the loss, Ā and c̄. Without it, p̄̇ and the derivative
    for the labels are None. For indices, the derivative for the labels is always None.
    """
    planes, classes = Planes.from_tensors(p, p_dot), len(weight)
    batch, width = planes.samples, planes.sample_size
    score_row, gradient_row = _row("scores", weight), _row("gradients", weight)
    blocks = triton.cdiv(classes, score_row["COLUMNS"])
    score_programs = triton.cdiv(batch, score_row["ROWS"]) * blocks
    across = triton.cdiv(width, gradient_row["BLOCK_D"])
    feature_programs = triton.cdiv(batch, gradient_row["BLOCK_B"]) * across
    weight_programs = triton.cdiv(classes, gradient_row["COLUMNS"]) * across

    z = weight.new_empty(batch, classes)
    z_dot = None if p_dot is None else torch.empty_like(z)
    partials = weight.new_empty(PARTS, batch, blocks)
    magnitudes, count = None, 0
    if p.dtype == torch.float16 and scale is None:
        count = score_programs if blocks == 1 else feature_programs
        magnitudes, scale = torch.empty(count, dtype=torch.int32, device=p.device), weight.new_empty(())
    channels, pixels = (planes.channels, planes.height * planes.width) if planes.channels_last else (1, width)
    shape = {"KIND": label_kind, "CLASSES": classes}
    plane_sizes = {"CHANNELS": channels, "PIXELS": pixels}

    launch(
        score, score_programs, p, p_dot, weight, weight_dot, bias, bias_dot, labels, z, z_dot, partials,
        magnitudes if blocks == 1 else None, batch, **shape, **plane_sizes, **score_row,
    )  # fmt: skip
    given = (labels, z, z_dot, partials, magnitudes)
    if magnitudes is not None and blocks > 1:
        launch(
            measure, feature_programs, weight, weight_dot, *given, batch,
            **shape, WIDTH=width, BLOCKS=blocks, **gradient_row,
        )  # fmt: skip
    p_bar = torch.empty_like(p)
    p_bar_dot = None if p_dot is None else torch.empty_like(p)
    weight_bar, bias_bar, loss = torch.empty_like(weight), torch.empty_like(bias), weight.new_empty(())
    labels_bar_dot = None if p_dot is None or label_kind == "indices" else torch.empty_like(labels)
    results = (p_bar, p_bar_dot, weight_bar, bias_bar, loss, labels_bar_dot)
    launch(
        differentiate, weight_programs + feature_programs, p, p_dot, weight, weight_dot, *given, scale, direction_scale, *results,
        batch, count, **shape, **plane_sizes, BLOCKS=blocks, LARGEST=LARGEST_COTANGENT, **gradient_row,
    )  # fmt: skip
    return loss, p_bar, p_bar_dot, weight_bar, bias_bar, labels_bar_dot, scale


def _row(kernel: str, weight: Tensor) -> Configuration:
    """Return the configuration of `kernel` for the classes and features of `weight`.

    The number of classes is rounded up to the next in the table; the last row has all larger numbers. More than WIDE features
    may have a row of their own.
    """
    classes, features = weight.shape
    shape_class = next((str(size) for size in (16, 64, 128, 256) if classes <= size), "1024")
    closest = f"{shape_class}-wide" if features > WIDE else shape_class
    return configuration(f"linear_cross_entropy_{kernel}", architecture(weight.device), closest, shape_class)
