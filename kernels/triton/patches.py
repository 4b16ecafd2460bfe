"""Gather the patches that a 3×3 convolution of images sees, sum their products, and fold a norm into the convolution's weights.

The images may be those of a step as they lie: a program gathers its sample, augments it, and lays it out.

A patch x̃ is TERMS numbers: 9·C of the image in the order (3, 3, C), ONES ones, whose weights are pieces of the shift that
follows the weights (rounded pieces add up to what one rounded number is not), and zeros up to what Tensor cores take. The
image is less its shift, a number near the mean of each channel: a norm takes away what that changes, and where the image
is far from zero the sums of products lose as much less to cancellation. The names of planes' sides: HP × WP the padded
image, (HP − 2) × (WP − 2) the convolution's result.
"""

from __future__ import annotations

from .launch import INTERPRETED, tl, triton
from .warp import load_parameters, mean_for_contrast, warp_pixels

ONES = tl.constexpr(3)
PROBES = tl.constexpr(256)  # pixels whose mean is an image's shift

_NUMPY = tl.constexpr(INTERPRETED)  # NumPy multiplies the bits of bfloat16 numbers as if they were integers


@triton.jit
def round_factor(tile: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Round to what Tensor cores take: they would cut the bits off a float32. A NaN, whose bits would overflow, stays one."""
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
    """Multiply factors that are rounded already; the sums are in ACC."""
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
    place: tl.tensor,  # (1, PIXELS): pixels, row by row, of the image with its padding
    PADDING: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
) -> tl.tensor:
    """Return pixels of the image, augmented where there are parameters, (BLOCK_C, PIXELS); zero outside of the image."""
    c = tl.arange(0, BLOCK_C)[:, None]
    row = place // (W + 2 * PADDING) - PADDING
    column = place % (W + 2 * PADDING) - PADDING
    if colour is None:
        inside = (c < C) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        pixel = row * W + column
        value = tl.load(image + (pixel * C + c if CHANNELS_LAST else c * (H * W) + pixel), inside, 0).to(ACC)
    else:
        value = warp_pixels(image, colour, down, right, mask, mean, c, row, column, C, H, W, ACC)
    return value


@triton.jit(do_not_specialize_on_alignment=["index", "parameters"])  # a step's lie anywhere, and are read one by one
def gather(
    x: tl.tensor,  # (n, C, H, W)
    index: tl.tensor | None,  # (B,)
    parameters: tl.tensor | None,  # (B, 13): of colour_warp_mask
    images: tl.tensor,  # (B, H + 2 PADDING, W + 2 PADDING, C)
    gram: tl.tensor,  # (B, parts, 9 C + 1, 9 C + 1)
    parts: tl.tensor,
    tiles: tl.tensor,  # of a part
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
    """Store the padded image less its shift, rounded, and the sums of x̃x̃ᵀ over parts of the pixels.

    A program stores all rows that its patches have pixels of, and reads them back: its first and last rows are its neighbours'
    too, which store the same values there.
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
    # from a multiple of PIXELS, so that a pixel has one place in a tile, and the same bits whichever program stores it
    for start in range(first // WIDTH * WP // PIXELS * PIXELS, end, PIXELS):
        pixel = start + tl.arange(0, PIXELS)[None, :]
        value = _load_pixels(x, colour, down, right, mask, mean, pixel, PADDING, C, H, W, CHANNELS_LAST, BLOCK_C, ACC)
        tl.store(images + pixel * C + c, round_factor(value - shift, PRECISION), (c < C) & (pixel < end))
    tl.debug_barrier()  # what other threads of the program stored is read below

    total = tl.zeros((TERMS, TERMS), ACC)
    for tile in range(tiles):
        centre = first + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        exists = (centre <= last)[:, None]
        centre = tl.minimum(centre, last)
        xs = load_patches(images, centre // WIDTH, centre % WIDTH, C, WP, TERMS)
        xs = tl.where(exists, xs, 0).to(xs.dtype)
        total += product(tl.trans(xs), xs, ACC, PRECISION)  # not into the accumulator, which would cut bits off
    COUNT: tl.constexpr = 9 * C + 1
    row, column = tl.arange(0, TERMS)[:, None], tl.arange(0, TERMS)[None, :]
    place = program.to(tl.int64) * (COUNT * COUNT) + row * COUNT + column
    tl.store(gram + place, total, (row < COUNT) & (column < COUNT))


@triton.jit
def add_up_parts(
    values: tl.tuple,  # of pointers to those of the first part
    masks: tl.tuple,  # or None for all
    parts: tl.tensor,
    STRIDE: tl.constexpr,  # from part to part
    ACC: tl.constexpr,
) -> tl.tuple:
    """Add up each of the values of all parts, in the order of parts; the loads of AT_ONCE parts are under way at a time."""
    AT_ONCE: tl.constexpr = 4
    totals: tl.tuple = ()
    for each in tl.static_range(len(values)):
        totals += (tl.zeros(values[each].shape, ACC),)
    for start in range(0, parts, AT_ONCE):
        loaded: tl.tuple = ()
        for part in tl.static_range(AT_ONCE):
            for each in tl.static_range(len(values)):
                exists = start + part < parts
                if masks is not None:
                    exists &= masks[each]
                loaded += (tl.load(values[each] + (start + part) * STRIDE, exists, 0),)
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
    """Return the mean (TERMS, 1) and the covariance (TERMS, TERMS) of a sample's patches, in float64."""
    COUNT: tl.constexpr = 9 * C + 1
    row, column = tl.arange(0, TERMS)[:, None], tl.arange(0, TERMS)[None, :]
    in_row, in_column = row < COUNT, column < COUNT
    gram += sample * parts * (COUNT * COUNT)
    # the products with a one are the mean: read a second time, they need not be picked from the others
    places = (gram + row * COUNT + 9 * C, gram + 9 * C * COUNT + column, gram + row * COUNT + column)
    masks = (in_row, in_column, in_row & in_column)
    mean, mean_row, total = add_up_parts(places, masks, parts, COUNT * COUNT, tl.float64)
    mean, mean_row = mean * (1 / PIXELS), mean_row * (1 / PIXELS)
    return mean, total * (1 / PIXELS) - mean * mean_row


@triton.jit
def weight_places(filters: tl.tensor, C: tl.constexpr, TERMS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return the places of weights (K, C, 3, 3) in the order of a patch, (BLOCK_C, TERMS), and which of them exist."""
    term = tl.arange(0, TERMS)[None, :]
    return filters[:, None] * (9 * C) + term % C * 9 + term // C, (term < 9 * C) & (filters[:, None] >= 0)


@triton.jit
def load_weights(
    weight: tl.tensor,  # (K, C, 3, 3)
    filters: tl.tensor,  # (BLOCK_C,)
    C: tl.constexpr,
    TERMS: tl.constexpr,
) -> tl.tensor:
    """Return weights in the order of a patch, (TERMS, BLOCK_C)."""
    # a filter's terms lie together, so that a warp reads a filter at a time
    place, exists = weight_places(filters, C, TERMS)
    return tl.trans(tl.load(weight + place, exists, 0))


@triton.jit
def _append_shift(
    weight: tl.tensor,  # (TERMS, BLOCK_C)
    level: tl.tensor,  # (BLOCK_C,): what the mean of the product has to be
    mean: tl.tensor,  # (TERMS, 1): of the patches
    C: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Return rounded weights, and at the ones the shift that takes their own mean away, so that rounding moves no mean."""
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
    """Return f (TERMS, BLOCK_C), rounded; of the planes mean, less what the images' shift makes of it, and rstd; and Cw."""
    w = w.to(tl.float64)
    covariance_w = tl.dot(covariance, w, out_dtype=tl.float64)
    mu = tl.sum(mean * w, 0)
    variance = tl.maximum(tl.sum(w * covariance_w, 0), 0.0)  # rounding can make a plane's that is constant negative
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
    """Return ḟ (TERMS, BLOCK_C), rounded, and of the planes k1, less what the images' shift makes of it, and k2."""
    w, w_dot = w.to(tl.float64), w_dot.to(tl.float64)
    k1 = tl.sum(mean * w_dot, 0)
    k2 = r * tl.sum(w_dot * covariance_w, 0)
    scale = gamma.to(tl.float64) * r
    along = r * (gamma_dot.to(tl.float64) - scale * k2)  # u̇ = along (y − mean) + scale (ẏ − k1) + β̇
    f_dot = (scale[None, :] * w_dot + along[None, :] * w).to(ACC)
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
    """Return the patches of pixels of the convolution's result, (N, TERMS)."""
    term = tl.arange(0, TERMS)[None, :]
    place = (row * WP + column)[:, None] * C + (term // (3 * C) * (WP * C) + term % (3 * C))
    xs = tl.load(images + place, term < 9 * C, 0)
    dtype: tl.constexpr = xs.dtype
    if _NUMPY and dtype == tl.bfloat16:
        xs = xs.to(tl.float32)
    return tl.where((term >= 9 * C) & (term < 9 * C + ONES), 1.0, xs).to(dtype)
