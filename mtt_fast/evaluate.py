"""How well networks do that were trained on a distilled set alone: `python -m mtt_fast.evaluate RUN_OR_FILE`.

The paper's protocol, or another by name (mtt_fast/protocols.py), on one network or several. The same protocol measures
random real images, and files of the public code.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from mtt_fast import cli
from mtt_fast.arithmetic import arithmetic, describe_arithmetic, precision_on
from mtt_fast.data import ImageData
from mtt_fast.errors import Diverged, InputError
from mtt_fast.interop.plain import guess_label_kind
from mtt_fast.interrupts import stop_request
from mtt_fast.options import EvaluationOptions, RealImages, at_least, real_images
from mtt_fast.protocols import Accuracy, evaluate
from mtt_fast.provenance import choose_device, device_name, versions
from mtt_fast.records import write_record
from mtt_fast.run_folder import SYNTHETIC
from mtt_fast.set_checks import check_classes
from mtt_fast.synthetic import SyntheticDataset, load_public_pair
from mtt_fast.texture import Canvas
from mtt_fast.training import Images

log = logging.getLogger(__name__)

RANDOM = "random"
"""The source that stands for random real images."""
REAL_IMAGES_LR = 0.01
"""Learning rate for real images, and for files that bring none, as in the public code."""


def random_subset(real: Images, num_classes: int, ipc: int, generator: torch.Generator) -> Images:
    """Return `ipc` random real images of each class, class-major, as networks see them (floating point).

    Raises `InputError` if a class has fewer.
    """
    chosen = [members[:ipc] for members in shuffled_classes(real, num_classes, ipc, generator)]
    return Images(*real.batch(torch.cat(chosen).to(real.labels.device)))


def shuffled_classes(real: Images, num_classes: int, ipc: int, generator: torch.Generator) -> list[Tensor]:
    """Return, for each class, where its images are in `real`, in random order: a vector of indices on the CPU.

    Raises `InputError` if a class has fewer than `ipc`.
    """
    shuffled = []
    labels = real.labels.cpu()
    for label in range(num_classes):
        members = (labels == label).nonzero()[:, 0]
        if len(members) < ipc:
            raise InputError(f"--ipc {ipc}: class {label} has only {len(members)} real images; use a smaller --ipc")
        shuffled.append(members[torch.randperm(len(members), generator=generator)])
    return shuffled


def as_training_images(synthetic: SyntheticDataset, device: torch.device) -> Images:
    """Return a distilled set as images to train on; label logits become probabilities."""
    moved = synthetic.to(device)
    labels = moved.labels.softmax(dim=1) if synthetic.label_kind == "logits" else moved.labels
    return Images(moved.images, labels, canvas=moved.canvas)


@dataclass(frozen=True)
class SetOptions(EvaluationOptions):
    """What networks are trained on."""

    ipc: int = 1
    """images a class, of random real images"""
    lr_teacher: float | None = None
    """learning rate; without it the learned one, or 0.01 where there is none"""
    texture: bool = False
    """the images of a .pt file are textures, of which networks see random crops"""
    canvas_size: int = 2
    """side of such a canvas, in images"""
    canvas_samples: int = 1
    """crops of each canvas in a step"""
    label_kind: str | None = None
    """of soft labels in a .pt file: probabilities or logits (guessed from their sums without this)"""


@dataclass(frozen=True)
class EvaluateOptions(SetOptions):
    """Train fresh networks on a distilled set, random real images, or files of the public code, and test them."""

    source: tyro.conf.Positional[str] = ""
    """a run's folder, a synthetic.safetensors, an images_*.pt with its labels_*.pt beside it, or the word "random" """
    out: str | None = None
    """also write the result to this JSON file"""


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    program = "python -m mtt_fast.evaluate"
    options = cli.parse(EvaluateOptions, argv, program)
    if not options.source:
        raise InputError(f"expected a run's folder, a file, or the word {RANDOM}; see {program} --help")
    synthetic = read_synthetic(options.source)
    if synthetic is not None:
        options = cli.parse(EvaluateOptions, argv, program, settings_of(synthetic))
    device = choose_device(options.device)
    with arithmetic(device, options.precision):
        _run(options, synthetic, device)


def _run(options: EvaluateOptions, synthetic: SyntheticDataset | None, device: torch.device) -> None:
    protocol = options.evaluation_protocol()
    data = options.load_data()
    networks = options.evaluated_networks(data)
    real = real_images(data, options.zca, device)
    train, lr = training_set(options, options.source, synthetic, real, device)
    log.info("%s", protocol.describe())
    found: dict[str, Accuracy] = {}
    with stop_request() as stop:
        for name, network in networks.items():
            found[name] = evaluate(
                network, train, real.test, lr, protocol, networks=options.num_eval, seed=options.seed, name=name,
                stop=stop, precision=precision_on(device, network, options.precision),
                at_once=options.networks_at_once,
            )  # fmt: skip
            log.info("%s on %s: %s", options.source, name, found[name])
    if options.out:
        first, *_ = networks
        write_record(
            options.out,
            {
                "source": options.source,
                "accuracy": found[first].record(),
                "model": first,
                "accuracy_by_network": {name: result.record() for name, result in found.items()},
                "lr": lr,
                "protocol": protocol.record(),
                "dataset": data.name,
                "zca": options.zca,
                "device": device_name(device),
                "arithmetic": describe_arithmetic(device, networks[first], options.precision),
                "versions": versions(),
            },
        )
    check_any_trained(found.values())


def read_synthetic(source: str) -> SyntheticDataset | None:
    """Return the distilled set of a run's folder or of a file of this package; None where `source` is another."""
    if source == RANDOM or source.endswith(".pt"):
        return None
    path = Path(source)
    return SyntheticDataset.load(path / SYNTHETIC if path.is_dir() else path)


def settings_of(synthetic: SyntheticDataset) -> dict[str, Any]:
    """Return the options of its distillation that an evaluation has too, but for the device."""
    names = {field.name for field in dataclasses.fields(EvaluationOptions)} - {"device"}
    return {name: value for name, value in synthetic.recipe.items() if name in names}


def training_set(
    options: SetOptions, source: str, synthetic: SyntheticDataset | None, real: RealImages, device: torch.device
) -> tuple[Callable[[torch.Generator], Images], float]:
    """Return what each network trains on (`synthetic` is what `read_synthetic` found), and the learning rate.

    Raises `InputError` for files that are broken or of another data set.
    """
    if complaint := at_least(
        1, ipc=options.ipc, canvas_size=options.canvas_size, canvas_samples=options.canvas_samples
    ):
        raise InputError(complaint)
    if synthetic is not None:
        images, learned = as_training_images(synthetic, device), float(synthetic.lr)
    elif source == RANDOM:
        classes = real.data.num_classes
        return (
            lambda generator: random_subset(real.train, classes, options.ipc, generator),
            options.lr_teacher or REAL_IMAGES_LR,
        )
    else:
        pixels, labels, rate = load_public_pair(source)
        canvas = Canvas(options.canvas_size, options.canvas_samples) if options.texture else None
        images = Images(pixels.to(device), _as_targets(labels, options.label_kind).to(device), canvas=canvas)
        learned = REAL_IMAGES_LR if rate is None else float(rate)
    check_shape(images, real.data, source)
    tell_missing(check_classes(images.labels, real.data.num_classes, source), real.data, source)
    return lambda _: images, options.lr_teacher or learned


def check_shape(images: Images, data: ImageData, source: str) -> None:
    """Raise `InputError` if the images from `source`, or the crops of their canvases, are not of the shape of `data`'s."""
    of_canvas = images.canvas.size if images.canvas else 1
    channels, height, width = data.image_shape
    expected = (channels, of_canvas * height, of_canvas * width)
    if tuple(images.pixels.shape[1:]) != expected:
        raise InputError(
            f"{source}: expected {'canvases' if images.canvas else 'images'} {expected} of {data.name}, found "
            f"{tuple(images.pixels.shape[1:])}; name their data set with --dataset, --res"
        )


def tell_missing(there: int, data: ImageData, source: str) -> None:
    """Warn if the set from `source` has images of `there` classes, fewer than `data`: the others cannot be learnt from it."""
    if there < data.num_classes:
        log.warning("%s: has images of %d of the %d classes of %s", source, there, data.num_classes, data.name)


def check_any_trained(results: Iterable[Accuracy]) -> None:
    """Raise `Diverged` if all networks of all `results` diverged: there is no accuracy, and what is written says so."""
    found = list(results)
    if all(result.diverged == len(result.values) for result in found):
        raise Diverged(
            f"all {sum(result.diverged for result in found)} networks diverged, so there is no accuracy; use a smaller --lr_teacher"
        )


def _as_targets(labels: Tensor, kind: str | None) -> Tensor:
    """Return class indices or probabilities; successors of the public code write logits under the same name."""
    if not labels.is_floating_point():
        return labels
    if kind is None:
        kind = guess_label_kind(labels)
        log.info("labels are soft; taken as %s", kind)
    return labels.softmax(dim=1) if kind == "logits" else labels


if __name__ == "__main__":
    sys.exit(cli.run(main))
