"""Time the reading of experts: mtt_fast's store, with and without checksums, beside torch.load of the public code's buffers.

Each reading is in a new process, because the first one is the slowest: torch.load reads the whole file, the store only two
rows. The checksums of these two rows are also timed separately, and given as a share of an iteration of the same setting.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.cases import case_on, make_case
from bench.engines import ENGINES
from bench.measuring import Spread, resident_bytes, seconds, spread
from bench.parsing import CommonOptions
from bench.records import publish
from bench.settings import Setting, Shape
from bench.workers import Process, WorkerError
from mtt_fast.commands.option_fields import Range
from mtt_fast.commands.options import Count
from mtt_fast.errors import InputError
from mtt_fast.networks.convnet import ConvNet
from mtt_fast.runtime.tensor_bytes import bytes_of
from mtt_fast.storage.checksums import checksum_of
from mtt_fast.storage.expert_metadata import ExpertMetadata
from mtt_fast.storage.tensor_files import read_header
from mtt_fast.storage.trajectories import TrajectoryStore, write_expert

CHECKED = "TrajectoryStore"
_EXPERT_EPOCHS = 2


@dataclass(frozen=True)
class Options(CommonOptions, Shape):
    """Time the first sample of a trajectory, and its checksums."""

    experts: Count = 5
    """experts in a file of the public layout (which holds ten by default)"""
    epochs: Annotated[int, Range(_EXPERT_EPOCHS + 1)] = 50
    """epochs of each expert"""


def main(options: Options, command: str) -> None:
    """Write experts in both formats, measure, print the table, write the record."""
    device, setting = options.torch_device(), options.resolve()
    net = setting.net
    last = {"expert": options.experts - 1, "epoch": options.epochs - _EXPERT_EPOCHS}
    with tempfile.TemporaryDirectory(prefix="mtt_fast-bench-") as folder:
        paths = write_all(Path(folder), net, options.experts, options.epochs)
        rows = []
        for reader, path in paths.items():
            row: dict[str, Any] = {
                "reader": reader,
                "problem": None,
                "disk": sum(file.stat().st_size for file in _files(path)),
            }
            try:
                row |= measure_reader(reader, path, last, options.repetitions)
            except WorkerError as error:
                row["problem"] = str(error)
            rows.append(row)
        samples = [row.pop("sample", None) for row in rows]
        if len({tuple(sample) for sample in samples if sample}) != 1:
            raise InputError("trajectories: the formats gave different parameters; nothing is recorded")
    iteration = seconds_of_iteration(setting, device)
    for row in rows:
        if row["reader"] == CHECKED:
            row["checksums"] = seconds_of_checksums(net.num_parameters)
            row["share"] = row["checksums"]["median"] / iteration
    megabytes = 4 * net.num_parameters / 1e6
    conditions = {
        "case": f"{options.experts} experts, {options.epochs} epochs, {megabytes:.1f} MB of parameters each time",
        "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} processors",
        "iteration": f"{iteration:.3g} s on {device.type}, {setting}",
    }
    publish(options, "trajectories", f"trajectories-{options.label()}-cpu", device, conditions, rows, command)


def seconds_of_iteration(setting: Setting, device: torch.device) -> float:
    """Return the seconds of an iteration of the setting, the least of three after one that is not counted."""
    case, engine = case_on(make_case(setting), torch.float32, device), ENGINES["fused"]
    return min([seconds(lambda: engine.run(case), device) for _ in range(4)][1:])


def seconds_of_checksums(parameters: int) -> Spread:
    """Return the seconds that the checksums of two rows of `parameters` numbers take."""
    rows = [torch.randn(parameters) for _ in range(2)]
    cpu = torch.device("cpu")
    return spread([seconds(lambda: [checksum_of(bytes_of(row)) for row in rows], cpu) for _ in range(100)])


def write_all(folder: Path, net: ConvNet, experts: int, epochs: int) -> dict[str, Path]:
    """Write the same random experts in the public format and in mtt_fast's, with and without checksums; return paths by reader.

    The public layout: a list of experts, each a list of epochs, each a list of the network's parameter tensors.
    """
    generator, public = torch.Generator().manual_seed(0), []
    for expert in range(experts):
        parameters = torch.randn(epochs + 1, net.num_parameters, generator=generator)
        metadata = ExpertMetadata(
            network={"kind": "ConvNet", **dataclasses.asdict(net)}, layout=net.layout.describe(), dataset="random",
            fingerprint="random", whitening="none", hyperparameters={}, seed=0, accuracy=[0.0] * (epochs + 1), versions={},
        )  # fmt: skip
        write_expert(folder / "store", expert, parameters, metadata)
        public.append([[part.clone() for part in net.layout.split(row)] for row in parameters])
    torch.save(public, folder / "replay_buffer_0.pt")
    (folder / "unchecked").mkdir()
    for path in (folder / "store").iterdir():
        text = read_header(path)[1] | {"format": "mtt_fast expert 1"}
        save_file(load_file(path), folder / "unchecked" / path.name, text)
    return {
        "torch.load": folder / "replay_buffer_0.pt",
        CHECKED: folder / "store",
        f"{CHECKED}, no checksums": folder / "unchecked",
    }


def measure_reader(reader: str, path: Path, last: dict[str, int], repetitions: int) -> dict[str, Any]:
    """Return the times and the memory of reading one sample, each time in a new process."""
    first, further, resident, sample = [], [], 0, []
    for _ in range(repetitions):
        with Process(build, reader=reader, path=str(path)) as worker:
            first_sample = worker.ask(read_sample, **last)
            further_sample = worker.ask(read_sample, expert=0, epoch=0)
        first.append(first_sample["seconds"])
        further.append(further_sample["seconds"])
        resident, sample = first_sample["resident"], first_sample["sample"]
    times: dict[str, Spread] = {"first": spread(first), "further": spread(further)}
    return {**times, "resident": resident, "sample": sample}


@dataclass
class State:
    """The state of a worker: a reader that opens its file or folder at the first question."""

    open: Callable[[], Callable[[int, int], Tensor]]
    read: Callable[[int, int], Tensor] | None = None


def build(reader: str, path: str) -> State:
    """Return the state of a worker."""
    return State((lambda: _open_public(path)) if reader == "torch.load" else (lambda: TrajectoryStore(path).read))


def read_sample(state: State, expert: int, epoch: int) -> dict[str, Any]:
    """Return, in a worker, the time and memory for the start and target of one iteration, and the rows' sums as a check."""
    resident, begin = resident_bytes(), time.perf_counter()
    if state.read is None:
        state.read = state.open()
    start, target = state.read(expert, epoch), state.read(expert, epoch + _EXPERT_EPOCHS)
    elapsed = time.perf_counter() - begin
    sums = [float(row.double().sum()) for row in (start, target)]
    return {"seconds": elapsed, "resident": max(0, resident_bytes() - resident), "sample": sums}


def _open_public(path: str) -> Callable[[int, int], Tensor]:
    buffers = torch.load(path)
    return lambda expert, epoch: torch.cat([part.reshape(-1) for part in buffers[expert][epoch]])


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else list(path.iterdir())
