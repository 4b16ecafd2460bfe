"""Read and write expert trajectories of the public code, replay_buffer_N.pt.

A buffer is a list of experts (ten, or --save_interval), each a list of epochs (row 0 the initialisation), each a list of
the tensors of `module.parameters()`. MCT's convexified_replay_buffer_N.pt have the same layout. They hold
no names, data set or whitening. Files are memory-mapped and read expert by expert.

A trap: `p.detach().cpu()` copies nothing on a CPU. Buffers made there have the last parameters in every epoch.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from mtt_fast.checks import check_count, shown
from mtt_fast.errors import InputError
from mtt_fast.interop.experts import Trajectory
from mtt_fast.interop.pickles import LARGE, load_pickle, save_large_pickle
from mtt_fast.networks.layout import ParameterLayout
from mtt_fast.storage.atomic import atomic_folder
from mtt_fast.storage.foreign import names_in, plain_tensor
from mtt_fast.storage.temporaries import is_free
from mtt_fast.storage.trajectories import TrajectoryStore

log = logging.getLogger(__name__)

BUFFER = r"replay_buffer_(\d+)\.pt"
CONVEXIFIED = r"convexified_(?:v\d+_)?replay_buffer_(\d+)\.pt"


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
    numbers = {int(match[1]) for match in numbered.values()}
    absent = next(number for number in range(len(numbers) + 1) if number not in numbers)
    if absent < max(numbers):
        log.warning(
            "%s: %s%d.pt is not there, of those up to %d; the others are read", source, series[0], absent, max(numbers)
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
    """Raise `InputError` unless an expert is a list of two or more points, each a list of plain floating-point tensors.

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
        for place, tensor in enumerate(point):
            if not plain_tensor(tensor, f"{where}, row {row}, tensor {place}").is_floating_point():
                raise InputError(f"{where}, row {row}, tensor {place}: expected floating point, found {shown(tensor)}")


def _check_distinct(lists: list[Any], where: str) -> None:
    if len({id(one) for one in lists}) < len(lists):
        raise InputError(
            f"{where}: expected distinct lists, found one list in several places; this is another kind of file, or a hostile one"
        )


def export_experts(
    store: TrajectoryStore, folder: str | os.PathLike[str], experts_per_file: int = 10
) -> Generator[Path, None, None]:
    """Write the experts as replay_buffer_0.pt, … in `folder`, as the public code reads them, and yield each file.

    The files appear when the last one was asked for, or none does. The last file holds the remaining experts, which the public
    code drops. One file's experts are in memory.
    Raises `InputError` for a store without experts, and if a file exists already.
    """
    folder, chosen = Path(folder), groups(store, experts_per_file)
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


def groups(store: TrajectoryStore, experts_per_file: int) -> list[range]:
    """Return the positions of the experts of each file; the last may hold fewer. Raises `InputError` for a store without experts."""
    check_count("experts_per_file", experts_per_file)
    store.path(0)  # raises if there is no expert
    return [range(len(store))[begin : begin + experts_per_file] for begin in range(0, len(store), experts_per_file)]


def as_epochs(store: TrajectoryStore, expert: int, epochs: Iterable[int]) -> list[list[Tensor]]:
    """Return an expert's parameters at `epochs`, each a list of tensors, which are views of one vector an epoch."""
    layout = ParameterLayout.from_text(store.metadata(expert).layout)
    return [layout.split(store.read(expert, epoch)) for epoch in epochs]
