"""The folder of one distillation: its options, its checkpoint, its metrics. Whatever stops the run, it can go on."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import logging
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from mtt_fast.cli import parse_toml
from mtt_fast.errors import InputError
from mtt_fast.files import (
    MALFORMED,
    checksum_of,
    load_tensors,
    open_regular,
    parse_json,
    read_header,
    read_text,
    save_tensors,
    write_text,
)
from mtt_fast.records import check_form, read_record, sealed, unsealed
from mtt_fast.temporaries import remove_leftovers

CONFIG, CHECKPOINT, METRICS, SUMMARY = "config.toml", "checkpoint.safetensors", "metrics.jsonl", "summary.json"
SYNTHETIC, BEST = "synthetic.safetensors", "best.safetensors"
"""The distilled set as it is, and that of the evaluation with the highest accuracy on the test images."""
EMA, BEST_EMA = "ema.safetensors", "best_ema.safetensors"
"""The same with the average of the images over the iterations in their place."""
_DISTILLATION = "mtt_fast.distill"
HISTORY = "history"
"""Folder of snapshots, iteration_000100.png: the first image of each class at each evaluation."""

_CONFIG_BEGINS = "# the options of this run: flags change them, and the last line tells whether anything else did"
_CONFIG_ENDS = "# checksum "
_STEPS = ("step", "skip", "above_threshold")
"""Kinds of records in metrics.jsonl, one for each iteration."""
_OF_EVALUATION = ("accuracy_mean", "accuracy_std", "networks")
_FIELDS = {
    "step": ("loss", "lr"), "evaluation": _OF_EVALUATION, "ema_evaluation": _OF_EVALUATION, "baseline": _OF_EVALUATION,
    "gradient": ("cosine",),
}  # fmt: skip
"""What records of a kind have besides; all numbers."""
_NO_NUMBERS = ("kind", "checksum")
_LONGEST_LINE, _LONGEST_METRICS = 1 << 16, 1 << 30  # bytes

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
            remove_leftovers(folder)
            for leftover in folder.glob(".*.partial"):  # as writers left them before they locked what they write
                if leftover.is_file():
                    leftover.unlink()
            yield
    except Timeout as error:
        raise InputError(
            f"{folder}: another process is writing to this run; wait for it or choose another --out"
        ) from error


def write_config(folder: Path, options: dict[str, Any], note: str = "") -> None:
    """Write options (text, numbers, booleans; None is left out) as TOML, below a `note` of one line.

    The last line is a comment with the checksum of all before it.
    """
    lines = [_CONFIG_BEGINS, *[f"# {note}"] * bool(note)]
    lines += [
        f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in options.items() if value is not None
    ]
    text = "\n".join(lines) + "\n"
    write_text(folder / CONFIG, f"{text}{_CONFIG_ENDS}{checksum_of(text.encode())}\n")


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the options that the run was started with, or None if there is no run in `folder`.

    Raises `InputError` if the file is not the one that was written.
    """
    path = folder / CONFIG
    if not path.exists():
        return None
    text = read_text(path)
    above, mark, checksum = text.rpartition(_CONFIG_ENDS)
    is_checked = bool(mark) or text.startswith(_CONFIG_BEGINS)  # else it is from before there were checksums
    options = parse_toml(text, path) if not is_checked or checksum == f"{checksum_of(above.encode())}\n" else {}
    try:
        check_form(options, dict.fromkeys(("method?", "recipe?", "dataset?", "model?"), str))
    except TypeError:
        options = {}
    if not options:
        raise InputError(
            f"{path}: damaged or changed by hand; restore a copy, or delete it and give the command that began the run with "
            "all its options: it goes on where it was"
        )
    return options


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
        f"--{name} {before[name]}" for name in _OF_EVALUATIONS if before.get(name) not in (None, getattr(options, name))
    ]
    if other:
        log.info(
            "its evaluations were made with %s; python -m mtt_fast.evaluate %s makes others", ", ".join(other), folder
        )
    return True


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return the fields of summary.json that have a value, or None if the run is not finished.

    Raises `InputError` if it is broken.
    """
    path = folder / SUMMARY
    if not path.exists():
        return None
    record = read_record(path, _A_SUMMARY, _SUMMARISE_AGAIN)
    summary = {name: value for name, value in record.items() if value is not None}
    try:
        check_form(summary, _SUMMARY)
    except MALFORMED as error:
        raise broken_summary(folder, error) from error
    return summary


_NUMBER = int | float
_ACCURACY = {"mean": _NUMBER, "std": _NUMBER, "n": int}
_SUMMARY = {
    "accuracy": {"*": _ACCURACY},
    "accuracy_by_network?": {"*": {"*": _ACCURACY}},
    "options?": {
        "dataset?": str, "subset?": str | None, "res?": int | None, "model?": str, "ipc?": int, "seed?": int,
    },
    "text?": str, "method?": str, "protocol?": {"text?": str}, "gradient?": {"kind?": str, "cosines_to_exact?": [_NUMBER]},
    "iterations?": int, "skipped_iterations?": int, "iterations_above_threshold?": int, "learning_rate_kept?": int,
    "learning_rate?": _NUMBER, "learning_rate_per_step?": [_NUMBER], "seconds?": {"*": _NUMBER},
    "peak_memory_bytes?": _NUMBER, "versions?": {"*": str}, "device?": str, "arithmetic?": str, "command?": str,
}  # fmt: skip
"""What readers of a summary take for granted."""
_A_SUMMARY = "the summary of a run with its accuracy"
_SUMMARISE_AGAIN = "delete it, and the command of the run writes it again"


def broken_summary(folder: Path, error: Exception) -> InputError:
    """Return the error that the summary in `folder` lacks what it should have, or has it in another form."""
    return InputError(
        f"{folder / SUMMARY}: expected {_A_SUMMARY}, found {type(error).__name__}: {error}; {_SUMMARISE_AGAIN}"
    )


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


_CHECKPOINT = "mtt_fast checkpoint 2"  # those from before there were checksums say nothing
EVALUATIONS = "evaluations"
"""The field of a checkpoint with the records of evaluations, whichever method it is of."""
_TENSORS = ("images", "labels", "lr", "images_velocity", "lr_velocity")
_OPTIONAL_TENSORS = ("labels_velocity", "ema")
_NUMBERS = ("iteration", "experts", "skipped", "above_threshold", "lr_kept", "seconds", "seconds_evaluation")


def save_checkpoint(folder: Path, state: State, evaluations: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write `state` and the records of the evaluations so far (`MetricsLog.evaluations`), atomically."""
    numbers = {name: getattr(state, name) for name in _NUMBERS}
    tensors = {name: getattr(state, name) for name in (*_TENSORS, *_OPTIONAL_TENSORS)}
    save_tensors(
        folder / CHECKPOINT,
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        {"format": _CHECKPOINT, "numbers": json.dumps(numbers), EVALUATIONS: json.dumps(evaluations)},
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
        numbers = parse_json(metadata["numbers"])
        if "format" in metadata:
            check_form(numbers, dict.fromkeys(_NUMBERS, _NUMBER))
            if metadata["format"] != _CHECKPOINT:
                raise ValueError("another format")
        return State(**values | numbers)
    except MALFORMED as error:
        raise InputError(f"{path}: not a checkpoint of this version; choose another --out") from error


class MetricsLog:
    """metrics.jsonl and TensorBoard events of a run, from a given iteration on.

    What was written after that iteration, by a run that was killed before its next checkpoint, is dropped first; an
    evaluation that was damaged since is taken from the checkpoint.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only this job writes events

        self._path = folder / METRICS
        found = [record for record in read_records(self._path) if record["iteration"] <= iteration]
        saved = _evaluations_in(folder / CHECKPOINT)
        steps = [record for record in found if record["kind"] in _STEPS]
        others = saved + [record for record in found if record["kind"] not in _STEPS and record not in saved]
        self.records = sorted(steps + others, key=lambda record: int(record["iteration"]))
        write_text(self._path, "".join(_as_line(record) for record in self.records))
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._events = SummaryWriter(str(folder / "events"), purge_step=iteration + 1)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The records of all kinds but those that each iteration has."""
        return [record for record in self.records if record["kind"] not in _STEPS]

    def write(self, kind: str, iteration: int, **values: float | int) -> None:
        """Append one record, all of it or nothing. Raises `OSError` where the disk is full.

        `kind` is "step", "skip" or "above_threshold" of an iteration, "evaluation", "ema_evaluation", "gradient" or
        "baseline".
        """
        record = {"kind": kind, "iteration": iteration, **values}
        line = _as_line(record).encode()
        before = self._file.tell()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except OSError:
            self._file.truncate(before)
            raise
        self.records.append(record)
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", value, iteration)

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


def _as_line(record: Mapping[str, Any]) -> str:
    return json.dumps(sealed(record)) + "\n"


def _evaluations_in(checkpoint: Path) -> list[dict[str, Any]]:
    """Return the records of evaluations that were saved with a checkpoint; none if there is none, or it is an old one."""
    if not checkpoint.exists():
        return []
    _, metadata = read_header(checkpoint)
    try:
        return [_as_record(value) for value in parse_json(metadata.get(EVALUATIONS, "[]"))]
    except MALFORMED as error:
        raise InputError(f"{checkpoint}: not a checkpoint of this version; choose another --out") from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; none if it is not there. Those that are damaged are left out, with a warning.

    Raises `InputError` if it cannot be read.
    """
    if not path.exists():
        return []
    with io.BufferedReader(open_regular(path, _LONGEST_METRICS)) as file:  # type: ignore[type-var]
        lines = [_record_in(line) for line in iter(lambda: file.readline(_LONGEST_LINE), b"")]
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            if line is not None:
                records.append(unsealed(line))
    if len(records) < len(lines):
        log.warning("%s: %d damaged lines are left out", path, len(lines) - len(records))
    return records


def _record_in(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line of metrics.jsonl; None if there is none."""
    with contextlib.suppress(*MALFORMED):
        return _as_record(parse_json(line))
    return None


def _as_record(value: Any) -> dict[str, Any]:
    """Return what a line of metrics.jsonl holds. Raises one of `MALFORMED` for anything else."""
    check_form(value, {"kind": str, "iteration": int})
    check_form(value, {name: _NUMBER for name in (*_FIELDS.get(value["kind"], ()), *value) if name not in _NO_NUMBERS})
    return dict(value)
