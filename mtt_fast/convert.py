"""Distilled sets and experts to and from the files of other software: `python -m mtt_fast convert SOURCE DESTINATION`.

The kinds of files are in mtt_fast/interop. Experts come as replay_buffer_N.pt of the public code; a destination of
experts is what --buffer_path names, in the public code and here.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from mtt_fast import cli
from mtt_fast.arithmetic import arithmetic
from mtt_fast.data import NAMES, ImageData, transform_for
from mtt_fast.data.imagenet import SUBSETS
from mtt_fast.errors import InputError
from mtt_fast.experts import STORE_DTYPES, describe_network
from mtt_fast.interop import (
    SET_KINDS,
    Facts,
    PlainSet,
    as_plain,
    as_synthetic,
    buffer_files,
    class_major,
    ddranking_call,
    export_experts,
    facts_of,
    import_experts,
    read_buffer,
    read_set,
    read_waypoints,
    set_kind_of,
    write_set,
)
from mtt_fast.interop.buffers import BUFFER, CONVEXIFIED, Trajectory
from mtt_fast.interop.plain import hardened, in_place
from mtt_fast.interop.waypoints import WAYPOINTS
from mtt_fast.interrupts import Stopped, stop_request
from mtt_fast.options import CommonOptions, at_least, buffer_folder, real_images
from mtt_fast.provenance import choose_device, versions
from mtt_fast.synthetic import SyntheticDataset
from mtt_fast.training import accuracy
from mtt_fast.trajectories import ExpertMetadata, TrajectoryStore

log = logging.getLogger(__name__)

PROGRAM = "python -m mtt_fast convert"
EXPERT_KINDS = {
    "experts": "this software's: expert_NNNN.safetensors, one file an expert",
    "buffer": "replay_buffer_N.pt of MTT and its successors",
    "convexified": "convexified_replay_buffer_N.pt of MCT",
    "waypoints": "waypoint_buffer_N.pt and step_buffer_N.pt of MCT",
}
_SERIES = {
    "buffer": BUFFER,
    "convexified": CONVEXIFIED,
    "waypoints": WAYPOINTS,
    "experts": r"expert_(\d+)\.safetensors",
}


@dataclass(frozen=True)
class ConvertOptions:
    """Convert a distilled set, or experts' trajectories, to or from the files of other software."""

    source: tyro.conf.Positional[str] = ""
    """a file or a folder"""
    destination: tyro.conf.Positional[str] = ""
    """a file or a folder that is not there yet; for experts the --buffer_path of who will read them"""
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """kind of the source, where its names do not tell"""
    to: str | None = None
    """kind of the destination: synthetic, mtt, dc, dc_benchmark, ddranking, png, parquet; experts, buffer. Without it:
    what the destination's name tells; else this software's kind, or from this software's the public code's"""

    dataset: str | None = None
    """the real images: foreign files do not say of which they are"""
    subset: str | None = None
    """of ImageNet"""
    res: int | None = None
    """resolution in pixels, where the data set has no one size"""
    data_path: str = "data"
    """where the data sets lie"""
    packed_path: str | None = None
    """where they are kept packed, if not in DATA_PATH/packed"""
    download: bool = False
    """fetch the data set if it is missing"""
    zca: bool = False
    """the source was made with ZCA-whitened images"""
    model: str = "ConvNet"
    """network of the experts"""
    device: str = "auto"
    """auto, cpu, cuda, …, where experts are measured"""

    lr_teacher: float = 0.01
    """learning rate of a set that comes without one"""
    label_kind: Literal["probabilities", "logits"] | None = None
    """what the source's soft labels are (guessed from their sums without this)"""
    reorder: bool = False
    """put a set with soft labels into the order of its largest labels"""
    hard_labels: bool = False
    """write each image's class in place of its soft label"""
    method: str = "TM"
    """whose set it is, in names of dc_benchmark's and DC's files: TM, DC, DSA, DM"""

    measure: Literal["last", "all", "none"] = "last"
    """epochs of each expert whose test accuracy is measured: the last, all, or none"""
    store_dtype: str = "float32"
    """of imported experts: float32, or bfloat16 at half the size"""
    experts_per_file: int = 10
    """experts in one replay_buffer_N.pt (the public code's --save_interval); they are in memory together"""

    def common(self) -> CommonOptions:
        """Return the options that name the real images and the network. Raises `InputError` without a data set."""
        if self.dataset is None:
            raise InputError(
                f"{self.source}: expected the real images that it belongs to, which its files do not name; say --dataset "
                "(and --data_path, --zca, --model where needed)"
            )
        names = {field.name for field in dataclasses.fields(CommonOptions)} & set(vars(self))
        return CommonOptions(**{name: getattr(self, name) for name in names})


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    options = cli.parse(ConvertOptions, argv, PROGRAM)
    if not options.source or not options.destination:
        raise InputError(f"expected a source and a destination; see {PROGRAM} --help")
    complaint = at_least(1, experts_per_file=options.experts_per_file)
    if complaint or not 0 < options.lr_teacher < math.inf:
        raise InputError(complaint or f"--lr_teacher {options.lr_teacher}: expected more than 0")
    if options.store_dtype not in STORE_DTYPES:
        raise InputError(f"--store_dtype {options.store_dtype}: expected {' or '.join(STORE_DTYPES)}")
    kind = options.from_ or _kind_of(Path(options.source))
    log.info("%s: %s", options.source, (EXPERT_KINDS | SET_KINDS).get(kind or "", "of no known kind"))
    if kind == "experts":
        _export(options)
    elif kind in EXPERT_KINDS:
        guessed = _guess_from_folder(Path(options.source))
        options = cli.parse(ConvertOptions, argv, PROGRAM, guessed)
        _import(options, kind)
    else:
        _convert_set(options, kind)


def _kind_of(source: Path) -> str | None:
    """Return the kind of the files that `source` is or holds, as far as names tell."""
    names = [path.name for path in source.iterdir()] if source.is_dir() else [source.name]
    for kind, pattern in _SERIES.items():
        if any(re.fullmatch(pattern, name) for name in names):
            return kind
    return set_kind_of(source)


def _guess_from_folder(source: Path) -> dict[str, Any]:
    """Return the options that the public code's folders tell: DATASET[_NO_ZCA][/SUBSET/RES]/MODEL."""
    folder = source.resolve() if source.is_dir() else source.resolve().parent
    model, *above = [part.name for part in (folder, *folder.parents)]
    if not model.startswith("ConvNet") or len(above) < 3:
        return {}
    if above[2] == "ImageNet" and above[1] in SUBSETS and above[0].isdigit():
        found: dict[str, Any] = {"dataset": "ImageNet", "subset": above[1], "res": int(above[0]), "model": model}
    else:
        name = above[0].removesuffix("_NO_ZCA")
        if name not in NAMES:
            return {}
        found = {"dataset": name, "zca": name.startswith("CIFAR") and name == above[0], "model": model}
    log.info("its folder's name tells %s", ", ".join(f"--{option} {value}" for option, value in found.items()))
    return found


def _import(options: ConvertOptions, kind: str) -> None:
    if options.to not in (None, "experts"):
        raise InputError(f"--to {options.to}: {options.source} holds experts, which become experts")
    common = options.common()
    files = buffer_files(options.source, _SERIES[kind])
    data = common.load_data()
    network = common.network(data)
    folder = buffer_folder(options.destination, data, options.model, options.zca)
    metadata = ExpertMetadata(
        network=describe_network(network),
        layout=network.layout.describe(),
        dataset=data.name,
        fingerprint=data.fingerprint,
        whitening="zca" if options.zca else "none",
        hyperparameters={},
        seed=-1,  # unknown
        accuracy=[],
        versions=versions(),
    )
    read = read_waypoints if kind == "waypoints" else read_buffer

    def experts() -> Iterator[Trajectory]:
        for file in files:
            yield from read(file)

    count = sum(1 for _ in experts())
    device = choose_device(options.device)
    with arithmetic(device, common.precision), stop_request() as stop, tqdm(total=count, unit="expert") as bar:

        def after_each(expert: Trajectory) -> None:
            bar.update()
            if stop:
                raise Stopped(
                    "stopped; the experts that were converted are saved; the same command continues", stop.signum
                )

        store = import_experts(
            experts, folder, network.layout, metadata, _measurer(options, common, data, device),
            STORE_DTYPES[options.store_dtype], after_each,
        )  # fmt: skip
    _say_imported(options, store, data)


def _measurer(
    options: ConvertOptions, common: CommonOptions, data: ImageData, device: torch.device
) -> Callable[[Tensor], list[float]]:
    """Return what measures the test accuracy of an expert's rows that --measure names, and gives NaN for the others."""
    if options.measure == "none":
        return lambda rows: [math.nan] * len(rows)
    network, test = common.network(data), real_images(data, options.zca, device).test

    def measure(rows: Tensor) -> list[float]:
        values = [math.nan] * len(rows)
        for row in range(len(rows)) if options.measure == "all" else [len(rows) - 1]:
            values[row] = accuracy(network, rows[row].to(device), test)
        return values

    return measure


def _say_imported(options: ConvertOptions, store: TrajectoryStore, data: ImageData) -> None:
    final = torch.tensor([store.metadata(expert).accuracy[-1] for expert in range(len(store))])
    log.info("wrote %d experts of %d epochs to %s", len(store), store.epochs(0), store.folder)
    if not final.isnan().any():
        log.info("their test accuracy is %.4f", final.mean())
        if final.mean() < 2 / data.num_classes:
            log.warning(
                "that is hardly more than guessing: were they trained on %s %s ZCA whitening?",
                data.name, "with" if options.zca else "without",
            )  # fmt: skip
    log.info(
        "use them with: python -m mtt_fast.distill --buffer_path %s --dataset %s --model %s%s --num_experts %d …",
        options.destination, options.dataset, options.model, " --zca" if options.zca else "", len(store),
    )  # fmt: skip


def _export(options: ConvertOptions) -> None:
    if options.to not in (None, "buffer"):
        raise InputError(f"--to {options.to}: {options.source} holds experts; expected buffer")
    store = TrajectoryStore(options.source)
    folder = _public_folder(Path(options.destination), store)
    written = []
    with stop_request() as stop, tqdm(total=len(store), unit="expert") as bar:
        for path in export_experts(store, folder, options.experts_per_file):
            written.append(path)
            bar.update(min(options.experts_per_file, len(store) - bar.n))
            if stop:
                raise Stopped(f"stopped; {', '.join(file.name for file in written)} are written", stop.signum)
    log.info("wrote %d experts to %s", len(store), ", ".join(map(str, written)))
    log.info("the public code's distill.py reads them with --buffer_path %s", options.destination)


def _public_folder(root: Path, store: TrajectoryStore) -> Path:
    """Return where the public code looks for these experts, below its --buffer_path."""
    source, metadata = store.folder.resolve(), store.metadata(0)
    subset, _, res = metadata.dataset.partition("-")
    if subset in SUBSETS:
        return root / "ImageNet" / subset / (res or "128") / source.name
    plain = metadata.dataset.startswith("CIFAR") and metadata.whitening == "none"
    return root / (metadata.dataset + ("_NO_ZCA" if plain else "")) / source.name


def _convert_set(options: ConvertOptions, kind: str | None) -> None:
    destination = Path(options.destination)
    facts = _facts(options) if kind in ("png", "parquet") and options.dataset else None
    found = read_set(options.source, kind, label_kind=options.label_kind, facts=facts, lr=options.lr_teacher)
    to = options.to or _kind_for(destination, native=kind == "synthetic")
    if to in EXPERT_KINDS:
        raise InputError(f"--to {to}: {options.source} holds a distilled set, not experts")
    if (
        to not in ("dc_benchmark", None)
        and destination.exists()
        and (destination.is_file() or any(destination.iterdir()))
    ):
        raise InputError(f"{destination}: is there already; choose another destination, or delete it")
    found = _in_order(options, found)
    if isinstance(found, PlainSet) and to in ("synthetic", "png", "parquet"):
        facts = _facts(options)
        recipe = _recipe(options, found)
        if found.lr is None:
            log.info("the source has no learning rate; --lr_teacher %g is kept as such", options.lr_teacher)
        found = as_synthetic(found, facts, options.lr_teacher, recipe, versions())
    written = write_set(destination, found, to, dataset=options.dataset, method=options.method)
    shown = [str(path) for path in written if path.suffix != ".png"]
    log.info("wrote %s (%s)", ", ".join(shown), SET_KINDS[to])
    log.info("%s", _usage(options, to, written, found))


def _facts(options: ConvertOptions) -> Facts:
    data = options.common().load_data()
    return facts_of(data, transform_for(data, options.zca))


def _recipe(options: ConvertOptions, found: PlainSet) -> dict[str, Any]:
    """Return what `evaluate` has to know of a set that came from elsewhere."""
    names = ("dataset", "subset", "res", "data_path", "packed_path", "zca", "model")
    return {name: getattr(options, name) for name in names} | {
        "ipc": len(found.labels) // found.num_classes,
        "imported_from": options.source,
    }


def _kind_for(destination: Path, native: bool) -> str:
    by_suffix = {".safetensors": "synthetic", ".parquet": "parquet"}.get(destination.suffix)
    if destination.suffix == ".pt":
        by_suffix = "dc" if destination.name.startswith("res_") else "mtt"
    return by_suffix or ("mtt" if native else "synthetic")


def _in_order(options: ConvertOptions, found: SyntheticDataset | PlainSet) -> SyntheticDataset | PlainSet:
    """Return the set class-major, with the labels that are asked for, and say what was found."""
    plain = found if isinstance(found, PlainSet) else as_plain(found)
    count, before = len(plain.labels), in_place(plain)
    rate = "none" if plain.lr is None else plain.lr.tolist()
    log.info(
        "%d images %s of %d classes, labels: %s, learning rate: %s",
        count, tuple(plain.images.shape[1:]), plain.num_classes, plain.label_kind, rate,
    )  # fmt: skip
    ordered = class_major(plain, options.reorder)
    if not torch.equal(ordered.labels, plain.labels):
        log.info("reordered: class by class")
    elif plain.label_kind != "indices" and before < count:
        log.info(
            "in %d of %d images the largest label is the class of their place; --reorder sorts by it", before, count
        )
    if options.hard_labels:
        ordered = hardened(ordered)
    changed: dict[str, Any] = {
        "images": ordered.images, "labels": ordered.labels, "label_kind": ordered.label_kind,
    }  # fmt: skip
    return dataclasses.replace(found, **changed)


def _usage(options: ConvertOptions, kind: str, written: list[Path], found: SyntheticDataset | PlainSet) -> str:
    """Return what the software that reads the files has to do."""
    first, folder = written[0], written[0].parent
    known = isinstance(found, SyntheticDataset)
    zca = found.whitening is not None if isinstance(found, SyntheticDataset) else (options.zca or None)
    plain = found if isinstance(found, PlainSet) else as_plain(found)
    spaces = {True: "ZCA-whitened", False: "normalised"}[bool(zca)] if known or zca else "normalised or whitened"
    match kind:
        case "synthetic":
            return f"use it with: python -m mtt_fast.evaluate {first}"
        case "ddranking":
            name = options.dataset or (found.recipe.get("dataset") if isinstance(found, SyntheticDataset) else None)
            return "DD-Ranking takes it with\n" + ddranking_call(folder, plain, str(name or "CIFAR10"), zca)
        case "dc_benchmark":
            return f"dc_benchmark reads it where its root is {options.destination}; images are {spaces}"
        case "dc":
            return f"images, labels = torch.load('{first}')['data'][-1]; images are {spaces}"
        case "png" | "parquet":
            what = f"datasets.load_dataset('parquet', data_files='{first}')" if kind == "parquet" else "an ImageFolder"
            return f"{what} reads it; pictures are cut to [0, 1] and 8 bits, so train on the tensors where you can"
    labels = {"indices": "class indices", "probabilities": "probabilities", "logits": "logits: take their softmax"}
    return f"torch.load each file; images are {spaces}, labels are {labels[plain.label_kind]}"


if __name__ == "__main__":
    sys.exit(cli.run(main))
