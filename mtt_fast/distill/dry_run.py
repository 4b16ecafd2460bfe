"""Describe what a distillation will do, and estimate its memory, time and disk space: `--dry-run`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mtt_fast.data.published_info import DatasetInfo, dataset_info
from mtt_fast.distill.cam_network import cam_expert
from mtt_fast.distill.checks import check_fits, load_state
from mtt_fast.distill.experts import ExpertInventory, inventory_of, remark_on_expert_count, whitening_remark
from mtt_fast.distill.frequencies import describe_frequencies
from mtt_fast.distill.labels import has_soft_baseline
from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.parametrised import (
    check_parametrisation,
    describe_parametrisation,
    parametrisation_on_meta,
)
from mtt_fast.distill.planning import plan_steps
from mtt_fast.engine.memory_plan import Plan
from mtt_fast.engine.students.choice import describe_numerics, precision_on, student_for
from mtt_fast.kernels import Precision
from mtt_fast.networks.protocol import Network, Trainable
from mtt_fast.recipes import recipe_about
from mtt_fast.storage.run_files import SUMMARY
from mtt_fast.storage.run_folder import read_config

_SAMPLES = 16  # images in a timed step
_MIN_CALLS, _MAX_CALLS = 3, 20  # of a timed step
_ENOUGH_SECONDS = 0.2  # in total, after which a step is not timed again
_WHITENING = 2  # matrices (D, D) in a distilled set


class SecondsPerImage(NamedTuple):
    """The seconds that one image takes in a step: in the gradient, and in its derivative."""

    gradient: float
    tangent: float


class EstimatedSeconds(NamedTuple):
    """The estimated seconds of a run, by purpose."""

    experts: float
    iterations: float
    evaluations: float


class EstimatedBytes(NamedTuple):
    """The estimated bytes that a run writes, by purpose."""

    experts: float
    run_folder: float
    packed_data: float


def dry_run(options: DistillOptions, folder: Path, device: torch.device, requested: Mapping[str, Any]) -> str:
    """Return lines of text: what the run will do, its memory plan, and an estimate of its time and disk space.

    Nothing is written, downloaded or decoded. The time is extrapolated from student steps on a few random images on `device`; it
    assumes one network after another, and leaves out reading and drawing. For `requested` see `check_experts`. Raises `InputError`
    as the run itself would for its options, memory budget, image folder, existing experts, or checkpoint.
    """
    info = dataset_info(options.dataset, options.subset, options.res, options.data_path)
    network = options.network(info)
    check_fits(options, info, network, device, requested)
    image_parameters = check_parametrisation(options, info, device)
    state = load_state(options, info, torch.device("cpu"))  # refuses a run that cannot continue
    inventory = inventory_of(options, info)
    precision = precision_on(device, network, options.precision, iterations=True)
    count = options.ipc * info.num_classes
    plan = plan_steps(
        options, network, (count, *info.image_shape), device, precision, image_parameters=image_parameters
    )
    cam = options.cam_network(info)
    to_train = options.cam_model not in (None, options.model) and cam_expert(options, info) is None
    seconds = _seconds_from_timed_steps(
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
        f"{options.batch_syn or count} of {count} synthetic images, matching {options.expert_epochs} expert epochs "
        f"from epoch {options.min_start_epoch} on and below epoch {options.max_start_epoch}; {_state(folder)}",
        "options": _other_options(options),
        "precision": describe_numerics(device, network, options.precision, iterations=True),
        "memory": str(plan).removeprefix("memory plan: "),
        "time": f"about {_duration(sum(seconds))}: experts {_duration(seconds.experts)}, iterations "
        f"{_duration(seconds.iterations)}, evaluations {_duration(seconds.evaluations)}; scaled from steps of {_SAMPLES} images "
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


def _seconds_from_timed_steps(
    options: DistillOptions,
    info: DatasetInfo,
    network: Trainable,
    plan: Plan,
    device: torch.device,
    *,
    missing: int,
    train_cam: bool,
) -> EstimatedSeconds:
    """Return `estimated_seconds`, with costs from timed steps of all networks of the run."""
    cam = options.cam_network(info)
    trained = (network, *options.evaluated_networks(info).values(), *([] if cam is None else [cam]))
    steps = [(network, precision_on(device, network, options.precision, iterations=True))]
    steps += [(each, precision_on(device, each, options.precision)) for each in trained]
    costs = {  # equal steps are timed once; only the student's needs the derivative
        step: _measured_seconds(*step, info.image_shape, device, tangent=step == steps[0])
        for step in dict.fromkeys(steps)
    }
    student_cost, expert_cost, *evaluated_costs = (costs[step] for step in steps)
    cam_seconds = None if cam is None else evaluated_costs.pop().gradient
    return estimated_seconds(
        options, info, missing, student_cost, share=plan.passes / plan.work.student.passes[0], expert=expert_cost.gradient,
        evaluated=[each.gradient for each in evaluated_costs], cam=cam_seconds, train_cam=train_cam,
    )  # fmt: skip


def estimated_seconds(
    options: DistillOptions,
    info: DatasetInfo,
    missing: int,
    cost: SecondsPerImage,
    *,
    share: float,
    expert: float,
    evaluated: Sequence[float],
    cam: float | None = None,
    train_cam: bool = False,
) -> EstimatedSeconds:
    """Return the estimated seconds of a run that trains `missing` experts.

    All costs are seconds per image: `cost` in a step of the student, `expert` in a step of an expert, `evaluated` in a step of each
    evaluated network, and `cam` in a step of the network of the Grad-CAM maps, if there is one. `share` is the part of `cost` that
    remains with saved activations. With `train_cam` the network of the maps is trained too.
    """
    random_sets = 1 + has_soft_baseline(options, options.network(info))
    count = options.ipc * info.num_classes
    crops = options.canvas.samples if options.canvas else 1
    batch = (options.batch_syn or count) * crops
    epochs = options.evaluation_protocol().total_epochs
    trainings = [epochs * count * crops * gradient + info.num_test * gradient / 3 for gradient in evaluated]
    steps = options.Iteration * options.num_trajectories * options.syn_steps
    # of the initial images, and every `eval_it` iterations, for each set
    evaluations = _set_count(options) * (1 + math.ceil(options.Iteration / options.eval_it))
    maps = 0 if cam is None else math.ceil(options.Iteration / options.cam_interval) * count * cam
    return EstimatedSeconds(
        experts=missing * _seconds_to_train(options, info, expert)
        + (0 if cam is None or not train_cam else _seconds_to_train(options, info, cam)),
        iterations=steps * batch * (cost.gradient + cost.tangent) * share + maps,
        # the first network is also evaluated on random real images
        evaluations=options.num_eval * (evaluations * sum(trainings) + random_sets * trainings[0]),
    )


def _seconds_to_train(options: DistillOptions, info: DatasetInfo, gradient: float) -> float:
    """Return the seconds to train an expert whose steps take `gradient` seconds per image."""
    gradients = 2 if options.rho_max else 1  # of a step
    forward = gradient / 3  # a backward pass costs two forward passes
    return options.train_epochs * (info.num_train * gradients * gradient + info.num_test * forward)


def _set_count(options: DistillOptions) -> int:
    """Return the number of sets that are evaluated and saved: the images, and their moving average if there is one."""
    return 1 if options.ema_decay is None else 2


def estimated_bytes(
    options: DistillOptions,
    info: DatasetInfo,
    num_parameters: int,
    missing: int,
    uncompressed: int,
    *,
    cam_parameters: int = 0,
    image_parameters: int = 0,
) -> EstimatedBytes:
    """Return the estimated bytes written by a run that trains `missing` experts and compresses `uncompressed` ones.

    `cam_parameters` is the number of parameters of the network of the Grad-CAM maps, or 0 if it is not trained; `image_parameters`
    that of the parameters from which the images are computed, or 0 if their pixels are learned.
    """
    rows = missing * (options.train_epochs + 1) + uncompressed * (options.num_interpolation or 0)
    values = math.prod(info.image_shape)
    images = 4 * options.ipc * info.num_classes * values * options.num_tiles
    weights = 0 if options.cam_model is None else images // info.image_shape[0]
    sets, learned = _set_count(options), 4 * image_parameters
    whitening = 4 * _WHITENING * values**2 if options.zca else 0
    return EstimatedBytes(
        experts=4 * (rows * num_parameters + (options.train_epochs + 1) * cam_parameters),
        # the last and the best of each set; the checkpoint's images, moving average and pixel weights, what is learned, and its velocity
        run_folder=2 * sets * (images + whitening + learned) + sets * images + (2 * learned or images) + weights,
        packed_data=info.packed_bytes,
    )


def _measured_seconds(
    network: Network, precision: Precision, image_shape: tuple[int, int, int], device: torch.device, *, tangent: bool
) -> SecondsPerImage:
    """Return the measured seconds per image of a student's gradient and, with `tangent`, of its derivative (else 0)."""
    student = student_for(network, device, "indices", precision=precision)
    theta = torch.randn(network.num_parameters, device=device) / 100
    images = torch.randn(_SAMPLES, *image_shape, device=device)
    labels = torch.zeros(_SAMPLES, dtype=torch.long, device=device)
    return SecondsPerImage(
        _timed(lambda: student.gradient(theta, images, labels), device) / _SAMPLES,
        _timed(lambda: student.gradient_jvp(theta, images, labels, theta), device) / _SAMPLES if tangent else 0.0,
    )


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of the fastest of several calls, without the first one, which allocates memory and compiles kernels.

    Other processes can only make a call slower, so the fastest is the best estimate.
    """
    seconds: list[float] = []
    while len(seconds) < _MIN_CALLS or (sum(seconds) < _ENOUGH_SECONDS and len(seconds) < _MAX_CALLS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


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
    """Return `folder`, or where it does not exist yet the first folder above it that does."""
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
