"""The folder of one distillation: its options, its checkpoint, its metrics. Whatever stops the run, it can go on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mtt_fast.errors import InputError
from mtt_fast.storage.files import read_toml, write_text

CONFIG, CHECKPOINT, METRICS, SUMMARY = "config.toml", "checkpoint.safetensors", "metrics.jsonl", "summary.json"
SYNTHETIC, BEST = "synthetic.safetensors", "best.safetensors"
"""The distilled set as it is, and that of the evaluation with the highest accuracy on the test images."""
EMA, BEST_EMA = "ema.safetensors", "best_ema.safetensors"
"""The same with the average of the images over the iterations in their place."""
_DISTILLATION = "mtt_fast.distill"
HISTORY = "history"
"""Folder of snapshots, iteration_000100.png: the first image of each class at each evaluation."""

_OF_EVALUATIONS = ("num_eval", "epoch_eval_train", "eval_mode", "protocol", "best_epoch", "batch_train")

log = logging.getLogger(__name__)


@contextlib.contextmanager
def only_user(folder: Path) -> Iterator[None]:
    """Keep other processes out of the run while the block lasts, and clear what a killed one left half-written.

    Raises `InputError` if another process is in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            for leftover in folder.glob(".*.partial"):
                leftover.unlink()
            yield
    except Timeout as error:
        raise InputError(
            f"{folder}: another process is writing to this run; wait for it or choose another --out"
        ) from error


def write_config(folder: Path, options: dict[str, Any], note: str = "") -> None:
    """Write options (text, numbers, booleans; None is left out) as TOML, below a `note` of one line."""
    lines = [f"# {note}"] * bool(note)
    lines += [
        f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in options.items() if value is not None
    ]
    write_text(folder / CONFIG, "\n".join(lines) + "\n")


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the options that the run was started with, or None if there is no run in `folder`."""
    return read_toml(folder / CONFIG) if (folder / CONFIG).exists() else None


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
    path = folder / SUMMARY
    if not path.exists():
        return False
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if summary["iterations"] < iterations:
            return False
        text, before = summary["text"], summary.get("options", {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: broken; delete it, and the same command writes it again") from error
    log.info("%s is finished: %s", folder, text)
    other = [
        f"--{name} {before[name]}" for name in _OF_EVALUATIONS if before.get(name) not in (None, getattr(options, name))
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
