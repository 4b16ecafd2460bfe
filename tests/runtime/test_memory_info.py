"""Test that amounts of memory are read from text."""

from __future__ import annotations

import pytest

from mtt_fast import InputError
from mtt_fast.runtime.memory_info import parse_bytes


@pytest.mark.parametrize(
    ("text", "value"),
    [("6GiB", 6 * 2**30), ("1.5 MB", 1_500_000), ("7", 7), (123, 123), (1.5e9, 1_500_000_000), ("2kib", 2048)],
)
def test_amounts(text: float | str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "lots", "6 XB", "-3GiB", 0, float("nan")])
def test_amounts_that_are_none(text: float | str) -> None:
    with pytest.raises(InputError, match=r"^`memory_budget` "):
        parse_bytes(text)
