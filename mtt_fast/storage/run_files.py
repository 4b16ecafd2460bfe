"""Name the files in the folder of a run, and what a path names."""

import os

CONFIG, CHECKPOINT, METRICS, SUMMARY = "config.toml", "checkpoint.safetensors", "metrics.jsonl", "summary.json"
SECONDS = "seconds.json"
"""Where the time of the run went, over all processes that worked on it."""
SYNTHETIC, BEST = "synthetic.safetensors", "best.safetensors"
"""The current distilled set, and the one with the highest accuracy on the test images so far."""
EMA, BEST_EMA = "ema.safetensors", "best_ema.safetensors"
"""The same two for the average of the images over the iterations."""
HISTORY = "history"
"""Folder of snapshots, iteration_000100.png: the first image of each class at each evaluation."""
EVALUATIONS = "evaluations"
"""The field of every method's checkpoint that holds the records of evaluations."""


def last_name(path: str | os.PathLike[str]) -> str:
    """Return the last name of a path, for one that ends in . or .. that of the folder, without following links."""
    return os.path.basename(os.path.abspath(path))
