"""Convert expert trajectories of the public code, replay_buffer_N.pt, to one file for each expert, and back.

A buffer is a list of experts (ten, or --save_interval), each a list of epochs (row 0 the initialisation), each a list of
the tensors of `module.parameters()`. MCT's convexified_replay_buffer_N.pt have the same layout. They hold
no names, data set or whitening. Files are memory-mapped and read expert by expert.

A trap: `p.detach().cpu()` copies nothing on a CPU. Buffers made there have the last parameters in every epoch.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtt_fast.checks import shown
from mtt_fast.errors import InputError, dtype_name
from mtt_fast.interop.pickles import LARGE, load_pickle, save_large_pickle
from mtt_fast.networks.by_name import full_name
from mtt_fast.networks.layout import ParameterLayout
from mtt_fast.storage.atomic import atomic_folder
from mtt_fast.storage.expert_locks import lock_expert_folder
from mtt_fast.storage.expert_metadata import ExpertMetadata
from mtt_fast.storage.foreign import names_in, plain_tensor
from mtt_fast.storage.identity import check_same_data
from mtt_fast.storage.temporaries import is_free
from mtt_fast.storage.trajectories import TrajectoryStore, mark_unfinished, write_expert
from mtt_fast.storage.waypoints import Course

log = logging.getLogger(__name__)

BUFFER = r"replay_buffer_(\d+)\.pt"
CONVEXIFIED = r"convexified_(?:v\d+_)?replay_buffer_(\d+)\.pt"

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


def buffer_files(source: str | os.PathLike[str], pattern: str = BUFFER) -> list[Path]:
    """Return the buffers in a folder whose names match `pattern`, by number; or the one file that `source` is."""
    source = Path(source)
    if not os.path.isdir(source):
        return [source]
    numbered = {source / name: match for name in names_in(source) if (match := re.fullmatch(pattern, name))}
    series = sorted({path.name[: match.start(1)] for path, match in numbered.items()})
    if len(series) != 1:
        raise InputError(
            f"{source}: expected buffers of one kind, found {', '.join(f'{name}N.pt' for name in series) or 'none'}; "
            "name one of the files, or a folder that holds one kind"
        )
    numbers = sorted(int(match[1]) for match in numbered.values())
    if absent := sorted(set(range(numbers[-1])) - set(numbers)):
        log.warning(
            "%s: %s%d.pt is not there, of those up to %d; the others are read",
            source,
            series[0],
            absent[0],
            numbers[-1],
        )
    return sorted(numbered, key=lambda path: int(numbered[path][1]))


def read_buffer(file: Path) -> Iterator[Trajectory]:
    """Yield the experts of one buffer; their tensors are memory-mapped. Raises `InputError` if it is something else."""
    for place, epochs in enumerate(experts_of_buffer(load_pickle(file, mapped=True, most=LARGE), file)):
        check_points(epochs, f"{file}: expert {place}", "epochs")
        yield Trajectory(file, place, epochs)


def experts_of_buffer(content: Any, file: Path) -> list[Any]:
    """Return the experts that a buffer holds. Raises `InputError`, which names the `file`, if it is no list of any."""
    if not isinstance(content, list) or not content:
        raise InputError(
            f"{file}: expected a list of experts, found {shown(content)}; name a buffer, such as replay_buffer_0.pt"
        )
    _check_distinct(content, str(file))
    return content


def check_points(points: Any, where: str, kind: str) -> None:
    """Raise `InputError` unless an expert is a list of two or more points, each a list of as many plain floating-point tensors.

    The lists must be distinct objects, as programs write them: a small file could refer to one list a million times. `kind`
    is the word for the points. The message begins with `where`.
    """
    lists = points if isinstance(points, list) else []
    odd = [point for point in lists if not isinstance(point, list) or not point]
    if len(lists) < 2 or odd:
        raise InputError(
            f"{where}: expected a list of two or more {kind}, each a list of tensors, found "
            f"{shown(odd[0] if odd else points)}; get the file again"
        )
    _check_distinct(points, where)
    for row, point in enumerate(points):
        if len(point) != len(points[0]):
            raise InputError(f"{where}, row {row}: expected {len(points[0])} tensors as in row 0, found {len(point)}")
        for place, tensor in enumerate(point):
            if not plain_tensor(tensor, f"{where}, row {row}, tensor {place}").is_floating_point():
                raise InputError(f"{where}, row {row}, tensor {place}: expected floating point, found {shown(tensor)}")


def _check_distinct(lists: list[Any], where: str) -> None:
    if len({id(one) for one in lists}) < len(lists):
        raise InputError(
            f"{where}: expected distinct lists, found one list in several places; this is another kind of file, or a hostile one"
        )


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
        for index, expert in enumerate(experts()):
            if index in present.indices:
                _check_is(present, present.indices.index(index), expert, metadata, dtype)
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
    fix = "choose another destination, or delete it"
    check_same_data(written.identity, metadata.identity, path, fix=fix)
    known = (written.layout, full_name(written.network)) == (metadata.layout, full_name(metadata.network))
    last = expert.epochs[-1]
    ends = (0, expert.points[0]), (last, expert.points[-1])
    same = present.epochs(place) == last and all(
        torch.equal(present.read(place, epoch), _flat(tensors).to(present.dtype(place)).float())
        for epoch, tensors in ends
    )
    if not (known and same):
        raise InputError(f"{path}: holds another expert than {expert.name}; {fix}")
    if present.dtype(place) != dtype:
        raise InputError(f"{path}: stored as {dtype_name(present.dtype(place))}, not {dtype_name(dtype)}; {fix}")


def _write(
    folder: Path, index: int, expert: Trajectory, metadata: ExpertMetadata, measure: Measure, dtype: torch.dtype
) -> None:
    rows, last = expert.rows(), expert.epochs[-1]
    measured = dict(zip(expert.epochs, measure(rows), strict=True))
    accuracy = [measured.get(epoch, math.nan) for epoch in range(last + 1)]
    origin = {"imported_from": expert.name, "train_epochs": last}
    metadata = dataclasses.replace(metadata, accuracy=accuracy, hyperparameters=origin)
    write_expert(folder, index, rows, metadata, dtype, expert.course)


def export_experts(
    store: TrajectoryStore, folder: str | os.PathLike[str], experts_per_file: int = 10
) -> Generator[Path, None, None]:
    """Write the experts as replay_buffer_0.pt, … in `folder`, as the public code reads them, and yield each file.

    The files appear when the last one was asked for, or none does. The last file holds the remaining experts, which the public
    code drops. One file's experts are in memory.
    Raises `InputError` if a file exists already.
    """
    folder, chosen = Path(folder), list(groups(len(store), experts_per_file))
    check_absent(folder, "replay_buffer_0.pt", f"replay_buffer_{len(chosen)}.pt")
    with atomic_folder(folder, last="replay_buffer") as content:
        for number, experts in enumerate(chosen):
            path = content / f"replay_buffer_{number}.pt"
            save_large_pickle(path, [as_epochs(store, expert, range(store.epochs(expert) + 1)) for expert in experts])
            yield folder / path.name


def check_absent(folder: Path, first: str, further: str) -> None:
    """Raise `InputError` if `folder` holds the `first` file of a series, or one that would be taken for a `further` one."""
    if is_free(folder):
        return
    for path in (folder / first, folder / further):
        if path.exists():
            raise InputError(f"{path}: exists already; choose another destination, or delete it")


def groups(count: int, size: int) -> Iterator[range]:
    """Yield 0 … `count` − 1 in ranges of `size`; the last may be shorter."""
    for begin in range(0, count, size):
        yield range(begin, min(begin + size, count))


def as_epochs(store: TrajectoryStore, expert: int, epochs: Iterable[int]) -> list[list[Tensor]]:
    """Return an expert's parameters at `epochs`, each a list of tensors, which are views of one vector an epoch."""
    layout = ParameterLayout.from_text(store.metadata(expert).layout)
    return [layout.split(store.read(expert, epoch)) for epoch in epochs]


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _difference(layout: ParameterLayout, shapes: Sequence[tuple[int, ...]]) -> str:
    if len(shapes) != len(layout.shapes):
        return f"expected {len(layout.shapes)} tensors, found {len(shapes)}"
    place = next(place for place, shape in enumerate(layout.shapes) if shape != shapes[place])
    return f"expected {layout.names[place]} of shape {layout.shapes[place]}, found {shapes[place]}"
