"""Convert experts from the buffers of other software, and back."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mtt_fast.commands.options import CommonOptions, buffer_folder
from mtt_fast.compress import waypoint_folder
from mtt_fast.convert.options import ConvertOptions
from mtt_fast.data import NAMES, ImageData
from mtt_fast.data.class_lists import SUBSETS
from mtt_fast.errors import InputError
from mtt_fast.experts.options import STORE_DTYPES
from mtt_fast.interop import buffer_files, export_experts, export_waypoints, import_experts, read_buffer, read_waypoints
from mtt_fast.interop.buffers import BUFFER, CONVEXIFIED
from mtt_fast.interop.experts import Trajectory
from mtt_fast.interop.waypoints import WAYPOINTS
from mtt_fast.networks.by_name import full_name, short_name
from mtt_fast.runtime.interrupts import raise_if_stopped, stop_request
from mtt_fast.runtime.numerics import numerics
from mtt_fast.runtime.provenance import choose_device
from mtt_fast.storage.atomic import atomic_folder
from mtt_fast.storage.expert_checks import check_one_kind
from mtt_fast.storage.expert_metadata import ExpertMetadata
from mtt_fast.storage.foreign import names_in
from mtt_fast.storage.identity import NORMALISED, WHITENED
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.temporaries import is_free
from mtt_fast.storage.trajectories import TrajectoryStore, write_expert
from mtt_fast.training.accuracy import accuracy
from mtt_fast.training.images import real_images

log = logging.getLogger(__name__)

EXPERT_KINDS = {
    "experts": "mtt_fast's: expert_NNNN.safetensors, one file an expert",
    "buffer": "replay_buffer_N.pt of MTT and its successors",
    "convexified": "convexified_replay_buffer_N.pt of MCT",
    "waypoints": "waypoint_buffer_N.pt and step_buffer_N.pt of MCT",
}
_ELSEWHERE = "choose another destination"
_STOPPED = "stopped; nothing was written"
_SERIES = {
    "buffer": BUFFER,
    "convexified": CONVEXIFIED,
    "waypoints": WAYPOINTS,
    "experts": r"expert_(\d+)\.safetensors",
}


def expert_kinds_of(source: Path) -> list[str]:
    """Return the kinds of the experts in `source`, a file or a folder, by the files' names, in the order of preference.

    Raises `InputError` for a folder that cannot be listed.
    """
    names = names_in(source) if os.path.isdir(source) else [source.name]
    return [kind for kind, pattern in _SERIES.items() if any(re.fullmatch(pattern, name) for name in names)]


def options_in_path(source: Path) -> dict[str, Any]:
    """Return the options in the names of the public code's folders: DATASET[_NO_ZCA][/SUBSET/RES]/MODEL.

    The names tell whether images of CIFAR were whitened; those of other data sets may have been.
    """
    path = Path(os.path.realpath(source))
    folder = path if path.is_dir() else path.parent
    model, *above = [part.name for part in (folder, *folder.parents)]
    if not model.startswith("ConvNet") or len(above) < 3:
        return {}
    if above[2] == "ImageNet" and above[1] in SUBSETS and above[0].isdecimal():
        options: dict[str, Any] = {"dataset": "ImageNet", "subset": above[1], "res": int(above[0]), "model": model}
    else:
        name = above[0].removesuffix("_NO_ZCA")
        if name not in NAMES:
            return {}
        tells = name != above[0] or name.startswith("CIFAR")
        options = {"dataset": name} | ({"zca": name == above[0]} if tells else {}) | {"model": model}
    log.info("the folder's name says %s", ", ".join(f"--{option} {value}" for option, value in options.items()))
    return options


def import_from(options: ConvertOptions, kind: str) -> None:
    """Read experts of `kind` from `options.source` and write them to the folder where distill looks for experts.

    All experts are checked first. Ctrl-C stops after an expert; the same command continues.
    Raises `InputError` for files that hold no experts of the network, and without the data set's name.
    """
    if options.to not in (None, "experts"):
        raise InputError(f"--to {options.to}: {options.source} holds experts, which become experts")
    common = options.common()
    files = buffer_files(options.source, _SERIES[kind])
    data = common.load_data()
    network = common.network(data)
    folder = buffer_folder(options.destination, data, options.model, zca=options.zca)
    if kind == "waypoints":
        folder = waypoint_folder(folder, len(next(read_waypoints(files[0])).points))
    check_output_folder(folder, _ELSEWHERE)
    metadata = ExpertMetadata.of(network, data.identity(zca=options.zca))
    read = read_waypoints if kind == "waypoints" else read_buffer

    def experts() -> Iterator[Trajectory]:
        for file in files:
            yield from read(file)

    count = sum(1 for _ in experts())
    device = choose_device(options.device)
    with numerics(device, common.precision), stop_request() as stop, tqdm(total=count, unit="expert") as bar:

        def after_each(expert: Trajectory) -> None:
            bar.update()
            raise_if_stopped(stop, "stopped; the experts that were converted are saved; the same command continues")

        store = import_experts(
            experts, folder, network.layout, metadata, _measurer(options, common, data, device),
            STORE_DTYPES[options.store_dtype], after_each,
        )  # fmt: skip
    _log_imported(options, store, data)


def _measurer(
    options: ConvertOptions, common: CommonOptions, data: ImageData, device: torch.device
) -> Callable[[Tensor], list[float]]:
    """Return a function from rows to their test accuracies: those that --measure selects are measured, the others NaN."""
    network, test = common.network(data), real_images(data, device, zca=options.zca).test

    def measure(rows: Tensor) -> list[float]:
        values = [math.nan] * len(rows)
        for row in range(len(rows)) if options.measure == "all" else [len(rows) - 1]:
            values[row] = accuracy(network, rows[row].to(device), test)
        return values

    return measure


def _log_imported(options: ConvertOptions, store: TrajectoryStore, data: ImageData) -> None:
    final = torch.tensor([store.metadata(expert).accuracy[-1] for expert in range(len(store))])
    lengths = sorted({store.epochs(expert) for expert in range(len(store))})
    log.info("wrote %d experts of %s epochs to %s", len(store), " or ".join(map(str, lengths)), store.folder)
    log.info("their test accuracy is %.4f", final.mean())
    if options.measure == "all" and (
        before := [expert for expert in range(len(store)) if not _is_measured(store, expert)]
    ):
        log.warning(
            "--measure all: has no effect on %d experts that were there already, such as %s, of which the last epoch was measured; "
            "delete them first to measure all",
            len(before),
            store.path(before[0]),
        )
    first_with: dict[str, int] = {}
    for index in range(len(store)):
        if (first := first_with.setdefault(store.digest(index), index)) != index:
            log.warning(
                "%s: the same trajectory as expert %d, so it counts twice; was a buffer copied?",
                store.path(index),
                first,
            )
    if final.mean() < 2 / data.num_classes:
        log.warning(
            "that is hardly more than guessing: were they trained on %s %s ZCA whitening?",
            data.name, "with" if options.zca else "without",
        )  # fmt: skip
    names = ("dataset", "subset", "res", "data_path", "model")
    flags = [
        word for name in names if (value := getattr(options, name)) is not None for word in (f"--{name}", str(value))
    ]
    flags += ["--zca"] * options.zca + ["--num_experts", str(len(store))]
    course = store.course(0)
    flags += ["--num_interpolation", str(len(course.epochs))] if course else []
    command = shlex.join(["--buffer_path", options.destination, *flags])
    log.info("use them with: python -m mtt_fast.distill %s …", command)


def _is_measured(store: TrajectoryStore, expert: int) -> bool:
    """Return whether there is an accuracy at each saved row of the expert."""
    accuracy = store.metadata(expert).accuracy
    return not any(math.isnan(accuracy[epoch]) for epoch in store.saved_epochs(expert))


def export_to(options: ConvertOptions) -> None:
    """Write mtt_fast's experts in `options.source` as buffers, in the folder where the buffers' readers look for them.

    Whole experts become replay_buffer_N.pt; compressed ones waypoint_buffer_N.pt, or replay_buffer_N.pt with --to buffer.
    With --to experts they stay mtt_fast's, and are rewritten with checksums.
    Nothing is written if the command is stopped.
    """
    store = TrajectoryStore(options.source)
    if not len(store):
        raise InputError(
            f"{options.source}: expected experts (expert_0000.safetensors, …), found none; name their folder"
        )
    check_one_kind(store)
    kind = options.to or ("waypoints" if store.course(0) else "buffer")
    if kind == "experts":
        _copy(store, options.destination)
        return
    if kind not in ("buffer", "waypoints"):
        raise InputError(f"--to {kind}: {options.source} holds experts; expected buffer, waypoints or experts")
    folder = _public_folder(Path(options.destination), store, kind)
    check_output_folder(folder, _ELSEWHERE)
    export = export_waypoints if kind == "waypoints" else export_experts
    written = []
    files = export(store, folder, options.experts_per_file)
    with stop_request() as stop, tqdm(total=len(store), unit="expert") as bar, contextlib.closing(files):
        for path in files:
            written.append(path)
            bar.update(min(options.experts_per_file, len(store) - bar.n))
            raise_if_stopped(stop, _STOPPED)
    log.info("wrote %d experts to %s", len(store), ", ".join(map(str, written)))
    readers = {"buffer": "the public code's distill.py reads", "waypoints": "MCT's distill_compressed.py reads"}
    log.info("%s them with --buffer_path %s", readers[kind], options.destination)


def _copy(store: TrajectoryStore, buffer_path: str) -> None:
    """Rewrite the experts in the folder below `buffer_path` where distill looks for them. Nothing is written if the command is stopped."""
    identity, course = store.metadata(0).identity, store.course(0)
    folder = buffer_folder(buffer_path, identity, _model(store), zca=identity.whitening == WHITENED)
    folder = waypoint_folder(folder, len(course.epochs)) if course else folder
    if not is_free(folder):
        raise InputError(f"{folder}: exists already; choose another destination, or delete it")
    check_output_folder(folder, _ELSEWHERE)
    with stop_request() as stop, atomic_folder(folder) as content:
        for expert, index in enumerate(tqdm(store.indices, unit="expert")):
            rows = torch.stack([store.read(expert, epoch) for epoch in store.saved_epochs(expert)])
            write_expert(content, index, rows, store.metadata(expert), store.dtype(expert), store.course(expert))
            raise_if_stopped(stop, _STOPPED)
    log.info("wrote %d experts to %s", len(store), folder)


def _model(store: TrajectoryStore) -> str:
    """Return the name of the experts' network, as --model spells it: that of their folder, or if it has another name the shortest."""
    folder, network = store.folder.resolve(), store.metadata(0).network
    if "outputs" in network:  # a user's network
        return str(network["kind"])
    names = (name for name in (folder.name, folder.parent.name) if full_name({"kind": name}) == full_name(network))
    return next(names, short_name(network) or folder.name)


def _public_folder(root: Path, store: TrajectoryStore, kind: str) -> Path:
    """Return the folder below `root`, a --buffer_path, where the public code, or for waypoints MCT's, looks for these experts."""
    metadata, model = store.metadata(0), _model(store)
    subset, _, res = metadata.dataset.rpartition("-")
    if subset in SUBSETS:
        return root / "ImageNet" / subset / res / model
    suffixed = ("CIFAR10", "CIFAR100", "Tiny") if kind == "waypoints" else ("CIFAR10", "CIFAR100")
    plain = metadata.dataset in suffixed and metadata.whitening == NORMALISED
    return root / (metadata.dataset + ("_NO_ZCA" if plain else "")) / model
