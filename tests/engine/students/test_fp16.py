"""Check float16 planes: as exact as tf32's factors, at any scale of the direction, never silently wrong where they overflow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mtt_fast import ConvNet
from mtt_fast.engine.students.fused import FusedConvNetStudent
from mtt_fast.kernels import LabelKind, Precision
from mtt_fast.kernels.reference import linear
from mtt_fast.testing import relative_error
from tests.engine.meta_gradients import golden_case

NET = ConvNet(3, 4, 8, 6, 2)


def step_of(net: ConvNet, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return theta, images, labels and a direction, in float32."""
    generator = torch.Generator().manual_seed(0)
    assert isinstance(net.image_size, int)
    images = torch.randn(batch, net.in_channels, net.image_size, net.image_size, generator=generator)
    v = torch.randn(net.num_parameters, generator=generator)
    return net.init(generator), images, torch.arange(batch) % net.num_classes, v


@pytest.mark.parametrize("exponent", [-40, 40])
@pytest.mark.parametrize("save", [False, True])
def test_the_scale_of_the_direction_is_taken_out_exactly(exponent: int, save: bool) -> None:
    student = FusedConvNetStudent(NET, precision="fp16")
    theta, images, labels, v = step_of(NET, 3)
    gradient = student.gradient(theta, images, labels, save=save)
    far = student.gradient_jvp(theta, images, labels, v * 2.0**exponent, gradient.saved)
    gradient = student.gradient(theta, images, labels, save=save)
    near = student.gradient_jvp(theta, images, labels, v, gradient.saved)
    for name in ("v_dot_g", "hessian_v", "images"):
        assert torch.equal(getattr(far, name), getattr(near, name) * 2.0**exponent), name


@pytest.mark.parametrize("label_kind", ["indices", "probabilities"])
@pytest.mark.parametrize("norm", ["instance", "none"])
def test_one_step_is_as_exact_as_in_tf32(norm: str, label_kind: LabelKind) -> None:
    net = ConvNet(3, 4, 16, 16, 2, norm)  # type: ignore[arg-type]
    theta, images, labels, v = step_of(net, 4)
    if label_kind == "probabilities":
        labels = torch.randn(4, 4).softmax(1)
    wide = labels.double() if labels.is_floating_point() else labels
    expected = FusedConvNetStudent(net, label_kind).gradient_jvp(theta.double(), images.double(), wide, v.double())

    def errors(precision: Precision, *, save: bool) -> dict[str, float]:
        student = FusedConvNetStudent(net, label_kind, precision)
        saved = student.gradient(theta, images, labels, save).saved
        actual = student.gradient_jvp(theta, images, labels, v, saved)
        names = ("v_dot_g", "hessian_v", "images", "labels")
        pairs = {name: (getattr(actual, name), getattr(expected, name)) for name in names}
        return {name: relative_error(a.double(), b) for name, (a, b) in pairs.items() if b is not None}

    tf32 = errors("tf32", save=False)
    for save in (False, True):
        fp16 = errors("fp16", save=save)
        # a unit that either rounding carries over ReLU's kink is much among so few, of v·g above all
        assert all(fp16[name] <= max(2 * tf32[name], 2**-5) for name in tf32), (fp16, tf32)


@pytest.mark.parametrize("norm", ["instance", "none"])
def test_the_scale_of_the_cotangents_is_taken_out_of_the_gradient(norm: str) -> None:
    net = ConvNet(3, 4, 16, 16, 2, norm)  # type: ignore[arg-type]
    theta, images, labels, _ = step_of(net, 4)
    expected = FusedConvNetStudent(net).gradient(theta.double(), images.double(), labels).gradient
    for save in (False, True):
        actual = FusedConvNetStudent(net, precision="fp16").gradient(theta, images, labels, save).gradient
        assert relative_error(actual.double(), expected) <= 2**-5


@pytest.mark.parametrize("name", ["cifar-d3-n5", "rgb64-d4-n3", "rgb128-d5-n2", "soft-labels-d3-n6"])
def test_golden_cases_are_as_exact_as_in_tf32(golden: Path, name: str) -> None:
    case = golden_case(golden, name)
    fp16, tf32 = (
        relative_error(case.meta_gradient(torch.float32, precision=precision).images, case.expected.images)
        for precision in ("fp16", "tf32")
    )
    assert fp16 <= 2 * tf32


def test_what_overflows_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    theta, images, labels, v = step_of(NET, 3)
    monkeypatch.setattr(linear, "LARGEST_COTANGENT", 2.0**20)
    student = FusedConvNetStudent(NET, precision="fp16")
    assert not student.gradient(theta, images, labels).gradient.isfinite().all()
    assert not student.gradient_jvp(theta, images, labels, v).images.isfinite().all()
