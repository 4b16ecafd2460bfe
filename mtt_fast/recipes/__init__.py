"""Read recipes, the named settings of `python -m mtt_fast.distill`: options, description, source and method, a TOML file each.

A recipe with `base = "NAME"` starts from the options of that recipe, or of the file bases/NAME.toml, and overrides them with its
own.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

from mtt_fast.errors import InputError, did_you_mean
from mtt_fast.storage.text_files import read_toml

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
    """Return the text of the recipe's file, after the files that it is based on, as one TOML file of options.

    Anything that is not an option, or that a later file overrides, becomes a comment.
    """
    texts, taken = [], {*_ABOUT, "base"}
    for each in _with_bases(name):
        text = re.sub(rf"^({'|'.join(sorted(taken))}) =", r"# \g<0>", _text(each), flags=re.MULTILINE)
        texts.append(f"# over {base}\n{text}" if (base := _table(each).get("base")) else text)
        taken |= _table(each).keys()
    return "\n".join(texts[::-1])


def _read(name: str) -> dict[str, Any]:
    """Return the content of the recipe `name`, merged over its base's. Raises `InputError` for an unknown one."""
    names = recipe_names()
    if name not in names:
        raise InputError(
            f"--recipe {name}: no such recipe{did_you_mean(name, names)}; python -m mtt_fast.recipes lists them"
        )
    merged: dict[str, Any] = {}
    for each in reversed(_with_bases(name)):
        merged |= _table(each)
    merged.pop("base", None)
    return merged


def _with_bases(name: str) -> list[str]:
    """Return `name`, and the names of its base, the base's base, and so on. Raises `InputError` if the chain is a cycle."""
    names = [name]
    while (base := _table(names[-1]).get("base")) is not None:
        if base in names:
            circle = " -> ".join([*names[names.index(base) :], base])
            raise InputError(
                f"recipe {names[-1]}: expected a base that is not based on it, found {base} ({circle}); name another base"
            )
        names.append(base)
    return names


def _table(name: str) -> dict[str, Any]:
    with resources.as_file(_file(name)) as path:
        return read_toml(path)


def _text(name: str) -> str:
    return str(_file(name).read_text(encoding="utf-8"))


def _file(name: str) -> Any:
    """Return the file of the recipe `name`, or of its nearest base that has one."""
    recipe = _folder() / f"{name}.toml"
    return recipe if recipe.is_file() else _folder() / "bases" / f"{name}.toml"


def _folder() -> Any:
    return resources.files(__name__)
