"""Compress experts to a few waypoints each, with straight lines between them: `python -m mtt_fast.compress FOLDER`.

MCT does the same to a buffer (mtt_fast/storage/waypoints.py has the equations). `python -m mtt_fast.distill --num_interpolation K`
compresses by itself; this command compresses any folder, at the epochs that the user chooses.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tqdm import tqdm

from mtt_fast.commands import cli, parsing
from mtt_fast.commands.option_fields import Checked, Range
from mtt_fast.commands.options import AtLeastTwo, TrueOrFalse
from mtt_fast.errors import InputError
from mtt_fast.networks.layout import ParameterLayout
from mtt_fast.runtime.interrupts import raise_if_stopped, stop_request
from mtt_fast.storage.expert_checks import check_one_kind
from mtt_fast.storage.expert_locks import lock_expert_folder
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.trajectories import TrajectoryStore, expert_path, write_expert
from mtt_fast.storage.waypoints import check_waypoints, convexified, evenly_spaced

_COMPRESS_AGAIN = "delete that folder, or compress into another one"  # --out of a distillation is another folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompressOptions:
    """Compress experts to a few waypoints each, with straight lines between them (MCT)."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")] = ""
    """folder of experts, such as buffers/CIFAR10_NO_ZCA/ConvNet"""
    num_interpolation: AtLeastTwo = 4
    """waypoints per expert, including the first and the last"""
    epochs: Annotated[tuple[int, ...] | None, Range(0, largest=10**9)] = None
    """epochs of the waypoints, such as 0 6 25 50; if not given, evenly spaced"""
    smooth: TrueOrFalse = True
    """smooth the waypoints: use the mean of the epochs before and after each, and of the last two epochs for the last waypoint; two
    waypoints, the ends, stay as they are, as in MCT's code"""
    out: Annotated[str | None, Checked(check_output_folder)] = None
    """folder for the compressed experts; if not given, FOLDER/waypoints_K"""

    def without_effect(self) -> dict[str, str]:
        """Return the options that have no effect with the others, with the reasons."""
        reasons = {} if self.epochs is None else {"num_interpolation": "with --epochs, which determines the number"}
        if self.count == 2:
            reasons["smooth"] = "with two waypoints, which stay as they are"
        return reasons

    @property
    def count(self) -> int:
        """Return the number of waypoints per expert."""
        return len(self.epochs) if self.epochs else self.num_interpolation


def waypoint_folder(folder: Path, count: int) -> Path:
    """Return the folder for the experts of `folder` as `count` waypoints each."""
    return folder / f"waypoints_{count}"


def compress(
    folder: Path, out: Path, count: int, epochs: Sequence[int] | None = None, *, smooth: bool = True, wait: float = 0
) -> TrajectoryStore:
    """Compress those experts in `folder` that `out` lacks to `count` waypoints; return the store of all in `out`.

    The waypoints are at `epochs`, or evenly spaced; `smooth` as in `convexified`, but two waypoints stay as they are, as in MCT's
    code. Each expert is written as soon as it is done.
    Raises `InputError` if there is none, if they were not trained alike on the same images, if one is compressed already, if
    the waypoints do not fit an expert's epochs, if `out` holds one that was made otherwise, or if another process writes
    there (`wait` as in `lock_folder`); `Stopped` on Ctrl-C or SIGTERM.
    """
    whole = TrajectoryStore(folder)
    if not len(whole):
        raise InputError(
            f"{folder}: expected experts, found none; train some with `python -m mtt_fast.experts`, or convert the public code's "
            "with `python -m mtt_fast.convert`"
        )
    check_one_kind(whole)
    written = compressed = 0
    with lock_expert_folder(out, "choose another `out`", wait=wait), stop_request() as stop:
        done = TrajectoryStore(out)
        for expert, index in enumerate(tqdm(whole.indices, desc="compress", unit="expert")):
            raise_if_stopped(stop, "stopped; the experts that were finished are saved; the same command continues")
            if whole.course(expert) is not None:
                raise InputError(
                    f"{folder}: expert {index} is compressed already; give the folder of uncompressed experts"
                )
            waypoints = tuple(epochs or evenly_spaced(whole.epochs(expert), count))
            check_waypoints(waypoints, whole.epochs(expert))
            smoothed = smooth and len(waypoints) > 2
            if index in done.indices:
                _check_same(whole, expert, done, waypoints, smooth=smoothed)
            else:
                _compress_one(whole, expert, out, waypoints, smooth=smoothed)
            written += expert_path(folder, index).stat().st_size
            compressed += expert_path(out, index).stat().st_size
    log.info(
        "%d experts of %s as waypoints in %s: %s, not %s, %.1f times smaller",
        len(whole), folder, out, _size(compressed), _size(written), written / compressed,
    )  # fmt: skip
    return TrajectoryStore(out)


def _compress_one(whole: TrajectoryStore, expert: int, out: Path, epochs: tuple[int, ...], *, smooth: bool) -> None:
    metadata = dataclasses.replace(whole.metadata(expert), made_of=whole.digest(expert))
    trajectory = torch.stack([whole.read(expert, epoch) for epoch in range(whole.epochs(expert) + 1)])
    sizes = ParameterLayout.from_text(metadata.layout).sizes
    parameters, course = convexified(trajectory, sizes, epochs, smooth=smooth)
    write_expert(out, whole.indices[expert], parameters, metadata, whole.dtype(expert), course)


def _check_same(
    whole: TrajectoryStore, expert: int, done: TrajectoryStore, epochs: tuple[int, ...], *, smooth: bool
) -> None:
    """Raise `InputError` unless `done` holds the waypoints at `epochs` of that very expert."""
    index = whole.indices[expert]
    compressed = done.indices.index(index)
    course = done.course(compressed)
    if course is None or (course.epochs, course.smooth) != (epochs, smooth):
        content, fix = "a whole expert", "choose another --out"
        if course is not None:
            content, fix = f"waypoints at {course.epochs}, smooth {course.smooth}", _COMPRESS_AGAIN
        raise InputError(
            f"{expert_path(done.folder, index)}: expected waypoints at {epochs}, smooth {smooth}, found {content}; {fix}"
        )
    check_compressed_from(done, [compressed], whole)


def check_compressed_from(compressed: TrajectoryStore, experts: Iterable[int], whole: TrajectoryStore) -> None:
    """Raise `InputError` if one of `experts` in the `compressed` store was made from another expert than that in `whole`.

    Experts of the same number are compared. The message names both files.
    """
    for expert in experts:
        index, made_of = compressed.indices[expert], compressed.metadata(expert).made_of
        digest = whole.digest(whole.indices.index(index)) if index in whole.indices else ""
        if made_of and digest and made_of != digest:
            raise InputError(
                f"{compressed.path(expert)}: made from another expert than {expert_path(whole.folder, index)}; "
                f"{_COMPRESS_AGAIN}"
            )


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    options = parsing.parse(CompressOptions, argv, "python -m mtt_fast.compress")
    if not options.folder:
        raise InputError("expected a folder of experts, such as buffers/CIFAR10_NO_ZCA/ConvNet; see --help")
    folder = Path(options.folder)
    out = Path(options.out) if options.out else waypoint_folder(folder, options.count)
    compress(folder, out, options.count, options.epochs, smooth=options.smooth)


if __name__ == "__main__":
    sys.exit(cli.run(main))
