"""Read the difficulty of the training images from a file of scores, and check on resume that it is the same (SelMatch)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mtt_fast.data import ImageData
from mtt_fast.distill.options import DistillOptions
from mtt_fast.errors import InputError
from mtt_fast.interop.scores import read_scores
from mtt_fast.runtime.provenance import digest
from mtt_fast.storage.checkpoint import State


def check_scores_are_there(options: DistillOptions) -> None:
    """Raise `InputError` if `score_path` names no file."""
    if options.score_path is not None and not Path(options.score_path).is_file():
        raise InputError(
            f"--score_path {options.score_path}: expected a file such as scores/forgetting_CIFAR10.npy of SelMatch's code, found "
            "none; check the path"
        )


def read_difficulty(options: DistillOptions, data: ImageData) -> Tensor:
    """Return the difficulty of each training image from the file of `score_path`, (n,) on the CPU, higher for harder images.

    Raises `InputError` for a file that is missing, broken, or made for other images, and for scores of another kind than `score`,
    which would reverse the order.
    """
    scores = read_scores(str(options.score_path), data.train.labels)
    low, high = (float(bound) + 0.0 for bound in scores.aminmax())  # −0 becomes 0
    if options.score == "cscore" and (low < 0 or high > 1):
        raise InputError(
            f"--score cscore, --score_path {options.score_path}: expected C-scores, from 0 (hard) to 1, found {low:g} to {high:g}; give "
            "--score forgetting for numbers of forgetting events, or other whole numbers that are higher for harder images"
        )
    if options.score == "forgetting" and (low < 0 or bool((scores % 1 != 0).any())):
        raise InputError(
            f"--score forgetting, --score_path {options.score_path}: expected whole numbers from 0 (easy) on, found fractions or "
            f"negative numbers ({low:g} to {high:g}); give --score cscore for C-scores, or give ranks for scores of another kind"
        )
    return -scores if options.score == "cscore" else scores


def check_same_scores(options: DistillOptions, difficulty: Tensor | None, state: State) -> None:
    """Raise `InputError` unless the run with `state` began with this `difficulty` of the training images."""
    # only a checkpoint of a former version has no digest
    if difficulty is not None and state.scores_digest not in ("", digest(difficulty)):
        raise InputError(
            f"--score_path {options.score_path}: expected the scores with which the run began, found others; restore the file, or "
            "choose another --out"
        )
