"""Check the layers of docs/architecture.md: imports go downward only, and take no private names; and that docstrings open with a verb."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mtt_fast"
TOPS = {"__init__", "__main__", "testing"}  # the library's entry, the commands' and the oracles: they may use anything
ONLY = {
    "runtime": {"errors"},
    "networks": {"checks", "errors", "kernels", "user_code"},
    "augmentation": {"checks", "errors", "kernels"},
    "parametrisations": {"errors", "runtime", "user_code"},
}
UPWARD = {("data.synthetic", "interop")}  # when it is called
NO_VERB = re.compile(
    r"\W*(What|How|Whether|Of|Which|Where|Why|When|Who|From|As|So|Or|By|For|With|In|On|Its|Their|Those|It|They|That|Once)\b"
)
ARTICLE = re.compile(r"(The|An?|One|Two)\b")  # a class may open with its name, a function only with its verb


def layers() -> list[set[str]]:
    """Return the lines of the drawing, the lowest first."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawing = re.search(r"```text\n(.*?)```", text, re.DOTALL)
    assert drawing is not None
    return [set(line.split()) for line in reversed(drawing[1].splitlines())]


def imports(path: Path) -> Iterator[str]:
    """Yield the layer of each module of this package that a file imports, however late."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if names == ["mtt_fast"] and isinstance(node, ast.ImportFrom):
            names = [f"mtt_fast.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("mtt_fast."))


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if name.split(".")[0] not in TOPS | {"kernels"}:
            yield name, path


def test_every_folder_and_command_is_in_the_drawing() -> None:
    assert {name.split(".")[0] for name, _ in modules()} | {"kernels"} == set().union(*layers())


def test_imports_go_downward_only() -> None:
    rank = {name: place for place, line in enumerate(layers()) for name in line}
    upward = {
        (module, layer)
        for module, path in modules()
        for layer in imports(path)
        if layer != (own := module.split(".")[0])
        and layer in rank
        and (rank[layer] >= rank[own] or layer not in ONLY.get(own, {layer}))
    }
    assert upward == UPWARD


def test_kernels_know_nothing_of_the_rest() -> None:
    modules = sorted((ROOT / "kernels").rglob("*.py"))
    assert modules
    for path in modules:
        assert not set(imports(path)) - {"kernels"}, path


def test_students_know_nothing_of_the_path() -> None:
    modules = sorted((PACKAGE / "engine" / "students").glob("*.py"))
    assert modules
    for path in modules:
        names = re.findall(r"mtt_fast\.engine\b[\w.]*", path.read_text(encoding="utf-8"))
        assert {".".join(name.split(".")[:3]) for name in names} <= {"mtt_fast.engine.students"}, path


def is_private(name: str | None) -> bool:
    return name is not None and name.startswith("_") and not name.startswith("__")


OURS = ("mtt_fast", "kernels", "bench", "tests")


@pytest.mark.parametrize("folder", [*OURS, "examples"])
def test_no_module_imports_a_private_name_of_another(folder: str) -> None:
    private = {
        f"{path.relative_to(ROOT)}: {node.module}.{alias.name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS
        for alias in node.names
        if is_private(alias.name)
    }
    assert private == set()


@pytest.mark.parametrize("folder", [*OURS, "examples"])
def test_no_module_imports_the_kernels_a_second_time(folder: str) -> None:
    """Check that none names the package `kernels`, which the repository's folder has beside `mtt_fast.kernels`."""
    second = {
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / folder).rglob("*.py"))
        if re.search(r"^\s*(from|import) kernels\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert second == set()


def docstrings(path: Path) -> Iterator[tuple[bool, str]]:
    """Yield each docstring of a file, and whether it is a function's."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (docstring := ast.get_docstring(node)):
            yield isinstance(node, ast.FunctionDef), docstring


@pytest.mark.parametrize("folder", [*OURS, "examples"])
def test_docstrings_open_with_a_verb(folder: str) -> None:
    openings = {
        f"{path.relative_to(ROOT)}: {docstring.splitlines()[0]}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if folder != "tests" or "kernels" not in path.parts  # those say which shapes a test has
        for is_function, docstring in docstrings(path)
        if NO_VERB.match(docstring) or (is_function and ARTICLE.match(docstring))
    }
    assert openings == set()
