"""Compare a command with the run that its folder holds already."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Container
from pathlib import Path
from typing import Any

from mtt_fast.commands.option_fields import Role, fields_of
from mtt_fast.errors import InputError
from mtt_fast.storage.files import (
    MALFORMED,
)
from mtt_fast.storage.run_folder import broken_summary, read_config, read_summary

log = logging.getLogger(__name__)


_DISTILLATION = "mtt_fast.distill"


def check_same_method(folder: Path, method: str | None) -> None:
    """Raise `InputError` if `folder` holds a run of another method.

    `method` is the name after `python -m mtt_fast.baselines`; None is the distillation, whose options name no method.
    """
    config = read_config(folder)
    if config is not None and config.get("method") != method:
        raise InputError(
            f"{folder}: holds a run of {config.get('method', _DISTILLATION)}, not {method or _DISTILLATION}; choose another "
            "--out (or delete the folder)"
        )


def check_same_run(folder: Path, options: Any, may_differ: Container[str]) -> None:
    """Raise `InputError` if `folder` holds a run with other values than those in the dataclass `options`.

    Options named in `may_differ` may, since the result does not depend on them.
    """
    before = read_config(folder)
    if before is None:
        return
    before = dataclasses.asdict(type(options)()) | before  # an option that is younger than the run
    for name, value in dataclasses.asdict(options).items():
        if name not in may_differ and before[name] != value:
            raise InputError(
                f"{folder}: holds a run {_differing(name, before[name], value)}; choose another --out "
                f"(or delete the folder)"
            )


def is_finished(folder: Path, options: Any, iterations: int) -> bool:
    """Return whether the run in `folder` has come to its end after at least so many iterations, and if so say it.

    What its evaluations were made with is said where the dataclass `options` asks for others.
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
            "its evaluations were made with %s; python -m mtt_fast.evaluate %s makes others", ", ".join(other), folder
        )
    return True


def _differing(name: str, before: Any, value: Any) -> str:
    """Return in words that an option had another value before."""
    found, wanted = (
        f"without --{name}"
        if one is None or one is False
        else f"with --{name}" + (f" {one}" if one is not True else "")
        for one in (before, value)
    )
    both = found.startswith("with ") and wanted.startswith("with ")
    return f"{found}, not {value if both else wanted}"
