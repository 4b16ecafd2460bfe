"""Gather the patches of a 3×3 convolution of images, sum their products, and fold a norm into the convolution's weights.

A program may gather its sample from all images by an index, and augment it, before it stores the padded image.

A patch x̃ has TERMS values: 9·C values of the image in the order (3, 3, C), then ONES ones, then zeros up to a size that Tensor
cores support. The weights of the ones are three pieces of the shift that the folded norm adds. Three rounded pieces add up to a
more precise shift than one rounded number. A value near the mean of each channel (the image's shift) is subtracted from the
image. The norm cancels this, and the sums of products lose fewer bits to cancellation if an image is far from zero. The padded
image has HP × WP pixels, the convolution's result (HP − 2) × (WP − 2).
"""

from __future__ import annotations

from .launch import INTERPRETED, tl, triton
from .warp import load_parameters, mean_for_contrast, warp_pixels

ONES = tl.constexpr(3)
PROBES = tl.constexpr(256)  # pixels of an image whose mean is its shift

_NUMPY = tl.constexpr(INTERPRETED)  # NumPy would multiply the bits of bfloat16 numbers as integers


@triton.jit
def round_factor(tile: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Return `tile` rounded to the nearest number of PRECISION, as a factor for Tensor cores.

    For tf32 the result stays float32. Tensor cores would truncate it without this. NaN stays NaN: its bits would overflow.
    """
    if PRECISION == "bf16":
        tile = tile.to(tl.bfloat16)
    elif PRECISION == "fp16":
        tile = tile.to(tl.float16)
    elif PRECISION == "tf32":
        nearest = ((tile.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        tile = tl.where(tile == tile, nearest, tile)
    return tile


@triton.jit
def product(a: tl.tensor, b: tl.tensor, ACC: tl.constexpr, PRECISION: tl.constexpr) -> tl.tensor:
    """Return the matrix product of factors that are already rounded, accumulated in ACC."""
    if _NUMPY:
        a, b = a.to(ACC), b.to(ACC)
    precision: tl.constexpr = "tf32" if PRECISION == "tf32" else "ieee"
    return tl.dot(a, b, input_precision=precision, out_dtype=ACC)


@triton.jit
def _load_pixels(
    image: tl.tensor,  # (C, H, W)
    colour: tl.tuple | None,
    down: tl.tuple | None,
    right: tl.tuple | None,
    mask: tl.tuple | None,
    mean: tl.tensor | None,
    offsets: tl.tensor,  # (1, PIXELS): numbers of pixels of the padded image, row by row
    PADDING: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
) -> tl.tensor:
    """Return pixels of the image, augmented if `colour` is not None, (BLOCK_C, PIXELS). Outside of the image they are zero."""
    c = tl.arange(0, BLOCK_C)[:, None]
    row = offsets // (W + 2 * PADDING) - PADDING
    column = offsets % (W + 2 * PADDING) - PADDING
    if colour is None:
        inside = (c < C) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        pixel = row * W + column
        value = tl.load(image + (pixel * C + c if CHANNELS_LAST else c * (H * W) + pixel), inside, 0).to(ACC)
    else:
        value = warp_pixels(image, colour, down, right, mask, mean, c, row, column, C, H, W, ACC)
    return value


# `index` and `parameters` of a step have any alignment, and single loads read them
@triton.jit(do_not_specialize_on_alignment=["index", "parameters"])
def gather(
    x: tl.tensor,  # (n, C, H, W)
    index: tl.tensor | None,  # (B,)
    parameters: tl.tensor | None,  # (B, 13): WARP_PARAMETERS of colour_warp_mask
    images: tl.tensor,  # (B, H + 2 PADDING, W + 2 PADDING, C)
    gram: tl.tensor,  # (B, parts, 9 C + 1, 9 C + 1)
    parts: tl.tensor,
    tiles: tl.tensor,  # in one part
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PADDING: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,  # at least C
    BLOCK_M: tl.constexpr,
    ELEMENTS: tl.constexpr,
) -> None:
    """Store the padded image minus its shift, rounded, and the sum of x̃x̃ᵀ over one part of the pixels.

    A program stores all rows of which its patches have pixels, and reads them back. Neighbouring programs also store its first
    and last rows, with the same values.
    """
    ACC: tl.constexpr = gram.dtype.element_ty
    WP: tl.constexpr = W + 2 * PADDING
    WIDTH: tl.constexpr = WP - 2
    ALL: tl.constexpr = (H + 2 * PADDING - 2) * WIDTH
    PIXELS: tl.constexpr = ELEMENTS // BLOCK_C
    program = tl.program_id(0)
    sample = (program // parts).to(tl.int64)
    first = program % parts * tiles * BLOCK_M
    last = tl.minimum(first + tiles * BLOCK_M, ALL) - 1
    x += (sample if index is None else tl.load(index + sample)) * (C * H * W)
    images += sample * (C * (H + 2 * PADDING) * WP)
    colour, down, right, mask, mean = None, None, None, None, None
    if parameters is not None:
        colour, down, right, mask = load_parameters(parameters, sample)
        mean = mean_for_contrast(colour[2], x, C * H * W, ACC)

    probe = tl.arange(0, PROBES)[None, :] * (H * W) // PROBES
    probes = _load_pixels(x, colour, down, right, mask, mean, probe, 0, C, H, W, CHANNELS_LAST, BLOCK_C, ACC)
    shift = tl.sum(probes, 1, keep_dims=True) / PROBES
    c = tl.arange(0, BLOCK_C)[:, None]
    end = (last // WIDTH + 3) * WP
    # `start` is a multiple of PIXELS: a pixel has the same place in the tile of every program, and so the same bits
    for start in range(first // WIDTH * WP // PIXELS * PIXELS, end, PIXELS):
        pixel = start + tl.arange(0, PIXELS)[None, :]
        value = _load_pixels(x, colour, down, right, mask, mean, pixel, PADDING, C, H, W, CHANNELS_LAST, BLOCK_C, ACC)
        tl.store(images + pixel * C + c, round_factor(value - shift, PRECISION), (c < C) & (pixel < end))
    tl.debug_barrier()  # threads read below what other threads of the program stored

    total = tl.zeros((TERMS, TERMS), ACC)
    for tile in range(tiles):
        centre = first + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        in_part = (centre <= last)[:, None]
        centre = tl.minimum(centre, last)
        xs = load_patches(images, centre // WIDTH, centre % WIDTH, C, WP, TERMS)
        xs = tl.where(in_part, xs, 0).to(xs.dtype)
        # added outside of `tl.dot`, whose accumulator would lose bits
        total += product(tl.trans(xs), xs, ACC, PRECISION)
    COUNT: tl.constexpr = 9 * C + 1
    row, column = tl.arange(0, TERMS)[:, None], tl.arange(0, TERMS)[None, :]
    offsets = program.to(tl.int64) * (COUNT * COUNT) + row * COUNT + column
    tl.store(gram + offsets, total, (row < COUNT) & (column < COUNT))


@triton.jit
def add_up_parts(
    values: tl.tuple,  # pointers to the values of the first part
    masks: tl.tuple,  # masks of these, or None
    parts: tl.tensor,
    STRIDE: tl.constexpr,  # elements from one part to the next
    ACC: tl.constexpr,
) -> tl.tuple:
    """Return the sum of each value over all parts, in the order of the parts. AT_ONCE parts are loaded at the same time."""
    AT_ONCE: tl.constexpr = 4
    totals: tl.tuple = ()
    for each in tl.static_range(len(values)):
        totals += (tl.zeros(values[each].shape, ACC),)
    for start in range(0, parts, AT_ONCE):
        loaded: tl.tuple = ()
        for part in tl.static_range(AT_ONCE):
            for each in tl.static_range(len(values)):
                mask = start + part < parts
                if masks is not None:
                    mask &= masks[each]
                loaded += (tl.load(values[each] + (start + part) * STRIDE, mask, 0),)
        added: tl.tuple = ()
        for each in tl.static_range(len(values)):
            total = totals[each]
            for part in tl.static_range(AT_ONCE):
                total += loaded[part * len(values) + each].to(ACC)
            added += (total,)
        totals = added
    return totals


@triton.jit
def moments(
    gram: tl.tensor,  # (B, gram_parts, 9 C + 1, 9 C + 1)
    sample: tl.tensor,
    parts: tl.tensor,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    TERMS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the mean (TERMS, 1) and the covariance (TERMS, TERMS) of the patches of a sample, in float64."""
    COUNT: tl.constexpr = 9 * C + 1
    row, column = tl.arange(0, TERMS)[:, None], tl.arange(0, TERMS)[None, :]
    in_row, in_column = row < COUNT, column < COUNT
    gram += sample * parts * (COUNT * COUNT)
    # the products with a one are the mean; a second load of these is simpler than to extract them from `total`
    pointers = (gram + row * COUNT + 9 * C, gram + 9 * C * COUNT + column, gram + row * COUNT + column)
    masks = (in_row, in_column, in_row & in_column)
    mean, mean_row, total = add_up_parts(pointers, masks, parts, COUNT * COUNT, tl.float64)
    mean, mean_row = mean * (1 / PIXELS), mean_row * (1 / PIXELS)
    return mean, total * (1 / PIXELS) - mean * mean_row


@triton.jit
def weight_offsets(filters: tl.tensor, C: tl.constexpr, TERMS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return offsets of weights (K, C, 3, 3) in the order of a patch, (BLOCK_C, TERMS), and their mask."""
    term = tl.arange(0, TERMS)[None, :]
    return filters[:, None] * (9 * C) + term % C * 9 + term // C, (term < 9 * C) & (filters[:, None] >= 0)


@triton.jit
def load_weights(
    weight: tl.tensor,  # (K, C, 3, 3)
    filters: tl.tensor,  # (BLOCK_C,)
    C: tl.constexpr,
    TERMS: tl.constexpr,
) -> tl.tensor:
    """Return the weights of `filters` in the order of a patch, (TERMS, BLOCK_C)."""
    # the terms of a filter are adjacent in memory, so a warp reads one filter at a time
    offsets, mask = weight_offsets(filters, C, TERMS)
    return tl.trans(tl.load(weight + offsets, mask, 0))


@triton.jit
def _append_shift(
    weight: tl.tensor,  # (TERMS, BLOCK_C)
    level: tl.tensor,  # (BLOCK_C,): the mean that the product should have
    mean: tl.tensor,  # (TERMS, 1): of the patches
    C: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Return the weights rounded, with the shift as weights of the ones.

    The shift is computed from the rounded weights, so that rounding does not change the mean of the product.
    """
    term = tl.arange(0, TERMS)[:, None]
    weight = round_factor(weight, PRECISION)
    shift = (level - tl.sum(mean * weight.to(level.dtype).to(tl.float64), 0)).to(level.dtype)
    first = round_factor(shift, PRECISION).to(level.dtype)
    second = round_factor(shift - first, PRECISION).to(level.dtype)
    third = shift - first - second
    pieces = tl.where(term == 9 * C, first[None, :], tl.where(term == 9 * C + 1, second[None, :], third[None, :]))
    pieces = tl.where(term < 9 * C + ONES, pieces, 0)
    return tl.where(term < 9 * C, weight, round_factor(pieces, PRECISION))


@triton.jit
def fold_norm(
    mean: tl.tensor,  # (TERMS, 1): of the patches
    covariance: tl.tensor,  # (TERMS, TERMS)
    w: tl.tensor,  # (TERMS, BLOCK_C)
    gamma: tl.tensor,  # (BLOCK_C,)
    beta: tl.tensor,
    EPS: tl.constexpr,
    C: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return f (TERMS, BLOCK_C), rounded, the mean and rstd of the planes (BLOCK_C,), and covariance · w (TERMS, BLOCK_C).

    The mean is that for the image minus its shift.
    """
    w = w.to(tl.float64)
    covariance_w = tl.dot(covariance, w, out_dtype=tl.float64)
    mu = tl.sum(mean * w, 0)
    # rounding can make the variance of a constant plane negative
    variance = tl.maximum(tl.sum(w * covariance_w, 0), 0.0)
    r = 1 / tl.sqrt(variance + EPS)
    scale = gamma.to(tl.float64) * r
    f = _append_shift((scale[None, :] * w).to(ACC), beta, mean, C, TERMS, PRECISION)
    return f, mu, r, covariance_w


@triton.jit
def fold_norm_tangent(
    mean: tl.tensor,  # (TERMS, 1): of the patches
    covariance_w: tl.tensor,  # (TERMS, BLOCK_C)
    r: tl.tensor,  # (BLOCK_C,)
    w: tl.tensor,  # (TERMS, BLOCK_C)
    w_dot: tl.tensor,
    gamma: tl.tensor,  # (BLOCK_C,)
    gamma_dot: tl.tensor,
    beta_dot: tl.tensor,
    C: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return ḟ (TERMS, BLOCK_C), rounded, and k1 and k2 of the planes (BLOCK_C,). k1 is for the image minus its shift."""
    w, w_dot = w.to(tl.float64), w_dot.to(tl.float64)
    k1 = tl.sum(mean * w_dot, 0)
    k2 = r * tl.sum(w_dot * covariance_w, 0)
    scale = gamma.to(tl.float64) * r
    scale_dot = r * (gamma_dot.to(tl.float64) - scale * k2)  # u̇ = scale_dot (y − mean) + scale (ẏ − k1) + β̇
    f_dot = (scale[None, :] * w_dot + scale_dot[None, :] * w).to(ACC)
    return _append_shift(f_dot, beta_dot, mean, C, TERMS, PRECISION), k1, k2


@triton.jit
def load_patches(
    images: tl.tensor,  # of the sample: (HP, WP, C)
    row: tl.tensor,  # (N,)
    column: tl.tensor,
    C: tl.constexpr,
    WP: tl.constexpr,
    TERMS: tl.constexpr,
) -> tl.tensor:
    """Return the patches of the convolution's output pixels (row, column), (N, TERMS)."""
    term = tl.arange(0, TERMS)[None, :]
    offsets = (row * WP + column)[:, None] * C + (term // (3 * C) * (WP * C) + term % (3 * C))
    xs = tl.load(images + offsets, term < 9 * C, 0)
    dtype: tl.constexpr = xs.dtype
    if _NUMPY and dtype == tl.bfloat16:
        xs = xs.to(tl.float32)
    return tl.where((term >= 9 * C) & (term < 9 * C + ONES), 1.0, xs).to(dtype)
