"""Unroll steps and match their path on a GPU that is not there (tests/runtime/emulated_gpu.py)."""

from __future__ import annotations

import contextlib
import runpy
import sys
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtt_fast import (
    Adam,
    Augmentation,
    ConvNet,
    FlatModule,
    GraphedMatchingLoss,
    InputError,
    SiameseAugment,
    matching_loss,
    unroll,
)
from mtt_fast.networks.protocol import Trainable
from mtt_fast.testing import assert_close

NET = ConvNet(3, 4, 8, width=5, depth=2)
ADAM = Adam(eps=1e-2)
STEPS = [torch.tensor([3, 1, 0, 7]), torch.tensor([2, 2, 9]), torch.tensor([5, 8, 6, 4])]


def module_with_buffers() -> FlatModule:
    """Return a module whose buffers and frozen parameters are on the host."""
    norm = nn.BatchNorm2d(4).eval()
    frozen = nn.Conv2d(3, 3, 1).requires_grad_(requires_grad=False)
    return FlatModule(nn.Sequential(frozen, nn.Conv2d(3, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 4)))


def tensors(net: Trainable, device: str) -> list[Tensor]:
    """Return start, target, images, labels and lr."""
    generator = torch.Generator().manual_seed(0)
    start = net.init(generator)
    target = start + 0.1 * torch.randn(len(start), generator=generator)
    labels = torch.randn(10, 4, generator=generator).softmax(1)
    every = [start, target, torch.randn(10, 3, 8, 8, generator=generator), labels, torch.tensor(0.1)]
    return [tensor.to(device) for tensor in every]


def result(net: Trainable, device: str, *, per_parameter: bool = False, **options: object) -> list[Tensor]:
    """Return loss and gradients of `unroll`, with one learning rate or one for each step and parameter."""
    start, target, images, labels, lr = tensors(net, device)
    learned = [each.requires_grad_() for each in (images, labels, lr)]
    draws = torch.Generator().manual_seed(1)
    rates = lr.expand(len(STEPS), len(start)) if per_parameter else lr
    path = unroll(net, start, images, labels, rates, STEPS, SiameseAugment(), generator=draws, **options)  # type: ignore[call-overload]
    loss = matching_loss(path[-1], start, target)
    return [loss.detach(), *torch.autograd.grad(loss, learned)]


def graphed_result(loss_of: GraphedMatchingLoss, net: Trainable, device: str) -> list[Tensor]:
    """Return loss and gradients of a call of `loss_of`."""
    start, target, images, labels, lr = tensors(net, device)
    learned = [each.requires_grad_() for each in (images, labels, lr)]
    loss = loss_of(start, target, images, labels, lr, STEPS, generator=torch.Generator().manual_seed(1))
    return [loss.detach(), *torch.autograd.grad(loss, learned)]


def contrastive(logits: Tensor, labels: Tensor) -> Tensor:
    """Return a loss that compares each sample of a batch with the others."""
    return F.mse_loss(logits @ logits.T, labels @ labels.T)


def mix() -> None:
    """Do what a GPU refuses, and what the host waits for."""
    with contextlib.suppress(RuntimeError):
        torch.ones(3, device="cuda").add(torch.ones(3))
    with contextlib.suppress(RuntimeError):
        torch.randn(3, device="cuda", generator=torch.Generator())
    torch.use_deterministic_algorithms(True)
    torch.ones(3, device="cuda", dtype=torch.long).cumsum(0)
    with contextlib.suppress(RuntimeError):
        torch.ones(3, device="cuda").cumsum(0)
    float(torch.ones((), device="cuda"))


def compare() -> None:
    """Compare results on the device with those on the CPU."""
    for net in (NET, module_with_buffers()):
        for options in (
            {}, {"momentum": 0.5, "microbatch": 2, "loss": F.cross_entropy}, {"optimizer": ADAM}, {"per_parameter": True},
            {"loss": contrastive}, {"microbatch": 2, "loss": contrastive},
        ):  # fmt: skip
            for actual, expected in zip(result(net, "cuda", **options), result(net, "cpu", **options), strict=True):
                assert_close("unroll", actual.cpu(), expected, 1e-4)
        for options in (
            {}, {"optimizer": ADAM}, {"microbatch": 2, "loss": contrastive}, {"microbatch": 2, "loss": F.cross_entropy},
        ):  # fmt: skip
            graphed = GraphedMatchingLoss(net, augment=SiameseAugment(), **options)
            for _ in range(2):
                actuals = graphed_result(graphed, net, "cuda")
            assert graphed.problem is None, graphed.problem
            for actual, expected in zip(actuals, result(net, "cpu", **options), strict=True):
                assert_close("graphed", actual.cpu(), expected, 1e-4)


def capture() -> None:
    """Call the library while the caller captures a CUDA graph, and compare with calls outside."""
    steps, module = [step.to("cuda") for step in STEPS], module_with_buffers()

    def unrolled(net: Trainable, start: Tensor, target: Tensor, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
        return matching_loss(unroll(net, start, images, labels, lr, steps)[-1], start, target)

    tried = partial(GraphedMatchingLoss(module), batches=steps)
    tried(*tensors(module, "cuda"))
    for net, loss_of in (
        (NET, partial(unrolled, NET)),
        (NET, partial(GraphedMatchingLoss(NET), batches=steps)),
        (module, tried),
    ):
        given = tensors(net, "cuda")
        given[2].requires_grad_()
        (expected,) = torch.autograd.grad(unrolled(net, *given), given[2])
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            (actual,) = torch.autograd.grad(loss_of(*given), given[2])
        assert_close("captured", actual.cpu(), expected.cpu(), 1e-6)
    fixed = Augmentation(lambda *_: None, lambda images, _: images.roll(1, -1))
    for net, augment in ((module, None), (NET, fixed)):
        start, _, images, labels, lr = tensors(net, "cuda")
        with torch.cuda.graph(torch.cuda.CUDAGraph()), contextlib.suppress(InputError):
            unroll(net, start, images, labels, lr, steps, augment)
            raise AssertionError("captured without a trial")


def bench(*words: str) -> None:
    """Run `python -m bench` in one process, without NVML and large products."""
    from bench import measuring, workers

    sys.argv = ["bench", *words]
    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(workers, "Process", workers.Here))
        for name, value in {"driver_version": "none", "used_on_gpu": 0, "matrix_product_peak": 1e9}.items():
            patches.enter_context(patch.object(measuring, name, lambda *_, value=value: value))
        runpy.run_module("bench", run_name="__main__", alter_sys=True)


def baseline(*words: str) -> None:
    """Run `python -m mtt_fast.baselines`; a method's own test takes few steps, since a thousand show no more."""
    from mtt_fast.baselines import truncated_bptt

    sys.argv = ["mtt_fast.baselines", *words]
    with patch.object(truncated_bptt, "_OWN_STEPS", 5):
        runpy.run_module("mtt_fast.baselines", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    {"mix": mix, "compare": compare, "capture": capture, "bench": bench, "baseline": baseline}[sys.argv[1]](
        *sys.argv[2:]
    )
