"""Test that amounts of memory are read from text, and free memory from the system and its control groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtt_fast import InputError
from mtt_fast.runtime import memory_info
from mtt_fast.runtime.memory_info import bytes_left_in_groups, free_bytes, parse_bytes


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


VERSIONS = {
    "1": ("7:memory:/a/b\n0::/x\n", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "2": ("4:cpu:/x\n0::/a/b\n", "", "memory.max", "memory.current", "inactive_file"),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_groups_leave_what_is_below_their_limits(version: str, tmp_path: Path) -> None:
    membership, mount, limit, usage, cached = VERSIONS[version]
    (tmp_path / "own").write_text(membership)
    for name, allowed, used, in_cache in (("a/b", 1000, 700, 100), ("a", 3000, 3100, 0), ("", "max", 9000, 0)):
        group = tmp_path / mount / name
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(f"{allowed}\n")
        (group / usage).write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 7\n{cached} {in_cache}\n")
    assert bytes_left_in_groups(tmp_path / "own", tmp_path) == [400, 0]


def test_free_memory_is_the_least_that_system_and_groups_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert 0 < free_bytes(cpu) < 2**60
    monkeypatch.setattr(memory_info, "bytes_left_in_groups", lambda *_: [456, 123])
    assert free_bytes(cpu) == 123
    monkeypatch.setattr(memory_info, "bytes_left_in_groups", lambda *_: [2**60])
    assert 0 < free_bytes(cpu) < 2**60
