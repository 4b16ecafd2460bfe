"""Test SAM, ASAM and GSAM against their definitions, written out for an ordinary module and optimizer in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtt_fast import ConvNet, FlatModule
from mtt_fast.engine.students.choice import student_for
from mtt_fast.engine.students.fused import FusedConvNetStudent
from mtt_fast.engine.students.generic import GenericStudent
from mtt_fast.runtime.numerics import numerics
from mtt_fast.testing import assert_close, reference_convnet
from mtt_fast.training.epochs import Epochs, training_step
from mtt_fast.training.images import Images
from mtt_fast.training.optimizers import Sgd
from mtt_fast.training.sharpness import SharpnessAware, sharpness_aware

NET = ConvNet(in_channels=3, num_classes=5, image_size=8, width=3, depth=2)


def flat(values: list[Tensor]) -> Tensor:
    return torch.cat([value.detach().reshape(-1) for value in values])


def cosine(a: list[Tensor], b: list[Tensor]) -> float:
    return float(torch.dot(flat(a), flat(b)) / flat(a).norm() / flat(b).norm())


def reference_step(
    module: nn.Module,
    optimizer: torch.optim.SGD,
    images: Tensor,
    labels: Tensor,
    rho: float,
    alpha: float,
    adaptive: bool,
) -> None:
    """Do one step of the optimizer against GSAM's direction, parameter by parameter, as the papers define it."""
    parameters = list(module.parameters())

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(F.cross_entropy(module(images), labels), parameters))

    before = [value.detach().clone() for value in parameters]
    here = gradients()
    unit = [value.abs() if adaptive else torch.ones_like(value) for value in before]
    length = flat([u * g for u, g in zip(unit, here, strict=True)]).norm()
    with torch.no_grad():
        for value, u, g in zip(parameters, unit, here, strict=True):
            value.add_(rho * u**2 * g / length)
    there = gradients()
    # g = |g| (cos φ ĝ/|ĝ| + g⊥/|g|), so g⊥ is what is left of g without its shadow on ĝ
    shadow = cosine(here, there) * flat(here).norm() / flat(there).norm()
    with torch.no_grad():
        for value, old, g, worse in zip(parameters, before, here, there, strict=True):
            value.copy_(old)
            value.grad = worse - alpha * (g - shadow * worse)
    optimizer.step()


@pytest.mark.parametrize("student", [GenericStudent(NET), FusedConvNetStudent(NET)], ids=["generic", "fused"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
@pytest.mark.parametrize(
    ("rho", "alpha", "momentum", "decay"), [(0.05, 0.0, 0.0, 0.0), (0.3, 0.3, 0.9, 5e-4), (0.5, 1.0, 0.0, 0.01)]
)
def test_steps_are_those_of_the_definition(
    student: GenericStudent, adaptive: bool, rho: float, alpha: float, momentum: float, decay: float
) -> None:
    module = reference_convnet(3, 5, 8, 3, 2).double()
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=momentum, weight_decay=decay)
    images = Images(torch.randn(7, 3, 8, 8, dtype=torch.float64), torch.randint(5, (7,)))
    start = flat(list(module.parameters()))
    theta, velocity = start, torch.zeros_like(start)
    sgd = Sgd(0.1, momentum, decay)
    rate = torch.tensor(sgd.lr, dtype=torch.float64)
    step = partial(training_step, SharpnessAware(student, rho, alpha, adaptive), sgd, lr=rate)
    plain = partial(training_step, student, sgd, lr=rate)
    for number in range(3):
        before = F.cross_entropy(module(images.pixels[number:]), images.labels[number:])
        reference_step(module, optimizer, images.pixels[number:], images.labels[number:], rho, alpha, adaptive)
        if number == 0:
            apart = plain(theta, velocity, *images.batch(slice(0, 7)))[0]
        theta, velocity, loss = step(theta, velocity, *images.batch(slice(number, 7)))
        assert_close("loss", loss, before, 1e-12)
        assert_close(f"step {number}", theta - start, flat(list(module.parameters())) - start, 1e-10)
        if number == 0:
            assert (theta - apart).norm() > 1e-3 * (theta - start).norm()  # not by doing nothing


def test_gsam_leaves_the_worse_loss_alone() -> None:
    """Check that its difference from SAM is at right angles to SAM's gradient."""
    student = GenericStudent(NET)
    theta = NET.init(torch.Generator().manual_seed(0)).double()
    images, labels = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 5
    sam, gsam = (SharpnessAware(student, 0.5, alpha).gradient(theta, images, labels).gradient for alpha in (0.0, 0.7))
    assert (gsam - sam).norm() > 1e-3 * sam.norm()
    assert abs(float(torch.dot(gsam - sam, sam))) < 1e-12 * float(sam.square().sum())


def test_without_a_radius_it_is_the_student_itself() -> None:
    student = GenericStudent(NET)
    assert sharpness_aware(student, 0.0, 0.3, adaptive=True) is student


def test_a_gradient_of_nothing_stays_finite() -> None:
    class Constant(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            return images.new_zeros(len(images), 2) + 0 * self.weight.sum()

    net = FlatModule(Constant(2, 2))
    step = SharpnessAware(GenericStudent(net), 0.1, 0.5, adaptive=True).gradient(
        net.init(), torch.randn(3, 2), torch.tensor([0, 1, 0])
    )
    assert torch.equal(step.gradient, torch.zeros_like(step.gradient))


def test_no_value_is_asked_for() -> None:
    """Use tensors without data, which have no values to give, so that a CUDA graph can capture the step."""
    theta = torch.empty(NET.num_parameters, device="meta")
    images, labels = torch.empty(4, 3, 8, 8, device="meta"), torch.empty(4, dtype=torch.long, device="meta")
    step = SharpnessAware(GenericStudent(NET), 0.1, 0.3, adaptive=True).gradient(theta, images, labels)
    assert (step.gradient.shape, step.loss.shape) == (theta.shape, ())


@pytest.mark.gpu
def test_steps_replayed_on_a_gpu_are_those_of_a_cpu() -> None:
    pixels, labels = torch.randn(12, 3, 8, 8), torch.arange(12) % 5
    ends = []
    with numerics(torch.device("cuda"), "fp32"):
        for device in (torch.device("cpu"), torch.device("cuda")):
            direction = SharpnessAware(student_for(NET, device), 0.1, 0.3, adaptive=True)
            epoch = Epochs(direction, Images(pixels.to(device), labels.to(device)), Sgd(0.1, batch_size=5), None)
            theta = NET.init(torch.Generator().manual_seed(0)).to(device)
            velocity, generator = torch.zeros_like(theta), torch.Generator().manual_seed(1)
            for _ in range(3):
                theta, velocity, _ = epoch(theta, velocity, generator)
            ends.append(theta.cpu())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-5)
