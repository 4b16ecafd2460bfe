"""Trajectories that MCT compressed: waypoint_buffer*_N.pt with step_buffer*_N.pt beside it.

Each expert has K waypoints (lists of parameter tensors) and, for each of the K − 1 pieces between them, the share of
the way that each parameter tensor has gone at each epoch: 0 … 1, proportional to the path's length in that tensor. With
K = 2 the one piece is not wrapped in a list; otherwise the names say _ipK. They are mtt_fast's compressed experts
(mtt_fast/storage/waypoints.py) in another form. A tensor that stands still through a piece has the share 0 at its end
there, and 1 here.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtt_fast.checks import shown
from mtt_fast.errors import InputError
from mtt_fast.interop.buffers import as_epochs, check_absent, check_points, experts_of_buffer, groups
from mtt_fast.interop.experts import Trajectory
from mtt_fast.interop.pickles import LARGE, load_pickle, save_large_pickle, save_pickle
from mtt_fast.storage.atomic import atomic_folder
from mtt_fast.storage.foreign import complaint_of
from mtt_fast.storage.trajectories import TrajectoryStore
from mtt_fast.storage.waypoints import Course

WAYPOINTS = r"waypoint_buffer_(?:(?:ip\d+|uni|dec|proj)_)?(\d+)\.pt"


def read_waypoints(file: Path) -> Iterator[Trajectory]:
    """Yield the experts of a waypoint buffer, each with its waypoints and the course between them.

    Raises `InputError` if the files do not fit together.
    """
    steps_file = _steps_file(file)
    waypoints = experts_of_buffer(load_pickle(file, mapped=True, most=LARGE), file)
    steps = load_pickle(steps_file, most=LARGE)
    if not isinstance(steps, list) or len(waypoints) != len(steps):
        raise InputError(
            f"{file}: expected a list of experts, and {steps_file.name} of as many, {len(waypoints)}, found {shown(steps)}; get "
            "both files again"
        )
    for place, (points, pieces) in enumerate(zip(waypoints, steps, strict=True)):
        check_points(points, f"{file}: expert {place}", "waypoints")
        try:
            yield Trajectory(file, place, points, _course(points, pieces))
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
            raise InputError(
                f"{file}: expert {place}: expected waypoints and the steps between them, found others ({complaint_of(error)}); "
                f"get it and {steps_file.name} again"
            ) from error


def export_waypoints(
    store: TrajectoryStore, folder: str | os.PathLike[str], experts_per_file: int = 10
) -> Generator[Path, None, None]:
    """Write compressed experts as waypoint_buffer[_ipK]_N.pt and step_buffer[_ipK]_N.pt in `folder`, and yield the first.

    The files appear when the last one was asked for, or none does.
    Raises `InputError` for an expert that is not compressed, or whose waypoints are not as many as the first one's, and
    where a file is already.
    """
    folder, chosen = Path(folder), groups(store, experts_per_file)
    courses = [_course_of(store, expert) for expert in range(len(store))]
    count = len(courses[0].epochs)
    if any(len(course.epochs) != count for course in courses):
        raise InputError(f"{store.folder}: expected {count} waypoints of every expert, found others; export them apart")
    kind = "waypoint_buffer" if count == 2 else f"waypoint_buffer_ip{count}"
    check_absent(folder, f"{kind}_0.pt", f"{kind}_{len(chosen)}.pt")
    with atomic_folder(folder, last=kind) as content:
        for number, experts in enumerate(chosen):
            path = content / f"{kind}_{number}.pt"
            pieces = [_shares(courses[expert]) for expert in experts]
            save_pickle(_steps_file(path), pieces if count > 2 else [one for (one,) in pieces])
            save_large_pickle(path, [as_epochs(store, expert, courses[expert].epochs) for expert in experts])
            yield folder / path.name


def _steps_file(file: Path) -> Path:
    return file.with_name(file.name.replace("waypoint_buffer", "step_buffer"))


def _course(points: Any, pieces: Any) -> Course:
    """Return the course that the shares `pieces` describe."""
    if not isinstance(pieces[0][0], Sequence):  # the shares of two waypoints
        pieces = [pieces]
    if len(points) != len(pieces) + 1:
        raise ValueError(f"{len(points)} waypoints and {len(pieces)} pieces")
    if len({id(part) for piece in pieces for part in piece}) < sum(map(len, pieces)) or min(map(len, pieces)) < 2:
        raise ValueError("a piece without epochs, or one list of shares twice")
    sizes = tuple(tensor.numel() for tensor in points[0])
    ends = tuple(itertools.accumulate((len(piece) - 1 for piece in pieces), initial=0))
    positions = torch.zeros(ends[-1] + 1, len(sizes), dtype=torch.float64, device="cpu")
    for k, (begin, piece) in enumerate(zip(ends[:-1], pieces, strict=True)):
        positions[begin + 1 : begin + len(piece)] = k + positions.new_tensor(piece[1:])
        positions[begin + len(piece) - 1] = k + 1
    course = Course(ends, sizes, positions, smooth=len(points) > 2)  # MCT's code leaves two as they are
    course.check()
    return course


def _shares(course: Course) -> list[list[list[Tensor]]]:
    """Return the shares of the way, indexed by piece, epoch and parameter tensor, each a tensor ()."""
    return [
        [list((course.positions[epoch] - k).float().clone().unbind()) for epoch in range(begin, end + 1)]
        for k, (begin, end) in enumerate(itertools.pairwise(course.epochs))
    ]


def _course_of(store: TrajectoryStore, expert: int) -> Course:
    course = store.course(expert)
    if course is None:
        raise InputError(
            f"{store.folder}: expected compressed experts, found whole ones; compress them with "
            "`python -m mtt_fast.compress`"
        )
    return course
