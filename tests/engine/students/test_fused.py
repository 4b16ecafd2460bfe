"""Test the fused student against the generic one, which knows the network and the loss only as functions."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtt_fast import ConvNet, InputError
from mtt_fast.engine.students.fused import FusedConvNetStudent
from mtt_fast.engine.students.generic import GenericStudent, cross_entropy, cross_entropy_from_logits
from mtt_fast.networks.convnet import Norm
from mtt_fast.testing import assert_close


def case(net: ConvNet, batch: int, label_kind: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return theta, images, labels and a direction."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    height, width = net.image_size if isinstance(net.image_size, tuple) else (net.image_size, net.image_size)
    logits = draw(batch, net.num_classes)
    # probabilities that are being learned leave the simplex
    labels = {"indices": logits.argmax(1), "probabilities": logits.softmax(1) * 1.1 - 0.01, "logits": logits}[
        label_kind
    ]
    return draw(net.num_parameters) / 2, draw(batch, net.in_channels, height, width), labels, draw(net.num_parameters)


def assert_same_as_generic(net: ConvNet, batch: int, label_kind: Any, seed: int = 0) -> None:
    theta, images, labels, v = case(net, batch, label_kind, seed)
    fused = FusedConvNetStudent(net, label_kind)
    generic = GenericStudent(net, cross_entropy_from_logits if label_kind == "logits" else cross_entropy)
    actual, wanted = fused.gradient(theta, images, labels), generic.gradient(theta, images, labels)
    assert_close("loss", actual.loss, wanted.loss, 1e-9, floor=1e-6)
    assert_close("gradient", actual.gradient, wanted.gradient, 1e-9, floor=1e-6)
    found_jvp, expected_jvp = (
        fused.gradient_jvp(theta, images, labels, v),
        generic.gradient_jvp(theta, images, labels, v),
    )
    saved = fused.gradient(theta, images, labels, save=True).saved
    assert saved
    from_kept = fused.gradient_jvp(theta, images, labels, v, saved)
    assert not saved  # used up, so that the memory is free again
    for name in ("v_dot_g", "hessian_v", "images", "labels"):
        value, expected = getattr(found_jvp, name), getattr(expected_jvp, name)
        if value is not None:
            assert_close(f"{name}, with what was kept", getattr(from_kept, name), value, 1e-12, floor=1e-4)
        if expected is None:
            assert value is None
        else:
            assert value.shape == expected.shape
            # a plane that the ReLU lets through whole has a gradient of zero, and both have rounding errors in its place
            assert_close(name, value, expected, 1e-9, floor=1e-4)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("label_kind", ["indices", "probabilities", "logits"])
@pytest.mark.parametrize(
    ("net", "batch"),
    [
        (ConvNet(3, 10, 32, 32, 3), 2),  # whole vectors of channels
        (ConvNet(1, 4, 28, 5, 3), 2),  # padding 3 in the first layer
        (ConvNet(3, 3, (9, 14), 7, 2), 3),  # odd sides, not square
        (ConvNet(3, 5, 11, 33, 3), 1),  # 1×1 planes after the last pool, one sample
        (ConvNet(2, 2, 5, 40, 1), 2),
        (ConvNet(1, 2, 1, 3, 1), 2),
        (ConvNet(3, 10, 16, 32, 3, "none"), 2),
        (ConvNet(1, 4, 28, 5, 3, "none"), 2),
        (ConvNet(2, 3, (9, 14), 7, 2, "none"), 3),
        (ConvNet(3, 5, 11, 33, 3, "none"), 1),
    ],
    ids=str,
)
def test_equals_the_generic_student(net: ConvNet, batch: int, label_kind: str) -> None:
    assert_same_as_generic(net, batch, label_kind)


@settings(max_examples=45)
@given(
    channels=st.sampled_from([1, 2, 3]),
    depth=st.integers(1, 3),
    extra=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    width=st.integers(1, 20),
    batch=st.integers(1, 4),
    norm=st.sampled_from(["instance", "none"]),
    label_kind=st.sampled_from(["indices", "probabilities", "logits"]),
    seed=st.integers(0, 1000),
)
def test_equals_the_generic_student_at_random(
    channels: int, depth: int, extra: tuple[int, int], width: int, batch: int, norm: Norm, label_kind: str, seed: int
) -> None:
    size = (2**depth + extra[0], 2**depth + extra[1])
    assert_same_as_generic(ConvNet(channels, 3, size, width, depth, norm), batch, label_kind, seed)


SMALL = ConvNet(3, 10, 8, width=4, depth=2)
STEP = {
    "theta": torch.ones(SMALL.num_parameters),
    "images": torch.ones(4, 3, 8, 8),
    "labels": torch.arange(4),
    "v": torch.ones(SMALL.num_parameters),
}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.arange(3), "`labels`: expected indices (4,), int64, found int64 of shape (3,)"),
        (torch.arange(4).int(), "`labels`: expected indices (4,), int64, found int32 of shape (4,)"),
        (torch.ones(4, 10), "`labels`: expected indices (4,), int64, found float32 of shape (4, 10)"),
        (torch.tensor([0, 1, 2, 10]), "`labels`: expected class indices 0 … 9, found 0 … 10"),
        (torch.tensor([0, 1, 2, -1]), "`labels`: expected class indices 0 … 9, found -1 … 2"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels: Tensor, message: str) -> None:
    (theta, images, _, v), student = STEP.values(), FusedConvNetStudent(SMALL)
    with pytest.raises(InputError, match=re.escape(message)):
        student.gradient_jvp(theta, images, labels, v)
    with pytest.raises(InputError, match=re.escape(message)):
        student.gradient(theta, images, labels)


def test_labels_are_of_the_kind_that_the_student_has() -> None:
    for labels, found in ((STEP["labels"], "int64 of shape (4,)"), (torch.ones(4, 9), "float32 of shape (4, 9)")):
        with pytest.raises(InputError, match=re.escape(f"expected logits (4, 10), float32, found {found}")):
            FusedConvNetStudent(SMALL, "logits").gradient(STEP["theta"], STEP["images"], labels)
