"""Measure the gradients' errors against float64 in each precision of the products, iteration by iteration.

On a CPU the reference emulates a precision: it rounds the factors as tensor cores do and adds up in float32. On a GPU the
precision is the GPU's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from bench.cases import case_on, make_case
from bench.iterations import NamedCase, golden_cases, run_cases
from bench.parsing import RecordOptions, precisions_in
from bench.records import publish
from bench.settings import Shape
from mtt_fast import matching_loss, unroll
from mtt_fast.commands.options import Count
from mtt_fast.kernels import Precision
from mtt_fast.testing import relative_error

_MICROBATCH = 32  # so that float64 fits in the memory in which the engine fits; the result is the same


@dataclass(frozen=True)
class Options(RecordOptions, Shape):
    """Compare the gradients in each precision of the products with float64's: on a random case, and on the cases of --golden and --runs."""

    precisions: str = ",".join(get_args(Precision))
    """precisions to compare, as in fp32,bf16"""
    golden: str | None = None
    """folder of golden cases, to compare these too"""
    runs: str | None = None
    """folders of distillations, separated by commas, to compare iterations on their sets too"""
    starts: Count = 1
    """iterations of each of --runs; their first epochs are spread evenly over the later half of the expert's epochs, and one is the last"""


def main(options: Options, command: str) -> None:
    """Compute, print the table, write the record."""
    device = options.torch_device()
    names = precisions_in(options.precisions, device)
    conditions = {"products": "emulated" if device.type == "cpu" else "the GPU's own"}
    rows = [_row(case, names, device) for case in _cases(options)]
    publish(options, "precision", f"precision-{options.label()}-{device.type}", device, conditions, rows, command)


def _cases(options: Options) -> Iterator[NamedCase]:
    setting = options.resolve()
    yield NamedCase(f"random, {setting}", make_case(setting), "indices")
    if options.golden:
        yield from golden_cases(Path(options.golden))
    for folder in options.runs.split(",") if options.runs else []:
        yield from run_cases(Path(folder), options.starts)


def _row(named: NamedCase, precisions: list[Precision], device: torch.device) -> dict[str, Any]:
    """Return the errors of each precision, and the ratio of each image gradient's error to tf32's."""
    exact = gradients_of(named, torch.float64, "fp32", device)
    row: dict[str, Any] = {"case": named.name}
    for precision in precisions:
        found = gradients_of(named, torch.float32, precision, device)
        row[precision] = {part: relative_error(found[part].double(), exact[part]) for part in exact}
    if "tf32" in row:
        row["of_tf32"] = {precision: row[precision]["images"] / row["tf32"]["images"] for precision in precisions}
    return row


def gradients_of(named: NamedCase, dtype: torch.dtype, precision: Any, device: torch.device) -> dict[str, Tensor]:
    """Return the gradients of images, learning rate and soft labels, and the student's displacement."""
    case = case_on(named.case, dtype, device)
    images, lr = case.images.clone().requires_grad_(), case.lr.clone().requires_grad_()
    labels = case.labels.clone().requires_grad_(case.labels.is_floating_point())
    path = unroll(
        case.net, case.start, images, labels, lr, case.batches, microbatch=_MICROBATCH, label_kind=named.label_kind,
        momentum=named.momentum, weight_decay=named.weight_decay, precision=precision,
    )  # fmt: skip
    matching_loss(path[-1], start=case.start, target=case.target).backward()
    gradients = {"images": images.grad, "lr": lr.grad, "labels": labels.grad, "path": (path[-1] - case.start).detach()}
    return {part: gradient for part, gradient in gradients.items() if gradient is not None}
