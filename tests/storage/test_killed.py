"""Kill writers at any moment, and check that a file is whole or absent, and that no half of one stays for ever."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mtt_fast import InputError, SyntheticDataset
from mtt_fast.storage.atomic import atomic_folder, atomic_path
from mtt_fast.storage.regular import open_regular
from mtt_fast.storage.run_folder import lock_folder
from mtt_fast.storage.temporaries import is_free, remove_leftovers, temporary_folder
from mtt_fast.storage.text_files import write_text

SCRIPT = Path(__file__).with_name("killed_script.py")


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system that need not wait for a disk, where there is one."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="mtt_fast-", dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    "what", [*(pytest.param(what, marks=pytest.mark.slow) for what in ("sets", "experts")), "caches"]
)
def test_killed_at_each_point(in_memory: Path, what: str) -> None:
    root = str(SCRIPT.parents[2])
    process = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), what], cwd=in_memory, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}, timeout=250,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    points = [
        int(line.rpartition(": ")[2].split()[0]) for line in process.stdout.splitlines() if line.endswith(" points")
    ]
    assert min(points) >= 5


HOLD = """
import sys, time
from pathlib import Path
from mtt_fast.storage.temporaries import temporary_folder
with temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    print("written", flush=True)
    time.sleep(600)
"""


def test_another_process_temporary_stays_until_it_ends(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "written\n"
        write_text(tmp_path / "mine", "x")
        assert len(list(tmp_path.glob(".out.*.partial/content/half"))) == 1
        other.kill()
        other.wait()
    write_text(tmp_path / "mine", "y")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_name_reaches_the_disk_after_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the order of what is brought to the disk, so that a power cut leaves the old file or the new one."""
    done: list[str] = []

    def synced(handle: int) -> None:
        done.append("sync folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "sync file")

    replace = os.replace

    def renamed(source: Path, destination: Path) -> None:
        done.append("rename")
        replace(source, destination)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr("os.replace", renamed)
    (tmp_path / "folder").mkdir()
    write_text(tmp_path / "folder" / "file", "x")
    assert done == ["sync file", "rename", "sync folder"]
    content = ["sync file", "sync folder", "sync file", "sync folder"]  # of the inner folder, and of the outer one
    (tmp_path / "empty").mkdir()
    for place, moves in (("new", 1), ("empty", 1), ("folder", 2)):  # renamed as a whole; filled file by file
        done.clear()
        with atomic_folder(tmp_path / place) as folder:
            (folder / "inner").mkdir()
            for name in ("a", "inner/b"):
                (folder / name).touch()
        assert done == content + moves * ["rename", "sync folder"]


def test_a_file_system_that_cannot_sync_folders_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def synced(handle: int) -> None:
        if kind(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", synced)
    kind, number = stat.S_ISDIR, errno.EINVAL
    for number in (errno.EINVAL, errno.EBADF):
        write_text(tmp_path / "file", "x")
        with atomic_folder(tmp_path / f"folder{number}") as folder:
            write_text(folder / "file", "y")
        assert [(tmp_path / name).read_text() for name in ("file", f"folder{number}/file")] == ["x", "y"]
    number = errno.EIO  # a disk that fails
    with pytest.raises(InputError, match="other: cannot be written"):
        write_text(tmp_path / "other", "x")
    kind, number = stat.S_ISREG, errno.EINVAL  # a file that cannot reach the disk is an error
    with pytest.raises(InputError, match="file: cannot be written"):
        write_text(tmp_path / "file", "z")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(("module", "call"), [(tempfile, "mkdtemp"), (fcntl, "flock")])
def test_a_temporary_that_is_taken_for_a_leftover_is_made_anew(
    module: ModuleType, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, calls = getattr(module, call), []

    def removed_at_first(*args: Any, **kwargs: Any) -> Any:
        calls.append(call)
        result = made(*args, **kwargs)
        for folder in tmp_path.glob(".file.*.partial") if len(calls) == 1 else ():
            shutil.rmtree(folder)  # by another process, before the folder was locked
        return result

    monkeypatch.setattr(module, call, removed_at_first)
    write_text(tmp_path / "file", "x")
    assert len(calls) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_system_without_locks_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    for text in ("x", "y"):
        write_text(tmp_path / "file", text)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_who_takes_a_folder_clears_what_a_killed_process_left_in_it(tmp_path: Path) -> None:
    leftover = tmp_path / ".out.abcd_123.partial"
    (leftover / "content").mkdir(parents=True)
    for name in ("lock", "content/half"):
        (leftover / name).touch()
    with lock_folder(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_writers_leave_no_file_open(tmp_path: Path) -> None:
    """Check it, since a run writes thousands of files, and a process may have about a thousand open."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()

    def write() -> None:
        (tmp_path / ".gone.abcd_123.partial").touch()
        write_text(tmp_path / "file", "x")
        for place in ("new", "folder"):
            with atomic_folder(tmp_path / place) as folder:
                (folder / "file").touch()
        with contextlib.suppress(InputError):
            open_regular(tmp_path).close()
        with lock_folder(tmp_path) as lock:
            pass
        assert not lock.is_locked

    write()
    before = os.listdir("/proc/self/fd")
    write()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_other_files_are_no_leftovers(tmp_path: Path) -> None:
    others = {".x.partial", "a.12345678.partial", ".a.12345678.partial.txt", ".a.1234567-.partial", ".lock"}
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".gone.abcd_123.partial").touch()  # as earlier versions left them
    (tmp_path / ".link.abcd_123.partial").symlink_to(tmp_path / ".lock")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == others | {".link.abcd_123.partial"}
    remove_leftovers(tmp_path / "none")


def test_many_threads_write_beside_each_other(tmp_path: Path) -> None:
    failures: list[Exception] = []

    def write(name: str) -> None:
        try:
            for number in range(40):
                write_text(tmp_path / name, f"{name} {number}")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(f"file{number % 4}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"file{number}" for number in range(4)]


def test_what_fails_leaves_no_folders(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a" / "b" / "file") as path:
        fail(path)
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a" / "b") as folder:
        fail(folder / "one")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a" / "b" / "file"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("kind", ["mtt", "png", "parquet", "synthetic"])
def test_a_full_disk_leaves_nothing_of_a_set(tmp_path: Path, kind: str) -> None:
    images = torch.rand(400, 3, 16, 16)
    full = SyntheticDataset(
        images, torch.arange(400) // 40, torch.tensor(0.1), tuple("abcdefghij"), (0.0,) * 3, (1.0,) * 3
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # stands in for a disk with so much left
    try:
        with pytest.raises(InputError, match=r"/new/out.*: cannot be written \(.*File too large") as raised:
            full.export(kind, tmp_path / "new" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ".partial" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_filled_and_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    with atomic_folder(".", last="b") as folder:
        for name in ("a", "b", "c"):
            (folder / name).write_text(name)
    assert tmp_path.stat().st_ino == before
    assert sorted(path.name for path in Path().iterdir()) == ["a", "b", "c"]


def test_what_readers_look_for_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").touch()
    moved: list[str] = []
    replace = os.replace

    def noted(source: Path, place: Path) -> None:
        moved.append(Path(place).name)
        replace(source, place)

    monkeypatch.setattr(os, "replace", noted)
    with atomic_folder(tmp_path, last="buffer_") as folder:
        for name in ("buffer_0", "buffer_1", "buffer_10", "step_0", "a/b/c"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    assert moved == ["step_0", "c", "buffer_10", "buffer_1", "buffer_0"]


def test_a_link_to_a_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "file").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "file").exists()


def test_a_place_is_free_where_only_leftovers_are(tmp_path: Path) -> None:
    assert is_free(tmp_path / "none")
    with temporary_folder(tmp_path / "out" / "file"):
        assert not is_free(tmp_path / "out")
    (tmp_path / "out" / ".file.abcd_123.partial").mkdir(parents=True)
    assert is_free(tmp_path / "out")
    (tmp_path / "out" / "file").symlink_to("nowhere")
    assert not is_free(tmp_path / "out")
    assert not is_free(tmp_path / "out" / "file")


def write_beside_others(path: Path, text: str) -> None:
    with atomic_folder(path.parent) as folder:
        (folder / path.name).write_text(text)


@pytest.mark.parametrize("write", [write_text, write_beside_others])
def test_an_error_after_a_rename_does_not_deny_the_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, str], None]
) -> None:
    (tmp_path / "file").write_text("old")
    synced = os.fsync

    def fails_once_renamed(handle: int) -> None:
        if (tmp_path / "file").read_text() == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        synced(handle)

    monkeypatch.setattr("os.fsync", fails_once_renamed)
    with pytest.raises(InputError, match=r": cannot be written \(Input/output error\); check the disk$"):
        write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
