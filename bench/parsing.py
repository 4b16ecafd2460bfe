"""Define the options that several benchmarks share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, cast, get_args

import torch

from mtt_fast.commands.option_fields import Checked
from mtt_fast.commands.options import Count
from mtt_fast.engine.students.choice import has_fused_kernels
from mtt_fast.errors import InputError
from mtt_fast.kernels import Precision
from mtt_fast.runtime.provenance import choose_device
from mtt_fast.storage.outputs import check_output_folder


@dataclass(frozen=True)
class RecordOptions:
    """The options of every benchmark: device and record."""

    device: str = "auto"
    """device to run on: auto, cpu, cuda, cuda:1, …"""
    out: Annotated[str, Checked(check_output_folder)] = "bench/results"
    """folder of the record"""
    name: str | None = None
    """name of the record; default from the benchmark, its setting and the device"""

    def torch_device(self) -> torch.device:
        """Return the device. Raises `InputError` if it cannot be used."""
        return choose_device(self.device)


@dataclass(frozen=True)
class CommonOptions(RecordOptions):
    """The options of benchmarks that time something."""

    repetitions: Count = 5
    """timed repetitions, interleaved over the subjects that are compared"""


@dataclass(frozen=True)
class RecipeOptions(RecordOptions):
    """The options of benchmarks of whole distillations: a recipe, and changes to it."""

    recipe: str = "digits"
    """the setting of the distillations"""
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

    def flags_without(self, *own: str) -> list[str]:
        """Return the options as flags of a distillation, without those of the record and the benchmark's `own` ones."""
        left_out = (*own, "out", "name")
        given = {name: value for name, value in asdict(self).items() if value is not None and name not in left_out}
        return [word for name, value in given.items() for word in (f"--{name}", str(value))]


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
