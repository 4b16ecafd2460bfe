"""Count what a step launches on a GPU, with none here: Triton's kernels are recorded, torch's operations counted, on meta tensors."""

from __future__ import annotations

import importlib
import pkgutil
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtt_fast import ConvNet, SiameseAugment
from mtt_fast.engine.draws import draw_steps
from mtt_fast.engine.fused import FusedConvNetStudent
from mtt_fast.engine.iteration import iterate
from mtt_fast.kernels import Precision, dispatch
from mtt_fast.kernels.types import memory_format

NET = ConvNet(3, 10, 32, 128, 3)

# operations of torch that launch nothing: views, and memory without values
FREE = frozenset(
    "_reshape_alias _unsafe_view alias as_strided detach empty empty_like empty_strided expand new_empty new_empty_strided permute "
    "select slice split split_with_sizes squeeze t transpose unbind unsqueeze view".split()
)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    """Leave memory as it is allocated: what fills it elsewhere would be counted."""


class CountLaunches(TorchDispatchMode):
    """Count the operations of torch, but for those that launch nothing, and the launches that are added from outside.

    cuDNN's convolution is of one memory format, channels_last if either factor is, and copies a factor that is not; on meta
    tensors, which know no device, torch leaves all contiguous.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name not in FREE
        result = func(*args, **(kwargs or {}))
        if name != "convolution":
            return result
        formats = [memory_format(factor) for factor in args[:2]]
        common = torch.channels_last if torch.channels_last in formats else torch.contiguous_format
        self.count += sum(each != common for each in formats)
        return torch.empty_like(result, memory_format=common)


def launches_of(steps: int, batch: int, precision: Precision) -> int:
    """Return the launches of an iteration of so many steps, by the rows of the table for an H100 or H200."""
    from mtt_fast.kernels import triton

    modules = [
        importlib.import_module(f"{triton.__name__}.{each.name}") for each in pkgutil.iter_modules(triton.__path__)
    ]
    augment = SiameseAugment("color_crop_cutout_flip_scale_rotate")
    batches = [torch.arange(batch)] * steps
    generator = torch.Generator().manual_seed(0)
    draws = draw_steps(batches, torch.Size((3, 32, 32)), torch.float32, augment.draw_parameters, generator)

    def meta(tensor: Tensor) -> Tensor:
        return tensor.to("meta")

    theta, images = torch.empty(NET.num_parameters, device="meta"), torch.empty(batch, 3, 32, 32, device="meta")
    labels = torch.zeros(batch, dtype=torch.long, device="meta")
    counter = CountLaunches()

    def launch(*_: Any, **__: Any) -> None:
        counter.count += 1

    with ExitStack() as patches:
        patches.enter_context(patch.object(dispatch, "_runs_triton", return_value=True))
        for module in modules:
            for name, value in {"launch": launch, "architecture": lambda *_: "sm_90"}.items():
                if hasattr(module, name):
                    patches.enter_context(patch.object(module, name, value))
        student = FusedConvNetStudent(NET, "indices", precision)
        with counter:
            iterate(
                student, augment, (batch,) * steps, theta, theta, images, labels, torch.empty((), device="meta"),
                *map(meta, draws.tensors()),
            )  # fmt: skip
    return counter.count


@pytest.mark.parametrize(
    ("batch", "precision", "most"),
    [
        (100, "tf32", 38),  # two weight gradients are made of copies, which was faster than cuDNN's way
        (100, "fp16", 37), (100, "bf16", 36),
        # most convolutions of so few samples are cut into parts, which the kernels that read them add up
        (10, "tf32", 40), (10, "fp16", 37), (10, "bf16", 36),
    ],
)  # fmt: skip
def test_a_step_of_both_sweeps(batch: int, precision: Precision, most: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: it comes for Linux alone")
    assert launches_of(3, batch, precision) - launches_of(2, batch, precision) <= most
