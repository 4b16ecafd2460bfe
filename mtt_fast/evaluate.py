"""How well networks do that were trained on a distilled set alone: `python -m mtt_fast.evaluate RUN_OR_FILE`.

The paper's protocol, or another by name (mtt_fast/protocols.py), on one network or several. The same protocol measures
random real images, and files of the public code.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from mtt_fast import cli
from mtt_fast.arithmetic import arithmetic, describe_arithmetic, precision_on
from mtt_fast.data import ImageData
from mtt_fast.errors import Diverged, InputError
from mtt_fast.identity import OTHER_DATA, check_same_data, check_same_whitening, other_data_in_words
from mtt_fast.interop.plain import guess_label_kind
from mtt_fast.interrupts import stop_request
from mtt_fast.option_fields import Needs, Role, names_of
from mtt_fast.options import Count, EvaluationOptions, RateOrNone, RealImages, real_images
from mtt_fast.protocols import Accuracy, evaluate
from mtt_fast.provenance import choose_device, device_name, versions
from mtt_fast.records import write_record
from mtt_fast.run_folder import SYNTHETIC
from mtt_fast.set_checks import check_classes
from mtt_fast.synthetic import SyntheticDataset, load_public_pair
from mtt_fast.texture import Canvas
from mtt_fast.training import Images
from mtt_fast.whitening import Whitening

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

    ipc: Count = 1
    """images a class, of random real images"""
    lr_teacher: RateOrNone = None
    """learning rate; without it the learned one, or 0.01 where there is none"""
    texture: bool = False
    """the images of a .pt file are textures, of which networks see random crops"""
    canvas_size: Annotated[Count, Needs("texture")] = 2
    """side of such a canvas, in images"""
    canvas_samples: Annotated[Count, Needs("texture")] = 1
    """crops of each canvas in a step"""
    label_kind: Literal["probabilities", "logits"] | None = None
    """of soft labels in a .pt file: probabilities or logits (guessed from their sums without this)"""
    other_data: bool = False
    """test on other images than those that the set was made from, of the same classes and size; they are normalised or whitened
    as its own were"""

    def without_effect_on(self, sources: Sequence[str]) -> dict[str, str]:
        """Return the options that have no effect on these sets, and why."""
        found = {}
        if RANDOM not in sources:
            found["ipc"] = f'without "{RANDOM}" among the sets: the others bring their own number of images'
        if not any(source.endswith(".pt") for source in sources):
            of_pt = "without a .pt file among the sets: those of this package know it themselves"
            found |= dict.fromkeys(("texture", "canvas_size", "canvas_samples", "label_kind"), of_pt)
        return found


@dataclass(frozen=True)
class EvaluateOptions(SetOptions):
    """Train fresh networks on a distilled set, random real images, or files of the public code, and test them."""

    source: tyro.conf.Positional[str] = ""
    """a run's folder, a synthetic.safetensors, an images_*.pt with its labels_*.pt beside it, or the word "random" """
    out: Annotated[str | None, Role.PLACE] = None
    """also write the result to this JSON file"""

    def without_effect(self) -> dict[str, str]:
        """See `CommonOptions.without_effect`."""
        return super().without_effect() | self.without_effect_on([self.source])


def main(argv: Sequence[str]) -> None:
    """Run the command with the arguments `argv`."""
    program = "python -m mtt_fast.evaluate"
    source = cli.preview(EvaluateOptions, argv, program).source
    if not source:
        raise InputError(f"expected a run's folder, a file, or the word {RANDOM}; see {program} --help")
    synthetic = read_synthetic(source)
    settings = {} if synthetic is None else settings_of(synthetic)
    options = cli.parse(EvaluateOptions, argv, program, settings, source=source)
    device = choose_device(options.device)
    with arithmetic(device, options.precision):
        _run(options, synthetic, device)


def _run(options: EvaluateOptions, synthetic: SyntheticDataset | None, device: torch.device) -> None:
    protocol = options.evaluation_protocol()
    if options.other_data and synthetic is None:
        raise InputError(f"{OTHER_DATA}: expected a distilled set, found {options.source}, of no images; leave it out")
    data = data_for(options, options.source, synthetic)
    networks = options.evaluated_networks(data)
    real = real_images_for(options, options.source, synthetic, data, device)
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
                "data": real.identity.record(),
                "made_from": None if synthetic is None else synthetic.identity.record(),
                "other_data": options.other_data,
                "device": device_name(device),
                "arithmetic": describe_arithmetic(device, networks[first], options.precision),
                "versions": versions(),
            },
        )
    check_any_trained(found.values())


def read_synthetic(source: str) -> SyntheticDataset | None:
    """Return the distilled set of a run's folder or of a file of this package; None where `source` is another."""
    return None if source == RANDOM or source.endswith(".pt") else SyntheticDataset.load(_file(source))


def _file(source: str) -> Path:
    """Return the file of the distilled set that `source`, a file or a run's folder, names."""
    path = Path(source)
    return path / SYNTHETIC if path.is_dir() else path


def settings_of(synthetic: SyntheticDataset) -> dict[str, Any]:
    """Return the options of its distillation that an evaluation has too, but for those of the machine."""
    names = names_of(EvaluationOptions, Role.RESULT, Role.EVALUATION, Role.PLACE)
    zca = synthetic.whitening is not None
    return {name: value for name, value in synthetic.recipe.items() if name in names} | {"zca": zca}


def data_for(options: SetOptions, source: str, synthetic: SyntheticDataset | None) -> ImageData:
    """Return the images that the options name.

    Raises `InputError` if they are not those that the set, `synthetic` from `source`, was made from, nor --other_data allows it.
    """
    data = options.load_data()
    if synthetic is not None:
        made_from, at_hand = synthetic.identity, data.identity(options.zca)
        check_same_data(made_from, at_hand, _file(source), other_data=options.other_data)
        if told := other_data_in_words(made_from, at_hand):
            log.info("%s: %s", _file(source), told)
    return data


def real_images_for(
    options: SetOptions, source: str, synthetic: SyntheticDataset | None, data: ImageData, device: torch.device
) -> RealImages:
    """Return `data` on the device as networks see it that are trained on the set, `synthetic` from `source`.

    Raises `InputError` if the set was whitened by another fit, and --other_data does not say to whiten `data` by the same.
    """
    if synthetic is not None and options.other_data:
        return real_images(data, options.zca, device, synthetic.transform)
    real = real_images(data, options.zca, device)
    if synthetic is not None and synthetic.whitening is not None and isinstance(real.transform, Whitening):
        check_same_whitening(synthetic.whitening, real.transform, _file(source))
    return real


def training_set(
    options: SetOptions, source: str, synthetic: SyntheticDataset | None, real: RealImages, device: torch.device
) -> tuple[Callable[[torch.Generator], Images], float]:
    """Return what each network trains on (`synthetic` is what `read_synthetic` found), and the learning rate.

    Raises `InputError` for files that are broken or of another data set.
    """
    if synthetic is not None:
        images, learned = as_training_images(synthetic, device), float(synthetic.lr)
    elif source == RANDOM:
        classes = real.data.num_classes
        return (
            lambda generator: random_subset(real.train, classes, options.ipc, generator),
            REAL_IMAGES_LR if options.lr_teacher is None else options.lr_teacher,
        )
    else:
        pixels, labels, rate = load_public_pair(source)
        canvas = Canvas(options.canvas_size, options.canvas_samples) if options.texture else None
        images = Images(pixels.to(device), _as_targets(labels, options.label_kind).to(device), canvas=canvas)
        learned = REAL_IMAGES_LR if rate is None else float(rate)
    check_shape(images, real.data, source)
    tell_missing(check_classes(images.labels, real.data.num_classes, source), real.data, source)
    return lambda _: images, learned if options.lr_teacher is None else options.lr_teacher


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
        if kind is not None:
            raise InputError(f"--label_kind {kind}: has no effect on labels that are classes; leave it out")
        return labels
    if kind is None:
        kind = guess_label_kind(labels)
        log.info("labels are soft; taken as %s", kind)
    return labels.softmax(dim=1) if kind == "logits" else labels


if __name__ == "__main__":
    sys.exit(cli.run(main))
