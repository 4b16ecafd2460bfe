"""Describe what a distillation will do, with its memory, time and disk space: `--dry-run`."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mtt_fast.commands.network_trial import try_users_network
from mtt_fast.data import DatasetInfo
from mtt_fast.data.catalogue import dataset_info
from mtt_fast.distill.cam_network import cam_expert
from mtt_fast.distill.checks import check_fits, load_state
from mtt_fast.distill.estimates import SAMPLES, EstimatedBytes, estimated_bytes, seconds_from_timed_steps
from mtt_fast.distill.experts import ExpertInventory, inventory_of, remark_on_expert_count, whitening_remark
from mtt_fast.distill.frequencies import describe_frequencies
from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.parametrised import (
    check_parametrisation,
    describe_parametrisation,
    parametrisation_on_meta,
)
from mtt_fast.distill.planning import plan_steps
from mtt_fast.engine.students.choice import describe_numerics, precision_on
from mtt_fast.recipes import recipe_about
from mtt_fast.storage.expert_checks import with_training_of
from mtt_fast.storage.run_files import SUMMARY
from mtt_fast.storage.run_folder import read_config


def dry_run(options: DistillOptions, folder: Path, device: torch.device, requested: Mapping[str, Any]) -> str:
    """Return lines of text: what the run will do, its memory plan, and an estimate of its time and disk space.

    Nothing is written, downloaded or decoded. The time is extrapolated from student steps on a few random images on `device`; it
    assumes one network after another, and leaves out reading and drawing. For `requested` see `check_experts`. Raises `InputError`
    as the run itself would for its options, network, memory budget, image folder, existing experts, or checkpoint.
    """
    info = dataset_info(options.dataset, options.subset, options.res, options.data_path)
    network = options.network(info)
    check_fits(options, info, network, device, requested)
    image_parameters = check_parametrisation(options, info, device)
    state = load_state(options, info, torch.device("cpu"))  # refuses a run that cannot continue
    inventory = inventory_of(options, info)
    if (store := inventory.ready or inventory.uncompressed) is not None:
        options = with_training_of(options, options.experts().record(), store.metadata(0))  # as the run records them
    precision = precision_on(device, network, options.precision, iterations=True)
    count = options.ipc * info.num_classes
    batch = options.batch_syn or count
    try_users_network(options.model, network, info.image_shape, info.num_classes, device, batch)
    plan = plan_steps(
        options, network, (count, *info.image_shape), device, precision, image_parameters=image_parameters
    )
    cam = options.cam_network(info)
    to_train = options.cam_model not in (None, options.model) and cam_expert(options, info) is None
    seconds = seconds_from_timed_steps(
        options, info, network, plan, device, missing=inventory.num_missing, train_cam=to_train
    )
    size = estimated_bytes(
        options, info, network.num_parameters, inventory.num_missing, inventory.num_to_compress,
        cam_parameters=cam.num_parameters if cam is not None and to_train else 0,
        image_parameters=image_parameters,
    )  # fmt: skip
    lines = {
        "recipe": _recipe(options),
        "data set": f"{info.name}: {'×'.join(map(str, info.image_shape))}, {info.num_classes} classes, "
        f"{info.num_train:,} + {info.num_test:,} images, {'whitened' if options.zca else 'normalised'}",
        "network": f"{options.model}, {network.num_parameters:,} parameters",
        "experts": _experts(options, info, inventory, "" if state else remark_on_expert_count(options, inventory)),
        "scores": _scores(options),
        "images": describe_frequencies(options, info) or _parametrised(options, info),
        "maps": _maps(options, to_train=to_train),
        "run": f"{options.Iteration:,} iterations of {options.syn_steps} student steps on "
        f"{batch} of {count} synthetic images, matching {options.expert_epochs} expert epochs "
        f"from epoch {options.min_start_epoch} on and below epoch {options.max_start_epoch}; {_state(folder)}",
        "options": _other_options(options),
        "precision": describe_numerics(device, network, options.precision, iterations=True),
        "memory": str(plan).removeprefix("memory plan: "),
        "time": f"about {_duration(sum(seconds))}: experts {_duration(seconds.experts)}, iterations "
        f"{_duration(seconds.iterations)}, evaluations {_duration(seconds.evaluations)}; scaled from steps of {SAMPLES} images "
        f"on {device}, one network after another",
        "disk": disk_in_words(options, size),
    }
    return "\n".join(f"{name:10}{text}" for name, text in lines.items() if text)


_SHOWN_ELSEWHERE = {
    "dataset", "subset", "res", "zca", "model", "ipc", "Iteration", "syn_steps", "expert_epochs", "max_start_epoch",
    "min_start_epoch", "batch_syn", "num_experts", "max_experts", "train_epochs", "recipe", "config", "out", "resume",
    "dry_run", "data_path", "packed_path", "buffer_path", "download", "score_path", "device", "precision", "memory_budget",
    "microbatch",
}  # fmt: skip
"""Options that other lines show, or that only name files and folders."""


def _other_options(options: DistillOptions) -> str:
    """Return all other options that are not at their defaults, as flags."""
    plain, given = dataclasses.asdict(DistillOptions()), dataclasses.asdict(options)
    others = {name: value for name, value in given.items() if name not in _SHOWN_ELSEWHERE and value != plain[name]}
    return " ".join(
        f"--{name}" if value is True else shlex.join([f"--{name}", str(value)]) for name, value in others.items()
    )


def _recipe(options: DistillOptions) -> str:
    if options.recipe is None:
        return ""
    about = recipe_about(options.recipe)
    return f"{options.recipe}: {about['description']} ({about['source']})"


def _scores(options: DistillOptions) -> str:
    if options.score_path is None:
        return ""
    return f"{options.score_path}, {'there' if Path(options.score_path).is_file() else 'to be put there first'}"


def _parametrised(options: DistillOptions, info: DatasetInfo) -> str:
    if options.parametrisation is None:
        return ""
    if (parametrisation := parametrisation_on_meta(options, info)) is not None:
        with contextlib.suppress(RuntimeError):  # a class may count values, such as those that are not zero
            return describe_parametrisation(options, info, parametrisation)
    return f"computed by {options.parametrisation}; the log of the run will tell the numbers that have to be stored"


def _maps(options: DistillOptions, *, to_train: bool) -> str:
    if options.cam_model is None:
        return ""
    known = "the first expert" if options.cam_model == options.model else "trained"
    return f"by {options.cam_model}, {'to be trained first' if to_train else known}, every {options.cam_interval} iterations"


def _experts(options: DistillOptions, info: DatasetInfo, inventory: ExpertInventory, on_number: str) -> str:
    kind = "imported experts, used as they are" if inventory.imported else ""
    to_train = kind or f"{inventory.num_missing} to train for {options.train_epochs} epochs"
    to_compress = f", {inventory.num_to_compress} to compress to {options.num_interpolation} waypoints"
    remarks = [whitening_remark(options, info) if inventory.num_missing else "", on_number]
    return (
        f"{to_train}, {inventory.num_available} in {inventory.uncompressed_folder}{to_compress if inventory.num_to_compress else ''}"
        + "".join(f" ({remark})" for remark in remarks if remark)
    )


def _state(folder: Path) -> str:
    if (folder / SUMMARY).exists():
        return f"{folder} is finished, or continues with more iterations"
    return f"{folder} continues" if read_config(folder) else f"into {folder}"


def disk_in_words(options: DistillOptions, size: EstimatedBytes) -> str:
    """Return the bytes that the run needs and those that are free, on each disk where it writes."""
    parts: dict[str, tuple[float, str | Path]] = {
        "experts": (size.experts, options.buffer_path),
        "run folder": (size.run_folder, options.folder()),
        "packed data set": (size.packed_data, options.packed_path or options.data_path),
    }
    disks: dict[int, list[str]] = {}
    for name, (_, folder) in parts.items():
        disks.setdefault(_existing(folder).stat().st_dev, []).append(name)
    free = []
    for names in disks.values():
        left = shutil.disk_usage(_existing(parts[names[0]][1])).free
        lacking = " (not enough)" if left < sum(parts[name][0] for name in names) else ""
        free.append(f"{_bytes(left)}{lacking}" + (f" for {' and '.join(names)}" if len(disks) > 1 else ""))
    needed = ", ".join(f"{name} {_bytes(count)}" for name, (count, _) in parts.items())
    return f"about {_bytes(sum(size))}: {needed}; free {', '.join(free)}"


def _existing(folder: str | Path) -> Path:
    """Return `folder`, or its nearest parent that exists."""
    path = Path(folder).expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _bytes(size: float) -> str:
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= length:
            return f"{size / length:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"
