"""Measure the distance between training on distilled sets and on real images: `python -m mtt_fast.analysis distance`.

This is Figure 5, right, of the paper (section 4.2), which compares MTT and DSA on CIFAR-100 with 1 image per class. From one set
of initial parameters θ_0

    θ*_Δt   are the parameters after Δt steps of training on real images, as experts are trained
    θ̂_k     are the parameters after k steps on the distilled set, with the learning rate, batch size, augmentation, momentum
            and weight decay of its distillation; k = 0 … K, in the paper K = 1,000

    d(Δt) = min_k |θ̂_k − θ*_Δt|² / |θ_0 − θ*_Δt|²

d is the normalised squared error of the matching loss at the closest step: 1 if no step is closer than the start, 0 if a step
reaches the target. The start and the real steps are those of an expert, so after whole epochs θ* is the row that
`mtt_fast.experts` saves. With --starts the distances are measured from several sets of initial parameters.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from mtt_fast.augmentation.siamese import augment_by_strategy
from mtt_fast.commands import parsing
from mtt_fast.commands.option_fields import Checked, Group, Role, names_of
from mtt_fast.commands.options import CommonOptions, Count, Networks, Positive
from mtt_fast.commands.plots import plot_label, save_figure
from mtt_fast.commands.tables import markdown_table
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.distill.segments import student_batches
from mtt_fast.engine.students.choice import precision_on
from mtt_fast.engine.unroll import unroll
from mtt_fast.errors import InputError
from mtt_fast.experts.options import ExpertTrainingOptions
from mtt_fast.networks.protocol import Trainable
from mtt_fast.runtime.interrupts import StopRequest, raise_if_stopped, stop_request
from mtt_fast.runtime.numerics import numerics
from mtt_fast.runtime.provenance import choose_device, device_name, digest, versions
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.storage.identity import check_same_data
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.records import read_entries, write_record
from mtt_fast.storage.run_files import SYNTHETIC, last_name
from mtt_fast.storage.run_folder import lock_folder
from mtt_fast.storage.text_files import write_text
from mtt_fast.training.experts import ExpertTraining, expert_steps
from mtt_fast.training.images import RealImages, as_training_images, real_images
from mtt_fast.training.protocols import EvaluationProtocol

log = logging.getLogger(__name__)

PROGRAM = "python -m mtt_fast.analysis distance"
RECORD = "distance.json"
_STOPPED = "stopped; the sets that were finished are saved, and the same command continues"
_WITHOUT_AUGMENTATION = {"DC", "DD", "LD"}  # methods whose distillation sees the images as they are
_WITH_ADAM = {"LD", "RaT-BPTT", "AT-BPTT"}  # methods whose distillation trains networks by Adam
_EXPERT_OPTIONS = {field.name for field in dataclasses.fields(ExpertTrainingOptions)} - {
    field.name for field in dataclasses.fields(CommonOptions)
} | {"expert_lr", "batch_real", "dsa", "dsa_strategy"}


@dataclass(frozen=True)
class DistanceOptions(ExpertTrainingOptions):
    """Plot the distance between training on each distilled set and Δt steps of training on real images, over Δt.

    The data set, the network and similar options are those of the first run unless given. The real training uses the options of
    the first run that was distilled by matching trajectories. A stopped command continues when repeated.
    """

    GROUP: ClassVar[Group] = Group.OTHER

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN …")] = ()
    """run folders or synthetic.safetensors files, optionally as LABEL=PATH, e.g. MTT=runs/mtt DSA=runs/dsa"""
    deltas: str = "10,20,50,100,200,500,1000,2000,5000"
    """values of Δt, the number of steps on real images, joined by commas"""
    steps: Count = 1000
    """K: steps on the distilled set; K + 1 parameter vectors are in memory together"""
    starts: Networks = 1
    """number of initial networks; each is trained on real images"""
    expert_lr: Annotated[Positive, Group.EXPERTS] = 0.01
    """learning rate of the real training"""
    batch_real: Annotated[Count, Group.EXPERTS] = 256
    """batch size of the real training"""
    out: Annotated[str, Group.OUTPUT, Checked(check_output_folder)] = "runs/distance"
    """folder for distance.png, distance.md and distance.json"""

    def without_effect(self) -> dict[str, str]:
        """See `CommonOptions.without_effect`."""
        reasons = super().without_effect() | {"networks_at_once": "here: one network is trained at a time"}
        if not self.decay:
            reasons["train_epochs"] = "without --decay: real training takes the largest of --deltas steps"
        return reasons


Nearest = tuple[float, int]
"""d(Δt), and the student's step k at that distance."""


class _RealTraining(NamedTuple):
    """The training on real images to which all sets are compared."""

    network: Trainable
    images: RealImages
    settings: ExpertTraining
    deltas: Sequence[int]  # rising


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    sets = read_distilled_sets(parsing.preview(DistanceOptions, argv, PROGRAM).runs)
    if not sets:
        raise InputError(f"expected run folders, plain or as LABEL=FOLDER; see {PROGRAM} --help")
    defaults = default_options([synthetic.recipe for synthetic in sets.values()])
    options = parsing.parse(DistanceOptions, argv, PROGRAM, defaults, source=next(iter(sets)))
    deltas = sorted(set(parsing.integers(options.deltas, "--deltas")))
    training = options.training_at(options.expert_lr, options.batch_real)
    device = choose_device(options.device)
    data = options.load_data()
    network = options.network(data)
    for label, synthetic in sets.items():
        check_same_data(synthetic.identity, data.identity(zca=options.zca), label)
        if synthetic.recipe.get("sort_method"):
            log.warning(
                "%s: its experts were trained on a curriculum of images (PAD); the real training here takes all images in each epoch",
                label,
            )
        if synthetic.recipe.get("method") in _WITH_ADAM:
            log.warning("%s: its distillation trained networks by Adam; the student here takes steps of SGD", label)
    with numerics(device, options.precision), lock_folder(Path(options.out)), stop_request() as stop:
        images = real_images(data, device, zca=options.zca)
        _run(options, sets, _RealTraining(network, images, training, deltas), stop)


def default_options(recipes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the defaults of the options: data and network by the first set's recipe, experts by the first that names some."""
    common = names_of(CommonOptions, Role.RESULT, Role.LOCATION)
    with_experts = next((recipe for recipe in recipes if "expert_epochs" in recipe), {})
    first_options = {name: value for name, value in (recipes[0] if recipes else {}).items() if name in common}
    return first_options | {name: value for name, value in with_experts.items() if name in _EXPERT_OPTIONS}


def read_distilled_sets(arguments: Sequence[str]) -> dict[str, SyntheticDataset]:
    """Return the sets by label: the text before "=", or the folder's name where the whole argument is a path."""
    sets: dict[str, SyntheticDataset] = {}
    for argument in arguments:
        label, equals, path = argument.partition("=")
        labelled = bool(equals) and not Path(argument).exists()  # a path may hold the sign as well
        file = Path(path if labelled else argument)
        if not labelled:
            label = last_name(file.parent if file.is_file() else file)
        if not label.strip():
            raise InputError(
                f"{argument}: expected a label before =, found none; give LABEL=FOLDER, or the folder alone"
            )
        if label in sets:
            raise InputError(f"{argument}: there is another run with the label {label}; give labels as LABEL=FOLDER")
        sets[label] = SyntheticDataset.load(file / SYNTHETIC if file.is_dir() else file)
    return sets


def _run(
    options: DistanceOptions, sets: Mapping[str, SyntheticDataset], real: _RealTraining, stop: StopRequest
) -> None:
    folder, deltas, device = Path(options.out), real.deltas, real.images.train.labels.device
    precision = precision_on(device, real.network, options.precision)
    measured = read_entries(
        folder / RECORD, "measured", _measurement, "a record of this command", "delete it or choose another --out"
    )
    keys = {
        (start, label): _measurement_key(options, synthetic, real, start)
        for start in range(options.starts)
        for label, synthetic in sets.items()
    }
    missing = [pair for pair, key in keys.items() if _find_nearest(measured, key) is None]
    trainings = {start for start, _ in missing}
    with tqdm(total=len(trainings) * deltas[-1] + len(missing) * options.steps, desc="distance", unit="step") as bar:
        for start in sorted(trainings):
            steps = expert_steps(
                real.images, real.network, real.settings, seed=options.seed, index=start, precision=precision
            )
            initial, *targets = parameters_after(steps, deltas, stop, bar)
            for label in (label for its_start, label in missing if its_start == start):
                generator = generator_for(options.seed, "distance", start)
                path = student_path(real.network, initial, sets[label], options, generator)
                nearest = nearest_steps(path, torch.stack(targets))
                bar.update(options.steps)
                measured.append({"question": keys[start, label], "nearest": nearest})
                _write_record(_curves(keys, measured, deltas), measured, options, device)
                raise_if_stopped(stop, _STOPPED)
    curves = _curves(keys, measured, deltas)
    _write_record(curves, measured, options, device)
    write_text(folder / "distance.md", _as_markdown(curves, options))
    _draw(folder / "distance.png", curves)
    for label, points in curves.items():
        closest = min(points, key=lambda point: point["mean"])
        log.info("%s: closest %.3f ± %.3f, Δt = %d", label, closest["mean"], closest["std"], closest["real_steps"])


def parameters_after(steps: Iterator[Tensor], deltas: Sequence[int], stop: StopRequest, bar: tqdm) -> list[Tensor]:
    """Return the parameters (P,) that `steps` yields first, and after each of the numbers `deltas` (rising) of steps.

    Raises `InputError` if parameters are no longer finite, or equal to those at the start; `Stopped` on request.
    """
    parameters = []
    for number, theta in enumerate(itertools.islice(steps, deltas[-1] + 1)):
        raise_if_stopped(stop, _STOPPED)
        if number in (0, *deltas):
            parameters.append(theta)
            if not bool(theta.isfinite().all()):
                raise InputError(f"training on real images diverged within {number} steps; give a smaller --expert_lr")
            if number and theta.equal(parameters[0]):
                raise InputError(f"training on real images went nowhere in {number} steps; give a larger --expert_lr")
        bar.update(number > 0)
    return parameters


def student_path(
    network: Trainable,
    start: Tensor,
    synthetic: SyntheticDataset,
    options: DistanceOptions,
    generator: torch.Generator,
) -> Tensor:
    """Return θ̂_0 … θ̂_K, (K + 1, P): `options.steps` steps from `start` (P,) as in the set's distillation."""
    recipe, images = synthetic.recipe, as_training_images(synthetic, start.device)
    batches = student_batches(len(images), batch_size_of(recipe), options.steps, generator)
    augment = augment_by_strategy(strategy_of(recipe, options))
    lrs = _student_rates(synthetic)
    if lrs.dim():  # one for each of N steps, which are repeated
        lrs = lrs.repeat(math.ceil(options.steps / len(lrs)))[: options.steps]
    with torch.no_grad():
        path: Tensor = unroll(
            network, start, images.pixels, images.labels, lrs.to(start.device),
            [images.expand_crops(index) for index in batches],
            augment if images.canvas is None else images.canvas.crops(augment),
            memory_budget="auto", momentum=recipe.get("student_mom", 0.0), weight_decay=recipe.get("student_l2", 0.0),
            generator=generator, precision=precision_on(start.device, network, options.precision),
        )  # fmt: skip
    return path


def _student_rates(synthetic: SyntheticDataset) -> Tensor:
    """Return the learning rate () of the student in the set's distillation, or one for each of its steps (N,)."""
    lrs = synthetic.lr if synthetic.lr_per_step is None else synthetic.lr_per_step
    # a velocity μ m + (1 − d) g is 1 − d times that of μ m + g
    return lrs * (1 - float(synthetic.recipe.get("student_dampening", 0.0)))


def batch_size_of(recipe: Mapping[str, Any]) -> int | None:
    """Return the number of images in a step of the networks of a set's distillation, None for all."""
    if recipe.get("method") in ("DC", "DSA"):
        return int(recipe.get("batch_train") or EvaluationProtocol.batch_size)
    size: int | None = recipe.get("batch_syn")
    return size


def strategy_of(recipe: Mapping[str, Any], options: DistanceOptions) -> str:
    """Return the augmentation of a set's distillation, or of the options if the set does not record it."""
    if "syn_strategy" in recipe:  # of RaT-BPTT and AT-BPTT, whose --dsa_strategy is that of evaluations
        return str(recipe["syn_strategy"])
    if recipe.get("no_aug") or recipe.get("method") in _WITHOUT_AUGMENTATION or not recipe.get("dsa", options.dsa):
        return "none"
    return str(recipe.get("dsa_strategy", options.dsa_strategy))


def nearest_steps(path: Tensor, targets: Tensor) -> list[Nearest]:
    """Return, for each of `targets` (n, P), the distance d of the module's docstring and the step with that distance.

    `path` (K + 1, P) is the student's, from the common start on; a step that is not finite is infinitely far.
    """

    def squared_distances(theta: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(targets - theta, dim=1, dtype=torch.float64)
        return norms.square()

    initial_distances = squared_distances(path[0])
    distances = torch.stack([squared_distances(theta) for theta in path]) / initial_distances  # (K + 1, n)
    least, step = distances.nan_to_num(nan=math.inf).min(dim=0)
    return [(float(value), int(k)) for value, k in zip(least, step, strict=True)]


def _measurement_key(
    options: DistanceOptions, synthetic: SyntheticDataset, real: _RealTraining, start: int
) -> dict[str, Any]:
    """Return everything on which a set's distances from one start depend. It is the "question" of an entry in distance.json."""
    student = {name: synthetic.recipe.get(name) for name in ("student_mom", "student_l2")}
    student["batch_syn"] = batch_size_of(synthetic.recipe)
    key = {
        "set": digest(synthetic.images, synthetic.labels, _student_rates(synthetic)),
        "label_kind": synthetic.label_kind,
        "canvas": synthetic.canvas and dataclasses.asdict(synthetic.canvas),
        "student": student | {"augment": strategy_of(synthetic.recipe, options), "steps": options.steps},
        "training": real.settings.record(),
        "deltas": list(real.deltas),
        "start": start,
        "seed": options.seed,
        "network": real.network.describe(),
        "fingerprint": real.images.data.fingerprint,
        "whitening": real.images.identity.whitening,
        "precision": precision_on(real.images.train.labels.device, real.network, options.precision),
    }
    return dict(json.loads(json.dumps(key)))  # as in the record that is read back


def _measurement(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry of the record. Raises one of `MALFORMED` for anything else."""
    nearest = [(float(distance), int(step)) for distance, step in entry["nearest"]]
    return {"question": dict(entry["question"]), "nearest": nearest}


def _find_nearest(measured: Sequence[Mapping[str, Any]], key: Mapping[str, Any]) -> Sequence[Nearest] | None:
    return next((entry["nearest"] for entry in measured if entry["question"] == key), None)


def _curves(
    keys: Mapping[tuple[int, str], Mapping[str, Any]], measured: Sequence[Mapping[str, Any]], deltas: Sequence[int]
) -> dict[str, list[dict[str, Any]]]:
    """Return, by label, a point for each Δt, over the starts that are measured."""
    nearest_by_label: dict[str, list[Sequence[Nearest]]] = {}
    for (_, label), key in keys.items():
        if (nearest := _find_nearest(measured, key)) is not None:
            nearest_by_label.setdefault(label, []).append(nearest)
    return {
        label: [_point(delta, [nearest[index] for nearest in by_start]) for index, delta in enumerate(deltas)]
        for label, by_start in nearest_by_label.items()
    }


def _point(delta: int, nearest: Sequence[Nearest]) -> dict[str, Any]:
    distances = [distance for distance, _ in nearest]
    return {
        "real_steps": delta,
        "mean": statistics.fmean(distances),
        "std": statistics.stdev(distances) if len(distances) > 1 else 0.0,
        "n": len(distances),
        "student_step": statistics.fmean(step for _, step in nearest),
    }


def _about(options: DistanceOptions) -> str:
    starts = "one start" if options.starts == 1 else f"{options.starts} starts, mean ± standard deviation"
    return (
        f"Least squared distance over {options.steps} steps on the distilled set to where Δt steps on real images lead, "
        f"divided by the squared distance of the start from there; from {starts}."
    )


def _write_record(
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    measured: Sequence[Mapping[str, Any]],
    options: DistanceOptions,
    device: torch.device,
) -> None:
    record = {
        "distance": _about(options),
        "curves": curves,
        "measured": measured,
        "options": dataclasses.asdict(options),
        "device": device_name(device),
        "versions": versions(),
    }
    write_record(Path(options.out) / RECORD, record)


def _as_markdown(curves: Mapping[str, Sequence[Mapping[str, Any]]], options: DistanceOptions) -> str:
    header = [str(point["real_steps"]) for point in next(iter(curves.values()))]
    rows = [[label, *map(_format_point, points)] for label, points in curves.items()]
    return f"{markdown_table(['Δt, steps on real images', *header], rows)}\n{_about(options)}\n"


def _format_point(point: Mapping[str, Any]) -> str:
    return f"{point['mean']:.3f}" + (f" ± {point['std']:.3f}" if point["n"] > 1 else "")


def _draw(path: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, points in curves.items():
        x, mean, std = ([point[name] for point in points] for name in ("real_steps", "mean", "std"))
        (line,) = axes.plot(x, mean, marker="o", markersize=3, label=plot_label(label))
        low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.axhline(1.0, color="grey", linestyle="--", linewidth=0.8)
    axes.set_xscale("log")
    axes.set(xlabel="Δt: steps on real images", ylabel="least |θ̂ − θ*|² / |θ_0 − θ*|²")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(path, figure)
