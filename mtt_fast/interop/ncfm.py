"""The files of NCFM: images and labels in one list, data_20000.pt in its runs, CIFAR10_ipc10.pt as its authors released them.

Images are pictures (n, C, H, W) in [0, 1], up to the last update, and each consists of `FACTOR` × `FACTOR` smaller ones, which
networks see scaled up (`mtt_fast.training.images.parts_of`). Labels are classes, and there is no learning rate.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from mtt_fast.checks import shown
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.errors import InputError
from mtt_fast.interop.pickles import load_pickle, plain_copy, save_pickle
from mtt_fast.interop.tensor_set import SourceInfo, TensorSet, tensor_set

FACTOR = 2
"""The factor of all configurations of NCFM."""

_NAME = re.compile(r"data_(init|\d+)\.pt|.*_ipc\d+\.pt")


def is_ncfm_name(name: str) -> bool:
    """Return whether NCFM's code, or its authors, call a file so."""
    return "images" not in name and _NAME.fullmatch(name) is not None


def read_ncfm(path: str | os.PathLike[str], info: SourceInfo | None, label_kind: str | None = None) -> TensorSet:
    """Read the set in a file of NCFM, with images in the input space of networks that `info` describes.

    Raises `InputError` for a missing, broken or hostile file, one of another content or of images of another shape, and without `info`.
    """
    content = load_pickle(path)
    if not isinstance(content, list) or len(content) != 2:
        raise InputError(f"{path}: expected a list of images and labels, as NCFM saves it, found {shown(content)}")
    if info is None:
        raise InputError(
            f"{path}: expected the properties of the real images, with which its pictures are normalised; name them with `dataset`"
        )
    images, labels = content
    distilled = tensor_set(images, labels, None, str(path), label_kind)
    shape = tuple(distilled.images.shape[1:])
    if shape[0] != len(info.mean) or (info.image_shape and shape != info.image_shape):
        raise InputError(
            f"{path}: expected images {info.image_shape or f'of {len(info.mean)} channels'} of {info.dataset}, found {shape}; name the data set that it was distilled "
            "from with `dataset`, `res`"
        )
    return dataclasses.replace(distilled, images=info.transform.apply(distilled.images))


def write_ncfm(path: str | os.PathLike[str], distilled: SyntheticDataset) -> list[Path]:
    """Write a set as pictures and labels in one list, and return the file. Raises `InputError` for soft labels."""
    if distilled.label_kind != "indices":
        raise InputError(
            f"{path}: expected class indices, which are all that NCFM's code takes, found {distilled.label_kind}; give `hard_labels` to "
            "write only each image's class"
        )
    pictures = distilled.transform.invert(distilled.images)
    return [save_pickle(path, [plain_copy(pictures), plain_copy(distilled.labels)])]
