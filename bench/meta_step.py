"""Measure one iteration of the method by every engine: time, memory, and error of the gradient, in one run.

Each engine first passes the gate, and its memory is measured. Then all engines that passed are timed in turn. Each measurement
has a process of its own, which is alone on a CPU: beside processes that hold most of the memory, page faults take longer. An engine's
failure is recorded in its row, and the others continue.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import gate
from bench.cases import Case, case_on, load_case, make_case, save_case
from bench.engines import ENGINES, Engine, checkpointed, engine_on, fused
from bench.floor import Convolution, convolutions, run_all
from bench.flops import MIXED_STEP, PLAIN_GRADIENT, iteration_flops
from bench.measuring import Peak, interleaved, matrix_product_peak, peak_above_baseline, seconds_in_turn, set_precision
from bench.parsing import CommonOptions
from bench.records import write_record
from bench.settings import Setting, Shape
from bench.shares import share_of_operations
from bench.tables import table
from bench.workers import Here, Process, Subjects, Worker
from mtt_fast.errors import InputError
from mtt_fast.runtime.memory_info import AUTO, parse_bytes
from mtt_fast.storage.tensor_files import read_header, save_tensors
from mtt_fast.testing import relative_error

log = logging.getLogger("mtt_fast")

FLOOR = "convolutions alone"
_TRUTH_MICROBATCH = 32  # so that the float64 gradients fit in the memory in which the engines fit


@dataclass(frozen=True)
class Options(CommonOptions, Shape):
    """Time one iteration of the method by every engine."""

    engines: str | None = None
    """engines to time, in this order; without it all of mtt_fast and autograd that the device can run; also ENGINE@PRECISION, as in
    fused-graph@fp16, and MODULE:FUNCTION, a function of your own from a case to the gradients"""
    memory_budget: str = "400MiB"
    """memory budget of fused-budget"""
    precision: str = "tf32"
    """precision of a GPU's float32 products: tf32 as the public code runs, fp32, or fp16 and bf16, which only the fused engines take"""
    truth: str | None = None
    """file for the gradients in float64, which take minutes on a CPU; used again for the same case"""
    floor: bool = True
    """also time only the convolutions"""
    one_process: bool = False
    """on a GPU: measure everything in one process, which avoids starting others"""


def main(options: Options, command: str) -> None:
    """Measure, print the table, write the record."""
    device, setting = options.torch_device(), options.resolve()
    parse_bytes(options.memory_budget)
    if options.one_process and device.type == "cpu":
        raise InputError(
            "--one_process True: expected a GPU, since peak memory on a CPU belongs to a process; leave it out"
        )
    worker_of: Callable[..., Worker] = Here if options.one_process else Process
    engines, precisions = _chosen(options, device)
    common: dict[str, Any] = {"device": str(device), "precision": options.precision}
    set_precision(device, options.precision)
    log.info("%s, on %s", setting, device)
    peak = matrix_product_peak(device)
    name_of_record = options.name or f"meta_step-{options.label()}-{device.type}"

    def record(rows: Mapping[str, dict[str, Any]], peak: float, *, complete: bool) -> dict[str, Any]:
        conditions = {
            "case": str(setting),
            "dtype": "float32" if device.type == "cpu" else options.precision,
            "budget": options.memory_budget,
            "matrix_product_flops": peak,
            "load": os.getloadavg()[0],
        } | packages(engines)
        place = (options.out, name_of_record, "meta_step", device)
        write_record(*place, conditions, list(rows.values()), command, complete=complete)
        return conditions

    with tempfile.TemporaryDirectory(prefix="mtt_fast-bench-") as folder:
        case = save_case(make_case(setting), Path(folder) / "case.safetensors") | common
        truth = options.truth or str(Path(folder) / "truth.safetensors")
        digest = hashlib.sha256(Path(case["path"]).read_bytes()).hexdigest()
        if not (Path(truth).exists() and read_header(truth)[1].get("case") == digest):
            with worker_of(build_case, **case) as worker:
                worker.ask(write_truth, path=truth, digest=digest)

        def build_worker(name: str) -> Worker:
            """Return a new worker of an engine, or of the floor."""
            if name == FLOOR:
                return worker_of(build_floor, shape=_shape(options), **common)
            tuned, budget = engines[name].tuned, options.memory_budget
            return worker_of(build_engine, tuned=tuned, case=case, engine=name, budget=budget)

        with Subjects() as workers:
            rows = workers.rows
            for name, engine in engines.items():
                with workers.row(name, engine=name, exact=engine.exact, tuned=engine.tuned) as row:
                    workers[name] = build_worker(name)
                    row |= workers[name].ask(check, truth=truth)
                    _check_gate(rows, name, precisions[name])
                    if engine.run is fused:
                        row["shares"] = workers[name].ask(shares)
                    if not options.one_process:
                        workers.pop(name).close()
                log.info("%s: %s", name, row["problem"] or f"error {row['error']:.1e}")
                record(rows, peak, complete=False)
            if options.floor:
                with workers.row(FLOOR, engine=FLOOR, exact=True, tuned=True):
                    if options.one_process:
                        workers[FLOOR] = build_worker(FLOOR)
            passed = [name for name, row in rows.items() if not row["problem"]]
            kept = workers if options.one_process else {}
            times = interleaved(
                options.repetitions, passed, lambda name: _seconds(kept.get(name), build_worker, name), workers.give_up
            )
    peak = max(peak, matrix_product_peak(device))  # on a shared machine the better of two moments
    for name, row in rows.items():
        row["seconds"] = times.get(name)
        row["flops"] = _flops(name, engines, setting)
    _compare(rows, peak)
    print(table("meta_step", record(rows, peak, complete=True), list(rows.values())))


def _seconds(kept: Worker | None, build_worker: Callable[[str], Worker], name: str) -> float:
    """Return the seconds of one iteration of an engine, by a worker that was `kept`, or by a new one after its first iteration."""
    if kept is not None:
        return float(kept.ask(timed))
    with build_worker(name) as worker:
        worker.ask(timed)  # an engine's first iteration allocates, and may compile
        return float(worker.ask(timed))


def _chosen(options: Options, device: torch.device) -> tuple[dict[str, Engine], dict[str, str]]:
    """Return the engines to time, and the precision of each, by name."""
    runnable = [
        name
        for name, engine in ENGINES.items()
        if engine.package is None and (device.type == "cuda" or not engine.cuda_only)
    ]
    engines, precisions = {}, {}
    for name in options.engines.split(",") if options.engines else runnable:
        engines[name], taken = engine_on(name, device, options.precision)
        precisions[name] = taken.get("precision", "tf32")
    return engines, precisions


def build_case(net: dict[str, Any], path: str, device: str, precision: str) -> Case:
    """Return the case, in float64, in a worker."""
    set_precision(torch.device(device), precision)
    return case_on(load_case(net, path), torch.float64, torch.device(device))


def write_truth(case: Case, path: str, digest: str) -> None:
    """Write the case's gradients, exact in float64, to `path`, with the case's digest, in a worker."""
    truth = checkpointed(case, microbatch=min(_TRUTH_MICROBATCH, case.batches.shape[1]))
    save_tensors(Path(path), truth._asdict(), {"case": digest})


@dataclass(frozen=True)
class EngineState:
    """The state of an engine's worker: the case in float32, and the engine's arguments."""

    engine: Engine
    case: Case
    limits: dict[str, Any]
    precision: dict[str, str]

    def run(self) -> Any:
        """Run one iteration."""
        return self.engine.run(self.case, **self.limits, **self.precision)

    @property
    def device(self) -> torch.device:
        """Return the device of the case."""
        return self.case.images.device


def build_engine(case: dict[str, Any], engine: str, budget: str) -> EngineState:
    """Return the state of an engine's worker."""
    budgets = {"fused-budget": budget, "fused-auto": AUTO, "fused-graph-auto": AUTO}
    name, _, _ = engine.partition("@")
    limits = {"memory_budget": budgets[name]} if name in budgets else {}
    device = torch.device(case["device"])
    named_engine, precision = engine_on(engine, device, case["precision"])
    return EngineState(named_engine, case_on(build_case(**case), torch.float32, device), limits, precision)


def check(state: EngineState, truth: str) -> dict[str, Any]:
    """Return, in a worker, the errors in float64 (small case) and in float32, and the peak memory of one iteration."""
    from safetensors.torch import load_file

    net, (steps, batch) = state.case.net, state.case.batches.shape
    setting = Setting(net, len(state.case.images), steps, batch)
    float64 = gate.float64_error(state.engine, setting, state.device, cut=bool(state.limits))
    gradients = []
    if state.engine.compiles:
        state.run()
    peak: Peak = peak_above_baseline(lambda: gradients.append(state.run()), state.device)
    error = relative_error(gradients[0].images.cpu(), load_file(truth)["images"])
    return {"error_float64": float64, "error": error, "peak": peak}


def timed(state: EngineState | FloorState) -> float:
    """Return, in a worker, the seconds of one iteration."""
    return seconds_in_turn(state.run, state.device)


def shares(state: EngineState) -> dict[str, float]:
    """Return, in a worker, the shares of an iteration's operations."""
    return share_of_operations(state.run, state.device)


@dataclass(frozen=True)
class FloorState:
    """The state of the floor's worker."""

    convolutions: list[Convolution]
    steps: int
    device: torch.device

    def run(self) -> None:
        """Run the convolutions of one iteration."""
        for _ in range(self.steps):
            run_all(self.convolutions)


def build_floor(shape: dict[str, Any], device: str, precision: str) -> FloorState:
    """Return the state of the floor's worker, with the convolutions of the setting."""
    set_precision(torch.device(device), precision)
    setting = Shape(**shape).resolve()
    return FloorState(convolutions(setting, torch.device(device)), setting.steps, torch.device(device))


def _shape(options: Shape) -> dict[str, Any]:
    return {name: getattr(options, name) for name in Shape.__dataclass_fields__}


def _check_gate(rows: dict[str, dict[str, Any]], name: str, precision: str) -> None:
    """Raise `WorkerError` if the errors of an exact engine are larger than allowed."""
    row = rows[name]
    if not row["exact"]:
        return
    # the bound is autograd's error, by the first engine here that is plain autograd
    autograd = next(
        (
            rows[plain]["error"]
            for plain in ("whole_graph", "whole_graph-tuned", "checkpointed")
            if "error" in rows.get(plain, {})
        ),
        None,
    )
    allowed = None if autograd is None else gate.allowed_float32(autograd, precision)
    row["allowed_error"] = allowed
    gate.check_errors(row["error_float64"], row["error"], allowed)


def _flops(name: str, engines: dict[str, Engine], setting: Setting) -> int | None:
    passes = (PLAIN_GRADIENT, MIXED_STEP) if name == FLOOR else engines[name].passes
    return iteration_flops(setting.net, setting.steps, setting.batch, *passes) if passes else None


def packages(engines: dict[str, Engine]) -> dict[str, str]:
    """Return the versions of the other libraries that are compared, as a condition of the record."""
    packages = [engine.package for engine in engines.values() if engine.package]
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    return {"other libraries": versions} if versions else {}


def _compare(rows: dict[str, dict[str, Any]], peak: float) -> None:
    """Add to each row its ratios to other rows, and to the device's peak."""
    medians = {name: row["seconds"]["median"] for name, row in rows.items() if row["seconds"]}
    for name, median in medians.items():
        row = rows[name]
        row["speedup"] = medians["whole_graph"] / median if "whole_graph" in medians else None
        row["speedup_tuned"] = medians["whole_graph-tuned"] / median if "whole_graph-tuned" in medians else None
        own_precision = "@" in name  # the peak is that of --precision
        row["share_of_peak"] = row["flops"] / median / peak if row["flops"] and not own_precision else None
        row["floor_share"] = medians[FLOOR] / median if FLOOR in medians else None
