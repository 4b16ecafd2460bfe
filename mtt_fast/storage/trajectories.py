"""Expert trajectories on disk: one safetensors file for each expert, from which single epochs are read.

The tensor `parameters` (epochs + 1, P) is float32 or bfloat16; row e is the network after e epochs of training, row 0 its
initialisation. An iteration needs two rows of one expert, so single rows are read, and each row has its own checksum. A compressed expert
has the rows of a few waypoints instead, and its course between them (mtt_fast/storage/waypoints.py).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import operator
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtt_fast.checks import shown
from mtt_fast.errors import InputError, OutOfRange, reason_of, remedy_for
from mtt_fast.networks.layout import ParameterLayout
from mtt_fast.runtime.tensor_bytes import bytes_of
from mtt_fast.storage.checksums import checksum_of
from mtt_fast.storage.expert_metadata import BEFORE_CHECKSUMS, FORMAT, TRAIN_AGAIN, WAYPOINTS, ExpertMetadata
from mtt_fast.storage.regular import open_regular
from mtt_fast.storage.tensor_files import TensorEntry, check_part, read_header, save_tensors, warn_unchecked
from mtt_fast.storage.text_files import MALFORMED, not_json_error, write_text
from mtt_fast.storage.waypoints import Course

_TENSOR = "parameters"
_UNFINISHED = ".unfinished"
"""A file that marks a folder to which experts are being imported, until all are there."""
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_COMPRESS_AGAIN = "delete it and make it again with `python -m mtt_fast.compress`"


def expert_path(folder: str | os.PathLike[str], index: int) -> Path:
    """Return the file of expert number `index` in `folder`."""
    return Path(folder) / f"expert_{index:04d}.safetensors"


def write_expert(
    folder: str | os.PathLike[str],
    index: int,
    parameters: Tensor,
    metadata: ExpertMetadata,
    dtype: torch.dtype = torch.float32,
    course: Course | None = None,
) -> Path:
    """Write expert number `index` atomically, and return its path.

    `parameters` (epochs + 1, P) of any floating type and device are stored as `dtype`, float32 or bfloat16, rounded to nearest. With a
    `course` they are the waypoints (K, P) of a compressed expert, and `metadata` is the uncompressed expert's. Without accuracies in
    `metadata` those of all epochs are NaN. Raises `InputError` for parameters that are not finite, do not change, or do not fit the
    metadata or the course, for metadata that JSON cannot hold, and if the disk is full.
    """
    path = expert_path(folder, index)
    if dtype not in _DTYPES.values():
        raise InputError(f"{path}: expected the stored type float32 or bfloat16, found {dtype}")
    if not isinstance(parameters, Tensor):
        raise InputError(
            f"{path}: not written: expected parameters as one tensor (epochs + 1, P), found {shown(parameters)}; use torch.stack "
            "of vectors, which torch.nn.utils.parameters_to_vector makes of a module's parameters"
        )
    stored = parameters.to("cpu", dtype)
    problem = _problem_with(stored, course, metadata)
    if problem:
        raise InputError(f"{path}: not written: {problem}")
    text = {"format": WAYPOINTS, "course": course.to_text()} if course else {"format": FORMAT}
    unmeasured = [math.nan] * len(course.positions if course else stored)
    metadata = dataclasses.replace(metadata, accuracy=metadata.accuracy or unmeasured)
    try:
        text |= metadata.to_text()
    except (TypeError, ValueError) as error:
        raise not_json_error(path, error) from error
    save_tensors(path, {_TENSOR: stored}, text, by_row=(_TENSOR,))
    return path


def _problem_with(parameters: Tensor, course: Course | None, metadata: ExpertMetadata) -> str | None:
    """Return why `parameters` (rows, P) are not a trajectory of the network in `metadata`, or None."""
    if parameters.dim() != 2 or len(parameters) < 2:
        return f"expected parameters of shape (epochs + 1, P) with at least one epoch, found {tuple(parameters.shape)}"
    size = ParameterLayout.from_text(metadata.layout).num_parameters
    if parameters.shape[1] != size:
        return f"the layout describes {size} parameters, found {parameters.shape[1]}"
    if course and (len(course.epochs), sum(course.sizes)) != tuple(parameters.shape):
        return f"the course is between {len(course.epochs)} waypoints of {sum(course.sizes)} parameters, found {tuple(parameters.shape)}"
    epochs = len(course.positions if course else parameters)
    if metadata.accuracy and len(metadata.accuracy) != epochs:
        return f"expected an accuracy for each of {epochs} rows, found {len(metadata.accuracy)}"
    for row, values in enumerate(parameters):
        if not values.isfinite().all():
            epoch = course.epochs[row] if course else row
            return f"the parameters after epoch {epoch} are not finite; {_why_not_finite(metadata)}"
    if (parameters == parameters[0]).all():
        return (
            "the parameters are the same in every epoch; were they saved as views of the live network, without a copy?"
        )
    return None


def _why_not_finite(metadata: ExpertMetadata) -> str:
    """Return the likely reason why parameters are NaN or infinite, from `metadata`, and what to do."""
    origin = metadata.hyperparameters.get("imported_from")
    if origin is not None:
        return f"they are not finite in {origin} either: its training diverged, or it is damaged; leave it out"
    lr = metadata.hyperparameters.get("lr")
    than = "" if lr is None else f" than {lr:g}"
    return f"its training diverged; train with a smaller learning rate{than} (`expert_lr`, or `lr_teacher` of `python -m mtt_fast.experts`)"


@dataclass(frozen=True)
class _Header:
    """The part of an expert's file that is read once."""

    entry: TensorEntry
    dtype: torch.dtype
    text: dict[str, str]
    course: Course | None  # of a compressed expert

    @property
    def saved_epochs(self) -> Sequence[int]:
        return self.course.epochs if self.course else range(self.entry.shape[0])

    @property
    def epochs(self) -> int:
        return (len(self.course.positions) if self.course else self.entry.shape[0]) - 1

    def at(self, epoch: float) -> tuple[int, Tensor | None]:
        """Return the row at `epoch`; between two rows, the first of them and the share of the way to the next, by parameter."""
        if self.course is not None:
            return self.course.at(epoch)
        row = math.floor(epoch)
        return row, torch.tensor(epoch - row, dtype=torch.float32, device="cpu") if epoch > row else None


class TrajectoryStore:
    """The experts in a folder, read-only. The constructor only lists the files; a file's header is read at its first use.

    Methods take an expert's position, 0 … len − 1, in `indices`, the sorted numbers of the experts (but see `starting_with`).
    They may be called from several threads. They raise `InputError` for a file that is missing, truncated or not an expert, and
    `OutOfRange` (an `InputError` and an `IndexError`) for a position or an epoch out of range.
    """

    def __init__(self, folder: str | os.PathLike[str], *, unfinished: bool = False) -> None:
        """Open `folder`. A folder that `mark_unfinished` has marked is refused, unless `unfinished`."""
        if not isinstance(folder, str | os.PathLike):
            raise InputError(f"`folder`: expected the path of a folder of experts, found {shown(folder)}")
        self.folder = Path(folder)
        try:
            names = os.listdir(self.folder)
        except (OSError, ValueError) as error:  # of a name with a NUL
            raise InputError(
                f"{self.folder}: expected a folder of experts ({reason_of(error)}); {remedy_for(error)}, "
                "or train some with `python -m mtt_fast.experts`"
            ) from error
        if _UNFINISHED in names and not unfinished:
            raise InputError(
                f"{self.folder}: expected all experts of a conversion, found an unfinished one; repeat its command, or "
                "delete the folder"
            )
        numbers = (re.fullmatch(r"expert_(\d{4,})\.safetensors", name) for name in names)
        self.indices: tuple[int, ...] = tuple(sorted(int(number[1]) for number in numbers if number))
        self._headers: dict[int, _Header] = {}
        self._warned = False  # that there are no checksums

    def __len__(self) -> int:
        return len(self.indices)

    def first(self, count: int) -> TrajectoryStore:
        """Return the store with only the first `count` experts."""
        store = copy.copy(self)
        store.indices = self.indices[:count]
        return store

    def starting_with(self, digests: Sequence[str]) -> TrajectoryStore | None:
        """Return the store with the experts of these `digests` first, in this order, then all others; None if one is missing."""
        first, others = [], [(self.digest(expert), index) for expert, index in enumerate(self.indices)]
        for digest in digests:  # several experts may have the same, such as "" if they have no checksums
            found = next((other for other in others if other[0] == digest), None)
            if found is None:
                return None
            others.remove(found)
            first.append(found)
        store = copy.copy(self)
        store.indices, store._headers = tuple(index for _, index in (*first, *others)), {}
        return store

    def read(self, expert: int, epoch: float) -> Tensor:
        """Return the parameters (P,), float32, after `epoch` epochs, 0 … epochs(expert), reading only their bytes.

        Rows are saved at whole epochs, or at a compressed expert's waypoints. Between two rows the parameters are on the
        straight line from one to the next.
        """
        header, epoch = self._header(expert), _number(epoch)
        if not 0 <= epoch <= header.epochs:
            raise OutOfRange(f"{self.path(expert)}: expected an epoch from 0 to {header.epochs}, found {epoch}")
        row, weights = header.at(epoch)
        start = self._row(expert, header, row)
        return start if weights is None else torch.lerp(start, self._row(expert, header, row + 1), weights)

    def _row(self, expert: int, header: _Header, number: int) -> Tensor:
        path, row = self.path(expert), torch.empty(header.entry.shape[1], dtype=header.dtype, device="cpu")
        content = bytes_of(row)
        with open_regular(path) as file:
            file.seek(header.entry.begin + number * len(content))
            count = file.readinto(content)  # type: ignore[attr-defined] # of unbuffered files
        if count != len(content):
            raise InputError(f"{path}: truncated since it was opened; {TRAIN_AGAIN}")
        if header.entry.checksums:
            check_part(path, f"row {number}", content, header.entry.checksums[number])
        elif not self._warned:
            self._warned = True
            warn_unchecked(self.folder)
        if not bool(row.sum().isfinite()) and not bool(row.isfinite().all()):  # the sum alone needs no memory
            raise InputError(
                f"{path}: the expert's parameters after epoch {header.saved_epochs[number]} are not finite (NaN or infinite): it diverged, or the file "
                f"was not written here; {TRAIN_AGAIN}"
            )
        return row.float()

    def epochs(self, expert: int) -> int:
        """Return the number of epochs of training."""
        return self._header(expert).epochs

    def saved_epochs(self, expert: int) -> Sequence[int]:
        """Return the epochs after which the parameters are stored: all of them, or those of a compressed expert's waypoints."""
        return self._header(expert).saved_epochs

    def dtype(self, expert: int) -> torch.dtype:
        """Return the type in which the parameters are stored."""
        return self._header(expert).dtype

    def course(self, expert: int) -> Course | None:
        """Return the course between the waypoints of a compressed expert; None for an uncompressed one."""
        return self._header(expert).course

    def metadata(self, expert: int) -> ExpertMetadata:
        """Return the metadata in the expert's file."""
        header, path = self._header(expert), self.path(expert)
        metadata = ExpertMetadata.from_text(header.text, path)
        size = ParameterLayout.from_text(metadata.layout).num_parameters
        if size != header.entry.shape[1] or len(metadata.accuracy) != header.epochs + 1:
            raise InputError(f"{path}: its parameters do not match its metadata; {TRAIN_AGAIN}")
        return metadata

    def path(self, expert: int) -> Path:
        """Return the expert's file."""
        return expert_path(self.folder, self.indices[self._position(expert)])

    def digest(self, expert: int) -> str:
        """Return a digest of the checksums of the expert's parameters; "" if the file has none."""
        header = self._header(expert)
        if not header.entry.checksums:
            return ""
        return checksum_of("".join((*header.entry.checksums, header.text.get("course", ""))).encode())

    def verify(self, expert: int) -> None:
        """Read all parameters of the expert. Raises `InputError` if they differ from what was written."""
        header = self._header(expert)
        for number in range(header.entry.shape[0]):
            self._row(expert, header, number)

    def _position(self, expert: Any) -> int:
        """Return `expert` as a position in `indices`. Raises `InputError` if it is not an integer, `OutOfRange` if there is no such expert."""
        try:
            position = operator.index(expert)
        except TypeError as error:
            raise InputError(
                f"`expert`: expected the position of an expert, a whole number, found {shown(expert)}"
            ) from error
        if not self.indices:
            raise OutOfRange(
                f"{self.folder}: expected experts (expert_0000.safetensors, …), found none; make them by `python -m mtt_fast.experts`, "
                "or of a replay_buffer_0.pt by `mtt_fast convert`"
            )
        if not 0 <= position < len(self):
            raise OutOfRange(f"{self.folder}: expected an expert from 0 to {len(self) - 1}, found {position}")
        return position

    def _header(self, expert: int) -> _Header:
        position = self._position(expert)
        if position not in self._headers:  # two threads may both read it, to the same result
            self._headers[position] = _read_header(self.path(position))
        return self._headers[position]


def experts_in(folder: Path) -> TrajectoryStore | None:
    """Return the experts in `folder`, or None if it has none or does not exist."""
    store = TrajectoryStore(folder) if folder.is_dir() else None
    return store or None  # one without experts is false


def _number(epoch: Any) -> float:
    value = epoch.item() if isinstance(epoch, Tensor) and epoch.numel() == 1 else epoch
    if not isinstance(value, Real):
        raise InputError(f"`epoch`: expected a number, found {shown(epoch)}")
    return int(value) if isinstance(value, Integral) else float(value)


def _read_header(path: Path) -> _Header:
    entries, text = read_header(path)
    entry, form = entries.get(_TENSOR), text.get("format", "another")
    form = BEFORE_CHECKSUMS.get(form, form)
    if form not in (FORMAT, WAYPOINTS):
        raise InputError(
            f"{path}: expected a file in the format {FORMAT!r}, found {form!r}; "
            "choose a folder that `python -m mtt_fast.experts` wrote"
        )
    if entry is None or entry.dtype not in _DTYPES or len(entry.shape) != 2:
        raise InputError(
            f"{path}: {_TENSOR}: expected {' or '.join(_DTYPES)} of two dimensions, found "
            f"{f'{entry.dtype} {entry.shape}' if entry else 'none'}; {TRAIN_AGAIN}"
        )
    if len(entry.checksums) not in (0, entry.shape[0]):
        raise InputError(f"{path}: expected a checksum for each of {entry.shape[0]} rows; {TRAIN_AGAIN}")
    dtype = _DTYPES[entry.dtype]
    course = _read_course(path, text, entry.shape) if form == WAYPOINTS else None
    return _Header(entry, dtype, text, course)


def _read_course(path: Path, text: Mapping[str, str], shape: tuple[int, ...]) -> Course:
    """Return the course of waypoints (K, P) of this `shape`."""
    try:
        course = Course.from_text(text["course"])
    except MALFORMED as error:
        raise InputError(f"{path}: the course between its waypoints is broken ({error}); {_COMPRESS_AGAIN}") from error
    if (len(course.epochs), sum(course.sizes)) != shape:
        raise InputError(f"{path}: its waypoints do not fit the course between them; {_COMPRESS_AGAIN}")
    return course


@contextlib.contextmanager
def mark_unfinished(folder: Path) -> Iterator[None]:
    """Mark a folder as unfinished until the block has written all experts to it.

    If the block fails, the mark stays, unless the folder is still without experts.
    """
    mark = folder / _UNFINISHED
    write_text(mark, "")
    try:
        yield
    except BaseException:
        if not len(TrajectoryStore(folder, unfinished=True)):
            mark.unlink()
            with contextlib.suppress(OSError):  # it holds other things
                folder.rmdir()
        raise
    mark.unlink()
