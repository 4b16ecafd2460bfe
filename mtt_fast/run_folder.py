"""The folder of one distillation: its options, its checkpoint, its metrics. Whatever stops the run, it can go on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from mtt_fast.cli import read_toml
from mtt_fast.errors import InputError
from mtt_fast.events import EventLog
from mtt_fast.files import load_tensors, save_tensors, write_text

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


@dataclass
class State:
    """All that a distillation carries from one iteration to the next."""

    iteration: int  # completed ones
    experts: int  # how many take turns; those trained since the start of the run stay out of it
    images: Tensor  # (n, C, H, W) float32
    labels: Tensor  # (n,) int64, the classes; or learned logits (n, classes) float32
    lr: Tensor  # () float32; (N,) where each step has one
    images_velocity: Tensor
    lr_velocity: Tensor
    labels_velocity: Tensor | None = None  # of learned labels
    ema: Tensor | None = None  # (n, C, H, W): the average of the images over the iterations, where it is asked for
    skipped: int = 0  # iterations whose loss or gradient was not finite
    above_threshold: int = 0  # iterations without an update, as their loss was above --threshold
    lr_kept: int = 0  # iterations whose update would have made the learning rate negative
    seconds: float = 0.0
    seconds_evaluation: float = 0.0

    @property
    def mean_lr(self) -> float:
        """The student's learning rate; of several, one a step, the mean."""
        return float(self.lr.mean())


_TENSORS = ("images", "labels", "lr", "images_velocity", "lr_velocity")
_OPTIONAL_TENSORS = ("labels_velocity", "ema")
_NUMBERS = ("iteration", "experts", "skipped", "above_threshold", "lr_kept", "seconds", "seconds_evaluation")


def save_checkpoint(folder: Path, state: State) -> None:
    """Write `state`, atomically."""
    numbers = {name: getattr(state, name) for name in _NUMBERS}
    tensors = {name: getattr(state, name) for name in (*_TENSORS, *_OPTIONAL_TENSORS)}
    save_tensors(
        folder / CHECKPOINT,
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        {"numbers": json.dumps(numbers)},
    )


def load_checkpoint(folder: Path, device: torch.device) -> State | None:
    """Return the last saved state on `device`, or None if there is none. Raises `InputError` if it is broken."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    tensors, metadata = load_tensors(path)
    try:
        names = (*_TENSORS, *(name for name in _OPTIONAL_TENSORS if name in tensors))
        values: dict[str, Any] = {name: tensors[name].to(device, copy=True) for name in names}
        return State(**values | json.loads(metadata["numbers"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a checkpoint of this version; choose another --out") from error


class MetricsLog:
    """metrics.jsonl and TensorBoard events of a run, from a given iteration on.

    What was written after that iteration, by a run that was killed before its next checkpoint, is dropped first.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        self._path = folder / METRICS
        self.records = [record for record in read_records(self._path) if record["iteration"] <= iteration]
        write_text(self._path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._events = EventLog(folder / "events", iteration + 1)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def write(self, kind: str, iteration: int, **values: float | int) -> None:
        """Append one record.

        `kind` is "step", "skip" or "above_threshold" of an iteration, "evaluation", "ema_evaluation", "gradient" or
        "baseline".
        """
        record = {"kind": kind, "iteration": iteration, **values}
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.write(f"{kind}/{name}", value, iteration)

    def find(self, kind: str, iteration: int | None = None) -> dict[str, Any] | None:
        """Return the first record of `kind` (at `iteration`, if given), or None."""
        for record in self.records:
            if record["kind"] == kind and iteration in (None, record["iteration"]):
                return record
        return None

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        self._events.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; none if it is not there, and none from a broken line on."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # the line under way when the process was killed
            break
    return records
