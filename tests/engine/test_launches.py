"""Test what a GPU's host code launches, with no GPU here: on meta tensors, Triton's kernels are not run, and torch's operations compute nothing."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtt_fast import Adam, ConvNet, SiameseAugment
from mtt_fast.engine.draws import draw_steps
from mtt_fast.engine.iteration import iteration
from mtt_fast.engine.optimizers import StudentSgd
from mtt_fast.engine.students.fused import FusedConvNetStudent
from mtt_fast.engine.students.microbatches import InMicrobatches
from mtt_fast.engine.students.protocol import Student
from mtt_fast.kernels import Precision, dispatch
from mtt_fast.kernels.types import memory_format
from tests.engine.no_values import NoValues

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


@contextmanager
def launches_on_meta() -> Iterator[CountLaunches]:
    """Take Triton's host code for meta tensors, by the rows of the table for an H100 or H200, and count what it launches.

    What waits for the device is an error, and so is a tensor in host memory, in an operation or as an argument of a kernel.
    """
    pytest.importorskip("triton", reason="Triton is not installed: it comes only for Linux")
    from mtt_fast.kernels import triton

    modules = [
        importlib.import_module(f"{triton.__name__}.{each.name}") for each in pkgutil.iter_modules(triton.__path__)
    ]
    counter = CountLaunches()

    def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        leaves = [getattr(each, "base", each) for each in tree_leaves((arguments, constants))]  # of a TMA descriptor
        places = {each.device.type for each in leaves if isinstance(each, Tensor)}
        assert places == {"meta"}, f"{kernel.fn.__name__} on {places}"
        counter.count += 1

    with ExitStack() as patches:
        patches.enter_context(patch.object(dispatch, "_runs_triton", return_value=True))
        for module in modules:
            for name, value in {"launch": launch, "architecture": lambda *_: "sm_90"}.items():
                if hasattr(module, name):
                    patches.enter_context(patch.object(module, name, value))
        patches.enter_context(NoValues())
        patches.enter_context(counter)
        yield counter


def launches_of(
    student: Student,
    steps: int,
    batch: int,
    net: ConvNet = NET,
    soft: bool = False,
    lr: Tensor | None = None,
    **options: Any,
) -> int:
    """Return the launches of an iteration of so many steps, with the public code's augmentation."""
    augment, shape = SiameseAugment("color_crop_cutout_flip_scale_rotate"), torch.Size((net.in_channels, 32, 32))
    generator = torch.Generator().manual_seed(0)
    draws = draw_steps([torch.arange(batch)] * steps, shape, torch.float32, augment.draw_parameters, generator)
    labels = torch.empty(batch, net.num_classes) if soft else torch.arange(batch)
    theta = torch.empty(net.num_parameters)
    tensors = (
        theta,
        theta,
        torch.empty(batch, *shape),
        labels,
        torch.empty(()) if lr is None else lr,
        *draws.tensors(),
    )
    on_meta = [tensor.to("meta") for tensor in tensors]
    with launches_on_meta() as counter:
        iteration(student, augment, (batch,) * steps, **options)(*on_meta)
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
    student = FusedConvNetStudent(NET, "indices", precision)
    assert launches_of(student, 3, batch) - launches_of(student, 2, batch) <= most


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_nothing_waits_in_the_host_code(precision: Precision) -> None:
    """Cover what the steps above do not: blocks with only planes, saved activations, pieces, momentum, Adam, rates per parameter, and soft labels."""
    for net, kind, cut, options in (
        (NET, "logits", False, {"saved_steps": 2, "optimizer": StudentSgd(0.5, 1e-3)}),
        (NET, "logits", False, {"optimizer": Adam(weight_decay=1e-3)}),
        (NET, "logits", False, {"optimizer": StudentSgd(has_velocity=True), "lr": torch.empty(2, NET.num_parameters)}),
        (ConvNet(3, 10, 32, 128, 3, norm="none"), "indices", False, {"saved_steps": 1}),
        (ConvNet(4, 10, 32, 24, 2), "probabilities", True, {}),
    ):
        student: Student = FusedConvNetStudent(net, kind, precision)
        count = launches_of(InMicrobatches(student, 4) if cut else student, 2, 10, net, kind != "indices", **options)
        assert count > 0


def test_a_tensor_in_host_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the tests above can fail."""
    monkeypatch.setattr("mtt_fast.kernels.triton.flat.torch.empty", lambda *shape, **_: torch.zeros(*shape))
    with pytest.raises(AssertionError, match=r"on \{'cpu'\}"):
        launches_of(FusedConvNetStudent(NET), 1, 10)
