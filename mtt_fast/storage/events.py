"""Write scalars for TensorBoard, at once and in the caller's thread, so that a full disk raises there."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

_FORMAT = "brain.Event:2"
_number = itertools.count()


class EventLog:
    """A new file of events in `folder` for iterations from `first` on; TensorBoard drops these iterations in other files.

    Raises `OSError` that names the file, as `write` does, where it cannot be written.
    """

    def __init__(self, folder: Path, first: int) -> None:
        # slow to import, and not all jobs write events
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_number):06d}"
        self._file = _WholeWrites(folder / name)
        self._records = RecordWriter(self._file)
        try:
            self._write(Event(file_version=_FORMAT))
            self._write(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
        except OSError:
            self.close()
            raise

    def write(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Append the scalars of an iteration, by name, in one record."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(Event(step=iteration, summary=Summary(value=values)))

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


class _WholeWrites:
    """A new unbuffered file. A record is written whole, or an error names the file."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, open(path, "xb", buffering=0)  # noqa: SIM115 - closed by close()

    def write(self, data: bytes) -> None:
        try:
            written = self._file.write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if written != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def close(self) -> None:
        self._file.close()
