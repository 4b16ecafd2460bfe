"""Check that native kernels run with the C++ sources that they were built from, and with no others."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest

from mtt_fast.kernels.native.extension import CPP, LOADED, check_sources, extension

SOURCES = Path(__file__).resolve().parents[2] / "kernels" / "cpp"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SOURCES, tmp_path / "cpp"))


@pytest.mark.skipif(not LOADED, reason="needs the native kernels")
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


def test_an_extension_that_does_not_know_its_sources_is_refused(folder: Path) -> None:
    older = ModuleType("_native")
    older.__file__ = "_native.so"
    with pytest.raises(ImportError, match=r"that _native.so was built from.* build it again with `pip install -e .`"):
        check_sources(older, folder)


def test_a_wheel_has_no_sources_to_compare(tmp_path: Path) -> None:
    check_sources(ModuleType("_native"), tmp_path / "absent")


def test_an_editable_install_compares_its_sources() -> None:
    assert not CPP.exists() or CPP == SOURCES
