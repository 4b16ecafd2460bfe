"""Evaluations as lines of metrics.jsonl, and as the records of accuracy in summary.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtt_fast.training.evaluation import Accuracy


def accuracy_fields(results: Mapping[str, Accuracy]) -> dict[str, float | int]:
    """Return the fields of an evaluation's line in metrics.jsonl, from the accuracies of networks by name.

    They are the accuracy of the first network, that of each where there are several, and the number of networks that
    diverged, if any did.
    """
    first, *_ = results.values()
    label = {"best_epoch": 1} if first.best_epoch else {}
    each = {
        f"{key}/{name}": value
        for name, accuracy in results.items()
        if len(results) > 1
        for key, value in _numbers(accuracy).items()
    }
    return {**_numbers(first), "networks": len(first.values), **label, **each}


def _numbers(accuracy: Accuracy) -> dict[str, float | int]:
    diverged = {"diverged": accuracy.diverged} if accuracy.diverged else {}
    return {"accuracy_mean": accuracy.mean, "accuracy_std": accuracy.std, **diverged}


def accuracy_record(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return mean, std and n of the first network in a line of metrics.jsonl.

    The record also says "epoch": "best" if the accuracy is that of the best epoch, and how many networks diverged if any did.
    """
    label = {"epoch": "best"} if line.get("best_epoch") else {}
    diverged = {"diverged": line["diverged"]} if line.get("diverged") else {}
    return {"mean": line["accuracy_mean"], "std": line["accuracy_std"], "n": line["networks"], **label, **diverged}


def accuracy_by_network(line: dict[str, Any], first: str) -> dict[str, dict[str, Any]]:
    """Return the record of each network in a line of metrics.jsonl; a line without names is of the network `first`."""
    names = [key.partition("/")[2] for key in line if key.startswith("accuracy_mean/")]
    return {
        name: accuracy_record(
            line
            | {key: line[f"{key}/{name}"] for key in ("accuracy_mean", "accuracy_std")}
            | {"diverged": line.get(f"diverged/{name}", 0)}
        )
        for name in names
    } or {first: accuracy_record(line)}


def format_accuracy(line: Mapping[str, Any]) -> str:
    """Return the accuracy of the first network in a line as text."""
    diverged = f" ({line['diverged']} of {line['networks']} diverged)" if line.get("diverged") else ""
    return f"{100 * line['accuracy_mean']:.2f} % ± {100 * line['accuracy_std']:.2f}{diverged}"


def remarks_on(accuracy: Mapping[str, Any]) -> str:
    """Return the remarks on an accuracy's record, as " (best epoch, 1 of 5 diverged)"; "" if there are none."""
    words = ["best epoch"] if accuracy.get("epoch") == "best" else []
    words += [f"{accuracy['diverged']} of {accuracy.get('n', '?')} diverged"] if accuracy.get("diverged") else []
    return f" ({', '.join(words)})" if words else ""
