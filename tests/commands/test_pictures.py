"""Test the pictures of a run: each image is where its label says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mtt_fast.commands.pictures import evenly, save_grid, save_snapshot


@pytest.mark.parametrize(("classes", "ipc", "columns"), [(12, 1, 10), (3, 2, 2), (3, 12, 10)])
def test_a_grid_has_each_picture_at_its_place(classes: int, ipc: int, columns: int, tmp_path: Path) -> None:
    """Colour each picture by its number, and read the colours back: two panels, one above the other."""
    labels = torch.arange(classes).repeat(ipc)  # the pictures of a class are not neighbours
    colours = torch.arange(classes * ipc) / 255
    pictures = colours[:, None, None, None].expand(-1, 1, 96, 96)
    names = ["a class without pictures", *map(str, range(classes))]
    save_grid(tmp_path / "grid.png", [("a", pictures), ("b", pictures + 100 / 255)], 1 + labels, names)
    if ipc == 1:
        rows = [list(range(10)), [10, 11]]
    else:
        rows = [[label + classes * number for number in range(min(ipc, 10))] for label in range(classes)]
    with Image.open(tmp_path / "grid.png") as image:
        pixels = image.convert("L")
    height = pixels.height // 2
    found = [
        [
            pixels.getpixel((6 + 102 * column + 48, panel * height + 34 + 122 * row + 20 + 48))
            for column in range(len(tiles))
        ]
        for panel in range(2)
        for row, tiles in enumerate(rows)
    ]
    assert found == rows + [[number + 100 for number in tiles] for tiles in rows]
    assert pixels.width == 6 + 102 * columns
    named = [
        [min(pixels.crop((left, top, left + 96, top + 20)).tobytes()) < 200 for left in range(6, pixels.width, 102)]
        for top in range(34, 34 + 122 * len(rows), 122)
    ]
    assert named == [[(ipc == 1 and column < len(tiles)) or column == 0 for column in range(columns)] for tiles in rows]


def test_a_name_is_cut_at_the_edge_of_its_picture(tmp_path: Path) -> None:
    edges = []
    for number, name in enumerate(("l" * 200, "l" * 20)):
        save_grid(tmp_path / f"{number}.png", [("", torch.ones(2, 1, 96, 96))], torch.arange(2), [name, ""])
        with Image.open(tmp_path / f"{number}.png") as image:
            captions = image.convert("L").crop((6, 34, image.width, 34 + 20))
        dark = [
            column
            for column in range(captions.width)
            if min(captions.crop((column, 0, column + 1, 20)).tobytes()) < 200
        ]
        edges.append(dark[-1])
    assert edges[1] < 90 < edges[0] < 96


def test_a_snapshot_has_the_first_picture_of_each_class_at_its_place(tmp_path: Path) -> None:
    labels = torch.arange(12).repeat(2)
    pictures = (torch.arange(24) / 255)[:, None, None, None].expand(-1, 1, 4, 6)
    save_snapshot(tmp_path / "snapshot.png", pictures, labels)
    with Image.open(tmp_path / "snapshot.png") as image:
        assert image.size == (60, 8)
        found = [image.convert("L").getpixel((6 * (number % 10) + 3, 4 * (number // 10) + 2)) for number in range(12)]
    assert found == list(range(12))
    save_snapshot(tmp_path / "few.png", pictures[:3], labels[:3])
    with Image.open(tmp_path / "few.png") as image:
        assert image.size == (18, 4)


def test_chosen_items_are_evenly_spaced() -> None:
    items = list(range(11))
    assert evenly(items, 3) == [0, 5, 10]
    assert evenly(items, 20) == items
    assert evenly([], 5) == []
