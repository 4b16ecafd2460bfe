"""Compare a command with an earlier run in the same folder."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from collections.abc import Container, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, TypeVar

from mtt_fast.commands.option_fields import Role, fields_of, outside_result
from mtt_fast.data.catalogue import name_of
from mtt_fast.errors import InputError
from mtt_fast.storage.run_files import CHECKPOINT, last_name
from mtt_fast.storage.run_folder import read_config
from mtt_fast.storage.run_summary import broken_summary, read_summary
from mtt_fast.storage.text_files import MALFORMED

log = logging.getLogger(__name__)


Options = TypeVar("Options")

_DISTILLATION = "mtt_fast.distill"
_EARLIER_PRECISION = "tf32"  # the default of former versions, which did not save the precision


def options_to_continue(
    folder: Path, method: str | None, options: Options, given: Container[str], may_differ: Set[str]
) -> tuple[Options, bool]:
    """Return `options` with the precision of the run of `method` in `folder`, and whether that run has finished.

    `given` are the options that the user gave. Raises `InputError` if there is a run and it cannot continue with the options:
    options that decide the result have other values, except those in `may_differ`, or an unfinished run was evaluated in another
    way.
    """
    earlier = earlier_options(folder, method)
    options = in_precision_of_run(options, earlier, given)
    check_same_run(folder, earlier, options, outside_result(type(options)) | may_differ)
    finished = is_finished(folder, options, getattr(options, "Iteration", 0))
    if not finished:
        check_same_evaluation(folder, earlier, options)
    return options, finished


def earlier_options(folder: Path, method: str | None) -> dict[str, Any] | None:
    """Return the options of the run of `method` in `folder`, or None if there is no run.

    `method` is the name after `python -m mtt_fast.baselines`; None is the distillation, whose options name no method. Raises
    `InputError` for a run of another method, and for a damaged file of options.
    """
    config = read_config(folder)
    if config is None:
        return None
    if config.get("method") != method:
        raise InputError(
            f"{folder}: holds a run of {config.get('method', _DISTILLATION)}, not {method or _DISTILLATION}; choose another "
            "--out (or delete the folder)"
        )
    return {"precision": _EARLIER_PRECISION} | config


def in_precision_of_run(options: Options, earlier: Mapping[str, Any] | None, given: Container[str]) -> Options:
    """Return the dataclass `options` with the precision of an `earlier` run, if there is one, unless it is in `given`.

    A run then continues in its own precision, even if the default has changed.
    """
    if earlier is None or "precision" in given:
        return options
    return dataclasses.replace(options, precision=earlier["precision"])  # type: ignore[type-var]


def check_same_run(folder: Path, earlier: Mapping[str, Any] | None, options: Any, may_differ: Container[str]) -> None:
    """Raise `InputError` if `earlier`, the options of the run in `folder`, have other values than the dataclass `options`.

    The options named in `may_differ` may have other values, since the result does not depend on them. An image folder may
    have moved: its images are compared when they are read.
    """
    for name, values in _other_values(earlier, options):
        is_same = name == "dataset" and _same_dataset(*values)
        if name not in may_differ and not is_same:
            raise InputError(
                f"{folder}: holds a run {_differing(name, *values)}; choose another --out (or delete the folder)"
            )


def check_same_evaluation(folder: Path, earlier: Mapping[str, Any] | None, options: Any) -> None:
    """Raise `InputError` if the run in `folder`, which continues with `options`, was evaluated in another way so far.

    `earlier` are its options. Its summary names one protocol for all accuracies, and its best set is the one of the highest.
    """
    if not (folder / CHECKPOINT).exists():  # nothing is evaluated yet
        return
    fields = fields_of(type(options))
    for name, values in _other_values(earlier, options):
        if fields[name].role is Role.EVALUATION:
            raise InputError(
                f"{folder}: holds a run {_differing(name, *values)}, and compares all its evaluations; leave that as it was, and "
                "evaluate the set in other ways by `python -m mtt_fast.evaluate`"
            )


def check_comparable(folder: Path, options: Any) -> None:
    """Raise `InputError` if the run in `folder` has finished with another evaluation, or more iterations, than `options` ask for.

    For commands that put the accuracies of several runs beside each other.
    """
    summary = read_summary(folder)
    if summary is None:
        return
    fix = (
        "which does not compare with other runs of this command; choose another folder, or give the options that it has"
    )
    before = summary.get("options", {})
    for name, field in fields_of(type(options)).items():
        now = getattr(options, name)
        if field.role is Role.EVALUATION and before.get(name, now) != now:
            raise InputError(f"{folder}: holds a run {_differing(name, before[name], now)}, {fix}")
    if (iterations := int(summary.get("iterations", 0))) > options.Iteration:
        raise InputError(f"{folder}: holds a run of {iterations} iterations, not {options.Iteration}, {fix}")


def _other_values(earlier: Mapping[str, Any] | None, options: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the names of options with another value in an `earlier` run than in `options`, with both values."""
    if earlier is None:
        return
    before = dataclasses.asdict(type(options)()) | dict(earlier)  # an option that is younger than the run
    for name, value in dataclasses.asdict(options).items():
        if before[name] != value:
            yield name, (before[name], value)


def _same_dataset(before: str, now: str) -> bool:
    """Return whether two values of --dataset mean one data set, or image folders of one name."""
    names = name_of(before), name_of(now)
    return names[0] == names[1] if any(names) else last_name(before) == last_name(now)


def is_finished(folder: Path, options: Any, iterations: int) -> bool:
    """Return whether the run in `folder` has finished after at least `iterations`, and log that it has.

    Where the dataclass `options` asks for another kind of evaluation, the log says with which options the run was evaluated.
    Raises `InputError` for a broken summary.
    """
    summary = read_summary(folder)
    try:
        if summary is None or summary["iterations"] < iterations:
            return False
        text, before = summary["text"], summary.get("options", {})
    except MALFORMED as error:
        raise broken_summary(folder, error) from error
    log.info("%s is finished: %s", folder, text)
    other = [
        f"--{name} {before[name]}"
        for name, field in fields_of(type(options)).items()
        if field.role is Role.EVALUATION and before.get(name) not in (None, getattr(options, name))
    ]
    if other:
        log.info(
            "its evaluations were made with %s; python -m mtt_fast.evaluate %s makes others",
            ", ".join(other),
            shlex.quote(str(folder)),
        )
    return True


def _differing(name: str, before: Any, value: Any) -> str:
    """Return, for a message, that an option had the value `before` and not `value`."""
    earlier, now = (
        f"without --{name}"
        if setting is None or setting is False
        else f"with --{name}" + (f" {setting}" if setting is not True else "")
        for setting in (before, value)
    )
    both = earlier.startswith("with ") and now.startswith("with ")
    return f"{earlier}, not {value if both else now}"
