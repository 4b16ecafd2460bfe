"""Check that native kernels run with the C++ sources that they were built from, and with no others."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mtt_fast.kernels import ConvLayer, native
from mtt_fast.kernels.native.extension import CPP, LOADED, check_sources, extension, load_extension

SOURCES = Path(__file__).resolve().parents[2] / "kernels" / "cpp"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SOURCES, tmp_path / "cpp"))


@pytest.mark.native
@pytest.mark.parametrize("change", ["edit", "new", "gone"])
def test_other_sources_are_refused(folder: Path, change: str) -> None:
    check_sources(extension(), folder)
    header = folder / "simd.h"
    match change:
        case "edit":
            header.write_text(header.read_text() + "// changed\n")
        case "new":
            (folder / "new.cpp").write_text("int answer() { return 42; }\n")
        case "gone":
            header.unlink()
    with pytest.raises(ImportError, match=r"cpp: expected the sources that .* was built from, found other ones"):
        check_sources(extension(), folder)


@pytest.fixture
def older() -> ModuleType:
    """Return an extension that does not know its sources."""
    module = ModuleType("_native")
    module.__file__ = "_native.so"
    return module


def test_an_extension_that_does_not_know_its_sources_is_refused(folder: Path, older: ModuleType) -> None:
    mend = f"that _native.so was built from.* build it again with `pip install -e .` in {folder.parents[1]}, or"
    with pytest.raises(ImportError, match=mend):
        check_sources(older, folder)


@pytest.mark.skipif(not CPP.exists(), reason="needs an editable install")
def test_the_sources_are_compared_before_the_extension_is_used(
    older: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda _: older)
    with pytest.raises(ImportError, match="found other ones"):
        load_extension()


@pytest.mark.parametrize("missing", ["the extension", "what it needs"])
def test_an_extension_that_does_not_load_is_not_passed_over(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> ModuleType:
        raise ModuleNotFoundError(name=name if missing == "the extension" else "numbers_of_another")

    monkeypatch.setattr(importlib, "import_module", find)
    if missing == "the extension":
        assert load_extension() is None
    else:
        with pytest.raises(ModuleNotFoundError):
            load_extension()


def test_a_wheel_has_no_sources_to_compare(tmp_path: Path) -> None:
    check_sources(ModuleType("_native"), tmp_path / "absent")


def test_an_editable_install_compares_its_sources() -> None:
    assert not CPP.exists() or CPP == SOURCES


RESULTS = """
import resource
import torch
from mtt_fast.kernels.native.extension import allocate, release_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

def result(size):
    return allocate(torch.empty(0), (size << 18,)).fill_(1)

def grown(*sizes):
    for size in sizes:  # each is freed before the next
        result(size)
    return resident() - before

before = 0
grown(10)
release_memory()
before = resident()
print(grown(10, 20, 30, 40))
print(grown(*[40, 30, 35] * 5, 40))
small, large = result(8), result(40)
print(grown())
del small, large
release_memory()
print(grown())
print(grown(10, 20))
both = [result(10), result(20)]
del both
print(grown(10, 20, 2))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory from Linux's /proc")
@pytest.mark.skipif(not LOADED, reason="the native kernels are not installed or turned off")
def test_results_that_were_freed_take_no_more_memory_than_was_once_in_use() -> None:
    """Follow results of so many MiB: the largest is 40; one of 8 does not take the memory of one of 40; nothing is left when it
    is released, not even the limit; and of 10 and 20 that were in use together only the smaller one makes room for 2."""
    answer = subprocess.run([sys.executable, "-c", RESULTS], check=True, capture_output=True, text=True)
    assert [int(line) for line in answer.stdout.split()] == pytest.approx([40, 40, 48, 0, 20, 22], abs=4)


@pytest.mark.skipif(not LOADED, reason="the native kernels are not installed or turned off")
def test_work_space_is_planned_for_every_thread_and_for_the_gradients_of_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def planned(threads: int) -> int:
        monkeypatch.setattr("torch.get_num_threads", lambda: threads)
        planned_bytes: int = native.workspace_bytes(4, [ConvLayer(256, 16, 16, 256, 1)], torch.float32)
        return planned_bytes

    one, two, three = map(planned, (1, 2, 3))
    of_a_thread = two - one
    assert three - two == of_a_thread > 0
    # transformed weights with their direction, and at least one sum of the transformed gradient, of 16 values for 9
    assert one - of_a_thread >= 3 * 16 * 256 * 256 * 4
