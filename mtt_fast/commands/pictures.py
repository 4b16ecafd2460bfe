"""Draw the images of a run, as a labelled grid and as a snapshot; find and read its snapshots."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mtt_fast.data.images import as_image
from mtt_fast.errors import InputError
from mtt_fast.storage.atomic import atomic_path
from mtt_fast.storage.regular import read_bytes
from mtt_fast.storage.run_files import HISTORY

_MAX_COLUMNS = 10
_MAX_CLASSES = 100  # in a snapshot
_MAX_SNAPSHOT_BYTES = 64 << 20
_SMALLEST_TILE = 96  # pixels on the screen
_GAP, _CAPTION, _HEADER = 6, 20, 34
_BACKGROUND, _TEXT_COLOUR = (255, 255, 255), (40, 40, 40)

Item = TypeVar("Item")


def save_grid(
    path: str | os.PathLike[str],
    panels: Sequence[tuple[str, Tensor]],
    labels: Tensor,
    class_names: Sequence[str],
) -> None:
    """Write panels, each a title and pictures (n, C, H, W) in [0, 1], one above the other with class names, atomically.

    One image per class: ten classes a row, names above. More: a class a row, its first ten images.
    Small images are enlarged by a whole factor, without smoothing.
    """
    by_class = [[int(i) for i in (labels == label).nonzero()[:_MAX_COLUMNS, 0]] for label in range(len(class_names))]
    rows: list[list[tuple[str, int]]]
    if max(map(len, by_class)) <= 1:
        present = [(name, indices[0]) for name, indices in zip(class_names, by_class, strict=True) if indices]
        rows = [present[begin : begin + _MAX_COLUMNS] for begin in range(0, len(present), _MAX_COLUMNS)]
    else:
        rows = [
            [(name if column == 0 else "", index) for column, index in enumerate(indices)]
            for name, indices in zip(class_names, by_class, strict=True)
            if indices
        ]
    save_stacked(path, [_panel(title, pictures, rows) for title, pictures in panels])


def save_stacked(path: str | os.PathLike[str], images: Sequence[Image.Image]) -> None:
    """Write `images` one below the other as PNG, atomically."""
    canvas = Image.new(
        "RGB", (max(image.width for image in images), sum(image.height for image in images)), _BACKGROUND
    )
    top = 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height
    with atomic_path(path) as temporary:
        canvas.save(temporary, format="PNG")


def _panel(title: str, pictures: Tensor, rows: Sequence[Sequence[tuple[str, int]]]) -> Image.Image:
    """Draw one panel; each tile of `rows` is a name above the picture at an index."""
    factor = max(1, math.ceil(_SMALLEST_TILE / pictures.shape[-1]))
    width, height = pictures.shape[-1] * factor, pictures.shape[-2] * factor
    font, title_font = ImageFont.load_default(size=14), ImageFont.load_default(size=17)
    pitch = height + _CAPTION + _GAP
    columns = max(map(len, rows))
    image = Image.new("RGB", (_GAP + columns * (width + _GAP), _HEADER + len(rows) * pitch + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((_GAP, _GAP), title, fill=_TEXT_COLOUR, font=title_font)
    for row, tiles in enumerate(rows):
        top = _HEADER + row * pitch
        for column, (name, index) in enumerate(tiles):
            left = _GAP + column * (width + _GAP)
            draw.text((left, top), _shortened(name, width, font), fill=_TEXT_COLOUR, font=font)
            tile = as_image(pictures[index]).convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            image.paste(tile, (left, top + _CAPTION))
    return image


def _shortened(name: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while font.getlength(name) > width:
        name = name[:-1]
    return name


def save_snapshot(path: str | os.PathLike[str], pictures: Tensor, labels: Tensor) -> None:
    """Write the first picture (C, H, W) in [0, 1] of each class, ten a row and pixel for pixel, atomically.

    `pictures` (n, C, H, W) with class indices `labels` (n,). At most a hundred classes are shown. A class has the same
    position in the snapshots of all iterations.
    """
    first = [int((labels == label).nonzero()[0, 0]) for label in labels.unique()[:_MAX_CLASSES]]
    height, width = pictures.shape[-2:]
    columns = min(_MAX_COLUMNS, len(first))
    canvas = Image.new("RGB", (columns * width, math.ceil(len(first) / columns) * height), _BACKGROUND)
    for position, index in enumerate(first):
        row, column = divmod(position, columns)
        canvas.paste(as_image(pictures[index]).convert("RGB"), (column * width, row * height))
    with atomic_path(path) as temporary:
        canvas.save(temporary, format="PNG")


def snapshots_in(run: Path) -> dict[int, Path]:
    """Return the files of the snapshots in the run folder `run` by iteration, in order."""
    names = {path: re.fullmatch(r"iteration_(\d+)\.png", path.name) for path in (run / HISTORY).glob("*.png")}
    return dict(sorted((int(name[1]), path) for path, name in names.items() if name))


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """Return `count` of the items, evenly spaced, with the first and the last; all if there are no more than that."""
    if len(items) <= count:
        return list(items)
    return [items[round(number * (len(items) - 1) / (count - 1))] for number in range(count)]


def read_snapshot(path: str | os.PathLike[str]) -> tuple[bytes, Image.Image]:
    """Return the bytes of a snapshot, and its picture. Raises `InputError` for a file that is not a complete PNG."""
    content = read_bytes(path, _MAX_SNAPSHOT_BYTES)
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            return content, image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{os.fspath(path)}: expected a picture (PNG), found a damaged or another file; delete it"
        ) from error
