"""Test the evolution of a set's images: each snapshot, the strip's frames, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from mtt_fast.analysis.evolution import CAPTION, read_history
from tests.analysis.helpers import run


def test_evolution_shows_every_snapshot(toy: Path, tmp_path: Path) -> None:
    assert run("evolution", str(toy / "run"), "--out", str(tmp_path), "--rows", "2", "--seconds", "0.1") == 0
    snapshots = []
    for path in sorted((toy / "run" / "history").iterdir()):
        with Image.open(path) as image:
            snapshots.append(image.convert("RGB"))
    assert len(snapshots) == 3
    width, height = (6 * side for side in snapshots[0].size)  # 80 pixels wide, enlarged to 480
    with Image.open(tmp_path / "evolution.gif") as gif:
        assert isinstance(gif, GifImageFile)
        assert gif.n_frames == 3
        assert gif.info["loop"] == 0  # endless
        shown = []
        for place, snapshot in enumerate(snapshots):
            gif.seek(place)
            shown.append(gif.info["duration"])
            frame = (
                gif.convert("RGB")
                .crop((0, CAPTION, width, CAPTION + height))
                .resize(snapshot.size, Image.Resampling.NEAREST)
            )
            difference = pixels(frame) - pixels(snapshot)
            assert float(difference.abs().max()) <= 8  # a GIF has 256 colours
        assert shown == [100, 100, 500]
    with Image.open(tmp_path / "evolution.png") as strip:
        assert strip.size == (width, 2 * (CAPTION + height))
        captions = [strip.crop((0, top, width, top + CAPTION)).tobytes() for top in (0, CAPTION + height)]
        assert captions[0] != captions[1]  # iteration 0, iteration 2
        for place, snapshot in enumerate((snapshots[0], snapshots[2])):
            top = place * (CAPTION + height) + CAPTION
            part = strip.crop((0, top, width, top + height)).resize(snapshot.size, Image.Resampling.NEAREST)
            assert pixels(part).equal(pixels(snapshot))


def test_pictures_stay_as_long_as_a_gif_can_hold_them(toy: Path, tmp_path: Path) -> None:
    for seconds, status in {"131": 0, "132": 2}.items():
        assert run("evolution", str(toy / "run"), "--out", str(tmp_path), "--seconds", seconds) == status
    with Image.open(tmp_path / "evolution.gif") as gif:
        assert gif.info["duration"] == 131_000
        gif.seek(2)
        assert gif.info["duration"] == 5 * 131_000


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.tensor(list(image.tobytes()), dtype=torch.int16)


def test_snapshots_are_in_the_order_of_their_iterations(tmp_path: Path) -> None:
    """Check that 1,000,000, which has a digit more, comes after 200,000."""
    (tmp_path / "history").mkdir()
    for iteration in (1_000_000, 200_000, 0):
        Image.new("RGB", (4, 4)).save(tmp_path / "history" / f"iteration_{iteration:06d}.png")
    assert list(read_history(tmp_path)) == [0, 200_000, 1_000_000]


def test_wrong_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evolution", str(tmp_path)) == 2
    assert "history: expected snapshots iteration_NNNNNN.png of a run, found none" in capsys.readouterr().err
    history = tmp_path / "history"
    history.mkdir()
    Image.new("RGB", (4, 4)).save(history / "iteration_000000.png")
    Image.new("RGB", (5, 4)).save(history / "iteration_000010.png")
    assert run("evolution", str(tmp_path)) == 2
    assert (
        "iteration_000010.png: expected (4, 4) pixels as in the first snapshot, found (5, 4)" in capsys.readouterr().err
    )
    (history / "iteration_000010.png").write_bytes(b"no")
    assert run("evolution", str(tmp_path)) == 2
    assert "iteration_000010.png: expected a picture (PNG), found a damaged or another file" in capsys.readouterr().err
