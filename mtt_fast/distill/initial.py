"""Make the initial state of a distillation: images, labels and learning rate."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mtt_fast.augmentation.texture import canvases_of
from mtt_fast.data import DatasetInfo, ImageData
from mtt_fast.distill.frequencies import most_varying_frequencies, with_frequencies
from mtt_fast.distill.labels import class_logits, expert_logits, experts_at
from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.parametrised import parametrisation_of
from mtt_fast.errors import InputError
from mtt_fast.networks.protocol import Network
from mtt_fast.parametrisations.by_name import code_digest, fit_parametrisation
from mtt_fast.parametrisations.parametrisation import Parametrisation, images_at, learned_values
from mtt_fast.runtime.provenance import digest
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.storage.checkpoint import State, TensorSpec, check_specs
from mtt_fast.storage.run_files import CHECKPOINT
from mtt_fast.storage.trajectories import TrajectoryStore
from mtt_fast.training.images import Images, RealImages
from mtt_fast.training.subsets import random_subset, shuffled_classes, window_of_difficulty

log = logging.getLogger(__name__)

_BATCH = 64  # images of a class in a forward pass; more would be a waste, since one image per class needs few


def initial_state(
    options: DistillOptions,
    initial: InitialImages,
    real: RealImages,
    network: Network,
    experts: TrajectoryStore,
    difficulty: Tensor | None,
) -> State:
    """Return the state before the first iteration of a run that starts from the `initial` images.

    For `difficulty` see `initial_images`.
    """
    if initial.num_misclassified:
        log.warning(
            "--pix_init samples_predicted_correctly: no expert gets enough images of every class right; %d of the %d are "
            "others of their class",
            initial.num_misclassified, len(initial.images) * options.num_tiles,
        )  # fmt: skip
    images, labels = initial.images.pixels.clone(), initial.images.labels
    parameters, velocity, square = _initial_parameters(initial.parametrisation)
    if options.lr_y is not None:
        labels = class_logits(labels, real.data.num_classes)
        if options.label_init == "experts":
            labels = expert_logits(network, experts_at(experts, None, images.device), images, labels)
    lr = torch.full((options.syn_steps,) if options.lr_per_step else (), options.lr_teacher, device=images.device)
    return State(
        0, len(experts), images, labels, lr, torch.zeros_like(images) if parameters is None else None, torch.zeros_like(lr),
        labels_velocity=None if options.lr_y is None else torch.zeros_like(labels),
        ema=None if options.ema_decay is None else images.clone(), frequencies=initial.frequencies,
        parameters=parameters, parameters_velocity=velocity, parameters_square=square,
        data=real.identity, digests=tuple(map(experts.digest, range(len(experts)))), imported=experts.metadata(0).imported,
        scores_digest="" if difficulty is None else digest(difficulty),
        code_digest="" if initial.parametrisation is None else code_digest(initial.parametrisation),
    )  # fmt: skip


NamedTensors = dict[str, Tensor] | None
"""Tensors by name, if there are some."""


def _initial_parameters(parametrisation: Parametrisation | None) -> tuple[NamedTensors, NamedTensors, NamedTensors]:
    """Return the parameters of a parametrisation, and the velocity and the mean square of its optimizer."""
    if parametrisation is None:
        return None, None, None
    values = learned_values(parametrisation)
    velocity, square = ({name: torch.zeros_like(each) for name, each in values.items()} for _ in range(2))
    return values, velocity, square if parametrisation.optimizer == "adam" else None


def state_specs(options: DistillOptions, data: ImageData | DatasetInfo) -> dict[str, TensorSpec | None]:
    """Return the dtype and shape of each tensor of a run's `State`, None for those that it lacks; without a parametrisation's parameters."""
    classes, (channels, height, width) = data.num_classes, data.image_shape
    count, side = options.ipc * classes, 1 if options.canvas is None else options.canvas.size
    images = torch.float32, (count, channels, height * side, width * side)
    logits, indices = (torch.float32, (count, classes)), (torch.int64, (count,))
    lr = torch.float32, (options.syn_steps,) if options.lr_per_step else ()
    learned = options.lr_y is not None
    return {
        "images": images,
        "images_velocity": images if options.parametrisation is None else None,
        "labels": logits if learned else indices,
        "labels_velocity": logits if learned else None,
        "lr": lr,
        "lr_velocity": lr,
        "ema": None if options.ema_decay is None else images,
        "frequencies": None if options.msz_per_channel is None else (torch.bool, (classes, height, width)),
        "pixel_weights": None if options.cam_model is None else (torch.float32, (count, 1, height, width)),
    }


def check_state_fits(folder: Path, options: DistillOptions, data: ImageData | DatasetInfo, state: State) -> None:
    """Raise `InputError` unless the tensors of `state`, from the run in `folder`, have the dtypes and shapes that `initial_state` gives them."""
    specs = state_specs(options, data)
    if state.pixel_weights is None and options.cam_model is not None:  # the first iteration computes them
        del specs["pixel_weights"]
    if (state.parameters is None) != (options.parametrisation is None):
        raise InputError(
            f"{folder / CHECKPOINT}: expected {'parameters' if options.parametrisation else 'pixels'} that are learned, as --parametrisation "
            "asks for, found others; restore a copy, or choose another `out`"
        )
    check_specs(folder, {name: getattr(state, name) for name in specs}, specs)


class InitialImages(NamedTuple):
    """The synthetic images before the first iteration."""

    images: Images
    """sorted by class"""
    num_misclassified: int = 0
    """number of images that no expert classifies correctly, if `pix_init` is "samples_predicted_correctly" """
    frequencies: Tensor | None = None
    """(classes, H, W) bool: the frequencies that are kept with `msz_per_channel`"""
    parametrisation: Parametrisation | None = None
    """computes the images, on their device, from its initial parameters"""
    evaluated: Tensor | None = None
    """(n, C, H, W): the images that a parametrisation gives to evaluations, if there is one"""

    @property
    def pictures(self) -> Tensor:
        """Return the images (n, C, H, W) to draw in pictures."""
        return self.images.pixels if self.evaluated is None else self.evaluated


def initial_images(
    options: DistillOptions,
    real: RealImages,
    network: Network,
    experts: TrajectoryStore,
    difficulty: Tensor | None = None,
) -> InitialImages:
    """Return the initial synthetic images with their labels.

    With `pix_init` "samples_predicted_correctly" the `experts` choose the images; if they classify too few of a class correctly,
    other images fill it up. With "window" the `difficulty` of the training images (`read_difficulty`) chooses them. A canvas is
    tiled from several images.
    """
    generator = generator_for(options.seed, "initial images")
    ipc, device, num_misclassified = options.ipc * options.num_tiles, real.train.labels.device, 0
    if options.pix_init == "samples_predicted_correctly":
        members = shuffled_classes(real, ipc, generator)
        trained = (experts.read(expert, experts.epochs(expert)).to(device) for expert in range(len(experts)))
        chosen, num_misclassified = predicted_correctly(network, trained, real.train, members, ipc)
        images = real.train.subset(torch.cat(chosen))
    elif options.pix_init == "window":
        assert difficulty is not None
        images = window_of_difficulty(real, difficulty, ipc, options.window_start_image)
    else:
        images = random_subset(real, ipc, generator)
    if options.pix_init == "noise":
        images = Images(torch.randn(images.pixels.shape, generator=generator).to(device), images.labels)
    if options.canvas is not None:
        images = Images(canvases_of(images.pixels, options.canvas_size), images.labels[:: options.num_tiles])
    if options.parametrisation is not None:
        return _parametrised(options, images, real.data.num_classes, num_misclassified)
    if options.msz_per_channel is None:
        return InitialImages(images, num_misclassified)
    frequencies = most_varying_frequencies(images.pixels, ipc, options.msz_per_channel)
    kept = Images(with_frequencies(images.pixels, frequencies), images.labels)
    return InitialImages(kept, num_misclassified, frequencies)


def _parametrised(options: DistillOptions, images: Images, num_classes: int, num_misclassified: int) -> InitialImages:
    """Return the images that the parametrisation of `options` computes, fitted to `images`."""
    module = parametrisation_of(options, images.pixels.cpu(), num_classes).to(images.pixels.device)
    name, generator = str(options.parametrisation), generator_for(options.seed, "fit of the parametrisation")
    fit_parametrisation(name, module, images.pixels, generator)
    values = learned_values(module)
    matched, evaluated = (
        images_at(module, values, torch.empty_like(images.pixels), evaluated=kind) for kind in (False, True)
    )
    initial = Images(matched, images.labels)
    return InitialImages(initial, num_misclassified, parametrisation=module, evaluated=evaluated)


def predicted_correctly(
    network: Network, experts: Iterable[Tensor], real: Images, members: Sequence[Tensor], ipc: int
) -> tuple[list[Tensor], int]:
    """Return, for each class, the first `ipc` of its `members` that an expert classifies correctly (DATM).

    If there are too few, images that no expert classifies correctly fill up the class; their number is returned too. `members`
    are indices into `real` for each class, `experts` are parameters (P,). The first expert classifies all members. Each later
    expert classifies what all before it got wrong, in classes with too few images.
    """
    right, remaining = [rows[:0] for rows in members], list(members)
    for theta in experts:
        for label, rows in enumerate(right):
            if len(rows) < ipc:
                more, remaining[label] = _split_by_correctness(network, theta, real, remaining[label], ipc - len(rows))
                right[label] = torch.cat([rows, more])
        if all(len(rows) == ipc for rows in right):
            break
    wrong = sum(ipc - len(rows) for rows in right)
    return [torch.cat([rows, rest])[:ipc] for rows, rest in zip(right, remaining, strict=True)], wrong


@torch.no_grad()
def _split_by_correctness(
    network: Network, theta: Tensor, real: Images, rows: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Return the first `count` of `rows` that the network classifies correctly under `theta`, and the misclassified ones before them."""
    right, wrong = rows[:0], rows[:0]
    for batch in rows.split(_BATCH):
        if len(right) < count:
            inputs, labels = real.batch(batch.to(real.labels.device))
            correct = (network(theta, inputs).argmax(dim=1) == labels).cpu()
            right, wrong = torch.cat([right, batch[correct]]), torch.cat([wrong, batch[~correct]])
    return right[:count], wrong
