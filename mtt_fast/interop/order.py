"""The order of training images by difficulty, as PAD's `data_indices/*.pt` hold it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from mtt_fast.checks import shown
from mtt_fast.errors import InputError
from mtt_fast.interop.pickles import load_pickle
from mtt_fast.storage.foreign import plain_tensor


def read_order(path: str | os.PathLike[str]) -> list[Tensor]:
    """Return the indices (n_c,) int64 of each class's images, the easiest first, out of a file of torch.save.

    The file holds a tensor (classes, n/classes), or for classes of several sizes a list of tensors. Raises `InputError` for
    anything else.
    """
    value = load_pickle(path)
    rows = value if isinstance(value, list) else torch.atleast_1d(plain_tensor(value, path))
    order = [plain_tensor(row, path) for row in rows]
    if not order or any(row.dim() != 1 or row.is_floating_point() or row.dtype == torch.bool for row in order):
        raise InputError(
            f"{path}: expected a row of indices for each class, a tensor (classes, images) or a list of tensors, found "
            f"{shown(value)}; name the right file"
        )
    return [row.long() for row in order]


def check_order(order: Sequence[Tensor], labels: Tensor, where: object) -> None:
    """Raise `InputError` unless `order`, from the file `where`, has each training image once, in the row of its class.

    `labels` (n,) are the classes of the training images.
    """
    every = torch.cat(list(order))
    if not torch.equal(every.sort().values, torch.arange(len(labels))):
        different = len(every[(every >= 0) & (every < len(labels))].unique())
        raise InputError(
            f"{where}: expected each of the {len(labels)} training images once, found {len(every)} indices, of {different} of them; "
            "give the order of this data set"
        )
    classes = torch.arange(len(order)).repeat_interleave(torch.tensor([len(row) for row in order]))
    wrong = int((labels.cpu()[every] != classes).sum())
    if wrong:
        raise InputError(
            f"{where}: expected the images of class c in row c, found {wrong} of {len(every)} in the row of another class; give the "
            "order of this data set, whose images are in the order of its files"
        )
