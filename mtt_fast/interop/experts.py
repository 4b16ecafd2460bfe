"""Write experts of other code bases, whole or as waypoints, to one file for each expert."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mtt_fast.errors import InputError, dtype_name
from mtt_fast.networks.by_name import full_name
from mtt_fast.networks.layout import ParameterLayout
from mtt_fast.storage.expert_locks import lock_expert_folder
from mtt_fast.storage.expert_metadata import ExpertMetadata
from mtt_fast.storage.identity import check_same_data
from mtt_fast.storage.trajectories import TrajectoryStore, expert_path, mark_unfinished, write_expert
from mtt_fast.storage.waypoints import Course

_OTHERS = "choose another destination, or delete it"

Measure = Callable[[Tensor], list[float]]
"""A function from the rows (n, P) of an expert to the test accuracy of each, NaN where it was not measured."""


@dataclass(frozen=True)
class Trajectory:
    """One expert in a file of another code base."""

    file: Path
    place: int
    points: Sequence[Sequence[Tensor]]
    """the parameters after each epoch, or at each waypoint"""
    course: Course | None = None
    """between waypoints"""

    @property
    def name(self) -> str:
        """Return the place of the expert, for messages."""
        return f"{self.file.name}, expert {self.place}"

    @property
    def epochs(self) -> Sequence[int]:
        """Return the epoch of each point."""
        return self.course.epochs if self.course else range(len(self.points))

    def rows(self) -> Tensor:
        """Return the parameters (epochs + 1, P), or those of the waypoints (K, P), float32, a copy."""
        rows = torch.empty(
            len(self.points), sum(tensor.numel() for tensor in self.points[0]), dtype=torch.float32, device="cpu"
        )
        for row, tensors in zip(rows, self.points, strict=True):
            row.copy_(_flat(tensors))
        return rows


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors one after another in one vector, float32."""
    return torch.cat([tensor.detach().flatten().float() for tensor in tensors])


def check_trajectory(expert: Trajectory, layout: ParameterLayout) -> None:
    """Raise `InputError` unless the expert's tensors are those of a network of `layout`, finite, and change over the epochs."""
    for point, tensors in enumerate(expert.points):
        found = [tuple(tensor.shape) for tensor in tensors]
        if found != list(layout.shapes):
            raise InputError(
                f"{expert.file}: expert {expert.place}, row {point}: the parameters are of another network: "
                f"{_difference(layout, found)}; name its network with `model`, and its data set with `dataset` and `res`"
            )
    held = expert.file.stat().st_size
    shared = sum(tensor.nbytes for point in expert.points for tensor in point) > held
    if shared or all(_same(expert.points[0], point) for point in expert.points[1:]):
        raise InputError(
            f"{expert.file}: expert {expert.place}: the parameters are the same in every epoch: the buffer was made on a "
            "CPU, where p.detach().cpu() is a view of the live parameters, so its epochs are lost; make it again with "
            "p.detach().clone(), or train experts with `python -m mtt_fast.experts`"
        )
    for epoch, tensors in zip(expert.epochs, expert.points, strict=True):
        for name, tensor in zip(layout.names, tensors, strict=True):
            if not bool(tensor.detach().float().isfinite().all()):
                raise InputError(
                    f"{expert.file}: expert {expert.place}: the parameters after epoch {epoch} are not finite (in "
                    f"{name}): the training diverged, or the file is damaged; train it again with the software that wrote it, or "
                    "leave it out"
                )


def import_experts(
    experts: Callable[[], Iterator[Trajectory]],
    folder: str | os.PathLike[str],
    layout: ParameterLayout,
    metadata: ExpertMetadata,
    measure: Measure,
    dtype: torch.dtype = torch.float32,
    each: Callable[[Trajectory], None] = lambda expert: None,
) -> TrajectoryStore:
    """Write `experts()`, whole or as waypoints, to expert_0000.safetensors, … in `folder`; return the store.

    All are checked before one is written; one expert at a time is in memory. `metadata` is all that they have in common.
    Experts that an earlier, stopped call wrote are kept as they are; until all are there, nobody else takes the folder for a whole one.
    `each` is called after every expert.
    Raises `InputError` for an expert that is none, if `folder` holds others, and if another process writes there.
    """
    folder = Path(folder)
    for expert in experts():
        check_trajectory(expert, layout)
    with lock_expert_folder(folder, "choose another destination"):
        present = TrajectoryStore(folder, unfinished=True)
        others = set(present.indices)
        for index, expert in enumerate(experts()):
            if index in others:
                others.remove(index)
                _check_is(present, present.indices.index(index), expert, metadata, dtype)
        if others:
            raise InputError(
                f"{expert_path(folder, min(others))}: expected only the experts to import, found another; {_OTHERS}"
            )
        with mark_unfinished(folder):
            for index, expert in enumerate(experts()):
                if index not in present.indices:
                    _write(folder, index, expert, metadata, measure, dtype)
                each(expert)
    return TrajectoryStore(folder)


def _check_is(
    present: TrajectoryStore, place: int, expert: Trajectory, metadata: ExpertMetadata, dtype: torch.dtype
) -> None:
    """Raise `InputError` unless the expert at `place` is this one, imported before as `dtype`, of the same images and network."""
    path, written = present.path(place), present.metadata(place)
    check_same_data(written.identity, metadata.identity, path, fix=_OTHERS)
    known = (written.layout, full_name(written.network)) == (metadata.layout, full_name(metadata.network))
    last = expert.epochs[-1]
    ends = (0, expert.points[0]), (last, expert.points[-1])
    same = present.epochs(place) == last and all(
        torch.equal(present.read(place, epoch), _flat(tensors).to(present.dtype(place)).float())
        for epoch, tensors in ends
    )
    if not (known and same):
        raise InputError(f"{path}: holds another expert than {expert.name}; {_OTHERS}")
    if present.dtype(place) != dtype:
        raise InputError(f"{path}: stored as {dtype_name(present.dtype(place))}, not {dtype_name(dtype)}; {_OTHERS}")


def _write(
    folder: Path, index: int, expert: Trajectory, metadata: ExpertMetadata, measure: Measure, dtype: torch.dtype
) -> None:
    rows, last = expert.rows(), expert.epochs[-1]
    measured = dict(zip(expert.epochs, measure(rows), strict=True))
    accuracy = [measured.get(epoch, math.nan) for epoch in range(last + 1)]
    origin = {"imported_from": expert.name, "train_epochs": last}
    metadata = dataclasses.replace(metadata, accuracy=accuracy, hyperparameters=origin)
    write_expert(folder, index, rows, metadata, dtype, expert.course)


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _difference(layout: ParameterLayout, shapes: Sequence[tuple[int, ...]]) -> str:
    if len(shapes) != len(layout.shapes):
        return f"expected {len(layout.shapes)} tensors, found {len(shapes)}"
    place = next(place for place, shape in enumerate(layout.shapes) if shape != shapes[place])
    return f"expected {layout.names[place]} of shape {layout.shapes[place]}, found {shapes[place]}"
