"""Trajectories that MCT compressed: waypoint_buffer*_N.pt with step_buffer*_N.pt beside it.

Of each expert there are K waypoints (lists of parameter tensors) and, for each of the K − 1 pieces between them, the
share of the way that each parameter tensor has gone at each epoch: 0 … 1, proportional to the path's length in that
tensor. With K = 2 the one piece is not wrapped in a list. (Zhong et al., "Towards Stable and Storage-efficient Dataset
Distillation: Matching Convexified Trajectory", CVPR 2025.)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtt_fast.errors import InputError
from mtt_fast.interop.buffers import Trajectory
from mtt_fast.interop.pickles import load_pickle

WAYPOINTS = r"waypoint_buffer_(?:(?:ip\d+|uni|dec|proj)_)?(\d+)\.pt"


def read_waypoints(file: Path) -> Iterator[Trajectory]:
    """Yield the experts of a waypoint buffer, with a row for each epoch: the point that MCT starts from or aims at there.

    Raises `InputError` if the files do not fit together.
    """
    steps_file = file.with_name(file.name.replace("waypoint_buffer", "step_buffer"))
    waypoints, steps = load_pickle(file, mapped=True), load_pickle(steps_file)
    if not isinstance(waypoints, list) or not isinstance(steps, list) or not len(waypoints) == len(steps) > 0:
        raise InputError(f"{file}: expected a list of experts, and {steps_file.name} of as many; name the right file")
    for place, (points, pieces) in enumerate(zip(waypoints, steps, strict=True)):
        try:
            yield Trajectory(file, place, _rows(points, pieces))
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise InputError(
                f"{file}: expert {place}: expected waypoints and the steps between them, found others ({error}); get "
                f"both files again"
            ) from error


def _rows(points: Any, pieces: Any) -> list[list[Tensor]]:
    if isinstance(pieces[0][0], Tensor):  # two waypoints
        pieces = [pieces]
    rows: list[list[Tensor]] = []
    for start, end, piece in zip(points[:-1], points[1:], pieces, strict=True):
        for shares in piece[1 if rows else 0 :]:  # a piece begins where the last one ended
            rows.append([torch.lerp(a, b, share) for a, b, share in zip(start, end, shares, strict=True)])
    return rows
