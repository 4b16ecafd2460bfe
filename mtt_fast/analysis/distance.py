"""How close students on distilled sets come to later parameters of the expert: `python -m mtt_fast.analysis distance`.

The right of Figure 5 of the paper (section 4.2), which compares sets that were distilled to match long and short pieces
of the experts' trajectories. The definition is this project's. For a distilled set, an expert θ*_0, θ*_1, … (one row an epoch) and a start epoch s:

    θ_0 = θ*_s,   θ_{k+1} = θ_k − α ∇ℓ(θ_k; X[b_k], y[b_k])   k = 0 … K − 1     (as in the distillation: the same learning rate,
                                                                batch size, augmentation, momentum and weight decay)
    d(Δ) = min_k ‖θ_k − θ*_{s+Δ}‖ / ‖θ*_s − θ*_{s+Δ}‖

So d(Δ) is the distance, in units of the way that the expert went in Δ epochs, at which some step of the student passes
the expert's parameters: 1 where no step comes closer than the start, 0 where one meets them. Distances are Euclidean and
not squared. The expert's Δ epochs are Δ·⌈n/b⌉ steps on real images, n training images in batches of b: the Δt of the
figure's axis. Mean and standard deviation are over experts and start epochs.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from mtt_fast import cli
from mtt_fast.analysis.output import markdown_table, save_figure
from mtt_fast.arithmetic import arithmetic, precision_on
from mtt_fast.augment import augment_by_strategy
from mtt_fast.distillation.segments import student_batches
from mtt_fast.errors import InputError
from mtt_fast.evaluate import as_training_images, check_shape
from mtt_fast.files import write_text
from mtt_fast.interrupts import Stopped, stop_request
from mtt_fast.models import Trainable
from mtt_fast.options import CommonOptions, at_least, buffer_folder
from mtt_fast.provenance import choose_device, device_name, versions
from mtt_fast.records import write_record
from mtt_fast.run_folder import SYNTHETIC
from mtt_fast.seeding import generator_for
from mtt_fast.synthetic import SyntheticDataset
from mtt_fast.trajectories import TrajectoryStore, check_compatible
from mtt_fast.unroll import unroll

log = logging.getLogger(__name__)

PROGRAM = "python -m mtt_fast.analysis distance"


@dataclass(frozen=True)
class DistanceOptions(CommonOptions):
    """Draw the parameter distance to the expert after Δt real steps, for several distilled sets.

    The data set, the network, the experts and the like are those of the first run, unless they are given.
    """

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """run folders or synthetic.safetensors files, each plain or as LABEL=PATH, e.g. long-range=runs/M20 short-range=runs/M1"""
    buffer_path: str = "buffers"
    """where the experts' trajectories are"""
    max_experts: int = 5
    """use only so many experts"""
    start_epochs: str = "0"
    """expert epochs to start from, joined by commas"""
    epochs: int | None = None
    """the largest Δ, in expert epochs; without it as far as the experts go"""
    steps: int = 1000
    """K: student steps on the distilled set, whose K + 1 vectors of parameters are in memory together"""
    out: str = "runs/distance"
    """folder for distance.png, distance.md and distance.json"""


Nearest = tuple[float, int]
"""d(Δ), and the student's step k that is so near."""


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    sets = _distilled_sets(cli.parse_known(DistanceOptions, argv, PROGRAM).runs)
    names = {field.name for field in dataclasses.fields(CommonOptions)} | {"buffer_path"}
    of_first: Mapping[str, Any] = next(iter(sets.values())).recipe if sets else {}
    defaults = {name: value for name, value in of_first.items() if name in names and name != "device"}
    options = cli.parse(DistanceOptions, argv, PROGRAM, defaults)
    if not sets:
        raise InputError(f"expected run folders, plain or as LABEL=FOLDER; see {PROGRAM} --help")
    complaint = at_least(1, max_experts=options.max_experts, epochs=options.epochs, steps=options.steps)
    if complaint:
        raise InputError(complaint)
    starts = cli.integers(options.start_epochs, "--start_epochs", minimum=0)
    device = choose_device(options.device)
    with arithmetic(device, options.precision):
        _run(options, sets, starts, device)


def _distilled_sets(places: Sequence[str]) -> dict[str, SyntheticDataset]:
    """Return the sets by label: what stands before "=", or the folder's name, where there is a file or folder so called."""
    found: dict[str, SyntheticDataset] = {}
    for place in places:
        label, equals, path = place.partition("=")
        labelled = bool(equals) and not Path(place).exists()  # a path may hold the sign as well
        file = Path(path if labelled else place)
        if not labelled:
            label = file.parent.name if file.is_file() else file.name
        if label in found:
            raise InputError(f"{place}: there is another run with the label {label}; give labels as LABEL=FOLDER")
        found[label] = SyntheticDataset.load(file / SYNTHETIC if file.is_dir() else file)
    return found


def _run(
    options: DistanceOptions, sets: Mapping[str, SyntheticDataset], starts: Sequence[int], device: torch.device
) -> None:
    data = options.load_data()
    network = options.network(data)
    experts = TrajectoryStore(buffer_folder(options.buffer_path, data, options.model, options.zca))
    count = min(options.max_experts, len(experts))
    if not count:
        raise InputError(f"{experts.folder}: expected experts, found none; give the --buffer_path of the runs")
    for label, synthetic in sets.items():
        check_shape(as_training_images(synthetic, torch.device("cpu")), data, label)
        if len(synthetic.class_names) != data.num_classes:
            raise InputError(
                f"{label}: expected {data.num_classes} classes of {data.name}, found {len(synthetic.class_names)}; the "
                "runs must be of one data set"
            )
    last = min(experts.epochs(expert) for expert in range(count))
    reach = [min(last - start, options.epochs or last) for start in starts]
    if min(reach) < 1:
        raise InputError(f"--start_epochs {options.start_epochs}: expected epochs below {last}, where the experts end")
    for expert in range(count):
        check_compatible(
            experts.metadata(expert),
            layout=network.layout.describe(),
            fingerprint=data.fingerprint,
            whitening="zca" if options.zca else "none",
            needed_epochs=last,
            epochs=experts.epochs(expert),
            where=experts.folder,
        )
    found: dict[str, dict[int, list[Nearest]]] = {label: {} for label in sets}
    works = [(label, expert, place) for label in sets for expert in range(count) for place in range(len(starts))]
    with stop_request() as stop, tqdm(works, desc="distance", unit="student") as bar:
        for label, expert, place in bar:
            if stop:
                raise Stopped("stopped; nothing was written", stop.signum)
            start, rows = starts[place], range(starts[place], starts[place] + reach[place] + 1)
            trajectory = torch.stack([experts.read(expert, row) for row in rows]).to(device)
            generator = generator_for(options.seed, "distance", expert, start)
            path = student_path(network, trajectory[0], sets[label], options, generator)
            for delta, nearest in nearest_steps(path, trajectory).items():
                found[label].setdefault(delta, []).append(nearest)
    batch = int(experts.metadata(0).hyperparameters["batch_size"])
    _write(Path(options.out), found, math.ceil(len(data.train.labels) / batch), options, device)


def student_path(
    network: Trainable,
    start: Tensor,
    synthetic: SyntheticDataset,
    options: DistanceOptions,
    generator: torch.Generator,
) -> Tensor:
    """Return θ_0 … θ_K, (K + 1, P): `options.steps` student steps from `start` (P,) as in the set's distillation."""
    recipe, images = synthetic.recipe, as_training_images(synthetic, start.device)
    batches = student_batches(len(images), recipe.get("batch_syn"), options.steps, generator)
    augment = None if recipe.get("no_aug") else augment_by_strategy(options.strategy)
    rates = synthetic.lr if synthetic.lr_per_step is None else synthetic.lr_per_step
    if rates.dim():  # one for each of N steps, which come again and again
        rates = rates.repeat(math.ceil(options.steps / len(rates)))[: options.steps]
    with torch.no_grad():
        path: Tensor = unroll(
            network, start, images.pixels, images.labels, rates.to(start.device),
            [images.seen_in(index) for index in batches],
            augment if images.canvas is None else images.canvas.crops(augment),
            memory_budget="auto", momentum=recipe.get("student_mom", 0.0), weight_decay=recipe.get("student_l2", 0.0),
            generator=generator, precision=precision_on(start.device, network, options.precision),
        )  # fmt: skip
    return path


def nearest_steps(path: Tensor, trajectory: Tensor) -> dict[int, Nearest]:
    """Return, by Δ = 1 …, the distance d(Δ) of the module's docstring and the step k at which it is reached.

    `path` (K + 1, P) is the student's, `trajectory` (Δ's + 1, P) the expert's from the start epoch on.
    Raises `InputError` if the expert is back where it started.
    """
    targets = trajectory[1:]

    def distance_to(place: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(targets - place, dim=1, dtype=torch.float64)
        return norms

    moved = distance_to(trajectory[0])
    if not bool((moved > 0).all()):
        raise InputError(
            "the expert has not moved between two epochs; leave it out with --max_experts, or train it again"
        )
    distances = torch.stack([distance_to(path[k]) for k in range(len(path))])  # (K + 1, Δ's)
    least, step = (distances / moved).min(dim=0)
    return {delta: (float(value), int(k)) for delta, (value, k) in enumerate(zip(least, step, strict=True), 1)}


def _write(
    folder: Path,
    found: Mapping[str, Mapping[int, Sequence[Nearest]]],
    steps_an_epoch: int,
    options: DistanceOptions,
    device: torch.device,
) -> None:
    curves = {
        label: [_point(delta, steps_an_epoch, of) for delta, of in points.items()] for label, points in found.items()
    }
    record = {
        "distance": "least over the student's steps, divided by the expert's way: mean, std over experts and start epochs",
        "curves": curves,
        "options": dataclasses.asdict(options),
        "device": device_name(device),
        "versions": versions(),
    }
    shown = [f"{point['expert_epochs']} ({point['real_steps']})" for point in next(iter(curves.values()))]
    rows = [
        [label, *(f"{point['mean']:.3f} ± {point['std']:.3f}" for point in points)] for label, points in curves.items()
    ]
    table = markdown_table(["after expert epochs (real steps)", *shown], rows)
    about = (
        "Least distance to the expert over the student's steps, divided by the expert's way: mean ± standard deviation."
    )
    write_text(folder / "distance.md", f"{table}\n{about}\n")
    _draw(folder / "distance.png", curves)
    write_record(folder / "distance.json", record)  # last: it says that all is there
    for label, points in curves.items():
        nearest = min(points, key=lambda point: point["mean"])
        log.info(
            "%s: nearest %.3f ± %.3f, after %d real steps",
            label,
            nearest["mean"],
            nearest["std"],
            nearest["real_steps"],
        )


def _point(delta: int, steps_an_epoch: int, nearest: Sequence[Nearest]) -> dict[str, Any]:
    distances = [distance for distance, _ in nearest]
    return {
        "expert_epochs": delta,
        "real_steps": delta * steps_an_epoch,
        "mean": statistics.fmean(distances),
        "std": statistics.stdev(distances) if len(distances) > 1 else 0.0,
        "n": len(distances),
        "student_step": statistics.fmean(step for _, step in nearest),
    }


def _draw(path: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, points in curves.items():
        x, mean, std = ([point[name] for point in points] for name in ("real_steps", "mean", "std"))
        (line,) = axes.plot(x, mean, marker="o", markersize=3, label=label.replace("$", r"\$"))
        low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.axhline(1.0, color="grey", linestyle="--", linewidth=0.8)
    axes.set(xlabel="Δt: the expert's steps on real images", ylabel="distance to the expert / its way, mean ± std")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(path, figure)
