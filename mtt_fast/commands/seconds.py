"""Count where the seconds of a run go, over all processes that worked on it: seconds.json, and a line at the end."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch

from mtt_fast.data import ImageData, transform_for
from mtt_fast.errors import InputError
from mtt_fast.storage.records import check_form, read_record, write_record
from mtt_fast.storage.run_files import SECONDS
from mtt_fast.storage.run_folder import lock_inode
from mtt_fast.training.images import RealImages, real_images

log = logging.getLogger(__name__)

Part = Literal["data", "whitening", "experts", "first_iteration", "iterations", "evaluations", "saving", "other"]
PARTS: tuple[Part, ...] = get_args(Part)
_FORM = {f"{part}?": int | float for part in PARTS}
_LEFT_OUT = 0.05  # seconds: a shorter part is left out of the line at the end


class Stopwatch:
    """The wall clock of a run: every moment counts towards one part of the work.

    Where parts nest, the inner one counts. The sum of `totals` is the time since the clock was made, plus what was added.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._totals: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self._part: Part = "other"
        self._since = clock()

    @contextlib.contextmanager
    def of(self, part: Part) -> Iterator[None]:
        """Count the block's time towards `part`, except that of inner blocks, which have parts of their own."""
        outer = self._part
        self._turn_to(part)
        try:
            yield
        finally:
            self._turn_to(outer)

    def add(self, earlier: Mapping[Part, float]) -> None:
        """Add what was counted `earlier`."""
        for part, seconds in earlier.items():
            self._totals[part] += seconds

    def totals(self) -> dict[str, float]:
        """Return the seconds of each part up to now."""
        self._turn_to(self._part)
        return {part: self._totals[part] for part in PARTS}

    def _turn_to(self, part: Part) -> None:
        now = self._clock()
        self._totals[self._part] += now - self._since
        self._part, self._since = part, now


def timed_real_images(data: ImageData, device: torch.device, seconds: Stopwatch, *, zca: bool) -> RealImages:
    """Return `data` on `device` as networks see it, whitened with `zca`; `seconds` counts the fit separately."""
    with seconds.of("whitening"):
        transform = transform_for(data, zca=zca, device=device)
    with seconds.of("data"):
        return real_images(data, device, zca=zca, transform=transform)


@contextlib.contextmanager
def accumulate_seconds(folder: Path, seconds: Stopwatch) -> Iterator[None]:
    """Add what earlier processes counted for the run in `folder`, and save the sum there, whatever ends the block.

    Save nothing after an error if another run has taken the folder.
    """
    seconds.add(_read(folder))
    place = lock_inode(folder)
    try:
        yield
    except BaseException:
        if lock_inode(folder) == place:
            with contextlib.suppress(InputError):  # the error that ended the run is shown, not that of its seconds
                save_seconds(folder, seconds)
        raise
    save_seconds(folder, seconds)


def save_seconds(folder: Path, seconds: Stopwatch) -> None:
    """Write the totals to seconds.json, from which a continued run counts on."""
    write_record(folder / SECONDS, seconds.totals())


def describe_seconds(totals: Mapping[str, float]) -> str:
    """Return totals on one line, as "12.5 s: data 2.0, iterations 10.5"."""
    parts = [f"{part.replace('_', ' ')} {taken:.1f}" for part, taken in totals.items() if taken >= _LEFT_OUT]
    return f"{sum(totals.values()):.1f} s: {', '.join(parts)}"


def _read(folder: Path) -> dict[Part, float]:
    """Return the totals that were saved in `folder`; none, with a warning, if the file is damaged."""
    path = folder / SECONDS
    if not path.exists():
        return {}
    try:
        record = read_record(path, "the seconds of a run", "they are counted from now on")
        check_form(record, _FORM)
        return {part: float(record[part]) for part in PARTS if part in record}
    except (InputError, TypeError) as error:
        log.warning("%s: the seconds before are not counted (%s)", path, error)
        return {}
