"""Find or train the network of the Grad-CAM maps (EDF), and weight the gradients of pixels by its maps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mtt_fast.commands.options import buffer_folder
from mtt_fast.data import DatasetInfo, ImageData
from mtt_fast.data.synthetic import classes_by_position
from mtt_fast.distill.experts import check_nothing_to_convert, inventory_of
from mtt_fast.distill.grad_cam import grad_cam, pixel_weights
from mtt_fast.distill.options import DistillOptions
from mtt_fast.engine.students.choice import precision_on
from mtt_fast.errors import InputError
from mtt_fast.experts.missing import first_expert
from mtt_fast.networks.protocol import Network
from mtt_fast.storage.checkpoint import State
from mtt_fast.storage.expert_checks import check_belongs, describe_other_training
from mtt_fast.storage.identity import describe_other_data
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.trajectories import TrajectoryStore, experts_in
from mtt_fast.training.images import RealImages

log = logging.getLogger(__name__)


class CamNetwork(NamedTuple):
    """The network of the Grad-CAM maps, with the parameters of its first expert after the last epoch."""

    network: Network
    theta: Tensor  # (P,)
    digest: str  # of the expert, see `TrajectoryStore.digest`


def cam_expert(options: DistillOptions, data: ImageData | DatasetInfo) -> TrajectoryStore | None:
    """Return the experts of `cam_model` (not None), of which the first makes the maps; None if that must be trained first."""
    return experts_in(_folder(options, data))


def check_cam_network(options: DistillOptions, data: ImageData | DatasetInfo, device: torch.device) -> None:
    """Raise `InputError` if `cam_model` cannot be trained on `device` with the options, or cannot make maps of single images."""
    network = options.cam_network(data)
    if network is None:
        return
    if network.mixes_samples:
        raise InputError(
            f"`cam_model` {options.cam_model}: expected a network without batch norm, since maps of single images need running "
            "statistics, which trajectories do not contain; use ResNet18"
        )
    precision_on(device, network, options.precision)
    image = torch.zeros(1, *data.image_shape)
    grad_cam(network, torch.zeros(network.num_parameters), image, torch.zeros(1, dtype=torch.long))


def check_cam_expert(options: DistillOptions, data: ImageData | DatasetInfo) -> None:
    """Raise `InputError` if the expert of `cam_model` was trained on other images, or is missing and cannot be written."""
    network = options.cam_network(data)
    if network is None:
        return
    if (store := cam_expert(options, data)) is not None:
        check_belongs(store, 0, network, data.identity(zca=options.zca), other_data=options.other_data)
    else:
        check_output_folder(_folder(options, data), "choose another `buffer_path`")
        check_nothing_to_convert(_folder(options, data))


def check_same_cam_expert(options: DistillOptions, data: ImageData | DatasetInfo, state: State) -> None:
    """Raise `InputError` unless the expert of `cam_model` that a run with `state` uses is there."""
    if options.cam_model is not None:
        _starting_with_same(options, data, cam_expert(options, data), state)


def _starting_with_same(
    options: DistillOptions, data: ImageData | DatasetInfo, store: TrajectoryStore | None, state: State
) -> TrajectoryStore:
    """Return `store` with the expert of the run with `state` in first place. Raises `InputError` as `check_same_cam_expert`."""
    reordered = store and store.starting_with([state.cam_digest])
    if reordered is None:
        raise InputError(
            f"{_folder(options, data)}: expected the expert of `cam_model` with which the run began, found "
            f"{'another' if store else 'none'}; restore it, or choose another `out`"
        )
    return reordered


def prepare_cam_network(options: DistillOptions, real: RealImages, state: State | None = None) -> CamNetwork | None:
    """Return the network of `cam_model`, after training its expert if that is missing; None without the option.

    With `state` the run continues, and takes the expert that it began with. Raises `Stopped` on Ctrl-C or SIGTERM.
    """
    network = options.cam_network(real.data)
    if network is None:
        return None
    check_cam_expert(options, real.data)  # again, since other processes may have written it
    store = first_expert(_folder(options, real.data), real, network, options.experts(), options)
    if state is not None:
        store = _starting_with_same(options, real.data, store, state)
    log.info("Grad-CAM maps by %s after %d epochs", store.path(0), store.epochs(0))
    expert = store.metadata(0)
    for remark in (
        describe_other_data(expert.identity, real.identity),
        describe_other_training(expert, options.experts().record(), to_the_end=True),
    ):
        if remark:
            log.info("%s: %s", store.folder, remark)
    return CamNetwork(network, store.read(0, store.epochs(0)).to(real.train.labels.device), store.digest(0))


def weigh_gradients(
    options: DistillOptions, cam: CamNetwork | None, state: State, gradients: list[Tensor] | None
) -> list[Tensor] | None:
    """Return `gradients`, with the images' gradient multiplied by `state.pixel_weights`.

    Every `cam_interval` iterations the weights are recomputed from the state's images. Without a `cam` network, and if
    `gradients` is None (not finite), `gradients` is returned unchanged.
    """
    if cam is None:
        return gradients
    if state.pixel_weights is None or state.iteration % options.cam_interval == 0:
        classes = classes_by_position(state.labels, len(state.labels) // options.ipc)
        state.pixel_weights = pixel_weights(cam.network, cam.theta, state.images, classes, options.cam_beta)
    if gradients is None:
        return None
    images_gradient, *others = gradients
    return [images_gradient * state.pixel_weights, *others]


def _folder(options: DistillOptions, data: ImageData | DatasetInfo) -> Path:
    """Return the folder of the expert of `cam_model`. If `cam_model` is `model`, it is the folder of the matched experts."""
    if options.cam_model == options.model:
        return inventory_of(
            options, data
        ).matched_folder  # perhaps waypoints, whose uncompressed experts may have been deleted
    return buffer_folder(options.buffer_path, data, str(options.cam_model), zca=options.zca)
