"""Test the training of an expert: as GSAM, its accuracies, from seed and index alone."""

from __future__ import annotations

import copy
import signal

import pytest
import torch
from torch import nn

from mtt_fast.data import from_tensors
from mtt_fast.engine.students.choice import student_for
from mtt_fast.engine.students.protocol import Student
from mtt_fast.kernels import Precision
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.networks.protocol import Network
from mtt_fast.runtime.interrupts import Stopped, StopRequest
from mtt_fast.testing import assert_close, reference_convnet
from mtt_fast.training.experts import ExpertTraining, expert_job, expert_steps
from mtt_fast.training.images import RealImages, real_images
from tests.training.jobs import finished
from tests.training.toy import NET, toy_images


@pytest.fixture
def images() -> RealImages:
    return toy_images()


def test_the_accuracies_of_an_expert_with_batch_norm_are_of_its_running_statistics() -> None:
    """Use darker test images, whose own statistics are others."""
    labels = torch.arange(30) % 3
    train, dark = torch.randint(0, 256, (30, 1, 6, 6), dtype=torch.uint8), torch.randint(0, 64, (300, 1, 6, 6))
    data = from_tensors((train, labels), (dark.to(torch.uint8), labels.repeat(10)))
    images = real_images(data, zca=False, device=torch.device("cpu"))
    training = ExpertTraining(train_epochs=4, lr=0.1, batch_size=30, augment="none")
    rows, accuracies = finished(
        expert_job(images, network_by_name("ConvNetD1W4BN", (1, 6, 6), 3), training, seed=3, index=1)
    )
    layers = (nn.Conv2d(1, 4, 3, padding=3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
    module = nn.Sequential(*layers, nn.Linear(100, 3))
    (pixels, _), (seen, truth) = images.train.batch(slice(None)), images.test.batch(slice(None))
    right, in_training = [], []
    with torch.no_grad():
        for epoch in range(5):
            nn.utils.vector_to_parameters(rows[epoch], module.parameters())
            right.append(float((module.eval()(seen).argmax(1) == truth).float().mean()))
            module.train()(pixels)  # the batch of the next step
            in_training.append(float((copy.deepcopy(module)(seen).argmax(1) == truth).float().mean()))
    assert accuracies == pytest.approx(right, abs=0.5 / 300)
    assert right != pytest.approx(in_training, abs=0.03)


@pytest.mark.parametrize("decay", [False, True])
def test_flat_trajectories_are_those_of_gsam(images: RealImages, decay: bool) -> None:
    """Check that with --decay the radius falls from rho_max to rho_min, as the learning rate does."""
    rho_min = 0.2 if decay else 0.5
    training = ExpertTraining(
        5, 0.05, decay=decay, batch_size=30, augment="none", rho_max=0.5, rho_min=rho_min, alpha=0.3, adaptive=True
    )
    parameters, _ = finished(expert_job(images, NET, training, seed=3, index=1))
    module = reference_convnet(1, 3, 6, 4, 1)
    pixels, labels = images.train.batch(slice(None))

    def gradient_at(theta: torch.Tensor) -> torch.Tensor:
        torch.nn.utils.vector_to_parameters(theta.clone(), module.parameters())
        loss = torch.nn.functional.cross_entropy(module(pixels), labels)
        return torch.nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(module.parameters())))

    theta = parameters[0]
    for epoch in range(5):
        lr, rho = (0.005, rho_min) if decay and epoch > 5 // 2 + 1 else (0.05, 0.5)
        here = gradient_at(theta)
        there = gradient_at(theta + rho * theta**2 * here / (theta * here).norm())
        across = here - torch.dot(here, there) / torch.dot(there, there) * there
        theta = theta - lr * (there - 0.3 * across)
        assert_close(f"epoch {epoch + 1}", parameters[epoch + 1] - parameters[0], theta - parameters[0], 1e-4)


def test_an_expert_depends_on_seed_and_index_alone(images: RealImages) -> None:
    training = ExpertTraining(train_epochs=2, batch_size=7)
    first, _ = finished(expert_job(images, NET, training, seed=0, index=4))
    finished(expert_job(images, NET, training, seed=0, index=3))
    again, _ = finished(expert_job(images, NET, training, seed=0, index=4))
    assert torch.equal(first, again)
    for seed, index in ((0, 5), (1, 4)):
        assert not torch.equal(first, finished(expert_job(images, NET, training, seed=seed, index=index))[0])


def test_an_expert_is_trained_in_the_precision_asked_for(images: RealImages, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def record_precision(network: Network, device: torch.device, *, precision: Precision) -> Student:
        asked.append(precision)
        return student_for(network, device)

    monkeypatch.setattr("mtt_fast.training.experts.student_for", record_precision)
    for train in (expert_job, expert_steps):
        next(train(images, NET, ExpertTraining(train_epochs=1), seed=0, index=0, precision="tf32"))
    assert asked == ["tf32", "tf32"]


def test_a_stop_request_ends_an_expert_after_its_epoch(images: RealImages) -> None:
    stop = StopRequest()
    job = expert_job(images, NET, ExpertTraining(train_epochs=3), seed=0, index=4, stop=stop)
    next(job)
    stop.signum = signal.SIGTERM
    with pytest.raises(Stopped, match=r"^stopped in expert 4; .* the same command continues$") as stopped:
        next(job)
    assert stopped.value.signum == signal.SIGTERM
