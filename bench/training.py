"""Compare training on images by mtt_fast and by an ordinary module and optimizer, for `experts` and `evaluate`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import module_of
from bench.gate import check_errors
from bench.measuring import interleaved, peak_above_baseline, seconds_in_turn
from bench.parsing import CommonOptions
from bench.records import publish
from bench.settings import NetworkShape, Setting
from bench.workers import Process, Subjects
from mtt_fast import testing
from mtt_fast.augmentation.siamese import augment_by_strategy
from mtt_fast.commands.options import Count
from mtt_fast.engine.students.choice import student_for
from mtt_fast.networks.convnet import ConvNet
from mtt_fast.runtime.prefetch import upload
from mtt_fast.testing import relative_error
from mtt_fast.training.epochs import Epochs
from mtt_fast.training.experts import ExpertTraining
from mtt_fast.training.images import Images
from mtt_fast.training.optimizers import Sgd

_EPOCH = 50_000  # images of CIFAR that an expert sees in an epoch
Loop = Callable[[ConvNet, Tensor, Images, Sgd, str, torch.Generator], Tensor]
"""A function from initial parameters (P,), images and hyperparameters to the parameters after one epoch."""


def plain_loop(
    net: ConvNet, start: Tensor, images: Images, sgd: Sgd, augment: str, generator: torch.Generator
) -> Tensor:
    """Train as an ordinary script does: nn.Module, torch.optim.SGD, loss.backward(). The augmentation is mtt_fast's own."""
    module = module_of(net).to(start)
    torch.nn.utils.vector_to_parameters(start.clone(), module.parameters())
    optimizer = torch.optim.SGD(module.parameters(), sgd.lr, momentum=sgd.momentum, weight_decay=sgd.weight_decay)
    augmentation = augment_by_strategy(augment)
    order = torch.randperm(len(images), generator=generator).to(start.device)
    for index in order.split(sgd.batch_size):
        inputs, targets = images.batch(index)
        if augmentation:
            inputs = augmentation(inputs, upload(augmentation.draw_parameters([inputs], generator), inputs.device))
        optimizer.zero_grad()
        F.cross_entropy(module(inputs), targets).backward()
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()


def mtt_fast_loop(
    net: ConvNet, start: Tensor, images: Images, sgd: Sgd, augment: str, generator: torch.Generator
) -> Tensor:
    """Train as mtt_fast's experts and evaluations do."""
    epoch = _epoch(net, images, sgd, augment)
    return epoch(start, torch.zeros_like(start), generator)[0]


@functools.lru_cache(maxsize=1)
def _epoch(net: ConvNet, images: Images, sgd: Sgd, augment: str) -> Epochs:
    """Return the training, the same object in every call, since on CUDA its first epoch captures a graph."""
    return Epochs(student_for(net, images.labels.device), images, sgd, augment_by_strategy(augment))


LOOPS: dict[str, tuple[Loop, bool]] = {
    "plain": (plain_loop, False),
    "plain-tuned": (plain_loop, True),
    "mtt_fast": (mtt_fast_loop, True),
}
"""Loops by name, each with whether glibc keeps freed memory in its process."""


@dataclass(frozen=True)
class TrainingOptions(CommonOptions, NetworkShape):
    """The options of both benchmarks of training."""

    images: Count = 1024
    """images in the epoch that is timed"""
    batch_train: Count = 256
    """batch size"""
    augment: bool = True
    """augment as the method does"""


def compare(options: TrainingOptions, benchmark: str, sgd: Sgd, command: str) -> None:
    """Time one epoch by every loop in turn, print the table, write the record."""
    device, setting = options.torch_device(), options.resolve()
    strategy = ExpertTraining().augment if options.augment else "none"
    task = {"net": asdict(setting.net), "images": options.images, "sgd": asdict(sgd), "augment": strategy}
    with Subjects() as workers:
        for name, (_, tuned) in LOOPS.items():
            with workers.row(name, loop=name, seconds=None) as row:
                workers[name] = Process(build, tuned=tuned, loop=name, device=str(device), **task)
                row |= workers[name].ask(check)
                check_errors(row["error_float64"])
        timings = interleaved(
            options.repetitions, workers, lambda name: float(workers[name].ask(timed)), workers.give_up
        )
    rows = workers.rows
    for name, timing in timings.items():
        median = timing["median"]
        rows[name] |= {
            "seconds": timing,
            "images_per_second": options.images / median,
            "epoch_seconds": _EPOCH / options.images * median if benchmark == "experts" else None,
            "speedup": timings["plain"]["median"] / median if "plain" in timings else None,
            "speedup_tuned": timings["plain-tuned"]["median"] / median if "plain-tuned" in timings else None,
        }
    conditions = {
        "case": f"{options.images} images, batches of {options.batch_train}, augmentation {strategy}, {setting.net}"
    }
    publish(
        options, "training", f"{benchmark}-{options.label()}-{device.type}", device, conditions, rows.values(), command
    )


@dataclass(frozen=True)
class State:
    """The state of a worker."""

    loop: Loop
    net: ConvNet
    start: Tensor
    images: Images
    sgd: Sgd
    augment: str

    def run(self) -> Tensor:
        """Run one epoch."""
        return self.loop(self.net, self.start, self.images, self.sgd, self.augment, torch.Generator().manual_seed(0))


def build(loop: str, device: str, net: dict[str, Any], images: int, sgd: dict[str, Any], augment: str) -> State:
    """Return the state of a worker."""
    network, target = ConvNet(**net), torch.device(device)
    assert isinstance(network.image_size, int)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, network.in_channels, network.image_size, network.image_size, generator=generator)
    labels = torch.arange(images) % network.num_classes
    start = network.init(generator).to(target)
    return State(LOOPS[loop][0], network, start, Images(pixels.to(target), labels.to(target)), Sgd(**sgd), augment)


def check(state: State) -> dict[str, Any]:
    """Return, in a worker, the loop's float64 error on a small case, and the peak memory of an epoch."""
    error = float64_error(state.loop, state.sgd, state.start.device)
    return {"error_float64": error, "peak": peak_above_baseline(state.run, state.start.device)}


def timed(state: State) -> float:
    """Return, in a worker, the seconds of one epoch."""
    return seconds_in_turn(state.run, state.start.device)


def float64_error(loop: Loop, sgd: Sgd, device: torch.device) -> float:
    """Return the relative error of a small epoch's displacement, in float64, against autograd written out."""
    setting = Setting(ConvNet(3, 4, 8, width=6, depth=2), images=10, steps=1, batch=4)
    net, generator = setting.net, torch.Generator().manual_seed(1)
    small = Sgd(sgd.lr, sgd.momentum, sgd.weight_decay, setting.batch)
    pixels = torch.randn(setting.images, 3, 8, 8, generator=generator, dtype=torch.float64).to(device)
    images = Images(pixels, torch.arange(setting.images, device=device) % 4)
    start = net.init(generator).double().to(device)
    end = loop(net, start, images, small, "none", torch.Generator().manual_seed(2))

    network = testing.module_function(module_of(net).to(start))
    theta, velocity = start, torch.zeros_like(start)
    for index in (
        torch.randperm(setting.images, generator=torch.Generator().manual_seed(2)).to(device).split(small.batch_size)
    ):
        leaf = theta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            F.cross_entropy(network(leaf, images.pixels[index]), images.labels[index]), leaf
        )
        velocity = small.momentum * velocity + gradient + small.weight_decay * theta
        theta = theta - small.lr * velocity
    return relative_error(end - start, theta - start)
