"""Bound the time and the memory of a test of hostile files."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.interop.helpers import EXAMPLES, growing_less_than

SECONDS, MEMORY = 30.0, 192 << 20  # on a busy machine; all take less than one


@pytest.fixture
def bounded() -> Iterator[None]:
    """Fail a test that takes long, or makes the process much larger."""
    start = time.monotonic()
    with growing_less_than(MEMORY):
        yield
    assert time.monotonic() - start < SECONDS * max(1, EXAMPLES / 60)
