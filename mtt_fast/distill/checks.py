"""Check, before a run starts, that the options fit the images, the networks and the experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from mtt_fast.data import DatasetInfo, ImageData
from mtt_fast.distill.cam_network import check_cam_expert, check_cam_network, check_same_cam_expert
from mtt_fast.distill.experts import check_experts, check_same_experts_so_far
from mtt_fast.distill.initial import check_state_fits
from mtt_fast.distill.options import DistillOptions
from mtt_fast.engine.students.choice import precision_on
from mtt_fast.errors import InputError
from mtt_fast.networks.protocol import Trainable
from mtt_fast.storage.checkpoint import State, check_same_images, load_checkpoint
from mtt_fast.training.subsets import check_enough


def check_options_fit(
    options: DistillOptions, data: ImageData | DatasetInfo, network: Trainable, device: torch.device
) -> None:
    """Raise `InputError` for options that do not fit each other, `network`, or the shape and the number of classes of the images.

    No image or expert is read.
    """
    images = options.ipc * data.num_classes
    if options.batch_syn and options.batch_syn > images:
        raise InputError(
            f"--batch_syn {options.batch_syn}: expected at most the {images} synthetic images ({options.ipc} for "
            f"each of {data.num_classes} classes); leave it out to use all"
        )
    frequencies = math.prod(data.image_shape[1:])
    if options.msz_per_channel and options.msz_per_channel > frequencies:
        raise InputError(
            f"--msz_per_channel {options.msz_per_channel}: expected at most the {frequencies} frequencies that a channel of "
            f"{'×'.join(map(str, data.image_shape[1:]))} pixels has; leave it out to distil all"
        )
    for name, ratio in (("loss_ratio", options.loss_ratio), ("depth_ratio", options.depth_ratio)):
        if ratio and not int(ratio * network.num_parameters):
            raise InputError(
                f"--{name} {ratio:g}: expected at least one parameter to leave out, found less than one of the "
                f"{network.num_parameters:,} of --model {options.model}; give a larger share, or leave it out"
            )
    if network.mixes_samples and (option := options.option_using_experts()):
        raise InputError(
            f"--model {options.model}, {option}: expected a network without batch norm, since predictions of experts for single "
            "images need running statistics, which trajectories do not contain; leave the option out, or use another --model"
        )
    check_cam_network(options, data, device)
    for evaluated in options.evaluated_networks(data).values():
        precision_on(device, evaluated, options.precision)


def check_fits(
    options: DistillOptions,
    data: ImageData | DatasetInfo,
    network: Trainable,
    device: torch.device,
    requested: Mapping[str, Any],
) -> None:
    """Raise `InputError` for an option with which the run would fail later.

    For `requested` see `check_experts`. A `DatasetInfo` stands for images that are not downloaded yet: then only the mean number
    of images per class is checked, and only the size of the experts' images.
    """
    check_options_fit(options, data, network, device)
    canvas_size = options.canvas_size if options.texture else 1
    check_enough(data, options.ipc, canvas_size, options.window_start_image)
    check_experts(options, data, network, device, requested)
    check_cam_expert(options, data)


def load_state(options: DistillOptions, data: ImageData | DatasetInfo, device: torch.device) -> State | None:
    """Return the state on `device` from which the run of `options` continues, or None if it has not begun.

    Raises `InputError` if the checkpoint is broken, or belongs to other images, options or experts.
    """
    folder = options.folder()
    state = load_checkpoint(folder, device)
    if state is not None:
        check_same_images(folder, state.data, data.identity(zca=options.zca))
        check_state_fits(folder, options, data, state)
        check_same_experts_so_far(options, state, data)
        check_same_cam_expert(options, data, state)
    return state
