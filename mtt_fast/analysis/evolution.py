"""Show the images of a run over its iterations: `python -m mtt_fast.analysis evolution RUN`.

Reads the snapshots that each evaluation wrote to RUN/history (the first image of each class, pixel for pixel).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image, ImageDraw, ImageFont

from mtt_fast.commands import parsing
from mtt_fast.commands.option_fields import Checked, Range
from mtt_fast.commands.options import AtLeastTwo
from mtt_fast.commands.pictures import evenly, read_snapshot, save_stacked, snapshots_in
from mtt_fast.errors import InputError
from mtt_fast.storage.atomic import atomic_path
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.run_files import HISTORY

log = logging.getLogger(__name__)

PROGRAM = "python -m mtt_fast.analysis evolution"
CAPTION = 24
"""Pixels above each picture for the number of its iteration."""
_MIN_WIDTH = 480  # pixels on the screen
_LAST_FRAME_FACTOR = 5  # times as long as the others
_BACKGROUND, _TEXT_COLOUR = (255, 255, 255), (40, 40, 40)


@dataclass(frozen=True)
class EvolutionOptions:
    """Show the images over the iterations of a run: RUN/evolution.gif, and a strip of some of them, RUN/evolution.png."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")] = ""
    """run folder"""
    out: Annotated[str | None, Checked(check_output_folder)] = None
    """folder for the two pictures; if not given, the run folder"""
    seconds: Annotated[float, Range(0.02, 131)] = 0.3
    """seconds per picture of the GIF; the last picture stays five times as long, and a GIF holds a picture for 655 seconds at most"""
    rows: AtLeastTwo = 8
    """pictures in the strip, evenly spaced, with the first and the last"""


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    options = parsing.parse(EvolutionOptions, argv, PROGRAM)
    if not options.run:
        raise InputError(f"expected a run's folder; see {PROGRAM} --help")
    frames = [_with_caption(iteration, image) for iteration, image in read_history(Path(options.run)).items()]
    folder = Path(options.out or options.run)
    save_animation(folder / "evolution.gif", frames, options.seconds)
    save_stacked(folder / "evolution.png", evenly(frames, options.rows))
    log.info("%s, %s: %d pictures", folder / "evolution.gif", folder / "evolution.png", len(frames))


def read_history(run: Path) -> dict[int, Image.Image]:
    """Return the snapshots of the run in the folder `run` by iteration, in order.

    Raises `InputError` if there are none, or one is broken or of another size than the first.
    """
    files = snapshots_in(run)
    if not files:
        raise InputError(
            f"{run / HISTORY}: expected snapshots iteration_NNNNNN.png of a run, found none; check the path"
        )
    snapshots: dict[int, Image.Image] = {}
    for iteration, path in files.items():
        _, snapshots[iteration] = read_snapshot(path)
        first = next(iter(snapshots.values()))
        if snapshots[iteration].size != first.size:
            raise InputError(
                f"{path}: expected {first.size} pixels as in the first snapshot, found "
                f"{snapshots[iteration].size}; are there two runs in one folder?"
            )
    return snapshots


def save_animation(path: Path, frames: Sequence[Image.Image], seconds: float) -> None:
    """Write `frames` as an endless GIF, each shown for `seconds` and the last longer, atomically."""
    durations = [round(1000 * seconds)] * (len(frames) - 1) + [round(1000 * seconds * _LAST_FRAME_FACTOR)]
    with atomic_path(path) as temporary:
        frames[0].save(
            temporary, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=False
        )


def _with_caption(iteration: int, image: Image.Image) -> Image.Image:
    """Return the picture below its iteration's number; a small picture is enlarged by a whole factor, without smoothing."""
    factor = max(1, math.ceil(_MIN_WIDTH / image.width))
    width, height = image.width * factor, image.height * factor
    frame = Image.new("RGB", (width, height + CAPTION), _BACKGROUND)
    ImageDraw.Draw(frame).text(
        (4, 3), f"iteration {iteration}", fill=_TEXT_COLOUR, font=ImageFont.load_default(size=15)
    )
    frame.paste(image.resize((width, height), Image.Resampling.NEAREST), (0, CAPTION))
    return frame
