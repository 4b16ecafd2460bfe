"""Parse command lines, with the options that several benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar, cast, get_args

import torch

from mtt_fast.commands import parsing
from mtt_fast.commands.option_fields import Checked
from mtt_fast.engine.student_choice import has_fused_kernels
from mtt_fast.errors import InputError
from mtt_fast.kernels import Precision
from mtt_fast.runtime.provenance import choose_device
from mtt_fast.storage.outputs import check_output_folder


@dataclass(frozen=True)
class CommonOptions:
    """The options of every benchmark: device, repetitions, and record."""

    device: str = "auto"
    """device to run on: auto, cpu, cuda, cuda:1, …"""
    repetitions: int = 5
    """timed repetitions, interleaved over the subjects that are compared"""
    out: Annotated[str, Checked(check_output_folder)] = "bench/results"
    """folder of the record"""
    name: str | None = None
    """name of the record; default from the benchmark, its setting and the device"""

    def torch_device(self) -> torch.device:
        """Return the device. Raises `InputError` if it cannot be used, or for fewer than one repetition."""
        if self.repetitions < 1:
            raise InputError(f"--repetitions {self.repetitions}: expected at least 1")
        return choose_device(self.device)


def precisions_in(names: str, device: torch.device) -> list[Precision]:
    """Return the precisions that `names` lists, joined by commas.

    Raises `InputError` for an unknown one, and where `device` has no fused step: the generic one would ignore it.
    """
    precisions = [cast(Precision, name) for name in names.split(",")]
    if unknown := [name for name in precisions if name not in get_args(Precision)]:
        raise InputError(f"--precisions {unknown[0]}: expected some of {', '.join(get_args(Precision))}")
    if not has_fused_kernels(device):
        raise InputError(
            f"--precisions: expected a device with kernels for ConvNet's fused step, found {device} without; see python -m mtt_fast.env"
        )
    return precisions


Options = TypeVar("Options")


def parse(kind: type[Options], argv: Sequence[str], prog: str) -> Options:
    """Return an instance of the dataclass `kind` from `argv`. Raises `InputError` for an unknown option."""
    return parsing.parse(kind, argv, prog)
