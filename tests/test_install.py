"""Install the package as a wheel, as an editable tree, and without a compiler, each into a fresh environment.

The environments see the packages of the one that runs the tests, and builds use no isolation, so nothing is fetched.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mtt_fast.kernels import reference

ROOT = Path(__file__).resolve().parents[1]

COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))), None)
HEADERS = Path(sysconfig.get_path("include"), "Python.h")
needs_compiler = pytest.mark.skipif(
    COMPILER is None or not HEADERS.exists(),
    reason="needs a C++ compiler and the headers of Python, and one is missing here",
)
REPORT = """
import json, torch, mtt_fast
from mtt_fast import kernels
a = torch.linspace(-1, 2, 100_003)
print(json.dumps({
    "native": kernels.native_available(),
    "files": [mtt_fast.__file__, kernels.__file__],
    "distance": kernels.squared_distance(a, a.square()).item(),
}))
"""


def run(*command: str | Path, variables: Mapping[str, str] | None = None, folder: Path | None = None) -> str:
    """Run a command that must succeed; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MTT_FAST_NATIVE", "PYTHONPATH")}
    answer = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environment | dict(variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout
    return answer.stdout


def pip(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "pip", *arguments]


def offline(build: Path) -> list[str]:
    return ["-v", "--no-index", "--no-deps", "--no-build-isolation", "--config-settings", f"build-dir={build}"]


def build_wheel(folder: Path, variables: Mapping[str, str] | None = None) -> tuple[Path, str]:
    """Return the wheel of the working tree, and what its build printed."""
    said = run(*pip("wheel", *offline(folder / "build"), "--wheel-dir", folder, ROOT), variables=variables)
    (wheel,) = folder.glob("*.whl")
    return wheel, said


@pytest.fixture
def no_compilers(tmp_path: Path) -> dict[str, str]:
    """Return the variables of a machine that can build nothing: PATH has what an isolated build brings, and no compiler."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("cmake", "ninja"):
        program = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
        assert program, f"{name} comes with the extra `test`"
        (programs / name).symlink_to(program)
    return {"PATH": str(programs), "CC": "/bin/false", "CXX": "/bin/false"}


@pytest.fixture
def quick_compiler(tmp_path: Path) -> dict[str, str]:
    """Return the variables of a machine whose compiler does not optimise, which would take four fifths of the time."""
    if os.name == "nt":
        return {}
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec "{COMPILER}" "$@" -O0\n')
    compiler.chmod(0o755)
    return {"CXX": str(compiler)}


def new_environment(folder: Path) -> Path:
    """Return the interpreter of a fresh environment that finds the packages of this one, but not its mtt_fast."""
    venv.create(folder, symlinks=os.name != "nt")
    places = {"base": str(folder), "platbase": str(folder)}
    # A folder that a .pth file names is searched, but its own .pth files are not read, nor so an editable mtt_fast.
    Path(sysconfig.get_path("purelib", "venv", places), "of_the_tests.pth").write_text(sysconfig.get_path("purelib"))
    return Path(sysconfig.get_path("scripts", "venv", places), "python")


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Return the interpreter of a fresh environment."""
    return new_environment(tmp_path / "venv")


def check(python: Path, folder: Path, *, native: bool, source: Path) -> None:
    """Check that the environment's mtt_fast comes from `source` and computes, with or without native kernels."""
    report: dict[str, Any] = json.loads(run(python, "-c", REPORT, folder=folder))
    assert report["native"] is native
    assert all(Path(file).is_relative_to(source) for file in report["files"])
    a = torch.linspace(-1, 2, 100_003)
    assert report["distance"] == pytest.approx(reference.squared_distance(a, a.square()).item(), rel=1e-13)


def check_content(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    kinds = ("**/*.py", "**/*.toml", "**/*.tsv", "**/*.j2", "py.typed")
    package = [path for kind in kinds for path in (ROOT / "mtt_fast").glob(kind)]
    kernels = [Path("mtt_fast", path.relative_to(ROOT)) for path in (ROOT / "kernels").glob("**/*.py")]
    assert {path.as_posix() for path in [*(path.relative_to(ROOT) for path in package), *kernels]} <= names
    assert not [name for name in names if name.endswith((".cpp", ".h"))]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_a_source_that_is_not_installed_says_so(tmp_path: Path, python: Path) -> None:
    shutil.copytree(ROOT / "mtt_fast", tmp_path / "mtt_fast", ignore=shutil.ignore_patterns("kernels", "__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    answer = subprocess.run(
        [python, "-m", "mtt_fast.env"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    *_, last = answer.stderr.splitlines()
    assert last.startswith(f"ImportError: {tmp_path / 'mtt_fast'}: expected an installed mtt_fast, found its source")


@pytest.mark.slow
@needs_compiler
def test_a_wheel_and_an_editable_install_bring_the_native_kernels(
    tmp_path: Path, quick_compiler: dict[str, str]
) -> None:
    wheel, said = build_wheel(tmp_path, quick_compiler)
    assert "installed with its native kernels" in said
    check_content(wheel)
    python = new_environment(tmp_path / "of_wheel")
    run(*pip("--python", python, "install", "--no-index", "--no-deps", wheel))
    check(python, tmp_path, native=True, source=tmp_path / "of_wheel")

    python = new_environment(tmp_path / "editable")
    # the same build folder, so that the kernels are compiled once
    install = pip("--python", python, "install", *offline(tmp_path / "build"), "--editable", ROOT)
    run(*install, variables=quick_compiler)
    check(python, tmp_path, native=True, source=ROOT)


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_pure_python_and_says_so(
    tmp_path: Path, python: Path, no_compilers: dict[str, str]
) -> None:
    wheel, said = build_wheel(tmp_path, no_compilers)
    assert "the pure-Python fallback was installed" in said
    assert wheel.name.endswith("-py3-none-any.whl")
    check_content(wheel)
    run(*pip("--python", python, "install", "--no-index", "--no-deps", wheel))
    check(python, tmp_path, native=False, source=tmp_path / "venv")


@pytest.mark.slow
def test_an_editable_install_needs_no_compiler(tmp_path: Path, python: Path, no_compilers: dict[str, str]) -> None:
    install = pip("--python", python, "install", *offline(tmp_path / "build"), "--editable", ROOT)
    run(*install, variables=no_compilers)
    check(python, tmp_path, native=False, source=ROOT)
