"""Bound the time and the memory of a test of hostile files."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.interop.helpers import EXAMPLES, growing_less_than

SECONDS, MEMORY = 30.0, 192 << 20  # on a busy machine; all take less than one


@given(st.text())
@settings(max_examples=1, database=None)
def draw_text(_: str) -> None:
    """Draw a text."""


@pytest.fixture(scope="session")
def table_of_characters() -> None:
    """Have Hypothesis make its table of characters, which takes 200 MiB where it is not in the folder .hypothesis yet."""
    draw_text()


@pytest.fixture
def bounded(table_of_characters: None) -> Iterator[None]:
    """Fail a test that takes long, or makes the process much larger."""
    start = time.monotonic()
    with growing_less_than(MEMORY):
        yield
    assert time.monotonic() - start < SECONDS * max(1, EXAMPLES / 60)
