"""Test claims of single experts, and locks of their folder."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from mtt_fast.errors import InputError
from mtt_fast.storage.expert_locks import claim_expert, lock_expert_folder


def test_an_expert_is_claimed_once(tmp_path: Path) -> None:
    folder = tmp_path / "experts"
    first, second = (claim_expert(folder, lambda: [2, 5], "ab") for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first.index, second.index) == (2, 5)
    assert claim_expert(folder, lambda: [2, 5], "ab") is None
    first.release()
    again = claim_expert(folder, lambda: [2, 5], "ab")
    assert again is not None
    assert again.index == 2
    first.release()  # does not release the claim of another
    assert claim_expert(folder, lambda: [2, 5], "ab") is None
    again.release()
    assert folder.exists()
    second.release()
    assert not folder.exists()


def test_who_claims_looks_for_missing_experts_when_nobody_else_can(tmp_path: Path) -> None:
    def missing() -> list[int]:
        assert (tmp_path / ".lock").exists()
        return []

    (tmp_path / "expert_0000.safetensors").touch()
    assert claim_expert(tmp_path, missing, "ab") is None
    assert [path.name for path in tmp_path.iterdir()] == ["expert_0000.safetensors"]


def test_who_claims_waits_for_its_turn(tmp_path: Path) -> None:
    handle = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as another process does for a moment while it claims an expert
    threading.Timer(0.1, os.close, [handle]).start()
    claim = claim_expert(tmp_path, lambda: [0], "ab")
    assert claim is not None
    claim.release()


def test_an_expert_that_is_written_while_another_process_looks_is_not_claimed(tmp_path: Path) -> None:
    def missing() -> list[int]:
        (tmp_path / "expert_0000.safetensors").touch()
        return [0, 1]

    claim = claim_expert(tmp_path, missing, "ab")
    assert claim is not None
    assert claim.index == 1
    claim.release()
    assert [path.name for path in tmp_path.iterdir()] == ["expert_0000.safetensors"]


def test_claims_of_a_killed_process_count_for_nothing(tmp_path: Path) -> None:
    for name in (".expert_0000.ab.lock", ".expert_0001.ab.lock", ".expert_0002.cd.lock"):
        (tmp_path / name).touch()
    claim = claim_expert(tmp_path, lambda: [0], "ab")
    assert claim is not None
    assert [path.name for path in tmp_path.iterdir()] == [".expert_0000.ab.lock"]
    claim.release()
    tmp_path.mkdir()
    (tmp_path / ".expert_0000.ab.lock").touch()
    with lock_expert_folder(tmp_path):
        pass
    assert not tmp_path.exists()


def test_a_folder_with_a_claim_is_not_locked(tmp_path: Path) -> None:
    claim = claim_expert(tmp_path, lambda: [0], "ab")
    assert claim is not None
    with (
        pytest.raises(InputError, match="another process is training or writing experts here; wait for it or go away"),
        lock_expert_folder(tmp_path, "go away"),
    ):
        raise AssertionError("locked")
    claim.release()
    with lock_expert_folder(tmp_path):
        pass
