"""Distilled sets by the kind of their files: recognised by name, read, and written."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from mtt_fast.data.listing import is_image_name
from mtt_fast.data.set_checks import check_set
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.errors import InputError, did_you_mean
from mtt_fast.interop.benchmark import is_benchmark, read_benchmark, read_result, write_benchmark, write_result
from mtt_fast.interop.image_folder import LABELS, read_image_folder, write_image_folder
from mtt_fast.interop.ncfm import is_ncfm_name, read_ncfm, write_ncfm
from mtt_fast.interop.pairs import read_pair, write_ddranking, write_pair
from mtt_fast.interop.parquet import read_parquet, write_parquet
from mtt_fast.interop.tensor_set import SourceInfo, TensorSet, as_tensor_set, check_tensor_set, class_major
from mtt_fast.storage.foreign import names_in
from mtt_fast.storage.run_files import SYNTHETIC, last_name

SET_KINDS = {
    "synthetic": "mtt_fast's: synthetic.safetensors, with all that is needed to use it",
    "mtt": "images_*.pt, labels_*.pt and lr_*.pt of MTT and its successors",
    "dc": "res_*.pt of DC, DSA and DM",
    "ncfm": "data_*.pt of NCFM, and its released NAME_ipcN.pt",
    "dc_benchmark": "the folders METHOD/DATASET/IPCn of dc_benchmark",
    "ddranking": "images.pt, labels.pt (soft labels as logits) and lr.pt for DD-Ranking",
    "png": "an image folder CLASS/NNNNN.png with labels.json",
    "parquet": "a parquet file as the library datasets writes it",
}
"""Kinds of files, and their descriptions."""

log = logging.getLogger(__name__)


def set_kind_of(source: str | os.PathLike[str]) -> str | None:
    """Return the kind of set that the names of `source`, a file or a folder, suggest, or None: the first of `set_kinds_of`."""
    return next(iter(set_kinds_of(source)), None)


def set_kinds_of(source: str | os.PathLike[str]) -> list[str]:
    """Return the kinds of sets that the names of `source`, a file or a folder, suggest, in the order of preference.

    Raises `InputError` for a folder that cannot be listed.
    """
    source = Path(source)
    if not os.path.isdir(source):
        return [kind] if (kind := _kind_of_file(source)) else []
    names = names_in(source)
    kind_of = {name: kind for name in names if (kind := _kind_of_file(source / name)) and os.path.isfile(source / name)}
    for_ddranking = {"images.pt", "labels.pt"} <= set(names)
    there = {
        "synthetic": SYNTHETIC in names,
        "ddranking": for_ddranking,
        "mtt": any(kind == "mtt" and not (for_ddranking and name == "images.pt") for name, kind in kind_of.items()),
        "png": LABELS in names,
    }
    kinds = [kind for kind, is_there in there.items() if is_there]
    if is_benchmark(source):
        if source.name.startswith("IPC"):  # other kinds' files in such a folder are the benchmark's own
            return kinds or ["dc_benchmark"]
        kinds.append("dc_benchmark")
    kinds += sorted({"dc", "ncfm", "parquet"} & set(kind_of.values()))
    folders = [source / name for name in names if os.path.isdir(source / name)]
    if kinds:  # a run's folder has pictures of its course
        beside = not {"synthetic", "png"} & set(kinds) and any(map(_has_pictures, folders))
        return [*kinds, "png"] if beside else kinds
    return ["png"] if any(map(_holds_pictures, folders)) else []


def _has_pictures(folder: Path) -> bool:
    """Return whether there is an image file in `folder` itself, if it can be listed."""
    return any(is_image_name(name) for _, _, files in islice(os.walk(folder), 1) for name in files)


def _holds_pictures(folder: Path) -> bool:
    """Return whether there is an image file in `folder` or below."""
    return any(is_image_name(name) for _, _, files in os.walk(folder) for name in files)


def _kind_of_file(path: Path) -> str | None:
    name = path.name
    if name.endswith(".pt") and "images" in name:
        return "mtt"
    if name.endswith(".pt") and name.startswith("res_"):
        return "dc"
    if is_ncfm_name(name):
        return "ncfm"
    return {".safetensors": "synthetic", ".parquet": "parquet"}.get(path.suffix)


def read_set(
    source: str | os.PathLike[str],
    kind: str | None = None,
    *,
    label_kind: str | None = None,
    info: SourceInfo | None = None,
    lr: float = 0.01,
) -> SyntheticDataset | TensorSet:
    """Read a distilled set of `kind`, or of the kind that the names of its files look like.

    Kinds that contain only tensors give a `TensorSet`; the kind of their soft labels, and of those in another program's
    parquet file, is `label_kind`, or guessed from the values. `info` and `lr`: see `read_image_folder`, `read_parquet` and `read_ncfm`.
    If a folder holds sets of several kinds, the first of `set_kinds_of` is read, and a warning names the others.
    Raises `InputError` for another kind, and for files that are missing, broken or hostile.
    """
    source = Path(source)
    if kind is None:
        kinds = set_kinds_of(source)
        kind = next(iter(kinds), None)
        warn_of_unread(source, kinds[1:], "give `kind` to read them")
    match kind:
        case "synthetic":
            return SyntheticDataset.load(source / SYNTHETIC if os.path.isdir(source) else source)
        case "mtt":
            return read_pair(source, label_kind)
        case "ddranking":
            distilled = read_pair(source / "images.pt" if os.path.isdir(source) else source, label_kind)
            soft = label_kind is None and distilled.label_kind != "indices"
            return dataclasses.replace(distilled, label_kind="logits") if soft else distilled
        case "dc":
            return read_result(_only(source, "res_*.pt"), label_kind)
        case "ncfm":
            return read_ncfm(_only(source, "*.pt"), info, label_kind)
        case "dc_benchmark":
            return read_benchmark(source)
        case "png":
            return read_image_folder(source, info, lr)
        case "parquet":
            return read_parquet(_only(source, "*.parquet"), info, lr, label_kind)
    raise InputError(_unknown(source, kind))


def warn_of_unread(source: str | os.PathLike[str], others: Iterable[str], fix: str) -> None:
    """Warn that `source` holds sets of the kinds `others` too, which are not read; `fix` says how to read them."""
    for kind in others:
        log.warning("%s: other sets (%s: %s) are not read; %s", os.fspath(source), kind, SET_KINDS[kind], fix)


def write_set(
    destination: str | os.PathLike[str],
    distilled: SyntheticDataset | TensorSet,
    kind: str,
    *,
    dataset: str | None = None,
    method: str = "TM",
) -> list[Path]:
    """Write a distilled set as files of `kind`, and return them.

    `destination` is a folder, or the name of the file where the kind has one (images_*.pt for "mtt"). `dataset` and
    `method` name files and folders of "dc" and "dc_benchmark"; without `dataset` the set's recipe names it. Other
    software's kinds hold one learning rate: of those learned for each step, the mean.
    Raises `InputError` for another kind, and for a set that the kind cannot hold.
    """
    path = Path(destination)
    if isinstance(distilled, TensorSet):
        check_tensor_set(distilled, f"{path}: not written")
    else:
        check_set(distilled, f"{path}: not written")
    plain = class_major(as_tensor_set(distilled))
    match kind:
        case "mtt":
            return write_pair(path if path.suffix == ".pt" else path / "images_best.pt", plain)
        case "ddranking":
            return write_ddranking(path, plain)
        case "dc":
            if path.suffix != ".pt":
                names = method, _dataset(distilled, dataset), plain.ipc("res_*.pt")
                path = path / "res_{}_{}_ConvNet_{}ipc.pt".format(*names)
            return write_result(path, plain)
        case "dc_benchmark":
            return write_benchmark(path, plain, _dataset(distilled, dataset), method)
    if kind not in SET_KINDS:
        raise InputError(_unknown(path, kind))
    if isinstance(distilled, TensorSet):
        raise InputError(
            f"{path}: expected the properties of the real images for kind {kind}; name them with `dataset`"
        )
    match kind:
        case "png":
            return write_image_folder(path, distilled)
        case "parquet":
            return write_parquet(path if path.suffix == ".parquet" else path / "synthetic.parquet", distilled)
        case "ncfm":
            return write_ncfm(path if path.suffix == ".pt" else path / f"data_ipc{plain.ipc('NCFM')}.pt", distilled)
    file = path if path.suffix == ".safetensors" else path / SYNTHETIC
    distilled.save(file)
    return [file]


def content_of(source: str | os.PathLike[str]) -> str:
    """Return in words what is at `source`, where its names suggest no kind of set."""
    if not os.path.lexists(source):
        return "nothing there"
    if os.path.isdir(source) and {"dataset_info.json", "dataset_dict.json"} & set(names_in(source)):
        return "a folder as save_to_disk of the library datasets writes it (its to_parquet writes a kind that is known)"
    return "other files"


def _only(source: Path, pattern: str) -> Path:
    if not os.path.isdir(source):
        return source
    files = [source / name for name in names_in(source) if fnmatchcase(name, pattern)]
    if len(files) != 1:
        raise InputError(f"{source}: expected one {pattern}, found {len(files)}; name the file")
    return files[0]


def _dataset(distilled: SyntheticDataset | TensorSet, dataset: str | None) -> str:
    """Return the name of the data set for names of files: of an image folder, which is given as a path, the last part."""
    path = dataset or (None if isinstance(distilled, TensorSet) else distilled.recipe.get("dataset"))
    name = last_name(path) if path else ""
    if not name:
        raise InputError(
            "`dataset`: expected the data set's name, which is part of the other software's file names, found none"
        )
    return name


def _unknown(where: Path, kind: str | None) -> str:
    kinds = ", ".join(SET_KINDS)
    if kind is None:
        return f"{where}: expected a distilled set ({kinds}), found {content_of(where)}; check the path, or give its `kind`"
    return f"`kind` {kind}: expected one of {kinds}{did_you_mean(kind, list(SET_KINDS))}"
