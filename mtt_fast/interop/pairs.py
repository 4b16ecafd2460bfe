"""images_*.pt with labels_*.pt, and lr_*.pt, beside it: the files of MTT and its successors, and of DD-Ranking.

| written by | names |
|---|---|
| MTT, TESLA, SelMatch | images_100.pt, images_best.pt; no learning rate |
| FTD, ATT | ema_images_100.pt besides |
| DATM, PAD, EDF | lr_100.pt, lr_best.pt besides; labels are logits |
| MCT | images_ipc-10_100.pt |
| SeqMatch | best_lr.pt |
| dc_benchmark | images_best_0.pt … images_best_4.pt, one set in parts; CIFAR10_IPC10_normalize_images.pt |
| DD-Ranking's users | images.pt, labels.pt, lr.pt; soft labels are logits |

Images are (n, C, H, W) in the networks' input space. images_zca_100.pt is no set: its whitening is undone, for looking at.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtt_fast.checks import shown
from mtt_fast.errors import InputError
from mtt_fast.interop.pickles import load_pickle, load_tensor, plain_copy, save_pickle
from mtt_fast.interop.tensor_set import TensorSet, label_warnings, tensor_set
from mtt_fast.storage.atomic import atomic_folder
from mtt_fast.storage.foreign import names_in, plain_tensor

_PART = re.compile(r"(.*best)_(0|[1-9]\d{0,4})\.pt")


def read_pair(source: str | os.PathLike[str], label_kind: str | None = None) -> TensorSet:
    """Read a file of images and the labels beside it, or the set in a folder: the best, else the only one.

    A set in parts (images_best_0.pt, …) is put together, whichever part is named. Raises `InputError` for files that
    are missing, broken, hostile or do not fit together.
    """
    path = find_images(Path(source))
    files = _parts(path)
    images = _joined([load_tensor(file) for file in files], path)
    for file in files:
        if not os.path.lexists(sibling(file, "labels")):
            raise InputError(
                f"{sibling(file, 'labels')}: cannot be read (no such file); expected the labels of {file.name} in it"
            )
    labels = _joined([load_tensor(sibling(file, "labels")) for file in files], sibling(path, "labels"))
    lr = next((_load_lr(file) for file in _lr_files(path) if os.path.lexists(file)), None)
    return tensor_set(images, labels, lr, str(path), label_kind)


def _joined(parts: list[Tensor], path: Path) -> Tensor:
    """Return the parts of a tensor as one. Raises `InputError`, which names `path`, for parts that do not fit together."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    for place, part in enumerate(parts):
        if not part.dim() or part.dtype != first.dtype or part.shape[1:] != first.shape[1:]:
            raise InputError(
                f"{path}: part {place}: expected a tensor like {shown(first)}, found {shown(part)}; get it again"
            )
    return torch.cat(parts)


def write_pair(images_path: str | os.PathLike[str], distilled: TensorSet) -> list[Path]:
    """Write images, labels and learning rate (if there is one) as tensors, and return the files.

    The images go to `images_path`, whose name has the word images; "labels" and "lr" stand in its place in the others.
    Raises `InputError` where a learning rate exists already that would be taken for the set's.
    """
    path = Path(images_path)
    if "images" not in path.name or "images_zca" in path.name or _PART.fullmatch(path.name):
        raise InputError(
            f"{path}: expected a file name that contains images, such as images_best.pt, but neither images_zca nor the number of a part; "
            "choose another name"
        )
    parts = {"images": distilled.images, "labels": distilled.labels}
    if distilled.lr is not None:
        parts["lr"] = distilled.lr
    for file in _lr_files(path):
        if file.exists() and (distilled.lr is None or file != sibling(path, "lr")):
            raise InputError(f"{file}: exists already, and would be taken for this set's learning rate; move it away")
    with atomic_folder(path.parent, last=path.name) as folder:
        for name, tensor in parts.items():
            save_pickle(sibling(folder / path.name, name), plain_copy(tensor))
    return [sibling(path, name) for name in parts]


def write_parts(folder: str | os.PathLike[str], distilled: TensorSet, parts: int) -> list[Path]:
    """Write images_best_0.pt, labels_best_0.pt, … in `parts` parts of consecutive images, and return the files."""
    names = []
    with atomic_folder(folder, last="images") as content:
        for kind, tensor in (("images", distilled.images), ("labels", distilled.labels)):
            for part, piece in enumerate(tensor.tensor_split(parts)):
                names.append(f"{kind}_best_{part}.pt")
                save_pickle(content / names[-1], plain_copy(piece))
    return [Path(folder) / name for name in names]


def write_ddranking(folder: str | os.PathLike[str], distilled: TensorSet) -> list[Path]:
    """Write the files that DD-Ranking's metrics take: images.pt, labels.pt, and lr.pt if there is a learning rate.

    Images must be class-major with as many of each class, as it gives hard labels by place. It takes soft labels for
    logits and applies softmax: probabilities would be smoothed a second time, so their logarithms are written, whose
    softmax they are (zero becomes the smallest normal number). `ddranking_call` says what to call.
    Raises `InputError` if the classes differ in number, and for labels that are weights, which a softmax cannot give.
    """
    distilled.ipc("DD-Ranking")
    if distilled.label_kind == "weights":
        raise InputError(
            f"{folder}: expected classes, probabilities or logits, as DD-Ranking takes the softmax of soft labels, found weights; "
            "`hard_labels` writes the set with classes"
        )
    labels = distilled.labels
    if distilled.label_kind == "probabilities":
        labels = labels.clamp_min(torch.finfo(labels.dtype).tiny).log()
    return write_pair(Path(folder) / "images.pt", dataclasses.replace(distilled, labels=labels))


def whitening_warnings(source: str | os.PathLike[str], distilled: TensorSet, *, zca: bool) -> Iterator[str]:
    """Yield reasons to doubt that the images in the files at `source` are whitened (`zca`), or else normalised.

    Such files do not say which they are; the values, the labels, and the files beside them may show it.
    """
    path = Path(source)
    folder = path if os.path.isdir(path) else path.parent
    whitened_files = sorted(folder.glob("*images_zca*.pt"))
    if whitened_files and not zca:
        yield (
            f"{whitened_files[0]}: this file is written where a set was distilled from whitened images; should they be "
            "taken with --zca?"
        )
    least, most = float(distilled.images.min()), float(distilled.images.max())
    if least >= 0:
        yield (
            f"{source}: images from {least:.3g} to {most:.3g} look like pictures; those that networks see are "
            f"{'whitened' if zca else 'normalised'} and have negative values"
        )
    yield from label_warnings(source, distilled)


def find_images(source: Path) -> Path:
    """Return the file of images that `source`, a file or a folder, stands for. Raises `InputError` if that is not clear."""
    if not os.path.isdir(source):
        if "images" not in source.name:
            raise InputError(f"{source}: expected a name like images_best.pt, beside its labels_best.pt")
        if "images_zca" in source.name:
            raise InputError(
                f"{source}: these images are for looking at, with their whitening undone; name "
                f"{source.name.replace('images_zca', 'images')} instead"
            )
        return source
    names = [
        source / name for name in names_in(source) if fnmatchcase(name, "*images*.pt") and "images_zca" not in name
    ]
    whole = list(dict.fromkeys(_whole(path) for path in names))
    best = [path for path in whole if path.stem.endswith("best") and not path.name.startswith("ema_")]
    for choice in (best, whole):
        if len(choice) == 1:
            return choice[0]
    raise InputError(
        f"{source}: expected one set (images_best.pt, or a single images_*.pt), found "
        f"{', '.join(path.name for path in whole[:4]) or 'none'}; name its file"
    )


def sibling(images_path: Path, name: str) -> Path:
    """Return the file called as `images_path`, with `name` for images."""
    return images_path.with_name(images_path.name.replace("images", name))


def _whole(path: Path) -> Path:
    """Return the name of the set that a part belongs to: images_best.pt for images_best_3.pt."""
    match = _PART.fullmatch(path.name)
    return path.with_name(f"{match[1]}.pt") if match else path


def _parts(path: Path) -> list[Path]:
    """Return the files that hold the set `path`: itself, or all its parts in order."""
    whole = _whole(path)
    if os.path.lexists(whole):
        return [path]
    siblings = names_in(whole.parent) if os.path.isdir(whole.parent) else []
    matches = [match for name in siblings if (match := _PART.fullmatch(name)) and f"{match[1]}.pt" == whole.name]
    numbered = {match[2]: whole.with_name(match[0]) for match in matches}
    for number in map(str, range(len(numbered))):
        if number not in numbered:
            raise InputError(
                f"{whole.with_name(f'{whole.stem}_{number}.pt')}: expected this part of the set, found {len(numbered)} others; "
                "get it, too"
            )
    return [numbered[number] for number in sorted(numbered, key=int)] or [path]


def _lr_files(path: Path) -> list[Path]:
    """Return the files that may hold the learning rate of a set, likeliest first."""
    whole = _whole(path)
    tag = whole.stem.rpartition("images_")[2]
    return [sibling(whole, "lr"), whole.with_name(f"{tag}_lr.pt"), whole.with_name(f"lr_{tag}.pt")]


def _load_lr(file: Path) -> Tensor:
    value = load_pickle(file, numpy_numbers=True)
    if isinstance(value, float | np.floating):
        return torch.tensor(float(value), dtype=torch.float32, device="cpu")
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise InputError(f"{file}: expected one learning rate, found {shown(value)}; move the file away to go without")
    return plain_tensor(value, file)
