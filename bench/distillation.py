"""Distil to the end in each precision of the products, and compare the accuracies.

Only the iterations use that precision; on a CPU the reference emulates it, as for `precision`. Experts and evaluations are
those of any run.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from bench.parsing import RecipeOptions, precisions_in
from bench.records import publish
from mtt_fast.distill import command as distil
from mtt_fast.distill.command_line import parse_options
from mtt_fast.kernels import Precision
from mtt_fast.storage.metrics import read_records
from mtt_fast.storage.run_files import METRICS, SUMMARY


@dataclass(frozen=True)
class Options(RecipeOptions):
    """Distil once in each precision, from the same start and the same experts, and evaluate the images."""

    precisions: str = ",".join(get_args(Precision))
    """precisions to compare, as in fp32,bf16"""
    buffer_path: str | None = None
    """folder of the experts; without it new experts are trained, and not kept"""


def main(options: Options, command: str) -> None:
    """Distil in each precision, print the table, write the record."""
    device, flags = options.torch_device(), options.flags_without("precisions", "buffer_path")
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
    publish(
        options,
        "distillation",
        f"distillation-{data}-ipc{setting.ipc}-{device.type}",
        device,
        conditions,
        rows,
        command,
    )


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
