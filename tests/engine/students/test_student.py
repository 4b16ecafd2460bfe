"""Test the generic student's two questions, and the losses that are differentiated twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast import ConvNet, FlatModule
from mtt_fast.engine.students.choice import student_for
from mtt_fast.engine.students.generic import GenericStudent, cross_entropy, cross_entropy_from_logits
from mtt_fast.engine.students.microbatches import InMicrobatches
from mtt_fast.testing import assert_close, reference_convnet

NET = ConvNet(in_channels=2, num_classes=3, image_size=6, width=3, depth=1)


@pytest.mark.parametrize("loss", [cross_entropy, cross_entropy_from_logits])
def test_soft_losses_to_second_order(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.randn(4, 3, dtype=torch.float64).softmax(1).requires_grad_()
    assert torch.autograd.gradcheck(loss, (logits, labels), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, (logits, labels))


def test_hard_loss_to_second_order() -> None:
    logits, labels = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 2, 1, 1])
    assert torch.autograd.gradgradcheck(lambda value: cross_entropy(value, labels), (logits,))
    # a hard label is the soft label that is sure
    sure = torch.nn.functional.one_hot(labels, 3).double()
    assert_close("loss", cross_entropy(logits, labels), cross_entropy(logits, sure), 1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("save", [False, True])
def test_the_product_is_the_derivative_of_the_gradient(size: int, soft: bool, save: bool) -> None:
    theta = torch.randn(NET.num_parameters, dtype=torch.float64)
    v = torch.randn_like(theta)
    images = torch.randn(7, 2, 6, 6, dtype=torch.float64)
    labels = torch.randn(7, 3, dtype=torch.float64).softmax(1) if soft else torch.arange(7) % 3
    student = InMicrobatches(GenericStudent(NET), size)
    of_pieces = student.gradient(theta, images, labels, save)
    saved, before = list(of_pieces.saved or ()), theta.clone()
    theta.mul_(2 if save else 1)  # the saved activations belong to the old parameters
    actual = student.gradient_jvp(theta, images, labels, v, of_pieces.saved)
    theta = before
    assert not any(saved), "they are used up"

    leaves = [images.clone().requires_grad_(), *([labels.clone().requires_grad_()] if soft else [])]
    at = theta.clone().requires_grad_()
    loss = cross_entropy(NET(at, leaves[0]), leaves[1] if soft else labels)
    (gradient,) = torch.autograd.grad(loss, at, create_graph=True)
    expected = torch.autograd.grad(v @ gradient, [at, *leaves])
    assert_close("v·g", actual.v_dot_g, v @ gradient, 1e-12)
    assert_close("H v", actual.hessian_v, expected[0], 1e-10)
    assert_close("images", actual.images, expected[1], 1e-10)
    assert (actual.labels is not None) == soft
    if actual.labels is not None:
        assert_close("labels", actual.labels, expected[2], 1e-10)
    assert (of_pieces.saved is not None) == save
    assert_close("loss", of_pieces.loss, loss, 1e-12)
    assert_close("gradient", of_pieces.gradient, gradient, 1e-12)
    assert actual.loss is not None
    assert_close("loss again", actual.loss, loss, 1e-12)
    results = (of_pieces.loss, of_pieces.gradient, actual.v_dot_g, actual.hessian_v, actual.images, actual.loss)
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("kind", ["indices", "probabilities", "logits"])
def test_a_modules_loss_is_the_cross_entropy_of_its_kind_of_labels(kind: Any) -> None:
    module = reference_convnet(1, 3, 8, 4, 1)
    network, logits = FlatModule(module), torch.randn(5, 3)
    images, theta = torch.randn(5, 1, 8, 8), network.init(torch.Generator().manual_seed(0))
    labels = {"indices": logits.argmax(1), "probabilities": logits.softmax(1), "logits": logits}[kind]
    target = logits.softmax(1) if kind == "logits" else labels
    expected = F.cross_entropy(network(theta, images), target)
    torch.testing.assert_close(
        student_for(network, torch.device("cpu"), kind).gradient(theta, images, labels).loss, expected
    )


def test_a_gradient_may_have_any_strides() -> None:
    """Use a network that is the sum of its parameters, whose gradient autograd expands from one number."""
    network: Any = lambda theta, images: theta.sum() * images.flatten(1)  # noqa: E731
    theta, images, labels = torch.randn(5), torch.randn(4, 3, 1, 1), torch.tensor([0, 1, 2, 0])
    step = GenericStudent(network).gradient(theta, images, labels)
    assert_close("gradient", step.gradient, step.gradient[:1].expand(5), 0)
