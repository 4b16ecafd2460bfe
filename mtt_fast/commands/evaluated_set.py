"""Read the set on which an evaluation trains networks: a run's, a file's, or random real images."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch

from mtt_fast.augmentation.texture import Canvas
from mtt_fast.commands.option_fields import Group, Needs, Role, names_of
from mtt_fast.commands.options import Count, EvaluationOptions, Positive, PositiveShare
from mtt_fast.data import ImageData
from mtt_fast.data.catalogue import published
from mtt_fast.data.set_checks import check_classes, check_share
from mtt_fast.data.synthetic import SyntheticDataset, real_mask
from mtt_fast.data.whitening import Whitening, check_same_whitening
from mtt_fast.errors import Diverged, InputError
from mtt_fast.interop import SET_KINDS, set_kind_of, set_kinds_of, source_info
from mtt_fast.interop.ncfm import FACTOR, read_ncfm
from mtt_fast.interop.pairs import read_pair, whitening_warnings
from mtt_fast.interop.sets import warn_of_unread
from mtt_fast.interop.tensor_set import class_major
from mtt_fast.storage.identity import check_same_data, describe_other_data
from mtt_fast.storage.run_files import SYNTHETIC
from mtt_fast.training.evaluation import Accuracy
from mtt_fast.training.images import Images, RealImages, as_training_images, parts_of, real_images
from mtt_fast.training.protocols import EvaluationProtocol
from mtt_fast.training.subsets import check_enough, random_subset

log = logging.getLogger(__name__)

RANDOM = "random"
"""The word that stands for random real images in place of a set."""
REAL_IMAGES_LR = 0.01
"""Learning rate for real images, and for files without a rate, as in the public code."""


@dataclass(frozen=True)
class SetOptions(EvaluationOptions):
    """Options of the set on which networks are trained."""

    GROUP: ClassVar[Group] = Group.SET

    ipc: Count = 1
    """random real images per class, if the set is the word "random" """
    lr_teacher: Positive | None = None
    """learning rate of the networks; if not given, that of --protocol, of the set, or 0.01 if the set has none"""
    texture: Annotated[bool, Group.TEXTURE] = False
    """treat the images of a .pt file as textures; networks use random crops of them"""
    canvas_size: Annotated[Count, Needs("texture"), Group.TEXTURE] = 2
    """side length of a canvas of --texture, in images"""
    canvas_samples: Annotated[Count, Needs("texture"), Group.TEXTURE] = 1
    """crops of each canvas of --texture per step"""
    label_kind: Annotated[Literal["probabilities", "weights", "logits"] | None, Group.LABELS] = None
    """kind of the soft labels in a .pt file; if not given, guessed from their sums"""
    distilled_share: PositiveShare = 1.0
    """share of each class's images in a .pt file that was distilled, for --protocol selmatch: the first ones, as SelMatch writes them (its
    alpha); the others are real images"""
    factor: Count | None = None
    """cut each image of the set into FACTOR × FACTOR smaller ones, which networks see scaled up (the multi-formation of IDC and NCFM); if
    not given, 2 for files of NCFM and sets made of them, else 1"""
    other_data: bool = False
    """test on other images than the set was made from, of the same classes and size; they are normalised or whitened like the
    set's own"""

    def evaluation_protocol(self) -> EvaluationProtocol:
        """Return the evaluation protocol, with the rate of --lr_teacher if given. Raises `InputError` as in `EvaluationOptions`."""
        protocol = super().evaluation_protocol()
        return protocol if self.lr_teacher is None else dataclasses.replace(protocol, lr=self.lr_teacher)

    def without_effect_on(self, sources: Sequence[str]) -> dict[str, str]:
        """Return the options that have no effect on these sets, with the reasons."""
        reasons = {}
        if set(sources) == {RANDOM}:
            reasons["factor"] = "on real images"
        if RANDOM not in sources:
            reasons["ipc"] = f'without "{RANDOM}" among the sets: the others have their own number of images'
        if not any(source.endswith(".pt") for source in sources):
            pt_reason = "without a .pt file among the sets: files of this package contain it"
            pt_options = ("texture", "canvas_size", "canvas_samples", "label_kind", "distilled_share")
            reasons |= dict.fromkeys(pt_options, pt_reason)
        elif self.texture or not self.evaluation_protocol().combined:
            reasons["distilled_share"] = "with --texture" if self.texture else "without --protocol selmatch"
        return reasons


def read_synthetic(source: str) -> SyntheticDataset | None:
    """Return the distilled set in a run's folder or a file of this package; None if `source` is a .pt file or "random"."""
    if source == RANDOM or source.endswith(".pt"):
        return None
    synthetic = SyntheticDataset.load(_file(source))
    if os.path.isdir(source):
        warn_of_unread(
            source, set_kinds_of(source)[1:], "name a file to evaluate it, or convert the folder with --from"
        )
    return synthetic


def _file(source: str) -> Path:
    """Return the file of the distilled set at `source`, a file or a run's folder. Raises `InputError` for another folder."""
    path = Path(source)
    if not path.is_dir():
        return path
    kind = set_kind_of(path)
    if kind != "synthetic":
        fix = {
            None: "check the path",
            "mtt": "name the file of images itself, such as images_best.pt",
            "ddranking": "name images.pt itself",
        }.get(kind, "make a set of it that networks can be trained on with `python -m mtt_fast convert`")
        found = "other files" if kind is None else SET_KINDS[kind]
        raise InputError(f"{path}: expected a run's folder, with {SYNTHETIC} in it, found {found}; {fix}")
    return path / SYNTHETIC


def settings_of(synthetic: SyntheticDataset) -> dict[str, Any]:
    """Return the recorded options of the set's distillation that an evaluation also has, without options of the machine."""
    names = names_of(EvaluationOptions, Role.RESULT, Role.EVALUATION, Role.LOCATION) | {"factor"}
    zca = synthetic.whitening is not None
    return {name: value for name, value in synthetic.recipe.items() if name in names} | {"zca": zca}


@dataclass(frozen=True)
class EvaluatedSet:
    """A set on which networks are trained: a distilled one, or where `synthetic` is None the files or random images of `source`."""

    source: str
    options: SetOptions
    synthetic: SyntheticDataset | None

    def load_data(self) -> ImageData:
        """Return the images that the options name.

        Raises `InputError` if the set was made from other images and --other_data does not allow it.
        """
        options, synthetic = self.options, self.synthetic
        if synthetic is None:
            return options.load_data()
        file, made_from = _file(self.source), synthetic.identity
        info = published(options.dataset, options.subset, options.res)
        if info is not None:  # before images are fetched and packed
            check_same_data(made_from, info.identity(zca=options.zca), file, other_data=options.other_data)
        data = options.load_data()
        loaded = data.identity(zca=options.zca)
        check_same_data(made_from, loaded, file, other_data=options.other_data)
        if difference := describe_other_data(made_from, loaded):
            log.info("%s: %s", file, difference)
        elif options.other_data:
            log.info("--other_data: has no effect, as %s was made from these images", file)
        return data

    def real_images(self, data: ImageData, device: torch.device) -> RealImages:
        """Return `data` on the device, normalised or whitened as the set was.

        Raises `InputError` if the set was whitened by another fit than `data`, without --other_data, which takes the set's own fit.
        """
        options, synthetic = self.options, self.synthetic
        if synthetic is not None and options.other_data:
            return real_images(data, device, zca=options.zca, transform=synthetic.transform)
        real = real_images(data, device, zca=options.zca)
        if synthetic is not None and synthetic.whitening is not None and isinstance(real.transform, Whitening):
            check_same_whitening(synthetic.whitening, real.transform, _file(self.source))
        return real

    def training_images(self, real: RealImages) -> tuple[Callable[[torch.Generator], Images], float]:
        """Return a function that gives each network's training images, and the learning rate.

        The rate is that of --lr_teacher, of the protocol, or else of the set. Raises `InputError` for files that are broken or of
        another data set.
        """
        source, options, initial_lr = self.source, self.options, self.options.evaluation_protocol().initial_lr
        if source == RANDOM:
            check_enough(real.data, options.ipc)
            return lambda generator: random_subset(real, options.ipc, generator), initial_lr(REAL_IMAGES_LR)
        images, learned = self._images_and_lr(real)
        check_shape(images, real.data, source)
        if (factor := self.factor) > 1:
            log.info("%s: each image is taken for %d × %d smaller ones (--factor)", source, factor, factor)
        images = parts_of(images, factor)
        classes = real.data.num_classes
        present = check_classes(images.labels, classes, source)
        if present < classes:
            log.warning("%s: has images of %d of the %d classes of %s", source, present, classes, real.data.name)
        return lambda _: images, initial_lr(learned)

    @property
    def _is_of_ncfm(self) -> bool:
        return self.synthetic is None and set_kind_of(self.source) == "ncfm"

    @property
    def factor(self) -> int:
        """Return the number of smaller images along a side of each image of the set."""
        return self.options.factor or (FACTOR if self._is_of_ncfm else 1)

    def _images_and_lr(self, real: RealImages) -> tuple[Images, float]:
        """Return the images of the set and its learning rate; for files without a rate, the rate for real images."""
        device = real.test.labels.device
        if self.synthetic is not None:
            return as_training_images(self.synthetic, device), float(self.synthetic.lr)
        options = self.options
        if self._is_of_ncfm:
            pair = read_ncfm(self.source, source_info(real.data, real.transform), options.label_kind)
        else:
            pair = read_pair(self.source, options.label_kind)
        if pair.label_kind != "indices" and options.label_kind is None:
            log.info("labels are soft; taken as %s", pair.label_kind)
        for line in whitening_warnings(self.source, pair, zca=options.zca):
            log.warning("%s", line)
        marks = None
        if options.distilled_share < 1:
            pair = class_major(pair)
            check_share(options.distilled_share, pair.labels, pair.label_kind, pair.num_classes, self.source)
            marks = real_mask(len(pair.labels), pair.num_classes, options.distilled_share)
        elif options.evaluation_protocol().combined:
            log.warning(
                "%s: all images count as distilled; if some are real, say so with --distilled_share", self.source
            )
        labels = pair.labels.softmax(dim=1) if pair.label_kind == "logits" else pair.labels
        canvas = Canvas(options.canvas_size, options.canvas_samples) if options.texture else None
        images = Images(pair.images.to(device), labels.to(device), canvas=canvas, real=marks)
        return images, REAL_IMAGES_LR if pair.lr is None else float(pair.lr)


def check_shape(images: Images, data: ImageData, source: str) -> None:
    """Raise `InputError` unless the images from `source`, or the crops of their canvases, have the shape of the images of `data`."""
    images_a_side = images.canvas.size if images.canvas else 1
    channels, height, width = data.image_shape
    expected = (channels, images_a_side * height, images_a_side * width)
    if tuple(images.pixels.shape[1:]) != expected:
        of_canvas = ", and their size with --canvas_size, or leave out --texture" if images.canvas else ""
        raise InputError(
            f"{source}: expected {'canvases' if images.canvas else 'images'} {expected} of {data.name}, found "
            f"{tuple(images.pixels.shape[1:])}; name their data set with --dataset, --res{of_canvas}"
        )


def check_any_trained(results: Iterable[Accuracy]) -> None:
    """Raise `Diverged` if all networks of all `results` diverged, so that there is no accuracy."""
    accuracies = list(results)
    if all(accuracy.diverged == len(accuracy.values) for accuracy in accuracies):
        raise Diverged(
            f"all {sum(accuracy.diverged for accuracy in accuracies)} networks diverged, so there is no accuracy; use a smaller "
            "--lr_teacher"
        )
