"""Time mtt_fast's step for ordinary modules beside whole-graph autograd, in CPU seconds and elapsed time.

Each row is a network and an engine in a process of its own, all timed in turn. CPU seconds are those of all threads, the
system's included: they measure the work, even on a machine that others use at the same time.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cases import Gradients, Iteration
from bench.gate import check_errors
from bench.measuring import interleaved, peak_above_baseline, spread, synchronise
from bench.parsing import CommonOptions
from bench.products import (
    Product,
    cross_entropy_of,
    forward_over_reverse,
    gradients_by,
    reverse_over_forward,
    reverse_over_reverse,
)
from bench.records import publish
from bench.workers import Process, Subjects
from mtt_fast import FlatModule, matching_loss, testing, unroll
from mtt_fast.commands.options import Count
from mtt_fast.errors import InputError
from mtt_fast.networks.resnets import resnet
from mtt_fast.runtime.memory_info import AUTO
from mtt_fast.testing import relative_error

_SHAPE, _CLASSES, _LR = (3, 32, 32), 10, 0.01


@dataclass(frozen=True)
class Options(CommonOptions):
    """Time one iteration on networks that are ordinary modules, at CIFAR-10's shape."""

    networks: str = "ConvNet,ResNet18,ViT"
    """networks to time, joined by commas"""
    engines: str = "whole_graph,generic,generic-auto"
    """engines to time, joined by commas"""
    steps: Count = 3
    """N, student steps in an iteration"""
    batch: Count = 20
    """b, images in a student step"""
    tuned: bool = False
    """have glibc keep freed memory, as mtt_fast's commands do; without it as in an ordinary script"""


class _VisionTransformer(nn.Module):
    """A vision transformer of kornia, with patches of four pixels, and a linear classifier on its class token."""

    def __init__(self) -> None:
        from kornia.models.vit import VisionTransformer  # here, since kornia takes seconds to import

        super().__init__()
        self.features = VisionTransformer(32, 4, embed_dim=128, depth=4, num_heads=4)
        self.head = nn.Linear(128, _CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images)[:, 0])  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ConvNet": lambda: testing.reference_convnet(3, _CLASSES, 32, 128, 3),
    "ResNet18": lambda: resnet(_SHAPE, _CLASSES),
    "ViT": _VisionTransformer,
    "MLP": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 32), nn.ReLU(), nn.Linear(32, _CLASSES)),
}


@dataclass(frozen=True, kw_only=True)
class Case(Iteration):
    """An iteration of a module: the same batch in every step."""

    module: nn.Module
    net: FlatModule


def whole_graph(case: Case) -> Gradients:
    """Build the graph of all N steps, then differentiate it, as the public code does."""
    with sdpa_kernel(SDPBackend.MATH):  # torch's other attentions have no second derivative
        result = testing.whole_graph(
            testing.module_function(case.module), case.start, case.target, case.images, case.labels, case.lr,
            list(case.batches),
        )  # fmt: skip
    return Gradients(result.images, result.lr)


def generic(case: Case, memory_budget: str | None = None) -> Gradients:
    """Run mtt_fast, which rebuilds each step's graph in the backward sweep, or saves the graph if the budget allows."""
    images, lr = (value.detach().clone().requires_grad_() for value in (case.images, case.lr))
    path = unroll(case.net, case.start, images, case.labels, lr, case.batches, memory_budget=memory_budget)
    return Gradients(*torch.autograd.grad(matching_loss(path[-1], case.start, case.target), (images, lr)))


def by_product(product: Product, case: Case) -> Gradients:
    """Take one step at a time as `generic` does, with `product` as the derivative of its gradient."""
    return gradients_by(product, cross_entropy_of(testing.module_function(case.module)), case)


ENGINES: dict[str, Callable[[Case], Gradients]] = {
    "whole_graph": whole_graph,
    "generic": generic,
    "generic-auto": lambda case: generic(case, AUTO),
    "reverse-over-reverse": partial(by_product, reverse_over_reverse),
    "forward-over-reverse": partial(by_product, forward_over_reverse),
    "reverse-over-forward": partial(by_product, reverse_over_forward),
}


def main(options: Options, command: str) -> None:
    """Measure, print the table, write the record."""
    device, names, engines = options.torch_device(), options.networks.split(","), options.engines.split(",")
    for flag, given, known in (("networks", names, NETWORKS), ("engines", engines, ENGINES)):
        if unknown := set(given) - set(known):
            raise InputError(f"--{flag} {','.join(sorted(unknown))}: expected some of {', '.join(known)}")
    elapsed: dict[str, list[float]] = defaultdict(list)

    def measure(name: str) -> float:
        times = workers[name].ask(timed)
        elapsed[name].append(times["elapsed"])
        return float(times["cpu"])

    with Subjects() as workers:
        for network, engine in itertools.product(names, engines):
            name = f"{network} {engine}"
            with workers.row(name, network=network, engine=engine) as row:
                workers[name] = Process(
                    build, tuned=options.tuned, network=network, engine=engine, device=str(device), steps=options.steps,
                    batch=options.batch,
                )  # fmt: skip
                row |= workers[name].ask(check)
                check_errors(row["error_float64"])
        cpu_seconds = interleaved(options.repetitions, workers, measure, workers.give_up)
    rows = workers.rows
    for name, cpu in cpu_seconds.items():
        rows[name] |= {"cpu_seconds": cpu, "seconds": spread(elapsed[name])}
        whole = cpu_seconds.get(f"{rows[name]['network']} whole_graph")
        rows[name]["cpu_of_whole_graph"] = cpu["least"] / whole["least"] if whole else None
    conditions = {
        "case": f"{'×'.join(map(str, _SHAPE))}, {_CLASSES} classes, N = {options.steps}, b = {options.batch}",
        "freed memory": "kept by glibc" if options.tuned else "as an ordinary script runs",
        "load": os.getloadavg()[0],
    }
    publish(options, "modules", f"modules-{device.type}", device, conditions, rows.values(), command)


@dataclass(frozen=True)
class State:
    """The state of a worker."""

    network: str
    engine: Callable[[Case], Gradients]
    case: Case
    device: torch.device


def build(network: str, engine: str, device: str, steps: int, batch: int) -> State:
    """Return the state of a worker."""
    target = torch.device(device)
    return State(network, ENGINES[engine], make_case(network, steps, batch, torch.float32, target), target)


def check(state: State) -> dict[str, Any]:
    """Return, in a worker, the error in float64 on a small case, and the peak memory of one iteration."""
    small = make_case(state.network, 2, 2, torch.float64, state.device)
    pairs = zip(state.engine(small), whole_graph(small), strict=True)
    error = max(relative_error(mine, theirs) for mine, theirs in pairs)
    return {"error_float64": error, "peak": peak_above_baseline(lambda: state.engine(state.case), state.device)}


def timed(state: State) -> dict[str, float]:
    """Return, in a worker, the CPU seconds of one iteration, of all threads, and the elapsed seconds."""
    synchronise(state.device)
    cpu, elapsed = time.process_time(), time.perf_counter()
    state.engine(state.case)
    synchronise(state.device)
    return {"cpu": time.process_time() - cpu, "elapsed": time.perf_counter() - elapsed}


def make_case(network: str, steps: int, batch: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Return a case of random images with a target near the start, whose values are exact in float32."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # modules draw their parameters from torch's own generator
        module = NETWORKS[network]().to(device, dtype)
    start = torch.nn.utils.parameters_to_vector(module.parameters()).detach()
    moved = 0.01 * torch.randn(len(start), generator=generator)
    return Case(
        module=module,
        net=FlatModule(module),
        start=start,
        target=start + moved.to(start),
        images=torch.randn(batch, *_SHAPE, generator=generator).to(start),
        labels=torch.arange(batch, device=device) % _CLASSES,
        lr=torch.tensor(_LR).to(start),
        batches=torch.arange(batch, device=device).expand(steps, batch),
    )
