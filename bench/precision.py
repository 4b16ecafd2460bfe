"""Measure the gradients' errors against float64 in each precision of the products, for one iteration.

On a CPU the reference emulates a precision: it rounds the factors as tensor cores do and adds up in float32. On a GPU the
precision is the GPU's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from bench.cases import TARGET_EPOCHS, case_on, make_case, trained_case
from bench.engines import Case
from bench.parsing import CommonOptions
from bench.records import write_record
from bench.render import table
from bench.settings import Shape
from mtt_fast import matching_loss, unroll
from mtt_fast.errors import InputError
from mtt_fast.kernels import Precision
from mtt_fast.testing import relative_error

_MICROBATCH = 32  # so that float64 fits in the memory in which the engine fits; the result is the same


@dataclass(frozen=True)
class Options(CommonOptions, Shape):
    """Compare the gradients in each precision of the products with float64's."""

    precisions: str = ",".join(get_args(Precision))
    """precisions to compare, as in fp32,bf16"""
    experts: str | None = None
    """folder of trained experts: start and target are an expert's epochs, in place of a random case"""
    synthetic: str | None = None
    """distilled set to step on, with --experts"""
    start_epoch: int = 0
    """epoch of the expert at which the student starts; the target is two epochs later"""
    repetitions: int = 1
    """not used: nothing is timed"""


def main(options: Options, command: str) -> None:
    """Compute, print the table, write the record."""
    device, setting = options.torch_device(), options.resolve()
    names = options.precisions.split(",")
    if unknown := [name for name in names if name not in get_args(Precision)]:
        raise InputError(f"--precisions {unknown[0]}: expected some of {', '.join(get_args(Precision))}")
    if (options.experts is None) != (options.synthetic is None):
        raise InputError("--experts, --synthetic: expected both or neither, found one; give the other too")
    if options.experts is None or options.synthetic is None:
        case, of = make_case(setting), str(setting)
    else:
        case = trained_case(setting, Path(options.experts), Path(options.synthetic), options.start_epoch)
        of = f"{setting}, from an expert's epoch {options.start_epoch} to {options.start_epoch + TARGET_EPOCHS}"
    expected = _gradients(case_on(case, torch.float64, device), "fp32")
    rows = []
    for name in names:
        gradients = _gradients(case_on(case, torch.float32, device), name)
        errors = {part: relative_error(gradients[part].double(), expected[part]) for part in expected}
        rows.append({"precision": name, **errors})
    conditions = {"case": of, "products": "emulated" if device.type == "cpu" else "the GPU's own"}
    print(table("precision", conditions, rows))
    name = options.name or f"precision-{options.label()}-{device.type}"
    write_record(options.out, name, "precision", device, conditions, rows, command)


def _gradients(case: Case, precision: Any) -> dict[str, torch.Tensor]:
    """Return the gradients of images and learning rate, and the student's displacement."""
    images, lr = case.images.clone().requires_grad_(), case.lr.clone().requires_grad_()
    path = unroll(
        case.net, case.start, images, case.labels, lr, case.batches, microbatch=_MICROBATCH, precision=precision
    )
    matching_loss(path[-1], start=case.start, target=case.target).backward()
    assert images.grad is not None
    assert lr.grad is not None
    return {"images": images.grad, "lr": lr.grad, "path": (path[-1] - case.start).detach()}
