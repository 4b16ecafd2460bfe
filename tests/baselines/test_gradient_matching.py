"""Test DC and DSA against the double backward of plain torch, in float64, on a toy network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast import InputError
from mtt_fast.augmentation.siamese import SiameseAugment
from mtt_fast.augmentation.warp import augment_with
from mtt_fast.baselines import gradient_matching
from mtt_fast.baselines.gradient_distance import DISTANCES, Metric
from mtt_fast.baselines.gradient_matching import DcOptions, DsaOptions, dc, dsa, matching_gradient
from mtt_fast.baselines.method import LearnedSet
from mtt_fast.baselines.real_data import random_batch
from mtt_fast.baselines.siamese import siamese_augmentation
from mtt_fast.engine.students.choice import student_for
from mtt_fast.engine.students.generic import GenericStudent
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.testing import assert_close, reference_convnet
from mtt_fast.training.images import RealImages
from mtt_fast.training.subsets import class_members
from tests.baselines.network import F64, NET, SHAPE, plain, random_theta, seeded


def written_out(metric: Metric, gradient: Tensor, real_gradient: Tensor) -> Tensor:
    """Return the distance as the papers define it, one row after the other."""

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum() / ((a**2).sum().sqrt() * (b**2).sum().sqrt() + 1e-6)

    if metric == "mse":
        return ((gradient - real_gradient) ** 2).sum()
    if metric == "cos":
        return 1 - cosine(gradient, real_gradient)
    total, begin = torch.zeros((), dtype=gradient.dtype), 0
    for parameter in reference_convnet(*SHAPE).parameters():
        end = begin + parameter.numel()
        if parameter.dim() > 1:
            rows = parameter.shape[0]
            for own, target in zip(
                gradient[begin:end].view(rows, -1), real_gradient[begin:end].view(rows, -1), strict=True
            ):
                total = total + 1 - cosine(own, target)
        begin = end
    return total


METRICS: list[Metric] = ["ours", "mse", "cos"]


@pytest.mark.parametrize("metric", METRICS)
def test_the_distance_of_gradients_is_the_papers(metric: Metric) -> None:
    gradient, real_gradient = torch.randn(2, NET.num_parameters, dtype=F64)
    assert_close(
        metric,
        DISTANCES[metric](gradient, real_gradient, NET.layout),
        written_out(metric, gradient, real_gradient),
        1e-12,
    )
    assert float(DISTANCES[metric](gradient, gradient, NET.layout)) == pytest.approx(0, abs=1e-4)  # but for the 1e-6


@pytest.mark.parametrize("strategy", ["none", "color", "crop", "cutout", "flip", "scale", "rotate"])
@pytest.mark.parametrize("metric", METRICS)
def test_gradient_matching_is_the_double_backward(metric: Metric, strategy: str) -> None:
    theta, function = random_theta(), plain()
    images, labels = torch.randn(5, 1, 8, 8, dtype=F64), torch.tensor([3, 3, 3, 3, 3])
    real_gradient = torch.randn(NET.num_parameters, dtype=F64)
    augment = siamese_augmentation(strategy, images, seeded(1))

    pixels, leaf = images.clone().requires_grad_(), theta.clone().requires_grad_()
    loss = F.cross_entropy(function(leaf, augment(pixels)), labels)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    expected = written_out(metric, gradient, real_gradient)
    (to_images,) = torch.autograd.grad(expected, pixels)

    for student in (student_for(NET, torch.device("cpu")), GenericStudent(NET)):
        distance, image_gradient = matching_gradient(
            student, theta, images, labels, augment, lambda own: DISTANCES[metric](own, real_gradient, NET.layout)
        )
        assert_close("distance", distance, expected, 1e-10)
        assert_close("gradient", image_gradient, to_images, 1e-9)


def test_siamese_augmentation_does_the_same_to_every_image() -> None:
    one = torch.rand(1, 3, 9, 9)
    augment = SiameseAugment("color_crop_cutout_flip_scale_rotate")
    for seed in range(12):
        same = siamese_augmentation(augment.strategy, one.expand(4, -1, -1, -1), seeded(seed))
        expected = augment_with(one, augment.draw_parameters([one], seeded(seed)))
        for batch in (1, 6):
            torch.testing.assert_close(same(one.expand(batch, -1, -1, -1)), expected.expand(batch, -1, -1, -1))
    identity = siamese_augmentation("none", one, seeded())
    assert identity(one) is one


def test_dc_updates_images_and_network_by_turns(real: RealImages) -> None:
    options = DcOptions(
        dataset="digits", ipc=1, batch_real=9, outer_loop=3, inner_loop=2, lr_net=0.1, lr_img=0.2, batch_train=6
    )
    learning, function = dc(options, real, NET), plain()
    images, velocity, labels = learning.images.double(), torch.zeros(()), torch.arange(10)
    members, generator = class_members(real, 1), generator_for(0, "gradient matching", 0)
    theta, total = NET.init(generator).double(), 0.0
    for _ in range(3):
        pixels, distance = images.clone().requires_grad_(), torch.zeros((), dtype=F64)
        for label, indices in enumerate(members):
            seen, of_seen = random_batch(real.train, indices, 9, generator)
            leaf = theta.clone().requires_grad_()
            (real_gradient,) = torch.autograd.grad(F.cross_entropy(function(leaf, seen.double()), of_seen), leaf)
            own = F.cross_entropy(function(leaf, pixels[label : label + 1]), labels[label : label + 1])
            (own_gradient,) = torch.autograd.grad(own, leaf, create_graph=True)
            distance = distance + written_out("ours", own_gradient, real_gradient)
        (gradient,) = torch.autograd.grad(distance, pixels)
        velocity = 0.5 * velocity + gradient
        images, total = images - 0.2 * velocity, total + float(distance.detach())
        for _ in range(2):
            for index in torch.randperm(10, generator=generator).split(6):
                leaf = theta.clone().requires_grad_()
                loss = F.cross_entropy(function(leaf, images[index]), labels[index])
                theta = theta - 0.1 * torch.autograd.grad(loss, leaf)[0]
    assert learning.step(0) == pytest.approx(total / 30, rel=1e-4)
    assert_close("images", learning.images.double(), images, 1e-3)


def test_dsa_matches_gradients_of_images_that_are_augmented_alike(real: RealImages) -> None:
    options = DsaOptions(dataset="digits", ipc=1, batch_real=9, outer_loop=1, inner_loop=1, lr_img=0.2)
    learning, function = dsa(options, real, NET), plain()
    generator = generator_for(0, "gradient matching", 0)
    theta, pixels = NET.init(generator).double(), learning.images.double().requires_grad_()
    distance = torch.zeros((), dtype=F64)
    for label, indices in enumerate(class_members(real, 1)):
        of_class, labels = random_batch(real.train, indices, 9, generator)
        augment = siamese_augmentation(options.strategy, of_class, generator)
        leaf = theta.clone().requires_grad_()
        loss = F.cross_entropy(function(leaf, augment(of_class).double()), labels)
        (real_gradient,) = torch.autograd.grad(loss, leaf)
        own = F.cross_entropy(function(leaf, augment(pixels[label : label + 1])), labels[:1])
        (own_gradient,) = torch.autograd.grad(own, leaf, create_graph=True)
        distance = distance + written_out("ours", own_gradient, real_gradient)
    (gradient,) = torch.autograd.grad(distance, pixels)
    assert learning.step(0) == pytest.approx(float(distance.detach()) / 10, rel=1e-4)
    assert_close("images", learning.images.double(), pixels.detach() - 0.2 * gradient, 1e-3)


def test_the_network_is_not_trained_after_the_last_update(real: RealImages, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = []

    def train(theta: Tensor, velocity: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        epochs.append(1)
        return theta, velocity, torch.zeros(())

    monkeypatch.setattr(gradient_matching, "Epochs", lambda *_: train)
    dc(DcOptions(dataset="digits", ipc=1, batch_real=9, outer_loop=3, inner_loop=2), real, NET).step(0)
    assert len(epochs) == 2 * 2


@pytest.mark.parametrize(("method", "strategy"), [(dc, None), (dsa, "color_crop")])
def test_the_network_sees_what_the_method_augments(
    method: Callable[..., LearnedSet], strategy: str | None, real: RealImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(gradient_matching, "Epochs", lambda student, images, sgd, augment: seen.append(augment))
    method(DsaOptions(dataset="digits", dsa_strategy="color_crop"), real, NET)
    assert seen == [None if strategy is None else SiameseAugment(strategy)]


def test_loops_are_the_papers_or_the_users() -> None:
    papers = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
    assert {ipc: DcOptions(ipc=ipc).loops() for ipc in papers} == papers
    assert DcOptions(ipc=50, inner_loop=3).loops() == (50, 3)
    for half in ({"outer_loop": 3}, {"inner_loop": 3}):
        with pytest.raises(InputError, match="--ipc 7: the papers name loops for 1, 10, 20, 30, 40, 50"):
            DcOptions(ipc=7, **half).check()  # type: ignore[arg-type]
    with pytest.raises(InputError, match="run dc instead"):
        DsaOptions(dsa=False).check()
