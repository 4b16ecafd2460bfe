"""The set on which an evaluation trains networks: a run's, a file's, or random real images."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtt_fast.augmentation.texture import Canvas
from mtt_fast.commands.options import EvaluationOptions, at_least
from mtt_fast.data import ImageData
from mtt_fast.data.synthetic import SyntheticDataset, load_public_pair
from mtt_fast.errors import InputError
from mtt_fast.interop.plain import guess_label_kind
from mtt_fast.storage.run_folder import SYNTHETIC
from mtt_fast.training.images import Images, RealImages, as_training_images
from mtt_fast.training.subsets import random_subset

log = logging.getLogger(__name__)


RANDOM = "random"
"""The source that stands for random real images."""
REAL_IMAGES_LR = 0.01
"""Learning rate for real images, and for files that bring none, as in the public code."""


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


def _as_targets(labels: Tensor, kind: str | None) -> Tensor:
    """Return class indices or probabilities; successors of the public code write logits under the same name."""
    if not labels.is_floating_point():
        return labels
    if kind is None:
        kind = guess_label_kind(labels)
        log.info("labels are soft; taken as %s", kind)
    return labels.softmax(dim=1) if kind == "logits" else labels
