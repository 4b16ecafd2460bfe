"""Test ConvNet's fused step with a loss of the caller's own, against cross-entropy's kernels and the generic student."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast import ConvNet, matching_loss, plan, unroll
from mtt_fast.engine.students.fused import FusedConvNetStudent
from mtt_fast.engine.students.fused_head import Head
from mtt_fast.engine.students.generic import GenericStudent, cross_entropy, cross_entropy_from_logits
from mtt_fast.engine.students.protocol import Loss
from mtt_fast.networks.convnet import Norm
from mtt_fast.testing import assert_close


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("kind", ["indices", "probabilities", "logits"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)  # fmt: skip
def test_cross_entropy_by_autograd_is_that_of_the_kernels(dtype: torch.dtype, tolerance: float, kind: Any) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    p, p_dot = (
        draw(5, 3, 2, 2, dtype=dtype, seed=seed).contiguous(memory_format=torch.channels_last) for seed in (1, 2)
    )
    classifier, classifier_dot = (
        (draw(4, 12, dtype=wide, seed=seed), draw(4, dtype=wide, seed=seed)) for seed in (3, 4)
    )
    logits = draw(5, 4, dtype=wide, seed=5)
    labels = {"indices": logits.argmax(1), "probabilities": logits.softmax(1), "logits": logits}[kind]
    own = Head("indices", cross_entropy_from_logits if kind == "logits" else cross_entropy)
    heads = (own, Head(kind, loss=None))
    scale = torch.tensor(0.25) if dtype == torch.float16 else None
    for given in (None, scale):
        for direction_scale in (None, torch.tensor(8.0, dtype=wide)):
            arguments = (p, p_dot, classifier, classifier_dot, labels, given, direction_scale)
            actual, expected = (head.gradient_jvp(*arguments) for head in heads)
            for name, one, other in zip(expected._fields[:-1], actual, expected, strict=False):
                assert (one is None) == (other is None), name
                if one is not None and other is not None:
                    assert one.dtype == other.dtype
                    assert_close(name, one, other, tolerance)
    primal, kernels_primal = (head.gradient(p, classifier, labels) for head in heads)
    for name, one, other in zip(primal._fields, primal, kernels_primal, strict=True):
        if one is not None and other is not None:
            assert_close(name, one, other, tolerance)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    logits -= 0.5 * F.one_hot(labels, 4)
    return F.cross_entropy(logits, labels)


def contrastive(logits: Tensor, labels: Tensor) -> Tensor:
    """Compare the samples of a batch: those of one class are to be alike."""
    similar = F.normalize(logits) @ F.normalize(logits).T
    return F.binary_cross_entropy_with_logits(similar, (labels[:, None] == labels).to(logits.dtype))


def distance(logits: Tensor, labels: Tensor) -> Tensor:
    """Match a teacher's features, at a temperature that is learned too: the last column."""
    return F.mse_loss(logits / labels[:, -1:].exp(), labels[:, :-1])


CLASSES = torch.tensor([0, 1, 2, 3, 0, 1, 2])
LOSSES: dict[str, tuple[Loss, Tensor]] = {
    "smoothed": (torch.nn.CrossEntropyLoss(label_smoothing=0.2), CLASSES),
    "weighted": (torch.nn.CrossEntropyLoss(weight=torch.arange(1, 5, dtype=torch.float64)), CLASSES),
    "margin, in place": (margin, CLASSES),
    "contrastive": (contrastive, CLASSES),
    "features": (distance, draw(7, 5, seed=9)),
    "linear": (lambda logits, labels: logits.sum(), CLASSES),
}


@pytest.mark.native
@pytest.mark.parametrize("norm", ["instance", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_any_loss_equals_the_generic_student(name: str, norm: Norm) -> None:
    (loss, labels), net = LOSSES[name], ConvNet(2, 4, 9, 5, 2, norm)
    theta, images, v = draw(net.num_parameters) / 2, draw(7, 2, 9, 9, seed=1), draw(net.num_parameters, seed=2)
    fused, generic = FusedConvNetStudent(net, loss=loss), GenericStudent(net, loss)
    step, expected_step = fused.gradient(theta, images, labels, save=True), generic.gradient(theta, images, labels)
    assert_close("loss", step.loss, expected_step.loss, 1e-12)
    assert_close("gradient", step.gradient, expected_step.gradient, 1e-10)
    expected = generic.gradient_jvp(theta, images, labels, v)
    for saved in (None, step.saved):
        actual = fused.gradient_jvp(theta, images, labels, v, saved)
        for field in ("v_dot_g", "hessian_v", "images", "labels", "loss"):
            one, other = getattr(actual, field), getattr(expected, field)
            assert (one is None) == (other is None), field
            if other is not None:
                assert_close(field, one, other, 1e-9, floor=1e-9)


@pytest.mark.native
@pytest.mark.parametrize("microbatch", [None, 3])
@pytest.mark.parametrize("name", ["smoothed", "features", "contrastive", "weighted"])
def test_a_convnet_with_a_loss_of_ones_own_is_unrolled_by_its_fused_step(name: str, microbatch: int | None) -> None:
    """Check the pieces, too: those of a mean are fused, and those of another loss are not."""
    (loss, labels), net = LOSSES[name], ConvNet(2, 4, 9, 5, 2)
    start, order = net.init(torch.Generator().manual_seed(0)).double(), torch.tensor([[0, 1, 2, 3, 4], [6, 5, 3, 1, 0]])
    images = draw(7, 2, 9, 9, seed=1)
    leaves = [images.requires_grad_(), *([labels.clone().requires_grad_()] if labels.is_floating_point() else [])]
    targets = leaves[1] if len(leaves) == 2 else labels
    path = unroll(net, start, images, targets, 0.3, order, loss=loss, microbatch=microbatch)
    found = torch.autograd.grad(matching_loss(path[-1], start, 1.1 * start), leaves)

    theta = start.clone().requires_grad_()
    for index in order:
        (gradient,) = torch.autograd.grad(loss(net(theta, images[index]), targets[index]), theta, create_graph=True)
        theta = theta - 0.3 * gradient
    expected = torch.autograd.grad((theta - 1.1 * start).square().sum() / (0.1 * start).square().sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        assert_close("gradient", one, other, 1e-9)
    student = plan(net, images=images, steps=2, batch=5, loss=loss, memory_budget=None).student
    assert isinstance(student, FusedConvNetStudent)
    assert student.loss is loss
