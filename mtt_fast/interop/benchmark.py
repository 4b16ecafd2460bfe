"""Files of DC, DSA and DM (res_*.pt), and the folders of dc_benchmark, which hold the sets of several methods.

A res file is a dictionary: `data`, a list with [images, labels] of each experiment, and `accs_all_exps`, accuracies by
network. dc_benchmark's folders are METHOD/DATASET/IPCn:

| METHOD | files |
|---|---|
| TM | images_best.pt, labels_best.pt; of tinyimagenet at 50 images per class images_best_0.pt … images_best_4.pt |
| DC, DSA, DM | res_METHOD_DATASET_ConvNet_nipc.pt (ConvNetD4 for tinyimagenet) |
| random, Kmeans | DATASET_IPCn_normalize_images.pt, DATASET_IPCn_images.pt, and labels |
| KIP | one .npz with images (n, H, W, C) and labels (n, classes) |

Its readers make labels whole numbers, which would destroy soft ones.
"""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtt_fast.checks import shown
from mtt_fast.errors import InputError
from mtt_fast.interop.arrays import read_arrays
from mtt_fast.interop.pairs import read_pair, write_pair, write_parts
from mtt_fast.interop.pickles import load_pickle, plain_copy, save_pickle
from mtt_fast.interop.tensor_set import TensorSet, tensor_set
from mtt_fast.storage.foreign import names_in
from mtt_fast.storage.temporaries import is_free

METHODS = ("TM", "DC", "DSA", "DM", "random", "Kmeans", "KIP")
_RESULTS = ("DC", "DSA", "DM")
_CHOSEN = {"random": "{}_IPC{}_normalize_images.pt", "Kmeans": "{}_IPC{}_images.pt"}
_NAMES = {"Tiny": "tinyimagenet"}
_PARTS = {("tinyimagenet", 50): 5}  # GitHub takes no larger files


def read_result(path: str | os.PathLike[str], label_kind: str | None = None) -> TensorSet:
    """Read the set of the last experiment in a res_*.pt, as dc_benchmark does. Soft labels are of `label_kind`, or it is guessed.

    Raises `InputError` for a missing, broken or hostile file, or one of another content.
    """
    content = load_pickle(path, numpy_numbers=True)
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, list) or not data or not _is_pair(data[-1]):
        raise InputError(
            f"{path}: expected a dictionary with data, a list of [images, labels], found {shown(content)}; name a "
            "res_*.pt of DC, DSA or DM"
        )
    images, labels = data[-1][:2]
    return tensor_set(images, labels, None, str(path), label_kind)


def write_result(path: str | os.PathLike[str], distilled: TensorSet) -> list[Path]:
    """Write the set as the one experiment of a res file (no accuracies), and return the file."""
    pair = [plain_copy(distilled.images), plain_copy(distilled.labels)]
    return [save_pickle(path, {"data": [pair], "accs_all_exps": {}})]


def read_benchmark(folder: str | os.PathLike[str]) -> TensorSet:
    """Read the set in a folder METHOD/DATASET/IPCn, or the only one below `folder`.

    Raises `InputError` if there is none or more than one, and for broken files.
    """
    folder = _only_set(Path(folder))
    for pattern, read in (("res_*.pt", read_result), ("*.npz", _read_kip)):
        files = [folder / name for name in names_in(folder) if fnmatchcase(name, pattern)]
        if len(files) > 1:
            raise InputError(f"{folder}: expected one {pattern}, found {len(files)}; name the file")
        if files:
            return read(files[0])
    return read_pair(folder)


def write_benchmark(root: str | os.PathLike[str], distilled: TensorSet, dataset: str, method: str) -> list[Path]:
    """Write the set below `root`, where dc_benchmark looks for sets of `method` (all but KIP).

    Raises `InputError` for soft labels, another method, classes that differ in number, and where a set is already.
    """
    if distilled.label_kind != "indices":
        raise InputError(
            f"{root}: expected class indices, as dc_benchmark makes all labels whole numbers, found {distilled.label_kind}; "
            "give `hard_labels` to write only each image's class"
        )
    known = ("TM", *_RESULTS, *_CHOSEN)
    if method not in known:
        raise InputError(f"`method` {method}: expected {', '.join(known)}")
    name, ipc = _NAMES.get(dataset, dataset), distilled.ipc("dc_benchmark")
    folder = Path(root) / method / name / f"IPC{ipc}"
    if not is_free(folder):
        raise InputError(f"{folder}: holds a set already; choose another root or `method`, or delete it")
    if method in _RESULTS:
        network = "ConvNetD4" if name == "tinyimagenet" else "ConvNet"
        return write_result(folder / f"res_{method}_{name}_{network}_{ipc}ipc.pt", distilled)
    if method in _CHOSEN:
        return write_pair(folder / _CHOSEN[method].format(name, ipc), distilled)
    if (name, ipc) in _PARTS:
        return write_parts(folder, distilled, _PARTS[name, ipc])
    return write_pair(folder / "images_best.pt", distilled)


def is_benchmark(folder: Path) -> bool:
    """Return whether `folder` is, or holds, folders METHOD/DATASET/IPCn."""
    return bool(_sets(folder))


def _sets(folder: Path) -> list[Path]:
    patterns = [f"{method}/*/IPC*" for method in METHODS] + ["*/IPC*", "IPC*"]
    below = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if os.path.isdir(path)]
    return [folder] if folder.name.startswith("IPC") else below


def _only_set(folder: Path) -> Path:
    sets = _sets(folder) if names_in(folder) else []
    if len(sets) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in sets[:4]) or "none"
        raise InputError(f"{folder}: expected one set in METHOD/DATASET/IPCn, found {names}; name its folder")
    return sets[0]


def _read_kip(path: Path) -> TensorSet:
    """Read KIP's images, whitened in KIP's own way, and the classes of its labels, as dc_benchmark does."""
    images, labels = (torch.from_numpy(array) for array in read_arrays(path, ("images", "labels")))
    if images.dim() != 4 or labels.dim() != 2 or not labels.numel() or not labels.isfinite().all():
        raise InputError(
            f"{path}: expected images (n, H, W, C) and finite labels (n, classes), found {tuple(images.shape)} and "
            f"{tuple(labels.shape)}; get it again"
        )
    return tensor_set(images.permute(0, 3, 1, 2).contiguous(), labels.argmax(1), None, str(path))


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) >= 2 and all(isinstance(part, Tensor) for part in value[:2])
