"""Test which file a class of the user's own comes from, and what its file imports."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtt_fast import InputError
from mtt_fast.user_code import file_digest, load


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make two folders with files of the same names; what is imported from them is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for each in ("first", "second"):
        Path(each).mkdir()
        Path(each, "own.py").write_text(f"class Net:\n    place = {each!r}\n")
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_classes_of_two_files_of_one_name_are_told_apart() -> None:
    first, second = (load("model", f"{each}/own.py:Net") for each in ("first", "second"))
    assert (first.place, second.place) == ("first", "second")
    assert file_digest(first) == hashlib.sha256(Path("first/own.py").read_bytes()).hexdigest()


def test_a_file_imports_the_one_beside_it_first() -> None:
    Path("beside_1.py").write_text("place = 'the working directory'")
    Path("first/beside_1.py").write_text("place = 'beside'")
    Path("first/own.py").write_text(
        "from beside_1 import place\ndef later():\n    import beside_2\n    return beside_2"
    )
    Path("first/beside_2.py").touch()
    assert load("model", "first/own.py:place") == "beside"
    assert load("model", "first/own.py:later")().__name__ == "beside_2"
    assert sys.path[0] != str(Path("first").resolve())


@pytest.mark.parametrize("beside", ["beside_3.py", "beside_4/__init__.py"])
def test_a_file_is_not_taken_for_that_of_another_folder(beside: str) -> None:
    for each in ("first", "second"):
        Path(each, beside).parent.mkdir(exist_ok=True)
    Path("first", beside).write_text("place = 'first'")
    Path("first/own.py").write_text(f"from {beside[:8]} import place")
    assert load("model", "first/own.py:place") == "first"
    assert load("model", "second/own.py:Net.place") == "second"  # which has no such file beside it
    Path("second", beside).touch()
    with pytest.raises(
        InputError, match=f"second/{beside}: cannot be imported, since .*first/{beside} of the same name"
    ):
        load("model", "second/own.py:Net")


def test_modules_of_packages_are_told_apart() -> None:
    for each in ("first", "second"):
        Path(each, "__init__.py").touch()
        Path(each, "inner.py").write_text(f"place = {each!r}")
        Path(each, "own.py").write_text(f"from {each}.inner import place")
        assert load("model", f"{each}/own.py:place") == each


def test_an_error_names_the_line_of_the_users_file() -> None:
    Path("first/own.py").write_text("\nimport json\ndef read():\n    json.loads('{')\nread()")
    with pytest.raises(InputError, match=r"JSONDecodeError: .* \(char 1\) \(first/own.py, line 4\)$"):
        load("model", "first/own.py:Net")
