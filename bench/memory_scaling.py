"""Measure the peak memory of one iteration against the steps N, the batch b and the resolution, beside the plan's prediction.

Each point is an iteration with whole batches and no saved activations: on a CPU the first of a fresh process, to which the peak belongs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from bench.cases import Case, case_on, make_case, small_setting
from bench.engines import Engine, engine_named, generic_convnet
from bench.measuring import peak_above_baseline
from bench.parsing import RecordOptions
from bench.records import publish, write_record
from bench.settings import Setting, Shape
from bench.workers import Here, Process, Worker, WorkerError
from mtt_fast import kernels
from mtt_fast.commands.parsing import integers
from mtt_fast.engine.memory_plan import plan
from mtt_fast.networks.convnet import ConvNet

log = logging.getLogger("mtt_fast")


@dataclass(frozen=True)
class Options(RecordOptions, Shape):
    """Measure the peak memory of an iteration as N, b and the resolution grow, one at a time."""

    engine: Literal["fused", "generic"] = "fused"
    """engine to measure"""
    vary_steps: str = "5,10,20,40"
    """values of N"""
    vary_batch: str = "25,50,100,200"
    """values of b"""
    vary_size: str = "32,64,96"
    """values of the resolution"""


def main(options: Options, command: str) -> None:
    """Measure, print the table, write the record."""
    device, base = options.torch_device(), options.resolve()
    conditions = {"case": str(base), "engine": options.engine}
    name = options.name or f"memory_scaling-{options.engine}-{options.label()}-{device.type}"
    worker_of: Callable[..., Worker] = Here if device.type == "cuda" else Process  # a process takes seconds to start
    rows = []
    for varied in ("steps", "batch", "size"):
        for value in integers(getattr(options, f"vary_{varied}"), f"--vary_{varied}"):
            setting = _changed(base, varied, value)
            row: dict[str, Any] = {
                "varied": varied, "steps": setting.steps, "batch": setting.batch, "size": setting.net.image_size, "problem": None,
                "planned": planned_bytes(setting, options.engine, device),
            }  # fmt: skip
            try:
                with worker_of(build, engine=options.engine, device=str(device), setting=asdict(setting)) as worker:
                    row["peak"] = worker.ask(peak)
                row["ratio"] = row["peak"]["bytes"] / row["planned"]
            except WorkerError as error:
                row["problem"] = str(error)
            log.info("%s %d: %s", varied, value, row["problem"] or row["peak"])
            rows.append(row)
            write_record(options.out, name, "memory_scaling", device, conditions, rows, command, complete=False)
    publish(options, "memory_scaling", name, device, conditions, rows, command)


def planned_bytes(setting: Setting, engine: str, device: torch.device) -> int:
    """Return the peak bytes that mtt_fast predicts for an iteration of `engine`."""
    net = generic_convnet(setting.net) if engine == "generic" else setting.net
    shape = (setting.images, net.in_channels, setting.side, setting.side)
    planned = plan(net, images=shape, steps=setting.steps, batch=setting.batch, memory_budget=None, device=device)
    return planned.peak_bytes


@dataclass(frozen=True)
class State:
    """The state of a worker."""

    engine: Engine
    case: Case


def build(engine: str, device: str, setting: dict[str, Any]) -> State:
    """Return the state of a worker after a small iteration, which loads the libraries."""
    of_worker, place = Setting(**setting | {"net": ConvNet(**setting["net"])}), torch.device(device)
    small, case = (case_on(make_case(each), torch.float32, place) for each in (small_setting(of_worker), of_worker))
    state = State(engine_named(engine), case)
    state.engine.run(small)
    if place.type == "cuda":
        kernels.compile_ahead(lambda: state.engine.run(case))
    return state


def peak(state: State) -> dict[str, Any]:
    """Return, in a worker, the peak memory of one iteration."""
    return dict(peak_above_baseline(lambda: state.engine.run(state.case), state.case.images.device))


def _changed(base: Setting, varied: str, value: int) -> Setting:
    if varied == "size":
        return replace(base, net=replace(base.net, image_size=value))
    changed = replace(base, steps=value) if varied == "steps" else replace(base, batch=value)
    return replace(changed, images=max(base.images, changed.batch))
