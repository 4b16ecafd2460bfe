"""Test unrolls by given plans, which all have the same gradients, and the repetition in smaller pieces when memory runs out."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import mtt_fast
from mtt_fast import ConvNet, InputError, Plan, SiameseAugment, matching_loss, unroll
from mtt_fast.engine.out_of_memory import with_smaller_pieces
from mtt_fast.engine.students.fused import FusedConvNetStudent
from mtt_fast.testing import assert_close

GIB, MIB = 2**30, 2**20
NET = ConvNet(image_size=8, width=6, depth=2, num_classes=4)


class Shrinking:
    """A student that runs out of memory above a number of samples, or when it has to save activations."""

    def __init__(self, most: int) -> None:
        self.most, self.exact = most, FusedConvNetStudent(NET)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.exact, name)

    def gradient(self, theta: Tensor, images: Tensor, labels: Tensor, save: bool = False) -> Any:
        if len(images) > self.most or save:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.exact.gradient(theta, images, labels)


def meta_gradient(plan: Plan, **options: Any) -> list[Tensor]:
    """Return the end of a path, and all gradients, of a case with a short batch, momentum and augmentation."""
    generator = torch.Generator().manual_seed(3)
    start = NET.init(generator).double().requires_grad_()
    images = torch.randn(9, 3, 8, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    batches = [torch.randperm(9, generator=generator)[:count] for count in (7, 9, 9, 4)]
    path = unroll(
        NET, start, images, torch.arange(9) % 4, lr, batches, plan=plan, momentum=0.5, weight_decay=0.01,
        augment=SiameseAugment(), generator=generator, **options,
    )  # fmt: skip
    loss = matching_loss(path[-1], start, start.detach() + 0.02) + path[1].square().sum() + path[1:3].sum()
    return [path[-1].detach(), *torch.autograd.grad(loss, (start, images, lr))]


def small_plan(**changes: Any) -> Plan:
    whole = mtt_fast.plan(
        NET, images=(9, 3, 8, 8), steps=4, dtype=torch.float64, momentum=0.5, augment=True, memory_budget=None
    )
    return dataclasses.replace(whole, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"saved_steps": 1},
        {"saved_steps": 4},
        {"saved_steps": 3, "microbatch": 4},
        {"microbatch": 1},
        {"path_on_host": True},
        {"path_on_host": True, "saved_steps": 2, "microbatch": 2},
    ],
    ids=str,
)
def test_every_plan_gives_the_same_gradients(changes: dict[str, Any]) -> None:
    names = ("end", "start", "images", "lr")
    for name, actual, expected in zip(
        names, meta_gradient(small_plan(**changes)), meta_gradient(small_plan()), strict=True
    ):
        assert_close(name, actual, expected, 1e-12)


def test_the_last_steps_save_their_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that no other steps do: their activations would lie beside each step of the backward sweep that comes first."""
    saved: list[bool] = []

    class Recording(Shrinking):
        def gradient(self, theta: Tensor, images: Tensor, labels: Tensor, save: bool = False) -> Any:
            saved.append(save)
            return self.exact.gradient(theta, images, labels, save)

    monkeypatch.setattr(importlib.import_module("mtt_fast.engine.unroll"), "student_for", lambda *_: Recording(0))
    meta_gradient(small_plan(saved_steps=1))
    assert saved[:4] == [False, False, False, True]


@pytest.mark.native
def test_a_second_backward_computes_what_the_first_one_used_up() -> None:
    images = torch.randn(9, 3, 8, 8, requires_grad=True)
    plan = dataclasses.replace(small_plan(), saved_steps=4)
    path = unroll(NET, NET.init(), images, torch.arange(9) % 4, 0.1, torch.arange(9).expand(4, 9), plan=plan)
    first, second = (torch.autograd.grad(path[-1].sum(), images, retain_graph=True)[0] for _ in range(2))
    assert_close("images", second, first, 1e-5)


@pytest.mark.gpu
def test_the_path_in_pinned_host_memory() -> None:
    net, device = ConvNet(width=32), torch.device("cuda")
    results = []
    for on_host in (False, True):
        start = net.init(torch.Generator(device).manual_seed(0))
        images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        plan = mtt_fast.plan(net, images=images, steps=5, memory_budget=None, device=device)
        plan = dataclasses.replace(plan, path_on_host=on_host)
        labels, batches = torch.arange(20, device=device) % 10, torch.arange(20, device=device).expand(5, 20)
        path = unroll(net, start, images, labels, torch.tensor(0.01, device=device), batches, plan=plan, momentum=0.5)
        assert path.is_cuda != on_host
        assert path.is_pinned() == on_host
        assert path[-1].is_cuda
        assert path[3].is_cuda
        (path[-1].square().sum() + path[2].sum()).backward()
        assert images.grad is not None
        results.append((path.detach().cpu(), images.grad))
    for name, on_device, on_host_too in zip(("path", "images"), *results, strict=True):
        assert_close(name, on_host_too, on_device, 1e-6)


@pytest.mark.gpu
def test_the_peak_of_the_device_is_within_the_budget() -> None:
    net, device = ConvNet(image_size=128, depth=5), torch.device("cuda")
    images = torch.randn(500, 3, 128, 128, device=device, requires_grad=True)
    labels, batches = torch.arange(500, device=device) % 10, torch.arange(500, device=device).expand(5, 500)
    start = net.init(torch.Generator(device).manual_seed(0))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    path = unroll(net, start, images, labels, torch.tensor(0.01, device=device), batches, memory_budget="4GiB")
    matching_loss(path[-1], start, start + 0.01).backward()
    taken = torch.cuda.max_memory_allocated() - before
    print(f"peak {taken / MIB:.0f} MiB")
    assert taken <= 4 * GIB


@pytest.mark.native
def test_out_of_memory_repeats_in_less_exactly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = meta_gradient(small_plan())
    module = importlib.import_module("mtt_fast.engine.unroll")
    monkeypatch.setattr(module, "student_for", lambda *_: Shrinking(3))
    actual, plan = with_smaller_pieces(small_plan(saved_steps=2), meta_gradient)
    assert (plan.microbatch, plan.saved_steps) == (3, 0)
    for name, value, wanted in zip(("end", "start", "images", "lr"), actual, expected, strict=True):
        assert_close(name, value, wanted, 1e-12)
    assert [record.message.startswith("out of memory; repeated exactly") for record in caplog.records] == [True] * 2

    monkeypatch.setattr(module, "student_for", lambda *_: Shrinking(0))
    with pytest.raises(InputError, match="out of memory at a piece of one image"):
        with_smaller_pieces(small_plan(), meta_gradient)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),  # of a graph
        RuntimeError("Triton Error [CUDA]: out of memory"),  # of a kernel's code
    ],
)
def test_every_out_of_memory_is_one(error: Exception) -> None:
    def attempt(plan: Plan) -> int:
        if plan.microbatch > 3:
            raise error
        return plan.microbatch

    assert with_smaller_pieces(small_plan(), attempt)[0] == 3
    with pytest.raises(RuntimeError, match="other"):
        with_smaller_pieces(small_plan(), lambda _: (_ for _ in ()).throw(RuntimeError("other")))
