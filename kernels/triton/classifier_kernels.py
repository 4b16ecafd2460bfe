"""Compute logits and gradients of a linear classifier under cross-entropy, and the largest gradient for float16's range.

`score` computes tiles of logits. For each row of a tile it also stores the six numbers that a softmax needs (softmax.py).
`differentiate` computes tiles of the gradients. It combines the six numbers over the tiles of a row, and recomputes the
gradient of a logit wherever it needs one. `measure` computes the largest gradient of float16 features.

Planes are (B, PIXELS, CHANNELS) in memory. Contiguous planes are passed as one channel with all features as pixels. Column
c · PIXELS + pixel of the weights belongs to channel c at that pixel: features have the order of a contiguous sample.

Without a `p_dot`, all results are the primal's. With one, `weight_bar`, `bias_bar` and `loss` are derivatives.
"""

from __future__ import annotations

from .launch import tl, triton
from .powers import inverse, magnitude_bits, power_of_two
from .softmax import combine, load_cotangents, load_softmax, load_targets, softmax_parts

FEATURES = tl.constexpr(2048)  # features in which a program searches for the largest gradient at a time
MAGNITUDES = tl.constexpr(1024)  # magnitudes of programs that are compared at a time


@triton.jit
def score(
    p: tl.tensor,  # (B, PIXELS, CHANNELS)
    p_dot: tl.tensor,  # or None; then all other `_dot` arguments are None
    weight: tl.tensor,  # (K, CHANNELS · PIXELS)
    weight_dot: tl.tensor,
    bias: tl.tensor,  # (K,)
    bias_dot: tl.tensor,
    labels: tl.tensor,  # (B,) int64, or (B, K)
    z: tl.tensor,  # (B, K)
    z_dot: tl.tensor,
    partials: tl.tensor,  # (6, B, blocks of classes)
    magnitudes: tl.tensor,  # (programs,) int32, or None; always None unless one block has all classes
    batch: tl.tensor,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """Store ROWS × COLUMNS logits, with a direction their derivatives, and for each row the six numbers of `softmax_parts`."""
    ACC: tl.constexpr = z.dtype.element_ty
    BLOCKS: tl.constexpr = (CLASSES + COLUMNS - 1) // COLUMNS
    block = tl.program_id(0) % BLOCKS
    row = (tl.program_id(0) // BLOCKS).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = block * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row_mask, column_mask = row < batch, column < CLASSES
    mask, offsets = row_mask & column_mask, row * CLASSES + column

    if ROWS < 16:  # `tl.dot` needs at least 16 rows
        logits, logits_dot = _logits_by_sums(
            p, p_dot, weight, weight_dot, row, column, row_mask, column_mask,
            CHANNELS, PIXELS, ROWS, COLUMNS, BLOCK_D, AHEAD if tl.float32 == ACC else 1, ACC,
        )  # fmt: skip
    else:
        logits, logits_dot = _logits_by_dot(
            p, p_dot, weight, weight_dot, row, column, row_mask, column_mask,
            CHANNELS, PIXELS, ROWS, COLUMNS, BLOCK_D, ACC,
        )  # fmt: skip
    logits += tl.load(bias + column, column_mask, 0).to(ACC)
    tl.store(z + offsets, logits, mask)
    if p_dot is not None:
        logits_dot += tl.load(bias_dot + column, column_mask, 0).to(ACC)
        tl.store(z_dot + offsets, logits_dot, mask)

    targets = load_targets(labels, row, column, batch, KIND, CLASSES, ACC)
    parts = softmax_parts(logits, logits_dot, targets, column_mask, p_dot is not None, KIND)
    for number in tl.static_range(6):
        tl.store(partials + (number * batch + row) * BLOCKS + block, parts[number], row_mask)
    if magnitudes is not None:
        tl.debug_barrier()  # all threads read the logits of a row that one thread stored
        softmax = combine(parts, p_dot is not None, KIND)
        largest = _largest_feature_gradient(
            weight, weight_dot, labels, z, z_dot if p_dot is not None else None, row, softmax, batch,
            KIND, CLASSES, CHANNELS * PIXELS, ROWS, ACC,
        )  # fmt: skip
        tl.store(magnitudes + tl.program_id(0), largest)


@triton.jit
def differentiate(
    p: tl.tensor,  # (B, PIXELS, CHANNELS)
    p_dot: tl.tensor,  # or None; then all other `_dot` arguments are None
    weight: tl.tensor,  # (K, CHANNELS · PIXELS)
    weight_dot: tl.tensor,
    labels: tl.tensor,  # (B,) int64, or (B, K)
    z: tl.tensor,  # (B, K)
    z_dot: tl.tensor,
    partials: tl.tensor,  # (6, B, BLOCKS)
    magnitudes: tl.tensor,  # (count,) int32, or None
    scale: tl.tensor,  # (), or None; written if there are magnitudes, else read
    direction_scale: tl.tensor,  # (), or None
    p_bar: tl.tensor,  # (B, PIXELS, CHANNELS)
    p_bar_dot: tl.tensor,
    weight_bar: tl.tensor,  # (K, CHANNELS · PIXELS)
    bias_bar: tl.tensor,  # (K,)
    loss: tl.tensor,  # ()
    labels_bar_dot: tl.tensor,  # (B, K), or None
    batch: tl.tensor,
    count: tl.tensor,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Store COLUMNS × BLOCK_D gradients of weights, summed over all samples, or BLOCK_B × BLOCK_D gradients of features.

    The first WEIGHT_PROGRAMS programs compute the gradients of weights and biases and the loss. The others sum the gradients
    of features over all classes, and with a direction store the derivative of the labels' gradient too.
    """
    ACC: tl.constexpr = z.dtype.element_ty
    WIDTH: tl.constexpr = CHANNELS * PIXELS
    ACROSS: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    WEIGHT_PROGRAMS: tl.constexpr = (CLASSES + COLUMNS - 1) // COLUMNS * ACROSS
    offsets = tl.program_id(0) % ACROSS * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    feature, feature_mask = offsets % CHANNELS * PIXELS + offsets // CHANNELS, offsets < WIDTH
    factor, unscale = 1.0, 1.0
    if magnitudes is not None:
        factor = power_of_two(_max_magnitude(magnitudes, count), LARGEST)
        if tl.program_id(0) == 0:
            tl.store(scale, factor)
    elif scale is not None:
        factor = tl.load(scale).to(ACC)
    if direction_scale is not None:
        unscale = inverse(tl.load(direction_scale).to(ACC))

    if tl.program_id(0) < WEIGHT_PROGRAMS:
        column = tl.program_id(0) // ACROSS * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        to_weight, to_bias, total = _sum_over_samples(
            p, p_dot, labels, z, z_dot, partials, column, offsets, feature_mask, batch,
            KIND, CLASSES, WIDTH, BLOCKS, BLOCK_B, COLUMNS, BLOCK_D, ACC,
        )  # fmt: skip
        weight_offset = tl.trans(column) * WIDTH + feature
        tl.store(weight_bar + weight_offset, to_weight * factor, (tl.trans(column) < CLASSES) & feature_mask)
        if tl.program_id(0) % ACROSS == 0:
            tl.store(bias_bar + column, to_bias * factor, column < CLASSES)
        if tl.program_id(0) == 0:
            tl.store(loss, total * unscale)
    else:
        first = tl.program_id(0) % ACROSS == 0
        row = ((tl.program_id(0) - WEIGHT_PROGRAMS) // ACROSS).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
        to_p, to_p_dot = _sum_over_classes(
            weight, weight_dot, labels, z, z_dot, partials, labels_bar_dot, unscale, first, row, feature, feature_mask, batch,
            KIND, CLASSES, WIDTH, BLOCKS, BLOCK_B, COLUMNS, BLOCK_D, ACC,
        )  # fmt: skip
        p_offset, mask = row * WIDTH + offsets, (row < batch) & feature_mask
        tl.store(p_bar + p_offset, (to_p * factor).to(p_bar.dtype.element_ty), mask)
        if p_dot is not None:
            tl.store(p_bar_dot + p_offset, (to_p_dot * factor).to(p_bar.dtype.element_ty), mask)


@triton.jit
def measure(
    weight: tl.tensor,  # (K, WIDTH)
    weight_dot: tl.tensor,  # or None, as z_dot
    labels: tl.tensor,
    z: tl.tensor,  # (B, K)
    z_dot: tl.tensor,
    partials: tl.tensor,  # (6, B, BLOCKS)
    magnitudes: tl.tensor,  # (programs,) int32
    batch: tl.tensor,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Store the bits of the largest magnitude in BLOCK_B × BLOCK_D gradients of features and in their derivatives."""
    ACC: tl.constexpr = z.dtype.element_ty
    ACROSS: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    feature = tl.program_id(0) % ACROSS * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    row = (tl.program_id(0) // ACROSS).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    to_p, to_p_dot = _sum_over_classes(
        weight, weight_dot, labels, z, z_dot, partials, None, 1.0, False, row, feature, feature < WIDTH, batch,
        KIND, CLASSES, WIDTH, BLOCKS, BLOCK_B, COLUMNS, BLOCK_D, ACC,
    )  # fmt: skip
    largest = magnitude_bits(to_p)
    if weight_dot is not None:
        largest = tl.maximum(largest, magnitude_bits(to_p_dot))
    tl.store(magnitudes + tl.program_id(0), tl.max(tl.max(largest, 1), 0))


@triton.jit
def _logits_by_sums(
    p: tl.tensor,
    p_dot: tl.tensor,
    weight: tl.tensor,
    weight_dot: tl.tensor,
    row: tl.tensor,  # (ROWS, 1)
    column: tl.tensor,  # (1, COLUMNS)
    row_mask: tl.tensor,
    column_mask: tl.tensor,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr,  # tiles of features that are loaded at a time
    ACC: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return logits without the bias (ROWS, COLUMNS) and, with a direction, their derivatives, without `tl.dot`."""
    WIDTH: tl.constexpr = CHANNELS * PIXELS
    total, total_dot = tl.zeros((ROWS, COLUMNS, BLOCK_D), ACC), tl.zeros((ROWS, COLUMNS, BLOCK_D), ACC)
    row, row_mask = row[:, :, None], row_mask[:, :, None]
    column, column_mask = column[:, :, None], column_mask[:, :, None]
    for start in range(0, WIDTH, AHEAD * BLOCK_D):
        # All loads of features come first. A load after a use would wait, since features move between threads.
        fs: tl.tuple = ()
        fs_dot: tl.tuple = ()
        for tile in tl.static_range(AHEAD):
            feature = start + tile * BLOCK_D + tl.arange(0, BLOCK_D)[None, None, :]
            p_offset, mask = (
                row * WIDTH + feature % PIXELS * CHANNELS + feature // PIXELS,
                row_mask & (feature < WIDTH),
            )
            fs += (tl.load(p + p_offset, mask, 0).to(ACC),)
            if p_dot is not None:
                fs_dot += (tl.load(p_dot + p_offset, mask, 0).to(ACC),)
        for tile in tl.static_range(AHEAD):
            feature = start + tile * BLOCK_D + tl.arange(0, BLOCK_D)[None, None, :]
            weight_offset, mask = column * WIDTH + feature, column_mask & (feature < WIDTH)
            w = tl.load(weight + weight_offset, mask, 0).to(ACC)
            total += fs[tile] * w
            if p_dot is not None:
                total_dot += fs_dot[tile] * w
                total_dot += tl.load(weight_dot + weight_offset, mask, 0).to(ACC) * fs[tile]
    return tl.sum(total, 2), tl.sum(total_dot, 2)


@triton.jit
def _logits_by_dot(
    p: tl.tensor,
    p_dot: tl.tensor,
    weight: tl.tensor,
    weight_dot: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    row_mask: tl.tensor,
    column_mask: tl.tensor,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the same as `_logits_by_sums`, by `tl.dot`, for at least 16 rows and classes."""
    WIDTH: tl.constexpr = CHANNELS * PIXELS
    total, total_dot = tl.zeros((ROWS, COLUMNS), ACC), tl.zeros((ROWS, COLUMNS), ACC)
    for start in range(0, WIDTH, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)[None, :]
        p_offset = row * WIDTH + feature % PIXELS * CHANNELS + feature // PIXELS
        weight_offset = tl.trans(column) * WIDTH + feature
        p_mask, weight_mask = row_mask & (feature < WIDTH), tl.trans(column_mask) & (feature < WIDTH)
        f = tl.load(p + p_offset, p_mask, 0).to(ACC)
        w = tl.trans(tl.load(weight + weight_offset, weight_mask, 0).to(ACC))
        total = tl.dot(f, w, total, input_precision="ieee", out_dtype=ACC)
        if p_dot is not None:
            f_dot = tl.load(p_dot + p_offset, p_mask, 0).to(ACC)
            w_dot = tl.trans(tl.load(weight_dot + weight_offset, weight_mask, 0).to(ACC))
            total_dot = tl.dot(f_dot, w, total_dot, input_precision="ieee", out_dtype=ACC)
            total_dot = tl.dot(f, w_dot, total_dot, input_precision="ieee", out_dtype=ACC)
    return total, total_dot


@triton.jit
def _largest_feature_gradient(
    weight: tl.tensor,
    weight_dot: tl.tensor,
    labels: tl.tensor,
    z: tl.tensor,
    z_dot: tl.tensor,  # or None
    row: tl.tensor,  # (ROWS, 1)
    softmax: tl.tuple,
    batch: tl.tensor,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
) -> tl.tensor:
    """Return the bits of the largest magnitude in the rows' gradients of features and in their derivatives.

    A thread adds up the classes of its own features, one after the other. A sum across threads would make all of them wait.
    """
    largest = tl.zeros((ROWS, FEATURES), tl.int32)
    for start in range(0, WIDTH, FEATURES):
        feature = start + tl.arange(0, FEATURES)[None, :]
        to_p, to_p_dot = tl.zeros((ROWS, FEATURES), ACC), tl.zeros((ROWS, FEATURES), ACC)
        for each in tl.range(0, CLASSES, loop_unroll_factor=4):
            column = each + tl.zeros((1, 1), tl.int32)
            o_bar, o_bar_dot, _ = load_cotangents(z, z_dot, labels, row, column, softmax, batch, KIND, CLASSES, ACC)
            w = tl.load(weight + each * WIDTH + feature, feature < WIDTH, 0).to(ACC)
            to_p += o_bar * w
            if weight_dot is not None:
                w_dot = tl.load(weight_dot + each * WIDTH + feature, feature < WIDTH, 0).to(ACC)
                to_p_dot += o_bar_dot * w + o_bar * w_dot
        largest = tl.maximum(largest, tl.maximum(magnitude_bits(to_p), magnitude_bits(to_p_dot)))
    return tl.max(tl.max(largest, 1), 0)


@triton.jit
def _max_magnitude(magnitudes: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Return the largest of `count` magnitudes, as bits."""
    largest = tl.zeros((MAGNITUDES,), tl.int32)
    for start in range(0, count, MAGNITUDES):
        offsets = start + tl.arange(0, MAGNITUDES)
        largest = tl.maximum(largest, tl.load(magnitudes + offsets, offsets < count, 0))
    return tl.max(largest, 0)


@triton.jit
def _sum_over_samples(
    p: tl.tensor,
    p_dot: tl.tensor,
    labels: tl.tensor,
    z: tl.tensor,
    z_dot: tl.tensor,
    partials: tl.tensor,
    column: tl.tensor,  # (1, COLUMNS)
    offsets: tl.tensor,  # (1, BLOCK_D)
    feature_mask: tl.tensor,
    batch: tl.tensor,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the gradients of weights (COLUMNS, BLOCK_D) and of biases (1, COLUMNS), and the loss.

    With a direction, return the derivatives of these three.
    """
    to_weight, to_bias, total = (
        tl.zeros((COLUMNS, BLOCK_D), ACC),
        tl.zeros((1, COLUMNS), ACC),
        tl.zeros((BLOCK_B, 1), ACC),
    )
    for start in range(0, batch, BLOCK_B):
        row = (start + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
        softmax = load_softmax(partials, row, batch, p_dot is not None, KIND, BLOCKS, ACC)
        o_bar, o_bar_dot, _ = load_cotangents(z, z_dot, labels, row, column, softmax, batch, KIND, CLASSES, ACC)
        p_offset, mask = row * WIDTH + offsets, (row < batch) & feature_mask
        cotangent = o_bar
        if p_dot is not None:
            cotangent = o_bar_dot
            f_dot = tl.load(p_dot + p_offset, mask, 0).to(ACC)
            to_weight = tl.dot(tl.trans(o_bar), f_dot, to_weight, input_precision="ieee", out_dtype=ACC)
        f = tl.load(p + p_offset, mask, 0).to(ACC)
        to_weight = tl.dot(tl.trans(cotangent), f, to_weight, input_precision="ieee", out_dtype=ACC)
        to_bias += tl.sum(cotangent, 0, keep_dims=True)
        total += tl.where(row < batch, softmax[5], 0)
    return to_weight, to_bias, -tl.sum(tl.sum(total, 1), 0) / batch


@triton.jit
def _sum_over_classes(
    weight: tl.tensor,
    weight_dot: tl.tensor,
    labels: tl.tensor,
    z: tl.tensor,
    z_dot: tl.tensor,
    partials: tl.tensor,
    labels_bar_dot: tl.tensor,
    unscale: tl.tensor,
    first: tl.tensor,  # whether to store the derivatives of the labels' gradients
    row: tl.tensor,  # (BLOCK_B, 1)
    feature: tl.tensor,  # (1, BLOCK_D)
    feature_mask: tl.tensor,
    batch: tl.tensor,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the gradients of features (BLOCK_B, BLOCK_D) and, with a direction, their derivatives, else zeros.

    Where `first` is set, also store the derivatives of the labels' gradients times `unscale`.
    """
    softmax = load_softmax(partials, row, batch, weight_dot is not None, KIND, BLOCKS, ACC)
    to_p, to_p_dot = tl.zeros((BLOCK_B, BLOCK_D), ACC), tl.zeros((BLOCK_B, BLOCK_D), ACC)
    for start in range(0, CLASSES, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        o_bar, o_bar_dot, to_labels = load_cotangents(z, z_dot, labels, row, column, softmax, batch, KIND, CLASSES, ACC)
        weight_offset, mask = tl.trans(column) * WIDTH + feature, (tl.trans(column) < CLASSES) & feature_mask
        w = tl.load(weight + weight_offset, mask, 0).to(ACC)
        to_p = tl.dot(o_bar, w, to_p, input_precision="ieee", out_dtype=ACC)
        if weight_dot is not None:
            w_dot = tl.load(weight_dot + weight_offset, mask, 0).to(ACC)
            to_p_dot = tl.dot(o_bar_dot, w, to_p_dot, input_precision="ieee", out_dtype=ACC)
            to_p_dot = tl.dot(o_bar, w_dot, to_p_dot, input_precision="ieee", out_dtype=ACC)
            if labels_bar_dot is not None:
                tl.store(
                    labels_bar_dot + row * CLASSES + column,
                    to_labels * unscale,
                    (row < batch) & (column < CLASSES) & first,
                )
    return to_p, to_p_dot
