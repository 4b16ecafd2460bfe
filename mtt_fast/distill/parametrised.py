"""Distil the parameters from which images are computed, in place of their pixels: `--parametrisation`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mtt_fast.data import DatasetInfo, ImageData
from mtt_fast.distill.options import DistillOptions
from mtt_fast.errors import InputError
from mtt_fast.parametrisations.by_name import code_digest, is_users_class, make_parametrisation
from mtt_fast.parametrisations.parametrisation import Parametrisation, are_close, images_at, learned_parameters
from mtt_fast.parametrisations.trial import try_parametrisation
from mtt_fast.runtime.numerics import numerics
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.storage.checkpoint import State, check_specs


class ImageParameters(NamedTuple):
    """The number of learned parameters from which images are computed, and of the values that a checkpoint holds of them."""

    learned: int = 0
    in_checkpoint: int = 0
    """with the optimizer's averages: one of each parameter, or with Adam two"""


def parametrisation_of(options: DistillOptions, images: Tensor, num_classes: int) -> Parametrisation:
    """Return the parametrisation of `options`, on the CPU, made from the initial `images` (n, C, H, W) of `num_classes` classes.

    It is the same each time. Raises `InputError` if it cannot be made.
    """
    return make_parametrisation(
        str(options.parametrisation), options.parametrisation_options, images, num_classes,
        generator_for(options.seed, "parametrisation"),
    )  # fmt: skip


def check_parametrisation(
    options: DistillOptions, data: ImageData | DatasetInfo, device: torch.device
) -> ImageParameters:
    """Return the numbers of the parametrisation's learned parameters, after a trial on `device`; zeros without a parametrisation.

    The trial uses random images. A user's class gets as many as in the run, since it may need groups of images; other classes get
    at most two per class of the data set, since their parameters may take gigabytes. Raises `InputError` if it cannot be made and
    learned.
    """
    if (name := options.parametrisation) is None:
        return ImageParameters()
    count = (options.ipc if is_users_class(name) else min(options.ipc, 2)) * data.num_classes
    images = torch.randn(count, *data.image_shape, generator=generator_for(options.seed, "images of a trial"))

    def make() -> Parametrisation:
        return parametrisation_of(options, images.clone(), data.num_classes).to(device)

    with numerics(device, "fp32"):
        tried = try_parametrisation(name, make, count, data.image_shape)
    # a user's class may be slow to construct again
    whole = tried if is_users_class(name) else parametrisation_on_meta(options, data)
    assert whole is not None
    learned = sum(each.numel() for each in learned_parameters(whole).values())
    return ImageParameters(learned, in_checkpoint=(3 if whole.optimizer == "adam" else 2) * learned)


def parametrisation_on_meta(options: DistillOptions, data: ImageData | DatasetInfo) -> Parametrisation | None:
    """Return the parametrisation of `options` on the device meta, where it takes no memory.

    Return None without a parametrisation, and for one that reads the values of images when it is made.
    """
    if options.parametrisation is None:
        return None
    with torch.device("meta"):
        images = torch.empty(options.ipc * data.num_classes, *data.image_shape, device="meta")
        try:
            return parametrisation_of(options, images, data.num_classes)
        except InputError:
            return None


def check_same_parametrisation(options: DistillOptions, state: State, parametrisation: Parametrisation) -> None:
    """Raise `InputError` unless the parameters of `state` fit the `parametrisation`, and give the images of `state`.

    The images differ if the user's code was changed after the run started. Rates, penalty and the images in evaluations may have
    changed too, so the file must be unchanged.
    """
    folder, parameters = options.folder(), state.parameters or {}
    specs = {name: (each.dtype, tuple(each.shape)) for name, each in learned_parameters(parametrisation).items()}
    for tensors in (parameters, state.parameters_velocity or {}):
        check_specs(folder, tensors, specs)
    check_specs(folder, state.parameters_square or {}, specs if parametrisation.optimizer == "adam" else {})
    computed = images_at(parametrisation, parameters, torch.empty_like(state.images))
    if not are_close(computed, state.images):
        raise InputError(
            f"--parametrisation {options.parametrisation}: expected the images with which the run in {folder} stopped, found others at the "
            "same parameters; give it the code with which the run began, or choose another --out"
        )
    # a checkpoint of a former version has no digest
    if state.code_digest not in ("", code_digest(parametrisation)):
        raise InputError(
            f"--parametrisation {options.parametrisation}: expected the file with which the run in {folder} began, found another; restore it "
            "(further classes can be in files of their own), or choose another --out"
        )


def describe_parametrisation(
    options: DistillOptions, data: ImageData | DatasetInfo, parametrisation: Parametrisation
) -> str:
    """Return a description of how many values must be stored for the images, compared with their pixels."""
    stored = parametrisation.stored_numbers()
    return (
        f"computed by {options.parametrisation} from {stored:,} stored numbers of 32 bits, as many as "
        f"{stored / (data.num_classes * math.prod(data.image_shape)):.3g} images per class of all pixels"
    )
