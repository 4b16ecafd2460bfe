"""Compute a softmax and the gradients of logits from blocks of classes, for the kernels of the classifier.

A row is cut into blocks of classes. `softmax_parts` returns six numbers of a block, and `combine` combines those of a row's
blocks to all that its softmax and its loss need.
"""

from __future__ import annotations

from .launch import tl, triton

PARTS = 6  # numbers that `softmax_parts` returns for each row


@triton.jit
def load_targets(
    labels: tl.tensor,  # (B,) int64, or (B, K)
    row: tl.tensor,  # (rows, 1)
    column: tl.tensor,  # (1, columns)
    batch: tl.tensor,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
    ACC: tl.constexpr,
) -> tl.tensor:
    """Return target probabilities (rows, columns), 0 outside of the classes. Labels that are logits stay logits, −∞ outside.

    For an index that is not a class, return NaN.
    """
    if KIND == "indices":
        index = tl.load(labels + row, row < batch, 0)
        known = (index >= 0) & (index < CLASSES)
        targets = tl.where(known, (column == index).to(ACC), float("nan"))  # since a kernel cannot raise an error
    else:
        nothing: tl.constexpr = float("-inf") if KIND == "logits" else 0.0
        mask = (row < batch) & (column < CLASSES)
        targets = tl.load(labels + row * CLASSES + column, mask, nothing).to(ACC)
    return targets


@triton.jit
def softmax_parts(
    z: tl.tensor,  # logits (rows, columns)
    z_dot: tl.tensor,
    targets: tl.tensor,
    column_mask: tl.tensor,
    DUAL: tl.constexpr,
    KIND: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Return six numbers of each row of a block of classes, (rows, 1) each.

    With e = exp(z − top) and unnormalised targets t, these are: the largest logit, top; Σ e; the largest label logit; Σ t;
    Σ t (z − top), with a direction Σ t ż; and Σ e ż. For labels that are logits, t = exp(labels − largest label logit).
    """
    z = tl.where(column_mask, z, float("-inf"))
    top = tl.max(z, 1, keep_dims=True)
    z -= tl.where(top == float("-inf"), 0, top)
    e = tl.exp(z)
    label_top, t = tl.zeros_like(top), targets
    if KIND == "logits":
        label_top = tl.max(targets, 1, keep_dims=True)
        t = tl.exp(targets - tl.where(label_top == float("-inf"), 0, label_top))
    values = z_dot if DUAL else tl.where(column_mask, z, 0)
    target_sum = tl.sum(t * values, 1, keep_dims=True)
    z_dot_sum = tl.sum(e * z_dot, 1, keep_dims=True)
    return top, tl.sum(e, 1, keep_dims=True), label_top, tl.sum(t, 1, keep_dims=True), target_sum, z_dot_sum


@triton.jit
def combine(parts: tl.tuple, DUAL: tl.constexpr, KIND: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Return seven numbers of each row, (rows, 1) each, given the parts of its blocks, (rows, blocks) each.

    With targets t and π = softmax(z), these are: top and Σ exp(z − top); the same two for labels that are logits; Σ t;
    Σ t log π, with a direction Σ t (log π)˙; and Σ π ż.
    """
    tops, sums, label_tops, target_masses, target_sums, z_dot_sums = parts
    top, label_top = tl.max(tops, 1, keep_dims=True), tl.max(label_tops, 1, keep_dims=True)
    rescale = tl.exp(tops - top)
    total = tl.sum(sums * rescale, 1, keep_dims=True)
    if not DUAL:
        target_sums += target_masses * tl.where(tops == float("-inf"), 0, tops - top)
    label_total = tl.zeros_like(label_top) + 1
    if KIND == "logits":
        label_rescale = tl.exp(label_tops - label_top)
        label_total = tl.sum(target_masses * label_rescale, 1, keep_dims=True)
        target_masses, target_sums = (
            target_masses * label_rescale / label_total,
            target_sums * label_rescale / label_total,
        )
    target_mass, target_sum = tl.sum(target_masses, 1, keep_dims=True), tl.sum(target_sums, 1, keep_dims=True)
    z_dot_mean = tl.sum(z_dot_sums * rescale, 1, keep_dims=True) / total
    target_sum -= target_mass * (z_dot_mean if DUAL else tl.log(total))
    return top, total, label_top, label_total, target_mass, target_sum, z_dot_mean


@triton.jit
def load_softmax(
    partials: tl.tensor,  # (6, B, BLOCKS)
    row: tl.tensor,  # (rows, 1)
    batch: tl.tensor,
    DUAL: tl.constexpr,
    KIND: tl.constexpr,
    BLOCKS: tl.constexpr,
    ACC: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Load the parts of all blocks of the rows, and return what `combine` returns for them."""
    block = tl.arange(0, triton.next_power_of_2(BLOCKS))[None, :]
    offsets, mask, size = row * BLOCKS + block, (row < batch) & (block < BLOCKS), batch * BLOCKS
    top = tl.load(partials + offsets, mask, float("-inf")).to(ACC)
    total = tl.load(partials + size + offsets, mask, 0).to(ACC)
    label_top = tl.load(partials + 2 * size + offsets, mask, float("-inf")).to(ACC)
    target_mass = tl.load(partials + 3 * size + offsets, mask, 0).to(ACC)
    target_sum = tl.load(partials + 4 * size + offsets, mask, 0).to(ACC)
    z_dot_sum = tl.load(partials + 5 * size + offsets, mask, 0).to(ACC)
    return combine((top, total, label_top, target_mass, target_sum, z_dot_sum), DUAL, KIND)  # type: ignore[no-any-return]


@triton.jit
def cotangents(
    z: tl.tensor,  # logits (rows, columns)
    z_dot: tl.tensor,
    targets: tl.tensor,
    mask: tl.tensor,
    softmax: tl.tuple,
    batch: tl.tensor,
    KIND: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return ō, the gradient of the logits, ō̇, its derivative, and the derivative of the labels' gradient.

    Each is (rows, columns). ō and ō̇ are 0 where `mask` is false. `softmax` is what `combine` returned for the rows.
    """
    top, total, label_top, label_total, target_mass, target_sum, z_dot_mean = softmax
    pi, t = tl.exp(z - top) / total, targets
    if KIND == "logits":
        t = tl.exp(targets - label_top) / label_total
    log_pi_dot = z_dot - z_dot_mean  # the derivative of log π in the direction
    to_labels = -log_pi_dot
    if KIND == "logits":  # through t = softmax(labels)
        to_labels = t * (target_sum - log_pi_dot)
    o_bar = tl.where(mask, (pi * target_mass - t) / batch, 0)
    return o_bar, tl.where(mask, pi * target_mass * log_pi_dot / batch, 0), to_labels / batch


@triton.jit
def load_cotangents(
    z: tl.tensor,  # (B, K)
    z_dot: tl.tensor,  # or None
    labels: tl.tensor,
    row: tl.tensor,  # (rows, 1)
    column: tl.tensor,  # (1, columns)
    softmax: tl.tuple,
    batch: tl.tensor,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
    ACC: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Load a tile of logits and labels (rows, columns), and return what `cotangents` returns for it."""
    mask, offsets = (row < batch) & (column < CLASSES), row * CLASSES + column
    targets = load_targets(labels, row, column, batch, KIND, CLASSES, ACC)
    logits = tl.load(z + offsets, mask, 0)
    logits_dot = logits
    if z_dot is not None:
        logits_dot = tl.load(z_dot + offsets, mask, 0)
    return cotangents(logits, logits_dot, targets, mask, softmax, batch, KIND)  # type: ignore[no-any-return]
