"""Check that native kernels run with the C++ sources that they were built from, and with no others."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from mtt_fast.kernels.native.extension import CPP, LOADED, check_sources, extension, load_extension

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
