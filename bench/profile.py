"""Write a trace of one iteration, to be opened with ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch.profiler import ProfilerActivity

from bench.cases import case_on, make_case
from bench.engines import engine_on
from bench.measuring import set_precision, synchronise
from bench.parsing import CommonOptions
from bench.records import TRACE
from bench.settings import Shape
from bench.shares import labelled, wrapped_operations
from mtt_fast.commands.option_fields import Checked
from mtt_fast.commands.options import Count
from mtt_fast.storage.outputs import check_output_folder

log = logging.getLogger("mtt_fast")

_LINES = 15


@dataclass(frozen=True)
class Options(CommonOptions, Shape):
    """Write a trace of one iteration, after --repetitions untimed ones."""

    repetitions: Count = 1
    """untimed iterations before the one that is traced"""
    out: Annotated[str, Checked(check_output_folder)] = "runs/profile"
    """folder of the trace"""
    engine: str = "fused"
    """engine to trace"""
    precision: str = "tf32"
    """precision of a GPU's float32 products: tf32, fp32, or fp16 and bf16, which only the fused engines take"""


def main(options: Options, command: str) -> None:
    """Run one iteration under the profiler, print the longest operations, write the trace."""
    device, setting = options.torch_device(), options.resolve()
    set_precision(device, options.precision)
    engine, precision = engine_on(options.engine, device, options.precision)
    case = case_on(make_case(setting), torch.float32, device)
    for _ in range(options.repetitions):
        engine.run(case, **precision)
    on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    activities = [ProfilerActivity.CPU, *on_gpu]
    # without `acc_events` torch 2.11 warns that the events of further cycles, which are none, will be lost
    with wrapped_operations(labelled), torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        engine.run(case, **precision)
        synchronise(device)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=_LINES))
    path = Path(options.out) / f"{options.name or f'{options.engine}-{options.label()}-{device.type}'}{TRACE}"
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    log.info("%s: open it with ui.perfetto.dev or chrome://tracing (%s)", path, command)
