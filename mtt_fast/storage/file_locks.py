"""Take and remove locks in folders that other processes may remove."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock


def acquire(lock: FileLock, timeout: float = -1) -> None:
    """Acquire `lock`, and make its folder. Raises `filelock.Timeout` after `timeout` seconds, and waits for ever if that is below 0."""
    while not lock.is_locked:
        folder = Path(lock.lock_file).parent
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=timeout)
        except FileNotFoundError:
            if folder.is_dir():
                raise
            # who held the lock left nothing in the folder, and removed it


def remove(lock: FileLock) -> None:
    """Release `lock`, which is held, and remove its file: a process that opened it before finds that it has no name, and starts over."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
