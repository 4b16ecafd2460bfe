"""Test windows of trainings against recorded steps of Adam and torch's clipping, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast import ConvNet
from mtt_fast.baselines.truncated_bptt import TruncatedBptt, TruncatedBpttOptions, Window, clipped, random_batches
from mtt_fast.runtime.cuda_graphs import Function, GraphedFunction
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.testing import assert_close
from mtt_fast.training.images import Images, RealImages
from tests.baselines.network import F64, SHAPE, plain, seeded
from tests.runtime.repeating import Repeating


class DoubleConvNet(ConvNet):
    """ConvNet that starts in float64."""

    def init(self, generator: torch.Generator | None = None) -> Tensor:
        return super().init(generator).double()


NET = DoubleConvNet(*SHAPE)


@pytest.fixture(scope="module")
def few(real: RealImages) -> RealImages:
    """Return 700 real images in float64, more than fit in a piece."""
    pixels, labels = real.train.batch(slice(700))
    return replace(real, train=Images(pixels.double(), labels))


def adams_update(gradient: Tensor, mean: Tensor, square: Tensor, t: int, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a step of torch.optim.Adam subtracts, and its new state."""
    mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
    return rate * (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8), mean, square


@pytest.mark.parametrize("train_y", [False, True])
@pytest.mark.parametrize("before", [0, 3, 53])  # not all a multiple of the steps in a CUDA graph
def test_iterations_are_those_of_recorded_steps(few: RealImages, before: int, train_y: bool) -> None:
    """Take all synthetic and all real images in each step, so that no random order matters."""
    options = TruncatedBpttOptions(
        dataset="digits", ipc=2, pix_init="real", lr_img=0.02, batch_real=1000, inner_lr=0.01, syn_strategy="none",
        real_strategy="none", clip_coef=0.5, train_y=train_y, label_lr_scale=0.1,
    )  # fmt: skip
    bptt, network = TruncatedBptt("method", options, few, NET), plain()
    images, labels = bptt.images.clone().requires_grad_(), torch.arange(10).repeat_interleave(2)
    groups: list[dict[str, Any]] = [{"params": [images]}]
    if train_y:
        labels = torch.eye(10, dtype=F64)[labels].requires_grad_()
        groups.append({"params": [labels], "lr": 0.2})
    assert bptt.labels.equal(labels)
    seen, targets = few.train.batch(slice(None))
    optimizer, average = torch.optim.Adam(groups, lr=0.02), None
    for iteration in range(3):
        theta = NET.init(generator_for(0, "method", iteration))
        mean = square = torch.zeros_like(theta)
        for n in range(before + 3):
            pixels, target = (images, labels) if n >= before else (images.detach(), labels.detach())
            leaf = theta if theta.requires_grad else theta.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(
                F.cross_entropy(network(leaf, pixels), target), leaf, create_graph=n >= before
            )
            update, mean, square = adams_update(gradient, mean, square, n + 1, 0.01)
            theta = (theta if n >= before else theta.detach()) - update
        loss = F.cross_entropy(network(theta, seen), targets)
        optimizer.zero_grad()
        loss.backward()
        assert images.grad is not None
        length = float(images.grad.norm())
        average = length if average is None else average - 0.5 * (average - length)
        torch.nn.utils.clip_grad_norm_(images, 2 * average)
        optimizer.step()
        with torch.no_grad():
            labels.clamp_(min=0)
        reached = bptt.update_set(iteration, Window(before, 3))
        assert float(reached.loss) == pytest.approx(float(loss.detach()), rel=1e-9)
        assert_close("end of the training", reached.theta, theta.detach(), 1e-6)
        assert bptt.real_images(reached.draws).labels.sort().values.equal(targets.sort().values)
        assert_close("images", bptt.images, images.detach(), 1e-6)
        assert_close("labels", bptt.labels.double(), labels.detach().double(), 1e-6)
        norm = bptt.learned_set(lambda _: 0.0).carried["gradient_norm"]
        assert float(norm) == pytest.approx(average, rel=1e-6)
    if train_y:
        assert (labels == 0).any()
        assert ((labels.sum(1) - 1).abs() > 0.1).any()


@pytest.mark.parametrize("train_y", [False, True])
def test_lengths_of_gradients_are_those_of_recorded_steps(few: RealImages, train_y: bool) -> None:
    options = TruncatedBpttOptions(
        dataset="digits", ipc=2, pix_init="real", inner_lr=0.01, syn_strategy="none", train_y=train_y
    )
    bptt, network = TruncatedBptt("method", options, few, NET), plain()
    if train_y:
        bptt.labels.copy_(torch.rand(20, 10, generator=seeded(), dtype=F64))
    theta = NET.init(seeded(3))
    mean = square = torch.zeros_like(theta)
    lengths = []
    for n in range(5):
        leaf = theta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(leaf, bptt.images), bptt.labels), leaf)
        lengths.append(float(gradient.norm()))
        update, mean, square = adams_update(gradient, mean, square, n + 1, 0.01)
        theta = theta - update
    assert bptt.gradient_norms(5, seeded(3)).tolist() == pytest.approx(lengths, rel=1e-6)
    augmented = TruncatedBptt("method", replace(options, syn_strategy="flip"), few, NET)
    assert augmented.gradient_norms(1, seeded(3)).tolist() != pytest.approx(lengths[:1], rel=1e-6)


@pytest.mark.parametrize("train_y", [False, True])
def test_captured_steps_serve_every_window(few: RealImages, monkeypatch: pytest.MonkeyPatch, train_y: bool) -> None:
    options = TruncatedBpttOptions(
        dataset="digits", ipc=3, batch_per_class=2, task_sampler_nc=4, lr_img=0.1, train_y=train_y, totwindow=20
    )
    capturers: list[Repeating] = []

    def graphed(function: Function, device: torch.device, first: Any, max_captured: int = 8) -> GraphedFunction:
        capturers.append(Repeating())
        return GraphedFunction(function, capturers[-1], max_captured)

    windows = [Window(9, 3), Window(4, 3), Window(0, 3), Window(6, 2), Window(9, 3), Window(3, 4)]
    eager = TruncatedBptt("method", options, few, NET)
    monkeypatch.setattr("mtt_fast.baselines.truncated_bptt.graphed", graphed)
    captured = TruncatedBptt("method", options, few, NET)
    for iteration, window in enumerate(windows):
        expected, reached = eager.update_set(iteration, window), captured.update_set(iteration, window)
        assert torch.equal(reached.loss, expected.loss)
        assert torch.equal(reached.theta, expected.theta)
        assert torch.equal(captured.images, eager.images)
        assert torch.equal(captured.labels, eager.labels)
    assert torch.equal(captured.gradient_norms(6, seeded()), eager.gradient_norms(6, seeded()))
    steps, window_steps = capturers
    assert (steps.captured, steps.graphed) == (4, 12)  # for one to four steps
    assert (window_steps.captured, window_steps.graphed) == (3, 6)


def test_long_gradients_are_clipped_as_torch_does() -> None:
    norm, average = torch.zeros(()), 0.0
    for length in (1.0, 5.0, 40.0, 0.1):
        gradient = F.normalize(torch.randn(7, generator=seeded()), dim=0) * length
        average = average - 0.1 * (average - length) if average else length
        leaf = torch.zeros(7, requires_grad=True)
        leaf.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(leaf, 2 * average)
        torch.testing.assert_close(clipped(gradient, norm, 0.9), leaf.grad)
        assert float(norm) == pytest.approx(average)


def test_a_step_takes_random_images_of_each_class() -> None:
    batches = random_batches(4, 5, 4, 3, 40, seeded())
    assert all((batch.view(4, 3) // 5 == torch.arange(4)[:, None]).all() for batch in batches)
    assert all(len(batch.unique()) == 12 for batch in batches)
    assert torch.stack(batches).unique().tolist() == list(range(20))
    (whole,) = random_batches(4, 2, 4, 3, 1, seeded())
    assert whole.sort().values.tolist() == list(range(8))


def test_a_step_takes_random_classes() -> None:
    batches = torch.stack(random_batches(4, 5, 2, 3, 600, seeded())).view(600, 2, 3)
    classes = (batches // 5).sort(1).values
    assert (classes == classes[..., :1]).all()
    assert (classes[:, 0] < classes[:, 1]).all()
    counts = torch.bincount(batches.flatten(), minlength=20)
    assert counts.min() > 100  # of 180 in the mean
    pairs = {tuple(pair) for pair in classes[..., 0].tolist()}
    assert len(pairs) == 6


@pytest.mark.parametrize(("asked", "taken"), [(None, 10), (10, 10), (12, 10), (3, 3)])
def test_more_classes_than_there_are_is_all_of_them(
    few: RealImages, monkeypatch: pytest.MonkeyPatch, asked: int | None, taken: int
) -> None:
    sizes: list[int] = []

    def recorded(*args: Any) -> list[Tensor]:
        batches = random_batches(*args)
        sizes.extend(map(len, batches))
        return batches

    monkeypatch.setattr("mtt_fast.baselines.truncated_bptt.random_batches", recorded)
    options = TruncatedBpttOptions(dataset="digits", ipc=2, batch_per_class=1, task_sampler_nc=asked)
    TruncatedBptt("method", options, few, NET).update_set(0, Window(1, 1))
    assert sizes == [taken, taken]


def test_noise_has_length_one(few: RealImages) -> None:
    images = TruncatedBptt("method", TruncatedBpttOptions(dataset="digits", ipc=2), few, NET).images
    torch.testing.assert_close(images.flatten(1).norm(dim=1), torch.ones(20, dtype=F64))


@pytest.mark.parametrize("strategy", ["syn_strategy", "real_strategy"])
def test_both_augmentations_have_an_effect(few: RealImages, strategy: str) -> None:
    options: dict[str, Any] = {"dataset": "digits", "syn_strategy": "none", "real_strategy": "none"}
    plain, augmented = (
        TruncatedBptt("method", TruncatedBpttOptions(**options | more), few, NET).update_set(0, Window(0, 1))
        for more in ({}, {strategy: "flip"})
    )
    assert float(plain.loss) != float(augmented.loss)


def test_it_lowers_its_loss_and_its_own_training_learns(real: RealImages) -> None:
    options = TruncatedBpttOptions(
        dataset="digits", pix_init="real", lr_img=0.05, batch_real=200, inner_lr=0.01, syn_strategy="none",
        real_strategy="none",
    )  # fmt: skip
    bptt = TruncatedBptt("method", options, real, ConvNet(*SHAPE))
    losses = [float(bptt.update_set(iteration, Window(iteration % 11, 10)).loss) for iteration in range(60)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    own_training = bptt.learned_set(lambda _: 0.0).own_training
    assert own_training is not None
    theta = own_training(seeded(1))
    seen, labels = real.test.batch(slice(None))
    assert float((ConvNet(*SHAPE)(theta, seen).argmax(1) == labels).float().mean()) > 0.5
