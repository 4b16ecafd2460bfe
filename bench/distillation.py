"""Distil to the end in each precision of the products, and compare the accuracies.

Only the iterations use that precision; on a CPU the reference emulates it, as for `precision`. Experts and evaluations are
those of any run.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from bench.parsing import CommonOptions, precisions_in
from bench.records import write_record
from bench.render import table
from mtt_fast.distill import command as distil
from mtt_fast.distill.command_line import parse_options
from mtt_fast.kernels import Precision
from mtt_fast.storage.metrics import read_records
from mtt_fast.storage.run_files import METRICS, SUMMARY

_OWN = ("repetitions", "precisions", "out", "name", "buffer_path")


@dataclass(frozen=True)
class Options(CommonOptions):
    """Distil once in each precision, from the same start and the same experts, and evaluate the images."""

    recipe: str = "digits"
    """the setting"""
    dataset: str | None = None
    """data set, if not the recipe's"""
    data_path: str = "data"
    """folder of the data sets"""
    Iteration: int | None = None
    """number of iterations, if not the recipe's"""
    num_experts: int | None = None
    """number of experts, if not the recipe's"""
    train_epochs: int | None = None
    """number of the experts' epochs, if not the recipe's"""
    max_start_epoch: int | None = None
    """last expert epoch to start from, if not the recipe's"""
    syn_steps: int | None = None
    """number of student steps, if not the recipe's"""
    num_eval: int | None = None
    """number of networks in an evaluation, if not the recipe's"""
    epoch_eval_train: int | None = None
    """number of epochs of these networks, if not the recipe's"""
    precisions: str = ",".join(get_args(Precision))
    """precisions to compare, as in fp32,bf16"""
    buffer_path: str | None = None
    """folder of the experts; without it new experts are trained, and not kept"""
    repetitions: int = 1
    """not used: nothing is timed"""

    def flags(self) -> list[str]:
        """Return the flags of the distillation."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if name not in _OWN}
        return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def main(options: Options, command: str) -> None:
    """Distil in each precision, print the table, write the record."""
    device, flags = options.torch_device(), options.flags()
    precisions, setting = precisions_in(options.precisions, device), parse_options(flags)
    flags += ["--eval_it", str(max(1, setting.Iteration))]  # at the start and at the end
    with tempfile.TemporaryDirectory(prefix="mtt_fast-") as temporary:
        flags += ["--buffer_path", options.buffer_path or str(Path(temporary) / "buffers")]
        rows = [_row(precision, flags, Path(temporary) / precision) for precision in precisions]
    data = Path(setting.subset or setting.dataset).name
    conditions = {
        "case": f"{data}, {setting.ipc} per class, {setting.model}, {setting.Iteration} iterations of {setting.syn_steps} steps",
        "products of the iterations": "emulated" if device.type == "cpu" else "the GPU's own",
        "evaluation": setting.evaluation_protocol().describe(),
    }
    print(table("distillation", conditions, rows))
    name = options.name or f"distillation-{data}-ipc{setting.ipc}-{device.type}"
    write_record(options.out, name, "distillation", device, conditions, rows, command)


def _row(precision: Precision, flags: list[str], folder: Path) -> dict[str, Any]:
    """Distil in `precision` to the end, in `folder`; return its row."""
    distil.main([*flags, "--out", str(folder)], precision=precision)
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    losses = [record["loss"] for record in read_records(folder / METRICS) if record["kind"] == "step"]
    return {
        "precision": precision,
        "accuracy": summary["accuracy"]["distilled"],
        "random": summary["accuracy"]["random_real_images"],
        "loss": statistics.fmean(losses[-max(1, len(losses) // 10) :]),
        "skipped": summary["skipped_iterations"],
        "repeated": summary["iterations_repeated_in_tf32"],
    }
