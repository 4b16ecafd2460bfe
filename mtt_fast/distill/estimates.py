"""Estimate the time and the disk space of a distillation before it starts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from mtt_fast.data import DatasetInfo
from mtt_fast.distill.initial import state_specs
from mtt_fast.distill.labels import has_soft_baseline
from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.parametrised import ImageParameters
from mtt_fast.engine.memory_plan import Plan
from mtt_fast.engine.students.choice import precision_on, student_for
from mtt_fast.kernels import Precision
from mtt_fast.networks.protocol import Network, Trainable

SAMPLES = 16  # images in a timed step
_MIN_CALLS, _MAX_CALLS = 3, 20  # of a timed step
_ENOUGH_SECONDS = 0.2  # in total, after which a step is not timed again
_WHITENING = 2  # matrices (D, D) in a distilled set


class SecondsPerImage(NamedTuple):
    """The seconds that one image takes in a step: in the gradient, and in its derivative."""

    gradient: float
    tangent: float


class EstimatedSeconds(NamedTuple):
    """The estimated seconds of a run, by purpose."""

    experts: float
    iterations: float
    evaluations: float


class EstimatedBytes(NamedTuple):
    """The estimated bytes that a run writes, by purpose."""

    experts: float
    run_folder: float
    packed_data: float


def seconds_from_timed_steps(
    options: DistillOptions,
    info: DatasetInfo,
    network: Trainable,
    plan: Plan,
    device: torch.device,
    *,
    missing: int,
    train_cam: bool,
) -> EstimatedSeconds:
    """Return `estimated_seconds`, with costs from timed steps of all networks of the run."""
    cam = options.cam_network(info)
    trained = (network, *options.evaluated_networks(info).values(), *([] if cam is None else [cam]))
    steps = [(network, precision_on(device, network, options.precision, iterations=True))]
    steps += [(each, precision_on(device, each, options.precision)) for each in trained]
    costs = {  # equal steps are timed once; only the student's needs the derivative
        step: _measured_seconds(*step, info.image_shape, device, tangent=step == steps[0])
        for step in dict.fromkeys(steps)
    }
    student_cost, expert_cost, *evaluated_costs = (costs[step] for step in steps)
    cam_seconds = None if cam is None else evaluated_costs.pop().gradient
    return estimated_seconds(
        options, info, missing, student_cost, share=plan.passes / plan.work.student.passes[0], expert=expert_cost.gradient,
        evaluated=[each.gradient for each in evaluated_costs], cam=cam_seconds, train_cam=train_cam,
    )  # fmt: skip


def estimated_seconds(
    options: DistillOptions,
    info: DatasetInfo,
    missing: int,
    cost: SecondsPerImage,
    *,
    share: float,
    expert: float,
    evaluated: Sequence[float],
    cam: float | None = None,
    train_cam: bool = False,
) -> EstimatedSeconds:
    """Return the estimated seconds of a run that trains `missing` experts.

    All costs are seconds per image: `cost` in a step of the student, `expert` in a step of an expert, `evaluated` in a step of
    each evaluated network, and `cam` in a step of the network of the Grad-CAM maps, if there is one. `share` is the fraction of
    `cost` that remains with saved activations. With `train_cam` the network of the maps is trained too.
    """
    random_sets = 1 + has_soft_baseline(options, options.network(info))
    count = options.ipc * info.num_classes
    crops = options.canvas.samples if options.canvas else 1
    batch = (options.batch_syn or count) * crops
    epochs = options.evaluation_protocol().total_epochs
    trainings = [epochs * count * crops * gradient + info.num_test * gradient / 3 for gradient in evaluated]
    steps = options.Iteration * options.num_trajectories * options.syn_steps
    # of the initial images, and every `eval_it` iterations, for each set
    evaluations = _set_count(options) * (1 + math.ceil(options.Iteration / options.eval_it))
    maps = 0 if cam is None else math.ceil(options.Iteration / options.cam_interval) * count * cam
    return EstimatedSeconds(
        experts=missing * _seconds_to_train(options, info, expert)
        + (0 if cam is None or not train_cam else _seconds_to_train(options, info, cam)),
        iterations=steps * batch * (cost.gradient + cost.tangent) * share + maps,
        # the first network is also evaluated on random real images
        evaluations=options.num_eval * (evaluations * sum(trainings) + random_sets * trainings[0]),
    )


def _seconds_to_train(options: DistillOptions, info: DatasetInfo, gradient: float) -> float:
    """Return the seconds to train an expert whose steps take `gradient` seconds per image."""
    gradients = 2 if options.rho_max else 1  # of a step
    forward = gradient / 3  # a backward pass costs two forward passes
    return options.train_epochs * (info.num_train * gradients * gradient + info.num_test * forward)


def _set_count(options: DistillOptions) -> int:
    """Return the number of sets that are evaluated and saved: the images, and their moving average if there is one."""
    return 1 if options.ema_decay is None else 2


def estimated_bytes(
    options: DistillOptions,
    info: DatasetInfo,
    num_parameters: int,
    missing: int,
    uncompressed: int,
    *,
    cam_parameters: int = 0,
    image_parameters: ImageParameters | None = None,
) -> EstimatedBytes:
    """Return the estimated bytes written by a run that trains `missing` experts and compresses `uncompressed` ones.

    `cam_parameters` is the number of parameters of the network of the Grad-CAM maps, or 0 if it is not trained;
    `image_parameters` the number from which the images are computed, or None if pixels are learned.
    """
    rows = missing * (options.train_epochs + 1) + uncompressed * (options.num_interpolation or 0)
    learned, learned_in_checkpoint = image_parameters or ImageParameters()
    state = {name: spec[0].itemsize * math.prod(spec[1]) for name, spec in state_specs(options, info).items() if spec}
    labels = 4 * options.ipc * info.num_classes**2 if options.label_kind != "indices" else state["labels"]
    whitening = 4 * _WHITENING * math.prod(info.image_shape) ** 2 if options.zca else 0
    one_set = state["images"] + labels + state["lr"] + whitening + 4 * learned
    return EstimatedBytes(
        experts=4 * (rows * num_parameters + (options.train_epochs + 1) * cam_parameters),
        # the last and the best of each set, and the checkpoint
        run_folder=2 * _set_count(options) * one_set + sum(state.values()) + 4 * learned_in_checkpoint,
        packed_data=info.packed_bytes,
    )


def _measured_seconds(
    network: Network, precision: Precision, image_shape: tuple[int, int, int], device: torch.device, *, tangent: bool
) -> SecondsPerImage:
    """Return the measured seconds per image of a student's gradient and, with `tangent`, of its derivative (else 0)."""
    student = student_for(network, device, "indices", precision=precision)
    theta = torch.randn(network.num_parameters, device=device) / 100
    images = torch.randn(SAMPLES, *image_shape, device=device)
    labels = torch.zeros(SAMPLES, dtype=torch.long, device=device)
    return SecondsPerImage(
        _timed(lambda: student.gradient(theta, images, labels), device) / SAMPLES,
        _timed(lambda: student.gradient_jvp(theta, images, labels, theta), device) / SAMPLES if tangent else 0.0,
    )


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of the fastest of several calls, without the first one, which allocates memory and compiles kernels.

    Other processes can only make a call slower, so the fastest is the best estimate.
    """
    seconds: list[float] = []
    while len(seconds) < _MIN_CALLS or (sum(seconds) < _ENOUGH_SECONDS and len(seconds) < _MAX_CALLS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
