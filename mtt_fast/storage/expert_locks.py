"""Lock a folder of experts, or claim single experts in it.

Several processes, on one machine or on several that share the folder, may train the experts of one folder: each claims an expert
before it trains it. All else that writes experts has the folder to itself. Locks and claims end with the process that holds them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from mtt_fast.errors import InputError
from mtt_fast.storage.file_locks import remove
from mtt_fast.storage.run_folder import lock_folder
from mtt_fast.storage.trajectories import expert_path

_DOING = "training or writing experts here"
_CLAIM = re.compile(r"\.expert_\d{4,}\.([0-9a-f]+)\.lock")
_WAIT = 120.0  # seconds; many processes on a slow file system may take turns, and one that fails loses the experts that it trains


@contextlib.contextmanager
def lock_expert_folder(folder: Path, fix: str = "choose another `buffer_path`", *, wait: float = 0) -> Iterator[None]:
    """Keep other processes from writing experts to `folder` within the block; readers need no lock.

    At the end the lock file is removed, and so is the folder if it is empty. Raises as `lock_folder`, also if another process
    has claimed an expert. `wait` as there.
    """
    with _locked(folder, fix, wait=wait):
        if any(_is_held(path) for path in _claims_in(folder)):
            raise InputError(f"{folder}: another process is {_DOING}; wait for it or {fix}")
        yield


@dataclass(frozen=True)
class ExpertClaim:
    """The right to train expert number `index` of a folder, until it is released or the process ends."""

    index: int
    lock: FileLock

    def release(self) -> None:
        """Let other processes claim the expert, if it was not written. A second call does nothing."""
        if self.lock.is_locked:
            remove(self.lock)
            _remove_if_empty(Path(self.lock.lock_file).parent)


def claim_expert(folder: Path, missing: Callable[[], Sequence[int]], training: str) -> ExpertClaim | None:
    """Claim the first expert that is `missing()` and that no process has claimed; return None if there is none.

    `training` is the digest of how the expert will be trained. Raises as `lock_folder`, also if another process trains experts of
    another digest in `folder`.
    """
    fix = "choose another `buffer_path`"
    with _locked(folder, fix, wait=_WAIT):
        for path, digest in _claims_in(folder).items():
            if _is_held(path) and digest != training:
                raise InputError(
                    f"{folder}: another process trains experts here with other options; give the same, or {fix}"
                )
        for index in missing():
            lock = FileLock(folder / f".expert_{index:04d}.{training}.lock")
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                if not expert_path(folder, index).exists():  # it may have been written since `missing` looked
                    return ExpertClaim(index, lock)
                remove(lock)
    return None


def _claims_in(folder: Path) -> dict[Path, str]:
    """Return the lock files of claims in `folder`, with the digests of the trainings. Processes that were killed may have left some."""
    matches = ((path, _CLAIM.fullmatch(path.name)) for path in folder.iterdir())
    return {path: match[1] for path, match in matches if match}


def _is_held(path: Path) -> bool:
    """Return whether a process holds the lock at `path`; remove the file if none does."""
    try:
        with FileLock(path, timeout=0):
            path.unlink(missing_ok=True)
    except Timeout:
        return True
    return False


@contextlib.contextmanager
def _locked(folder: Path, fix: str, *, wait: float) -> Iterator[None]:
    with lock_folder(folder, _DOING, fix, wait=wait) as lock:
        try:
            yield
        finally:
            remove(lock)
            _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # there are experts
        folder.rmdir()
