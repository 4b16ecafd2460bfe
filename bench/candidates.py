"""List the candidates for the table of launch configurations, and write the table."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def _rows(names: str, *values: tuple[int | None, ...], **more: int) -> list[Row]:
    """Return a row for each of `values`, which have these `names`; None for a name that the row lacks."""
    rows = (dict(zip(names.split(), each, strict=True)) for each in values)
    return [{name: value for name, value in row.items() if value is not None} | more for row in rows]


_TILE = "BLOCK_M BLOCK_N BLOCK_K num_warps num_stages"


def _correlations(programs: tuple[int, ...], *sizes: tuple[int, int, int, int, int]) -> list[Row]:
    return [tile | {"PROGRAMS": count} for tile in _rows(_TILE, *sizes) for count in programs]


# A candidate that does not fit on a GPU fails there, and is left out.

TILES: dict[str, list[Row]] = {
    "fp32": _rows(_TILE, (64, 32, 16, 4, 2), (64, 64, 16, 4, 3), (128, 64, 16, 8, 2)),
    "tf32": _rows(
        _TILE, (128, 128, 32, 8, 3), (64, 128, 32, 4, 3), (64, 128, 32, 8, 3), (128, 64, 32, 8, 3), (64, 64, 32, 4, 3)
    ),
    "bf16": _rows(
        _TILE, (128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (64, 128, 64, 4, 3), (64, 128, 64, 8, 3), (64, 64, 64, 4, 3)
    ),
}

CORRELATIONS: dict[str, list[Row]] = {
    "fp32": _correlations((528,), (32, 32, 64, 4, 2), (32, 64, 32, 4, 2)),
    "tf32": _correlations((264, 528), (32, 128, 128, 8, 3), (32, 128, 64, 8, 3), (64, 64, 64, 4, 2)),
    "bf16": _correlations((264, 528), (64, 128, 128, 8, 3), (64, 128, 64, 8, 3), (64, 64, 64, 4, 3)),
}


def _box_tiles(depth: int) -> list[Row]:
    """Return tiles by boxes whose rows of `depth` channels are 128 bytes; without TAPS, a program sums all taps."""
    return _rows(
        "BLOCK_M BLOCK_N BLOCK_K TAPS num_warps num_stages",
        (128, 128, depth, None, 8, 3), (256, 64, depth, None, 8, 3), (128, 64, depth, None, 4, 2), (64, 64, depth, None, 4, 4),
        (64, 128, depth, None, 4, 3), (128, 128, depth, 9, 8, 3), (128, 128, depth, 3, 8, 3), (64, 128, depth, 3, 4, 3),
        (64, 64, depth, 3, 4, 4), (64, 64, depth, 1, 4, 4),
    )  # fmt: skip


BOX_TILES: dict[str, list[Row]] = {"fp32": [], "tf32": _box_tiles(32), "bf16": _box_tiles(64)}

_BOX_CORRELATION = "BLOCK_M BLOCK_N BLOCK_K TAPS PROGRAMS num_warps num_stages"
BOX_CORRELATIONS: dict[str, list[Row]] = {
    "fp32": [],
    "tf32": _rows(
        _BOX_CORRELATION,
        (32, 128, 128, 3, 132, 8, 3),
        (32, 128, 128, 1, 264, 4, 3),
        (32, 128, 128, 1, 132, 4, 4),
        (32, 128, 64, 1, 132, 4, 4),
    ),
    "bf16": _rows(
        _BOX_CORRELATION,
        (64, 128, 128, 3, 132, 8, 3),
        (64, 128, 128, 1, 264, 4, 3),
        (128, 128, 128, 1, 132, 8, 3),
        (64, 128, 64, 1, 132, 4, 4),
    ),
}


_POOLS = _rows(
    "WINDOWS BLOCK_C UNROLL PROGRAMS num_warps",
    (64, 32, 1, 264, 8), (64, 32, 1, 528, 8), (32, 32, 1, 396, 4), (32, 32, 1, 792, 4),
    (32, 64, 1, 264, 8), (32, 64, 1, 528, 8), (32, 16, 4, 528, 4), (64, 64, 1, 264, 8), num_stages=1,
)  # fmt: skip
_SUMS = _rows(
    "WINDOWS BLOCK_C PROGRAMS num_warps",
    (32, 64, 264, 8), (32, 64, 528, 8), (32, 64, 396, 4), (32, 64, 792, 4),
    (32, 128, 264, 4), (32, 128, 264, 8), (32, 128, 528, 8), (32, 32, 528, 4), num_stages=1,
)  # fmt: skip

BLOCKS: dict[str, list[Row]] = {
    "image_patches": _rows(
        "BLOCK_M PROGRAMS num_warps", (128, 320, 4), (64, 320, 4), (128, 1056, 4), (32, 1056, 4), ELEMENTS=512, num_stages=1,
    ),
    "conv_norm_relu_pool": [*_POOLS, *(row | {"UNROLL": 4} for row in _POOLS[:4])],
    "conv_norm_relu_pool_backward": _SUMS,
    "conv_norm_relu_pool_dual": _POOLS,
    "conv_norm_relu_pool_dual_backward": _SUMS,
    "conv_norm_relu_pool_finish": _rows("BLOCK_C num_warps", (16, 4), (16, 8), (32, 8), (16, 2), num_stages=1),
    "conv_norm_relu_pool_columns": _rows(
        "WINDOWS TOGETHER BLOCK_C num_warps",
        (64, 1, 32, 4), (64, 1, 16, 4), (32, 1, 32, 4), (128, 1, 32, 8),
        (16, 4, 32, 4), (32, 4, 32, 4), (16, 4, 64, 4), (16, 4, 16, 4), num_stages=1,
    ),
    "conv_norm_relu_pool_col2im": _rows("BLOCK_M num_warps", (128, 4), (64, 4), num_stages=1),
}  # fmt: skip
"""Rows of the first block's passes, by their names in the table."""


def lines(shape_class: str) -> list[Row]:
    """Return the candidates for a norm: tiles in registers if a plane may fit, and tiles of parts."""
    windows = int(shape_class)
    held = [
        {"BLOCK_C": channels, "WINDOWS": windows, "num_warps": warps}
        for channels in (8, 16, 32, 64)
        for warps in (1, 2, 4, 8)
        if 16 <= 4 * windows * channels / (32 * warps) <= 64  # pixels of a thread
    ]
    parts = [
        {"BLOCK_C": 128, "WINDOWS": 16, "TILES": tiles, "num_warps": warps}
        for tiles in (1, 2, 4, 8)
        for warps in (4, 8)
    ]
    return held if windows < 256 else held + parts


_HEAD = """\
Launch configurations, by operation, class of shapes and architecture; `default` is for those that have no row of their
own. Written by `python -m bench tune`, which needs a GPU. Rows with `microseconds` are measured. Those with
`prototype_microseconds` took so long with a prototype of the kernel, with the same tiles and traffic; the kernel itself has
not been timed by itself. All others are guesses that fit in registers and shared memory."""

_SECTIONS = {
    "norm_relu_pool": """\
norm_relu_pool…: a tile is BLOCK_C × WINDOWS 2×2 windows. A class is the number of a plane's windows, rounded up to the sizes
below; the last one takes all larger planes. Where what is read is in parts that a convolution of few samples left, a row of the
class with `-partial` goes first; for planes of 16 bits, one with `-half`. Planes larger than a tile go in parts of TILES tiles.
The prototype ran on an H200, on float32 planes of 128 channels: 100 samples of up to 256 windows, else 20. The kernels ran there
on bfloat16 planes of 128 channels: in parts 10 samples, else 100 of up to 64 windows and 20 of more.""",
    "bias_relu_pool": "bias_relu_pool…: as above, but all planes go in parts, since each is walked over once.",
    "conv3x3": """\
conv3x3…: a tile is BLOCK_M × BLOCK_N results, each a sum over terms (a tap of a channel), taken BLOCK_K at a time. The
weight gradient's tile is BLOCK_K × BLOCK_N, its sum goes over pixels, BLOCK_M at a time, and is cut so as to make about
PROGRAMS programs. The backend is a kernel of ours that loads by pointers (triton) or by boxes (tma), or torch's library
(cudnn). A class is the precision, whether images (at most 16 channels: narrow) are on either side, and, each rounded up
to a power of four, the pixels of a result's plane and the samples; without these, it is for all that have no row of their own.
What follows tma is the tile by boxes, BLOCK_M being the box's pixels: TAPS is
how many taps a program sums; of a weight gradient, whose tile is BLOCK_N outputs × BLOCK_K inputs, how many it holds.
Where boxes do not fit, the row's other tile is taken. The prototype's times leave out the copies of weights, as those of
cuDNN beside which it was timed did, and of a weight gradient in tf32 those of its pixels (4 to 10 microseconds); in bf16
they are those of fp16; a tangent's are the dual's, which does more. The weight gradient of the class tf32-wide-256-256 was timed
with the 256 samples of a real batch: cuDNN is 55 microseconds faster there than boxes, and 5 slower with 100 samples.""",
    "image_patches": """\
image_patches: BLOCK_M pixels at a time, in parts that make about PROGRAMS programs, and ELEMENTS of the image to copy. A class
is the precision, bf16 for fp16 too, and, each rounded up (kernels/triton/block.py), the pixels of a plane and the samples; without
these, it is for all that have no row of their own.""",
    "conv_norm_relu_pool": """\
conv_norm_relu_pool…: the first block. A tile is WINDOWS 2×2 windows × BLOCK_C filters, and the windows are cut so as to make
about PROGRAMS programs; …_columns has TOGETHER of a window's four pixels in a tile, and …_col2im takes BLOCK_M pixels. Classes are
those of image_patches. The microseconds of …_finish, …_columns and …_col2im, passes of the dual's backward, are those of the whole;
rows of …_columns without are the faster ones in traces of whole iterations (bench/results/h200/traces.json).""",
    "linear_cross_entropy": """\
linear_cross_entropy…: the class of shapes is the number of classes, rounded up to the sizes below; the last one takes all larger
numbers. Of more than 4096 features a row of the class with `-wide` goes first: what a loop of four steps holds would spill. Scores
are tiles of ROWS samples × COLUMNS classes, summed over BLOCK_D features at a time, of which those of AHEAD tiles are loaded
together; up to 128 classes fit in one. Gradients are tiles of COLUMNS classes × BLOCK_D features, or of BLOCK_B samples × BLOCK_D
features.""",
    "colour_warp_mask": "colour_warp_mask…: a tile is ELEMENTS values, all channels of as many pixels.",
    "": """\
Flat vectors and rows: SIZE elements a program at a time; squared_distance adds up PARTIALS sums of float64. Of partial sums SIZE
are summands, and weights are packed in tiles of FILTERS × CHANNELS of their 3×3s. Where a launch makes patches too, those
tiles have image_patches' num_warps. ELEMENTS of adjoint_step are those of a tile of images.""",
}
"""Comments above the operations, by a prefix of their names."""


def text_of(table: dict[str, dict[str, dict[str, Row]]]) -> str:
    """Return the table as TOML."""
    lines = [_comment(_HEAD)]
    section = None
    for operation, classes in sorted(table.items(), key=lambda item: _section(item[0])):
        prefix = list(_SECTIONS)[_section(operation)]
        if prefix != section:
            lines += ["", _comment(_SECTIONS[prefix])]
            section = prefix
        for shape_class, rows in classes.items():
            lines += ["", f'[{operation}."{shape_class}"]']
            lines += [f"{architecture} = {{ {_entries(row)} }}" for architecture, row in rows.items()]
    return "\n".join(lines) + "\n"


def _section(operation: str) -> int:
    return next(index for index, prefix in enumerate(_SECTIONS) if operation.startswith(prefix))


def _comment(text: str) -> str:
    return "\n".join(f"# {line}" for line in text.splitlines())


def _entries(row: Row) -> str:
    return ", ".join(f"{name} = {_value(value)}" for name, value in row.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {_entries(value)} }}"
    return f'"{value}"' if isinstance(value, str) else str(value)
