"""Check a refusal of a hostile file, and read buffers, for the tests of several kinds of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from mtt_fast import InputError
from mtt_fast.interop import (
    read_buffer,
    read_waypoints,
)
from mtt_fast.interop.experts import check_trajectory
from mtt_fast.interop.tensor_set import SourceInfo
from tests.interop.buffers import NET

INFO = SourceInfo(("cat", "dog / wolf", "owl"), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), None)


def refused(read: Callable[[], object], name: str) -> str:
    """Return what the refusal says, which is one line with `name` in it."""
    with pytest.raises(InputError) as found:
        read()
    message = str(found.value)
    assert message.isprintable()
    assert name in message
    assert len(message) < 1000
    return message


def rows_of(file: Path) -> list[Tensor]:
    found = list(read_waypoints(file) if file.name.startswith("waypoint") else read_buffer(file))
    for expert in found:
        check_trajectory(expert, NET.layout)
    return [expert.rows() for expert in found]
