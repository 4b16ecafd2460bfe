"""The difficulty of training images, as SelMatch's `scores/` hold it: numpy's .npy, or .npz with an array called scores."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtt_fast.errors import InputError
from mtt_fast.interop.arrays import read_array, read_arrays


def read_scores(path: str | os.PathLike[str], labels: Tensor) -> Tensor:
    """Return the score of each training image, (n,) float64, out of the file at `path`, for images with `labels` (n,).

    Raises `InputError` for another file, scores that are not one finite number an image, and labels in the file that differ from
    `labels`: then the scores are of other images, or in another order.
    """
    scores, *labels_there = (
        [read_array(path)] if Path(path).suffix == ".npy" else read_arrays(path, ["scores"], ["labels"])
    )
    fits = scores.shape == (len(labels),)
    if not fits or not np.isfinite(scores).all():
        found = f"{(~np.isfinite(scores)).sum()} that are infinite or NaN" if fits else f"an array {scores.shape}"
        raise InputError(
            f"{path}: expected one finite score for each of the {len(labels)} training images, found {found}; give the scores of this "
            "data set"
        )
    if any(not np.array_equal(file_labels, labels.numpy()) for file_labels in labels_there):
        raise InputError(
            f"{path}: expected scores in the order of the training images, found other labels beside them; give the scores of this "
            "data set, whose images are in the order of its files"
        )
    return torch.from_numpy(scores.astype(np.float64))
