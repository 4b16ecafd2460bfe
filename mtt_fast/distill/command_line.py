"""Read the options of a distillation from flags, a file, a recipe, and the run to resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtt_fast.commands import parsing
from mtt_fast.commands.earlier_run import earlier_options
from mtt_fast.distill.options import DEFAULT_RECIPE, PROGRAM, DistillOptions
from mtt_fast.errors import InputError
from mtt_fast.recipes import recipe_options
from mtt_fast.storage.run_files import CONFIG
from mtt_fast.storage.text_files import read_toml


@dataclass(frozen=True)
class _Selection:
    """The flags that decide where the other options' defaults come from."""

    recipe: str | None = None
    config: str | None = None
    out: str | None = None
    resume: bool = False
    dataset: str | None = None


def parse_options(argv: Sequence[str]) -> DistillOptions:
    """Return the options of a command line, as `parse_with_given` does."""
    return parse_with_given(argv)[0]


def parse_with_given(argv: Sequence[str]) -> tuple[DistillOptions, set[str]]:
    """Return the options of a command line: defaults, then the recipe or the run to resume, then --config, then flags.

    Also return the names of the options that the flags, the recipe or --config give, but not those of the run to resume.

    The file of --config may name the recipe too. Without a recipe, a data set or a run to resume, the recipe is digits. Raises
    `InputError` for options that are unknown, or do not fit each other.
    """
    chosen, in_file = _selection(argv)
    differing = _differing_in_file(in_file, str(chosen.config))
    recipe = {} if chosen.resume or chosen.recipe is None else recipe_options(chosen.recipe)
    if chosen.resume:
        options = _options_of_run(chosen)
    elif chosen.recipe is not None:
        options = parsing.apply(DistillOptions(), recipe | {"recipe": chosen.recipe}, f"recipe {chosen.recipe}")
    else:
        options = DistillOptions()
    options = parsing.apply(options, in_file, str(chosen.config))
    options = parsing.parse(DistillOptions, argv, PROGRAM, options, in_file=differing)
    options.check()
    return options, {*recipe, *in_file, *parsing.given(DistillOptions, argv)}


def _selection(argv: Sequence[str]) -> tuple[_Selection, dict[str, Any]]:
    """Return the flags that decide where defaults come from, and the options in the file of --config."""
    chosen = parsing.parse_known(_Selection, argv, PROGRAM)
    in_file = read_toml(Path(chosen.config)) if chosen.config is not None else {}
    for name in ("recipe", "out", "dataset"):
        if getattr(chosen, name) is None and isinstance(in_file.get(name), str):  # `parsing.apply` refuses other types
            chosen = dataclasses.replace(chosen, **{name: in_file[name]})
    run_is_named = chosen.resume and chosen.out is not None
    if chosen.recipe is None and chosen.dataset is None and not run_is_named:
        chosen = dataclasses.replace(chosen, recipe=DEFAULT_RECIPE)
    return chosen, in_file


def _differing_in_file(in_file: Mapping[str, Any], path: str) -> set[str]:
    """Return the options in the file of --config that differ from the defaults. Raises `InputError` for options not allowed in a file."""
    default = DistillOptions()
    file_options = parsing.apply(default, in_file, path)
    if file_options.resume:
        raise InputError(f"{path}: option resume: has no effect in a file; leave it out, and give --resume")
    if file_options.config is not None:
        raise InputError(
            f"{path}: option config: expected no further file in a file of options, found {file_options.config!r}; write the "
            "options of both into one"
        )
    return {name for name in in_file if getattr(file_options, name) != getattr(default, name)}


def _options_of_run(chosen: _Selection) -> DistillOptions:
    """Return the options of the run to resume. Raises `InputError` where there is no run, or one of another recipe."""
    if not chosen.out and chosen.recipe is None:
        raise InputError("--resume: expected the run's folder with --out, or its --recipe, found neither")
    folder = Path(chosen.out) if chosen.out else Path("runs") / str(chosen.recipe)
    config = earlier_options(folder, None)
    if config is None:
        raise InputError(
            f"--resume: there is no run in {folder}; name its folder with --out, or start it without --resume"
        )
    run_options = parsing.apply(DistillOptions(), config, str(folder / CONFIG))
    if chosen.recipe not in (None, run_options.recipe):
        start = "without a recipe" if run_options.recipe is None else f"with --recipe {run_options.recipe}"
        raise InputError(
            f"--recipe {chosen.recipe}: has no effect with --resume, as the run in {folder} began {start}; leave it out"
        )
    return dataclasses.replace(run_options, resume=True, out=str(folder))
