"""Test distribution matching against torch.nn, in float64, on a toy network."""

from __future__ import annotations

import pytest
import torch

from mtt_fast.baselines.dm import DmOptions, dm, embedding_distance
from mtt_fast.baselines.real_data import random_batch
from mtt_fast.baselines.siamese import siamese_augmentation
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.testing import assert_close, reference_convnet
from mtt_fast.training.images import RealImages
from mtt_fast.training.subsets import class_members
from tests.baselines.network import F64, NET, SHAPE, seeded


def test_the_distance_of_mean_embeddings_is_that_of_the_module() -> None:
    module = reference_convnet(*SHAPE).double()
    theta = torch.nn.utils.parameters_to_vector(module.parameters()).detach()
    images, seen = torch.randn(3, 1, 8, 8, dtype=F64, requires_grad=True), torch.randn(7, 1, 8, 8, dtype=F64)
    features = torch.nn.Sequential(*list(module.children())[:-1])
    expected = ((features(seen).sum(0) / 7 - features(images).sum(0) / 3) ** 2).sum()
    distance = embedding_distance(NET, theta, images, seen)
    assert_close("distance", distance, expected, 1e-12)
    assert_close("gradient", torch.autograd.grad(distance, images)[0], torch.autograd.grad(expected, images)[0], 1e-12)


@pytest.mark.parametrize("dsa", [False, True])
def test_dm_moves_the_images_by_sgd_with_momentum(real: RealImages, dsa: bool) -> None:
    """Check that with DSA the real and the synthetic images of a class are augmented alike."""
    options = DmOptions(dataset="digits", ipc=2, batch_real=11, lr_img=0.3, dsa=dsa)
    learning = dm(options, real, NET)
    images, velocity, losses = learning.images.clone(), torch.zeros_like(learning.images), []
    for iteration in range(3):
        generator = generator_for(0, "dm", iteration)
        theta = NET.init(generator)
        pixels = images.clone().requires_grad_()
        total = torch.zeros(())
        for label, members in enumerate(class_members(real, 2)):
            seen, labels = random_batch(real.train, members, 11, generator)
            assert set(labels.tolist()) == {label}
            augment = siamese_augmentation(options.strategy, seen, generator)
            own = augment(pixels[2 * label : 2 * label + 2])
            total = total + ((NET.embed(theta, own).mean(0) - NET.embed(theta, augment(seen)).mean(0)) ** 2).sum()
        total.backward()
        assert pixels.grad is not None
        velocity = 0.5 * velocity + pixels.grad
        images -= 0.3 * velocity
        losses.append(float(total.detach()) / 10)
    assert [learning.step(iteration) for iteration in range(3)] == pytest.approx(losses, rel=1e-4)
    assert_close("images", learning.images, images, 1e-5)


def test_dm_lowers_its_loss(real: RealImages) -> None:
    learning = dm(DmOptions(dataset="digits", ipc=2, pix_init="noise", dsa=False), real, NET)
    members = class_members(real, 2)

    def loss() -> float:
        """Return the loss on all images, with a network that no iteration used."""
        theta, total = NET.init(seeded(12345)), 0.0
        for label, indices in enumerate(members):
            own = learning.images[2 * label : 2 * label + 2]
            total += float(embedding_distance(NET, theta, own, real.train.batch(indices)[0]))
        return total

    before = loss()
    for iteration in range(60):
        learning.step(iteration)
    assert loss() < 0.5 * before
