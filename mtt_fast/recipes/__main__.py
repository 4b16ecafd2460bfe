"""List all recipes, or those that have some words: `python -m mtt_fast.recipes [WORD…]`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, NamedTuple

import tyro

from mtt_fast.commands import cli, parsing
from mtt_fast.errors import InputError, did_you_mean
from mtt_fast.recipes import recipe_about, recipe_names, recipe_options, recipe_text

PROGRAM = "python -m mtt_fast.recipes"


@dataclass(frozen=True)
class ListOptions:
    """List the recipes (named settings). With words: list those that contain all words. With the name of a recipe: show it as a file
    for --config.
    """

    words: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[WORD …]")] = ()
    """words to search in names and descriptions, such as: datm cifar10; or the name of a recipe"""


class _Recipe(NamedTuple):
    name: str
    description: str
    source: str
    method: str
    dataset: str

    def has(self, word: str) -> bool:
        """Return whether `word` is the method, or in the name, the data set or the description before its colon.

        "ipc1" is not in "ipc10".
        """
        about = f"{self.name} {self.dataset} {self.description.split(':')[0]}"
        pattern = re.escape(word) + (r"(?!\d)" if word[-1:].isdigit() else "")
        return word.casefold() == self.method.casefold() or re.search(pattern, about, re.IGNORECASE) is not None


def listing(words: Sequence[str]) -> str:
    """Return the recipes that have all of `words`, by method and source; for the name of one recipe return the text of `recipe_text`.

    Raises `InputError` if there is none.
    """
    if len(words) == 1 and words[0] in recipe_names():
        return f"# python -m mtt_fast.distill --recipe {words[0]}\n{recipe_text(words[0]).rstrip()}"
    recipes = [recipe for recipe in _all() if all(recipe.has(word) for word in words)]
    if not recipes:
        known = sorted({part for name in recipe_names() for part in (name, *name.split("-"))})
        hint = next((guess for word in words if (guess := did_you_mean(word, known))), "")
        raise InputError(f"{' '.join(words)}: no recipe has all of these words{hint}; {PROGRAM} lists all")
    lines = []
    for (method, source), group in groupby(recipes, lambda recipe: (recipe.method, _without_file(recipe.source))):
        lines += ["", f"{method}: {source}", *(f"  {name:24} {description}" for name, description, *_ in group)]
    return "\n".join([*lines[1:], "", f"options and source of one: {PROGRAM} NAME"])


def _all() -> list[_Recipe]:
    """Return all recipes sorted by method, MTT's first, then by source, then by name and number."""
    recipes = [_Recipe(name, **recipe_about(name), dataset=recipe_options(name)["dataset"]) for name in recipe_names()]
    return sorted(
        recipes,
        key=lambda recipe: (
            recipe.method != "MTT",
            recipe.method,
            _without_file(recipe.source),
            _natural(recipe.name),
        ),
    )


def _without_file(source: str) -> str:
    """Return `source` without the name of a single recipe's file."""
    return re.sub(r", configs/.*", ", configs/", source)


def _natural(name: str) -> list[tuple[str, int]]:
    """Return the sort key that puts ipc10 after ipc1 and before ipc50."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D+)(\d*)", name)]


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    print(listing(parsing.parse(ListOptions, argv, PROGRAM).words))


if __name__ == "__main__":
    sys.exit(cli.run(main))
