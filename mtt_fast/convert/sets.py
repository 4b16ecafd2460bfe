"""Convert distilled sets from and to the files of other software."""

from __future__ import annotations

import dataclasses
import glob
import logging
import os
import shlex
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch

from mtt_fast.commands.cli import with_flags
from mtt_fast.commands.option_checks import check_effects
from mtt_fast.convert.options import PICTURES, WITH_DATA, ConvertOptions
from mtt_fast.data import NAMES, transform_for
from mtt_fast.data.catalogue import dataset_info
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.errors import InputError
from mtt_fast.interop import (
    SET_KINDS,
    SourceInfo,
    TensorSet,
    as_synthetic,
    as_tensor_set,
    class_major,
    ddranking_call,
    read_set,
    source_info,
    write_set,
)
from mtt_fast.interop.ddranking import VERSION
from mtt_fast.interop.ncfm import FACTOR
from mtt_fast.interop.pairs import sibling, whitening_warnings
from mtt_fast.interop.tensor_set import count_in_class_order, hardened, largest_label_counts
from mtt_fast.runtime.provenance import versions
from mtt_fast.storage.identity import UNKNOWN, WHITENED, check_same_data
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.temporaries import is_free

log = logging.getLogger(__name__)

_LOSSY = "Pictures are cut to [0, 1] and rounded to 8 bits: train on tensors where you can"


def convert_set(options: ConvertOptions, kind: str, given: Container[str] = ()) -> None:
    """Read a distilled set of `kind` from `options.source`, write it to `options.destination`, and say how to use it.

    `given` are the options of the command line, which are refused where they have no effect.
    Raises `InputError` for files that hold no set, for a destination that exists, for a set that the destination's kind cannot
    hold, and for one that needs the data set's name.
    """
    destination = Path(options.destination)
    to = options.to or _kind_for(destination, native=kind == "synthetic")
    if to not in SET_KINDS:
        raise InputError(f"--to {to}: {options.source} holds a distilled set, not experts")
    for remark in check_effects(options, given, options.without_effect_on_set(kind, to)):
        log.info("%s", remark)
    if destination.is_file() or (to != "dc_benchmark" and not is_free(destination)):
        raise InputError(f"{destination}: exists already; choose another destination, or delete it")
    check_output_folder(destination if destination.is_dir() else destination.parent, "choose another destination")
    info = _source_info(options) if kind in (*PICTURES, "ncfm") and options.dataset else None
    distilled = read_set(options.source, kind, label_kind=options.label_kind, info=info, lr=options.lr_teacher)
    if isinstance(distilled, SyntheticDataset):
        _check_belongs(options, distilled)
    for remark in check_effects(options, given, _without_effect(options, distilled, kind)):
        log.info("%s", remark)
    distilled = _in_order(options, distilled)
    if isinstance(distilled, TensorSet):
        for line in whitening_warnings(options.source, distilled, zca=options.zca):
            log.warning("%s", line)
    factor = _factor(options, distilled, kind)
    if isinstance(distilled, TensorSet) and to in WITH_DATA:
        distilled = _with_source_info(options, distilled, factor)
    elif isinstance(distilled, SyntheticDataset) and _lacks_recipe(options, distilled, kind):
        recipe = _recipe(options, as_tensor_set(distilled), factor)
        distilled = dataclasses.replace(distilled, recipe=recipe, versions=distilled.versions or versions())
    written = write_set(
        destination, distilled, to, dataset=options.dataset, method=options.method or _method(distilled)
    )
    log.info("wrote %s (%s)", ", ".join(str(path) for path in written if path.suffix != ".png"), SET_KINDS[to])
    log.info("%s", _usage(options, to, written, distilled, factor))
    whitened = bool(_is_whitened(options, distilled))
    for line in _left_out(to, distilled, written, whitened=whitened, factor=factor):
        log.warning("%s", line)
    if isinstance(distilled, SyntheticDataset) and distilled.canvas and to != "synthetic":
        log.info(
            "The images are canvases of %d by %d images: train on random crops of the size of an image (evaluate: --texture)",
            distilled.canvas.size, distilled.canvas.size,
        )  # fmt: skip


def _factor(options: ConvertOptions, distilled: SyntheticDataset | TensorSet, kind: str) -> int:
    """Return the number of smaller images along a side of each image of a set that was read from files of `kind`."""
    if isinstance(distilled, TensorSet) or _lacks_recipe(options, distilled, kind):
        return options.factor or (FACTOR if kind == "ncfm" else 1)
    factor = distilled.recipe.get("factor", 1)
    return factor if isinstance(factor, int) else 1


def _is_whitened(options: ConvertOptions, distilled: SyntheticDataset | TensorSet) -> bool | None:
    """Return whether the images are ZCA-whitened, or None where neither the set nor an option says so."""
    if isinstance(distilled, SyntheticDataset):
        return distilled.whitening is not None
    return options.zca or None


def _left_out(
    to: str, distilled: SyntheticDataset | TensorSet, written: list[Path], *, whitened: bool, factor: int
) -> Iterator[str]:
    """Yield what the `written` files of the kind `to` do not hold, such as learning rates, whitening and `factor`."""
    own = distilled if isinstance(distilled, SyntheticDataset) else None
    if own and own.parameters and to != "synthetic":
        yield (
            f"files of this kind hold the images alone, not the {sum(each.numel() for each in own.parameters.values()):,} learned "
            "parameters that they were computed from"
        )
    if own and own.real is not None and to not in ("synthetic", *PICTURES):
        yield (
            f"files of this kind do not say that {int(own.real.sum())} of the {len(own.real)} images are real, the last "
            f"ones of each class (evaluate, convert: --distilled_share {own.recipe['distilled_share']:g})"
        )
    if own and to == "png" and (absent := len(own.class_names) - len(own.classes.unique())):
        yield (
            f"{absent} of the {len(own.class_names)} classes have no images, and so no folder: readers that number the folders, as "
            "ImageFolder does, give other classes than the set's"
        )
    if to == "dc_benchmark" and whitened:
        yield (
            "files of this kind do not hold the whitening of the images, and dc_benchmark does not whiten its test images: the "
            "accuracy that it gives is not that of the set"
        )
    if factor > 1 and to not in WITH_DATA:
        yield (
            f"files of this kind do not say that each image consists of {factor} × {factor} smaller ones (evaluate, convert: --factor {factor})"
        )
    if factor != FACTOR and to == "ncfm":
        yield (
            f"files of this kind do not say their --factor: it is {factor} here, and taken for {FACTOR} if not given (evaluate, convert: "
            f"--factor {factor})"
        )
    if to == "ncfm" and whitened:
        yield "files of this kind do not say that the images were whitened (evaluate, convert: --zca)"
    lrs = own.lr_per_step if own else None
    images, *others = written
    if to in ("dc", "dc_benchmark", "ncfm") and distilled.lr is not None and sibling(images, "lr") not in others:
        yield (
            f"files of this kind hold no learning rate: train on these images at the set's own, {float(distilled.lr):.4g} "
            "(evaluate, convert: --lr_teacher)"
        )
    elif to not in WITH_DATA and lrs is not None:
        yield (
            f"files of this kind hold one learning rate: of the {len(lrs)} learned for each step, {float(lrs.min()):.4g} to "
            f"{float(lrs.max()):.4g}, the mean was written"
        )


def _check_belongs(options: ConvertOptions, distilled: SyntheticDataset) -> None:
    """Raise `InputError` where the options name other images than those that the set says it was made from.

    The set names its images, so the options need not; a name that is no data set's is meant for the written files.
    """
    expected = UNKNOWN
    known = {name.casefold() for name in NAMES if name != "folder"}
    if options.dataset is not None and options.dataset.casefold() in known:
        expected = dataset_info(options.dataset, options.subset, options.res, options.data_path).identity(
            zca=options.zca
        )
    expected = dataclasses.replace(expected, whitening=WHITENED if options.zca else "")
    check_same_data(
        distilled.identity,
        expected,
        options.source,
        fix="leave out the options that differ: the set's file names its images",
    )


def _lacks_recipe(options: ConvertOptions, distilled: SyntheticDataset, kind: str) -> bool:
    """Return whether a set was read from pictures without a recipe, as other software writes them, so that the options give it."""
    return kind in PICTURES and options.dataset is not None and not distilled.recipe


def _without_effect(options: ConvertOptions, distilled: SyntheticDataset | TensorSet, kind: str) -> dict[str, str]:
    """Return the options that have no effect on this set, which was read from files of `kind`, with the reasons."""
    reasons: dict[str, str] = {}
    if isinstance(distilled, SyntheticDataset) and kind in PICTURES and not _lacks_recipe(options, distilled, kind):
        reasons = dict.fromkeys(("model", "distilled_share", "factor"), "on pictures, whose record contains it")
    if distilled.label_kind == "indices":
        reasons |= dict.fromkeys(("reorder", "hard_labels"), "on labels that are classes")
    if distilled.lr is not None and distilled.lr != torch.tensor(options.lr_teacher):
        reasons["lr_teacher"] = f"on a set that has a learning rate, {float(distilled.lr):.4g}"
    return reasons


def _source_info(options: ConvertOptions) -> SourceInfo:
    data = options.common().load_data()
    return source_info(data, transform_for(data, zca=options.zca))


def _with_source_info(options: ConvertOptions, distilled: TensorSet, factor: int) -> SyntheticDataset:
    """Return a set of other software with what the options say about it and its real images; log what is kept."""
    if distilled.lr is None:
        log.info("the source has no learning rate; --lr_teacher %g is kept as such", options.lr_teacher)
    recipe = _recipe(options, distilled, factor)
    own = as_synthetic(distilled, _source_info(options), options.lr_teacher, recipe, versions(), options.source)
    if own.real is not None:
        log.info("%d of the %d images are kept as real ones", int(own.real.sum()), len(own.real))
    if factor > 1:
        log.info("each image is kept as %d × %d smaller ones (--factor)", factor, factor)
    return own


def _recipe(options: ConvertOptions, distilled: TensorSet, factor: int) -> dict[str, Any]:
    """Return the recipe, with the fields that `evaluate` needs, of a set of other software."""
    names = ("dataset", "subset", "res", "data_path", "packed_path", "zca", "model")
    recipe = {name: getattr(options, name) for name in names} | {
        "ipc": len(distilled.labels) // distilled.num_classes,
        "imported_from": options.source,
    }
    if options.distilled_share < 1:
        recipe["distilled_share"] = options.distilled_share
    if factor > 1:
        recipe["factor"] = factor
    return recipe


def _method(distilled: SyntheticDataset | TensorSet) -> str:
    """Return the method's name in the names of DC's and dc_benchmark's files; TM, matching trajectories, for all others."""
    name = distilled.recipe.get("method") if isinstance(distilled, SyntheticDataset) else None
    return {"DC": "DC", "DSA": "DSA", "DM": "DM", "Random": "random", "K-means": "Kmeans"}.get(str(name), "TM")


def _kind_for(destination: Path, *, native: bool) -> str:
    if destination.suffix == ".pt":
        return "dc" if destination.name.startswith("res_") else "mtt"
    by_suffix = {".safetensors": "synthetic", ".parquet": "parquet"}
    return by_suffix.get(destination.suffix, "mtt" if native else "synthetic")


def _in_order(options: ConvertOptions, distilled: SyntheticDataset | TensorSet) -> SyntheticDataset | TensorSet:
    """Return the set class-major, with class indices in place of soft labels for --hard_labels; log its content."""
    recipe = distilled.recipe if isinstance(distilled, SyntheticDataset) else {}
    if options.reorder and (share := recipe.get("distilled_share", options.distilled_share)) < 1:
        raise InputError(
            f"`reorder`: expected a set without real images, found one with `distilled_share` {share:g}, in which the places of images in "
            "their class tell the real ones; leave it out"
        )
    plain = as_tensor_set(distilled)
    count, before = len(plain.labels), count_in_class_order(plain)
    lr = "none" if plain.lr is None else f"{float(plain.lr):.4g}"
    log.info(
        "%d images %s of %d classes, labels: %s, learning rate: %s",
        count, tuple(plain.images.shape[1:]), plain.num_classes, plain.label_kind, lr,
    )  # fmt: skip
    ordered = class_major(plain, reorder_soft=options.reorder)
    changed: dict[str, Any] = {}
    if not torch.equal(ordered.labels, plain.labels):
        log.info("reordered: class by class")
        if isinstance(distilled, SyntheticDataset) and distilled.parameters:
            log.warning("the learned parameters are left out: they give the images in their former order")
            changed["parameters"] = {}
    elif plain.label_kind != "indices" and before < count:
        fewest, most = largest_label_counts(plain)  # if they differ, labels were learned, and places tell the classes
        sorts = "; --reorder sorts by it" if fewest == most else ""
        log.info("in %d of %d images the largest label is the class of their place%s", before, count, sorts)
    if options.hard_labels:
        ordered = hardened(ordered)
    changed |= {"images": ordered.images, "labels": ordered.labels, "label_kind": ordered.label_kind}
    return dataclasses.replace(distilled, **changed)


def _for_ddranking(
    options: ConvertOptions, folder: Path, distilled: SyntheticDataset | TensorSet, zca: bool | None
) -> str:
    """Return the call of DD-Ranking, or the reason why DD-Ranking cannot take the set."""
    recipe = distilled.recipe if isinstance(distilled, SyntheticDataset) else {}
    dataset, subset = options.dataset or recipe.get("dataset"), options.subset or recipe.get("subset")
    data_path = recipe.get("data_path", options.data_path)
    try:
        if isinstance(distilled, SyntheticDataset) and distilled.canvas:
            raise InputError("DD-Ranking has no random crops, which the canvases of --texture need")
        call = ddranking_call(folder, as_tensor_set(distilled), dataset, zca, subset, data_path)
    except InputError as error:
        return f"DD-Ranking {VERSION} cannot take the set: {with_flags(str(error))}"
    return f"DD-Ranking {VERSION} takes it with\n{call}"


def _usage(
    options: ConvertOptions, kind: str, written: list[Path], distilled: SyntheticDataset | TensorSet, factor: int
) -> str:
    """Return in words how other software reads the files."""
    first = written[0]
    zca = _is_whitened(options, distilled)
    space = {True: "ZCA-whitened", False: "normalised", None: "normalised or whitened, as in the source"}[zca]
    labels = {
        "indices": "class indices", "probabilities": "probabilities", "weights": "weights of the classes",
        "logits": "logits (take their softmax)",
    }[distilled.label_kind]  # fmt: skip
    soft = distilled.label_kind != "indices"
    match kind:
        case "synthetic":
            return f"use it with: python -m mtt_fast.evaluate {shlex.quote(str(first))}"
        case "ddranking":
            return _for_ddranking(options, first.parent, distilled, zca)
        case "dc_benchmark":
            own = "" if distilled.lr is None else f" (the set's own: {float(distilled.lr):.4g})"
            return (
                f"dc_benchmark's root is {options.destination}; images are {space}. Its evaluator trains at its --lr_net, 0.01 "
                f"if not given{own}"
            )
        case "dc":
            return f"images, labels = torch.load({str(first)!r}, weights_only=False)['data'][-1]; images are {space}"
        case "ncfm":
            return (
                f"NCFM's evaluation_script.py takes it as --load_path {shlex.quote(str(first))}, with factor: "
                f"{factor} in its configuration"
            )
        case "png":
            # of the folder alone, `datasets` would take a class called "train" for the split, and drop all others
            files = os.path.join(glob.escape(options.destination), "**")
            return (
                f"torchvision.datasets.ImageFolder({options.destination!r}) reads it, and so does "
                f"datasets.load_dataset('imagefolder', data_files={files!r}, split='train')"
                f"{f', without the {labels} in {written[-1]}' if soft else ''}. {_LOSSY}"
            )
        case "parquet":
            columns = f"; soft_label holds {labels}" if soft else ""
            return f"datasets.load_dataset('parquet', data_files={str(first)!r}, split='train') reads it{columns}. {_LOSSY}"
    return f"torch.load reads each; images are {space}, labels are {labels}"
