"""Read the set on which an evaluation trains networks: a run's, a file's, or random real images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from mtt_fast.augmentation.texture import Canvas
from mtt_fast.commands.option_fields import Group, Needs, Role, names_of
from mtt_fast.commands.options import Count, EvaluationOptions, RateOrNone
from mtt_fast.data import ImageData
from mtt_fast.data.set_checks import check_classes
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.data.whitening import Whitening, check_same_whitening
from mtt_fast.errors import Diverged, InputError
from mtt_fast.interop.pairs import load_public_pair
from mtt_fast.interop.tensor_set import guess_label_kind
from mtt_fast.storage.identity import check_same_data, other_data_in_words
from mtt_fast.storage.run_folder import SYNTHETIC
from mtt_fast.training.images import Images, RealImages, as_training_images, real_images
from mtt_fast.training.protocols import Accuracy
from mtt_fast.training.subsets import random_subset

log = logging.getLogger(__name__)


RANDOM = "random"
"""The source that stands for random real images."""
REAL_IMAGES_LR = 0.01
"""Learning rate for real images, and for files that bring none, as in the public code."""


@dataclass(frozen=True)
class SetOptions(EvaluationOptions):
    """What networks are trained on."""

    GROUP: ClassVar[Group] = Group.SET

    ipc: Count = 1
    """random real images a class, where the set is the word "random" """
    lr_teacher: RateOrNone = None
    """learning rate of the networks; without it the one that the set brings, or 0.01 where it brings none"""
    texture: Annotated[bool, Group.TEXTURE] = False
    """the images of a .pt file are textures, of which networks see random crops"""
    canvas_size: Annotated[Count, Needs("texture"), Group.TEXTURE] = 2
    """side of a canvas of --texture, in images"""
    canvas_samples: Annotated[Count, Needs("texture"), Group.TEXTURE] = 1
    """crops of each canvas of --texture in a step"""
    label_kind: Annotated[Literal["probabilities", "logits"] | None, Group.LABELS] = None
    """kind of the soft labels in a .pt file; without it guessed from their sums"""
    other_data: bool = False
    """test on other images than those that the set was made from, of the same classes and size; those images
    are normalised or whitened as the set's own were"""

    def without_effect_on(self, sources: Sequence[str]) -> dict[str, str]:
        """Return the options that have no effect on these sets, and why."""
        found = {}
        if RANDOM not in sources:
            found["ipc"] = f'without "{RANDOM}" among the sets: the others bring their own number of images'
        if not any(source.endswith(".pt") for source in sources):
            of_pt = "without a .pt file among the sets: those of this package know it themselves"
            found |= dict.fromkeys(("texture", "canvas_size", "canvas_samples", "label_kind"), of_pt)
        return found


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
        elif options.other_data:
            log.info("--other_data: has no effect, as %s was made from these images", _file(source))
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
