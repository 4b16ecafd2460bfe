"""Compute cross-entropy of a linear classifier, its gradient and its tangent: in two kernels, or around torch's products.

Fused, a program of the first kernel owns a few samples with all their classes and makes their logits itself; one of the
second owns a few features and makes all that is summed over classes or samples. With many classes torch's products are
faster, and a kernel between them reads the logits once and writes the gradients to them in their place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..types import LabelKind, accumulator
from .configurations import backend_of, configuration
from .launch import architecture, launch, tl, triton

_LARGEST_CLASS = 4096  # of shapes, in the table of configurations
_LEAST_OF_A_PRODUCT = 16  # rows and columns of what `tl.dot` takes


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
def _scores(
    features: tl.tensor,  # (B, D)
    weight: tl.tensor,  # (K, D)
    row: tl.tensor,
    column: tl.tensor,
    row_exists: tl.tensor,
    column_exists: tl.tensor,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
) -> tl.tensor:
    """Return the products of the rows of features with all classes' weights, (ROWS, COLUMNS)."""
    total = tl.zeros((ROWS, COLUMNS, BLOCK_D), ACC)
    for start in range(0, WIDTH, BLOCK_D):
        place = (start + tl.arange(0, BLOCK_D))[None, None, :]
        f = tl.load(features + row[:, :, None] * WIDTH + place, row_exists[:, :, None] & (place < WIDTH), 0)
        w = tl.load(weight + column[:, :, None] * WIDTH + place, column_exists[:, :, None] & (place < WIDTH), 0)
        total += f.to(ACC) * w.to(ACC)
    return tl.sum(total, 2)


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
def _gradient(
    z: tl.tensor,  # logits (ROWS, COLUMNS)
    labels: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    place: tl.tensor,
    row_exists: tl.tensor,
    column_exists: tl.tensor,
    batch: tl.tensor,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
    ACC: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return ō (ROWS, COLUMNS), and each sample's part of the loss (ROWS, 1)."""
    log_pi = _log_softmax(z, column_exists)
    t, mass = _target(labels, row, column, place, row_exists, column_exists, KIND, CLASSES, ACC)
    return (tl.exp(log_pi) * mass - t) / batch, -tl.sum(t * log_pi, 1, keep_dims=True) / batch


@triton.jit
def _gradient_dual(
    z: tl.tensor,  # logits (ROWS, COLUMNS)
    o_dot: tl.tensor,  # 0 for classes that do not exist
    labels: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    place: tl.tensor,
    row_exists: tl.tensor,
    column_exists: tl.tensor,
    batch: tl.tensor,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
    ACC: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return ō and ō̇ (ROWS, COLUMNS), each sample's part of the loss's derivative (ROWS, 1), and that of the gradient to soft labels."""
    pi = tl.exp(_log_softmax(z, column_exists))
    log_pi_dot = o_dot - tl.sum(pi * o_dot, 1, keep_dims=True)
    t, mass = _target(labels, row, column, place, row_exists, column_exists, KIND, CLASSES, ACC)
    along = tl.sum(t * log_pi_dot, 1, keep_dims=True)
    to_labels = -log_pi_dot / batch
    if KIND == "logits":  # through t = softmax(labels)
        to_labels = t * (along - log_pi_dot) / batch
    return (pi * mass - t) / batch, pi * mass * log_pi_dot / batch, -along / batch, to_labels


@triton.jit
def _softmax(
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
    z = _with_bias(logits, bias, place, column, mask, ACC)
    o_bar, loss = _gradient(z, labels, row, column, place, row_exists, column_exists, batch, KIND, CLASSES, ACC)
    tl.store(logits + place, o_bar, mask)
    tl.store(losses + row, loss, row_exists)


@triton.jit
def _softmax_dual(
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
    z = _with_bias(logits, bias, place, column, mask, ACC)
    o_dot = _with_bias(logits_dot, bias_dot, place, column, mask, ACC)
    o_bar, o_bar_dot, loss_dot, to_labels = _gradient_dual(
        z, o_dot, labels, row, column, place, row_exists, column_exists, batch, KIND, CLASSES, ACC
    )
    tl.store(logits + place, o_bar, mask)
    tl.store(logits_dot + place, o_bar_dot, mask)
    tl.store(losses_dot + row, loss_dot, row_exists)
    if labels_bar_dot is not None:
        tl.store(labels_bar_dot + place, to_labels, mask)


@triton.jit
def _logits(
    features: tl.tensor,  # (B, D)
    weight: tl.tensor,  # (K, D)
    bias: tl.tensor,  # (K,)
    labels: tl.tensor,  # (B,) int64, or (B, K)
    o_bar: tl.tensor,  # (B, K)
    losses: tl.tensor,  # (B,)
    batch: tl.tensor,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    ACC: tl.constexpr = losses.dtype.element_ty
    row, column, row_exists, column_exists = _tile(batch, CLASSES, ROWS, COLUMNS)
    place, mask = row * CLASSES + column, row_exists & column_exists
    z = _scores(features, weight, row, column, row_exists, column_exists, WIDTH, ROWS, COLUMNS, BLOCK_D, ACC)
    z += tl.load(bias + column, column_exists, 0).to(ACC)
    gradient, loss = _gradient(z, labels, row, column, place, row_exists, column_exists, batch, KIND, CLASSES, ACC)
    tl.store(o_bar + place, gradient, mask)
    tl.store(losses + row, loss, row_exists)


@triton.jit
def _logits_dual(
    features: tl.tensor,  # (B, D)
    features_dot: tl.tensor,
    weight: tl.tensor,  # (K, D)
    weight_dot: tl.tensor,
    bias: tl.tensor,  # (K,)
    bias_dot: tl.tensor,
    labels: tl.tensor,  # (B,) int64, or (B, K)
    o_bar: tl.tensor,  # (B, K)
    o_bar_dot: tl.tensor,
    losses_dot: tl.tensor,  # (B,)
    labels_bar_dot: tl.tensor,  # (B, K), or None
    batch: tl.tensor,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    ACC: tl.constexpr = losses_dot.dtype.element_ty
    row, column, row_exists, column_exists = _tile(batch, CLASSES, ROWS, COLUMNS)
    place, mask = row * CLASSES + column, row_exists & column_exists
    z = _scores(features, weight, row, column, row_exists, column_exists, WIDTH, ROWS, COLUMNS, BLOCK_D, ACC)
    z += tl.load(bias + column, column_exists, 0).to(ACC)
    o_dot = _scores(features, weight_dot, row, column, row_exists, column_exists, WIDTH, ROWS, COLUMNS, BLOCK_D, ACC)
    o_dot += _scores(features_dot, weight, row, column, row_exists, column_exists, WIDTH, ROWS, COLUMNS, BLOCK_D, ACC)
    o_dot += tl.load(bias_dot + column, column_exists, 0).to(ACC)
    gradient, gradient_dot, loss_dot, to_labels = _gradient_dual(
        z, o_dot, labels, row, column, place, row_exists, column_exists, batch, KIND, CLASSES, ACC
    )
    tl.store(o_bar + place, gradient, mask)
    tl.store(o_bar_dot + place, gradient_dot, mask)
    tl.store(losses_dot + row, loss_dot, row_exists)
    if labels_bar_dot is not None:
        tl.store(labels_bar_dot + place, to_labels, mask)


@triton.jit
def _products(
    features: tl.tensor,  # (B, D)
    features_dot: tl.tensor,  # or None: then neither is the next, and the results are those of the primal
    weight: tl.tensor,  # (K, D)
    weight_dot: tl.tensor,
    o_bar: tl.tensor,  # (B, K)
    o_bar_dot: tl.tensor,
    losses: tl.tensor,  # (B,)
    features_bar: tl.tensor,  # (B, D)
    features_bar_dot: tl.tensor,
    weight_bar: tl.tensor,  # (K, D): of the primal, else its derivative, as are the two below
    bias_bar: tl.tensor,  # (K,)
    loss: tl.tensor,  # ()
    batch: tl.tensor,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Sum over classes and over samples, for BLOCK_D features; the first program also what has no features."""
    ACC: tl.constexpr = losses.dtype.element_ty
    DUAL: tl.constexpr = features_dot is not None
    column, d = tl.arange(0, COLUMNS), tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    of_weight = column[:, None] * WIDTH + d[None, :]
    weight_exists = (column < CLASSES)[:, None] & (d < WIDTH)[None, :]
    w = tl.load(weight + of_weight, weight_exists, 0).to(ACC)
    if DUAL:
        w_dot = tl.load(weight_dot + of_weight, weight_exists, 0).to(ACC)
    to_weight, to_bias, total = tl.zeros((COLUMNS, BLOCK_D), ACC), tl.zeros((COLUMNS,), ACC), tl.zeros((BLOCK_B,), ACC)
    for start in range(0, batch, BLOCK_B):
        row = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        of_score = row[:, None] * CLASSES + column[None, :]
        score_exists = (row < batch)[:, None] & (column < CLASSES)[None, :]
        place, exists = row[:, None] * WIDTH + d[None, :], (row < batch)[:, None] & (d < WIDTH)[None, :]
        o = tl.load(o_bar + of_score, score_exists, 0).to(ACC)
        f = tl.load(features + place, exists, 0).to(ACC)
        tl.store(features_bar + place, tl.dot(o, w, input_precision="ieee", out_dtype=ACC), exists)
        moving = o
        if DUAL:
            moving = tl.load(o_bar_dot + of_score, score_exists, 0).to(ACC)
            f_dot = tl.load(features_dot + place, exists, 0).to(ACC)
            along = tl.dot(moving, w, input_precision="ieee", out_dtype=ACC)
            tl.store(features_bar_dot + place, tl.dot(o, w_dot, along, input_precision="ieee", out_dtype=ACC), exists)
            to_weight = tl.dot(tl.trans(o), f_dot, to_weight, input_precision="ieee", out_dtype=ACC)
        to_weight = tl.dot(tl.trans(moving), f, to_weight, input_precision="ieee", out_dtype=ACC)
        to_bias += tl.sum(moving, 0)
        total += tl.load(losses + row, row < batch, 0).to(ACC)
    tl.store(weight_bar + of_weight, to_weight, weight_exists)
    if tl.program_id(0) == 0:
        tl.store(bias_bar + column, to_bias, column < CLASSES)
        tl.store(loss, tl.sum(total, 0))


def linear_cross_entropy(
    features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, label_kind: LabelKind
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `mtt_fast.kernels.linear_cross_entropy`. An index that is no class makes the loss NaN."""
    losses = _empty_losses(features)
    if not _is_fused("linear_cross_entropy", weight):
        o = features.mm(weight.t())
        _by_samples(_softmax, "linear_cross_entropy", label_kind, o, bias, labels, losses, CLASSES=len(weight))
        return losses.sum(), o.mm(weight), o.t().mm(features), o.sum(0)
    o = features.new_empty(len(features), len(weight))
    sizes = {"CLASSES": len(weight), "WIDTH": features.shape[1]}
    _by_samples(_logits, "linear_cross_entropy_logits", label_kind, features, weight, bias, labels, o, losses, **sizes)
    features_bar, weight_bar, bias_bar = (torch.empty_like(each) for each in (features, weight, bias))
    loss = losses.new_empty(())
    _by_features(features, None, weight, None, o, None, losses, features_bar, None, weight_bar, bias_bar, loss)
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
    """See `mtt_fast.kernels.linear_cross_entropy_dual`. An index that is no class makes the results NaN."""
    operation, losses_dot = "linear_cross_entropy_dual", _empty_losses(features)
    labels_bar_dot = None if label_kind == "indices" else torch.empty_like(labels)
    rest = (bias, bias_dot, labels)
    if not _is_fused(operation, weight):
        o = features.mm(weight.t())
        o_dot = features.mm(weight_dot.t()).addmm_(features_dot, weight.t())
        arguments = (o, o_dot, *rest, losses_dot, labels_bar_dot)
        _by_samples(_softmax_dual, operation, label_kind, *arguments, CLASSES=len(weight))
        features_bar_dot = o_dot.mm(weight).addmm_(o, weight_dot)
        weight_bar_dot = o_dot.t().mm(features).addmm_(o.t(), features_dot)
        return losses_dot.sum(), o.mm(weight), features_bar_dot, weight_bar_dot, o_dot.sum(0), labels_bar_dot
    o, o_dot = (features.new_empty(len(features), len(weight)) for _ in range(2))
    inputs = (features, features_dot, weight, weight_dot)
    sizes = {"CLASSES": len(weight), "WIDTH": features.shape[1]}
    of_samples = (*rest, o, o_dot, losses_dot, labels_bar_dot)
    _by_samples(_logits_dual, "linear_cross_entropy_logits", label_kind, features, *inputs[1:], *of_samples, **sizes)
    like = (features, features, weight, bias)
    features_bar, features_bar_dot, weight_bar_dot, bias_bar_dot = (torch.empty_like(each) for each in like)
    loss_dot = losses_dot.new_empty(())
    _by_features(*inputs, o, o_dot, losses_dot, features_bar, features_bar_dot, weight_bar_dot, bias_bar_dot, loss_dot)
    return loss_dot, features_bar, features_bar_dot, weight_bar_dot, bias_bar_dot, labels_bar_dot


def _empty_losses(features: Tensor) -> Tensor:
    return torch.empty(len(features), dtype=accumulator(features.dtype), device=features.device)


def _shape_class(classes: int) -> str:
    return str(next((size for size in (16, 64, 128, 256, 1024) if classes <= size), _LARGEST_CLASS))


def _is_fused(operation: str, weight: Tensor) -> bool:
    return backend_of(operation, _shape_class(len(weight)), architecture(weight.device)) == "fused"


def _by_samples(
    kernel: Any, operation: str, label_kind: LabelKind, first: Tensor, *rest: Tensor | None, CLASSES: int, **sizes: int
) -> None:
    """Launch a program for each ROWS samples."""
    row, batch = configuration(operation, _shape_class(CLASSES), architecture(first.device)), len(first)
    launch(
        kernel, triton.cdiv(batch, row["ROWS"]), first, *rest, batch, KIND=label_kind, CLASSES=CLASSES,
        COLUMNS=triton.next_power_of_2(CLASSES), **sizes, **row,
    )  # fmt: skip


def _by_features(features: Tensor, features_dot: Tensor | None, weight: Tensor, *rest: Tensor | None) -> None:
    """Launch a program for each BLOCK_D features."""
    (batch, width), classes = features.shape, len(weight)
    row = configuration("linear_cross_entropy_products", _shape_class(classes), architecture(features.device))
    launch(
        _products, triton.cdiv(width, row["BLOCK_D"]), features, features_dot, weight, *rest, batch, CLASSES=classes,
        WIDTH=width, COLUMNS=max(_LEAST_OF_A_PRODUCT, triton.next_power_of_2(classes)), **row,
    )  # fmt: skip
