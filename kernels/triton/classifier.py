"""Compute softmax and cross-entropy of a linear classifier, their gradient and its tangent, in one pass over the logits.

The products before and after are torch's. A program owns a few samples with all their classes, so the logits are read
once, and the gradients to them are written in their place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..types import LabelKind, accumulator
from .configurations import configuration
from .launch import architecture, launch, tl, triton

_LARGEST_CLASS = 4096  # of shapes, in the table of configurations


@triton.jit
def _tile(
    batch: tl.tensor, CLASSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return rows (ROWS, 1), int64, and columns (1, COLUMNS), and which of each exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    return row, column, row < batch, column < CLASSES


@triton.jit
def _with_bias(
    logits: tl.tensor, bias: tl.tensor, place: tl.tensor, column: tl.tensor, mask: tl.tensor, ACC: tl.constexpr
) -> tl.tensor:
    return tl.load(logits + place, mask, 0).to(ACC) + tl.load(bias + column, mask, 0).to(ACC)


@triton.jit
def _log_softmax(z: tl.tensor, exists: tl.tensor) -> tl.tensor:
    """Return the log-softmax of each row: 0 for classes that do not exist, so that products with it stay finite."""
    z = tl.where(exists, z, float("-inf"))
    z -= tl.max(z, 1, keep_dims=True)
    return tl.where(exists, z - tl.log(tl.sum(tl.exp(z), 1, keep_dims=True)), 0)


@triton.jit
def _target(
    labels: tl.tensor,  # (B,) int64, or (B, K)
    row: tl.tensor,
    column: tl.tensor,
    place: tl.tensor,
    row_exists: tl.tensor,
    column_exists: tl.tensor,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
    ACC: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the distribution that each row is compared with, 0 for classes that do not exist, and its sum."""
    if KIND == "indices":
        index = tl.load(labels + row, row_exists, 0)
        known = (index >= 0) & (index < CLASSES)
        t = tl.where(known, (column == index).to(ACC), float("nan"))  # a kernel cannot raise an error
    else:
        t = tl.load(labels + place, row_exists & column_exists, 0).to(ACC)
        if KIND == "logits":
            t = tl.where(column_exists, tl.exp(_log_softmax(t, column_exists)), 0)
    return t, tl.sum(t, 1, keep_dims=True)


@triton.jit
def _primal(
    logits: tl.tensor,  # (B, K) without the bias, and in their place ō
    bias: tl.tensor,  # (K,)
    labels: tl.tensor,  # (B,) int64, or (B, K)
    losses: tl.tensor,  # (B,): the sum over samples is the caller's
    batch: tl.tensor,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    ACC: tl.constexpr = losses.dtype.element_ty
    row, column, row_exists, column_exists = _tile(batch, CLASSES, ROWS, COLUMNS)
    place, mask = row * CLASSES + column, row_exists & column_exists
    log_pi = _log_softmax(_with_bias(logits, bias, place, column, mask, ACC), column_exists)
    t, mass = _target(labels, row, column, place, row_exists, column_exists, KIND, CLASSES, ACC)
    tl.store(logits + place, (tl.exp(log_pi) * mass - t) / batch, mask)
    tl.store(losses + row, -tl.sum(t * log_pi, 1, keep_dims=True) / batch, row_exists)


@triton.jit
def _dual(
    logits: tl.tensor,  # (B, K) without the bias, and in their place ō
    logits_dot: tl.tensor,  # and ō̇
    bias: tl.tensor,  # (K,)
    bias_dot: tl.tensor,
    labels: tl.tensor,  # (B,) int64, or (B, K)
    losses_dot: tl.tensor,  # (B,): the sum over samples is the caller's
    labels_bar_dot: tl.tensor,  # (B, K), or None
    batch: tl.tensor,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    ACC: tl.constexpr = losses_dot.dtype.element_ty
    row, column, row_exists, column_exists = _tile(batch, CLASSES, ROWS, COLUMNS)
    place, mask = row * CLASSES + column, row_exists & column_exists
    pi = tl.exp(_log_softmax(_with_bias(logits, bias, place, column, mask, ACC), column_exists))
    o_dot = _with_bias(logits_dot, bias_dot, place, column, mask, ACC)  # 0 for classes that do not exist
    log_pi_dot = o_dot - tl.sum(pi * o_dot, 1, keep_dims=True)
    t, mass = _target(labels, row, column, place, row_exists, column_exists, KIND, CLASSES, ACC)
    along = tl.sum(t * log_pi_dot, 1, keep_dims=True)
    tl.store(logits + place, (pi * mass - t) / batch, mask)
    tl.store(logits_dot + place, pi * mass * log_pi_dot / batch, mask)
    tl.store(losses_dot + row, -along / batch, row_exists)
    if KIND == "probabilities":
        tl.store(labels_bar_dot + place, -log_pi_dot / batch, mask)
    elif KIND == "logits":  # through t = softmax(labels)
        tl.store(labels_bar_dot + place, t * (along - log_pi_dot) / batch, mask)


def linear_cross_entropy(
    features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, label_kind: LabelKind
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.linear_cross_entropy`. An index that is no class makes the loss NaN."""
    o = features.mm(weight.t())
    losses = _empty_losses(features)
    _launch(_primal, "linear_cross_entropy", label_kind, o, bias, labels, losses)
    return losses.sum(), o.mm(weight), o.t().mm(features), o.sum(0)


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
    """See `mtt_fast.kernels.linear_cross_entropy_dual`. An index that is no class makes the results NaN."""
    o = features.mm(weight.t())
    o_dot = features.mm(weight_dot.t()).addmm_(features_dot, weight.t())
    losses_dot = _empty_losses(features)
    labels_bar_dot = None if label_kind == "indices" else torch.empty_like(labels)
    arguments = (o, o_dot, bias, bias_dot, labels, losses_dot, labels_bar_dot)
    _launch(_dual, "linear_cross_entropy_dual", label_kind, *arguments)
    features_bar_dot = o_dot.mm(weight).addmm_(o, weight_dot)
    weight_bar_dot = o_dot.t().mm(features).addmm_(o.t(), features_dot)
    return losses_dot.sum(), o.mm(weight), features_bar_dot, weight_bar_dot, o_dot.sum(0), labels_bar_dot


def _empty_losses(features: Tensor) -> Tensor:
    return torch.empty(len(features), dtype=accumulator(features.dtype), device=features.device)


def _launch(kernel: Any, operation: str, label_kind: LabelKind, logits: Tensor, *rest: Tensor | None) -> None:
    batch, classes = logits.shape
    shape_class = next(
        size for size in (16, 64, 256, 1024, _LARGEST_CLASS) if classes <= size or size == _LARGEST_CLASS
    )
    row = configuration(operation, str(shape_class), architecture(logits.device))
    launch(
        kernel,
        triton.cdiv(batch, row["ROWS"]),
        logits,
        *rest,
        batch,
        KIND=label_kind,
        CLASSES=classes,
        COLUMNS=triton.next_power_of_2(classes),
        **row,
    )
