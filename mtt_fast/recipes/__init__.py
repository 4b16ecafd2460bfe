"""Settings by name, one TOML file each: options of `python -m mtt_fast.distill`, their description, source and method."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from mtt_fast.errors import InputError, did_you_mean
from mtt_fast.storage.files import read_toml

_ABOUT = ("description", "source", "method")


def recipe_names() -> list[str]:
    """Return the names of all recipes, sorted."""
    return sorted(Path(file.name).stem for file in _folder().iterdir() if file.name.endswith(".toml"))


def recipe_options(name: str) -> dict[str, Any]:
    """Return the options of the recipe `name`. Raises `InputError` for an unknown one."""
    return {key: value for key, value in _read(name).items() if key not in _ABOUT}


def recipe_about(name: str) -> dict[str, str]:
    """Return the description, the source and the method of the recipe `name`. Raises `InputError` for an unknown one."""
    table = _read(name)
    return {key: str(table[key]) for key in _ABOUT}


def recipe_text(name: str) -> str:
    """Return the file of the recipe `name`, TOML."""
    return str((_folder() / f"{name}.toml").read_text(encoding="utf-8"))


def _read(name: str) -> dict[str, Any]:
    names = recipe_names()
    if name not in names:
        raise InputError(
            f"--recipe {name}: no such recipe{did_you_mean(name, names)}; python -m mtt_fast.recipes lists them"
        )
    with resources.as_file(_folder() / f"{name}.toml") as path:
        return read_toml(path)


def _folder() -> Any:
    return resources.files(__name__)
