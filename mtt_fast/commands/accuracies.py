"""Evaluations as lines of metrics.jsonl, and as the records of accuracy in summary.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtt_fast.training.protocols import Accuracy


def measured(results: Mapping[str, Accuracy]) -> dict[str, float | int]:
    """Return what a line says of an evaluation of networks by name: the first one's accuracy, and that of each of several.

    How many networks diverged is there if any did.
    """
    first, *_ = results.values()
    label = {"best_epoch": 1} if first.best_epoch else {}
    each = {
        f"{key}/{name}": value
        for name, found in results.items()
        if len(results) > 1
        for key, value in _numbers(found).items()
    }
    return {**_numbers(first), "networks": len(first.values), **label, **each}


def _numbers(found: Accuracy) -> dict[str, float | int]:
    diverged = {"diverged": found.diverged} if found.diverged else {}
    return {"accuracy_mean": found.mean, "accuracy_std": found.std, **diverged}


def accuracy_record(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return mean, std and n of the first network in a line of metrics.jsonl.

    With it come the epoch's name if it is the best one, and how many networks diverged if any did.
    """
    label = {"epoch": "best"} if line.get("best_epoch") else {}
    diverged = {"diverged": line["diverged"]} if line.get("diverged") else {}
    return {"mean": line["accuracy_mean"], "std": line["accuracy_std"], "n": line["networks"], **label, **diverged}


def accuracy_by_network(line: dict[str, Any], first: str) -> dict[str, dict[str, Any]]:
    """Return the record of each network in a line of metrics.jsonl; `first` is the network of one that names none."""
    names = [key.partition("/")[2] for key in line if key.startswith("accuracy_mean/")]
    return {
        name: accuracy_record(
            line
            | {key: line[f"{key}/{name}"] for key in ("accuracy_mean", "accuracy_std")}
            | {"diverged": line.get(f"diverged/{name}", 0)}
        )
        for name in names
    } or {first: accuracy_record(line)}


def percent(line: Mapping[str, Any]) -> str:
    """Return the accuracy of the first network in a line as text."""
    diverged = f" ({line['diverged']} of {line['networks']} diverged)" if line.get("diverged") else ""
    return f"{100 * line['accuracy_mean']:.2f} % ± {100 * line['accuracy_std']:.2f}{diverged}"


def label_of(accuracy: Mapping[str, Any]) -> str:
    """Return what an accuracy's record says besides its numbers, as text behind them: the epoch, and what diverged."""
    words = ["best epoch"] if accuracy.get("epoch") == "best" else []
    words += [f"{accuracy['diverged']} of {accuracy.get('n', '?')} diverged"] if accuracy.get("diverged") else []
    return f" ({', '.join(words)})" if words else ""
