"""Read the summary of a finished run, summary.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtt_fast.errors import InputError
from mtt_fast.storage.records import NUMBER, check_form, read_record
from mtt_fast.storage.run_files import SUMMARY
from mtt_fast.storage.text_files import MALFORMED


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return the fields of summary.json that have a value, or None if there is no summary. Raises `InputError` if it is broken."""
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


_ACCURACY = {"mean": NUMBER, "std": NUMBER, "n": int}
_SUMMARY = {
    "accuracy": {"*": _ACCURACY},
    "accuracy_by_network?": {"*": {"*": _ACCURACY}},
    "options?": {
        "dataset?": str, "subset?": str | None, "res?": int | None, "model?": str, "ipc?": int, "seed?": int,
    },
    "experts?": {"hyperparameters?": dict, "digest?": str},
    "text?": str, "method?": str, "protocol?": {"text?": str}, "gradient?": {"kind?": str, "cosines_to_exact?": [NUMBER]},
    "iterations?": int, "skipped_iterations?": int, "iterations_repeated_in_tf32?": int,
    "iterations_above_threshold?": int, "learning_rate_kept?": int,
    "learning_rate?": NUMBER, "learning_rate_per_step?": [NUMBER], "seconds?": {"*": NUMBER},
    "data?": {"fingerprint?": str}, "network?": {"outputs?": [NUMBER]}, "peak_memory_bytes?": NUMBER, "versions?": {"*": str}, "device?": str, "arithmetic?": str, "command?": str,
}  # fmt: skip
"""The form of a summary on which its readers rely."""
_A_SUMMARY = "the summary of a run with its accuracy"
_SUMMARISE_AGAIN = "delete it, and the command of the run writes it again"


def broken_summary(folder: Path, error: Exception) -> InputError:
    """Return the error for a summary in `folder` of another form."""
    return InputError(
        f"{folder / SUMMARY}: expected {_A_SUMMARY}, found {type(error).__name__}: {error}; {_SUMMARISE_AGAIN}"
    )
