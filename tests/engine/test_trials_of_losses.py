"""Whatever a caller's loss does, `unroll` gives the right gradient or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtt_fast import ConvNet, FlatModule, InputError, unroll
from mtt_fast.testing import assert_close
from tests.engine.trial_cases import BATCHES, LABELS, gradient, with_layer


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1, 3], dtype=torch.float64)),
        nn.CrossEntropyLoss(ignore_index=1),
        lambda logits, labels: F.cross_entropy(logits - logits.mean(0), labels),
    ],
    ids=["a sum", "weights", "a class left out", "a mean over the batch"],
)
def test_a_loss_that_does_not_add_up_is_computed_of_whole_batches(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net = ConvNet(2, 3, 6, 4, 1)
    start = net.init(torch.Generator().manual_seed(0)).double()
    whole = gradient(net, start, loss=loss)
    for size in (1, 2, 3):
        assert_close("images", gradient(net, start, loss=loss, microbatch=size), whole, 1e-12)
    for check in ("unroll.try_step", "mean_loss._adds_up"):
        monkeypatch.setattr(
            f"mtt_fast.engine.{check}", lambda *_, **__: torch.tensor(True)
        )  # as a mean over the samples
    assert not torch.allclose(gradient(net, start, loss=loss, microbatch=2), whole, rtol=1e-3)


def test_weights_of_classes_are_found_wherever_they_are() -> None:
    """Check a weight of one class that few batches have."""
    net, images, labels = (
        ConvNet(2, 3, 6, 4, 1),
        torch.randn(40, 2, 6, 6, dtype=torch.float64),
        torch.zeros(40, dtype=torch.long),
    )
    labels[-1], labels[-2] = 2, 1
    images.requires_grad_()
    start = net.init(torch.Generator().manual_seed(0)).double()
    weights = torch.tensor([1, 5, 1], dtype=torch.float64)
    whole, cut = (
        torch.autograd.grad(
            unroll(
                net, start, images, labels, 0.3, torch.arange(40).view(2, 20), loss=nn.CrossEntropyLoss(weight=weights),
                microbatch=size,
            )[-1].sum(),
            images,
        )[0]
        for size in (None, 8)
    )  # fmt: skip
    assert_close("images", cut, whole, 1e-12)


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}], ids=["whole", "cut"])
def test_a_loss_that_writes_into_the_logits_is_taken(options: dict[str, Any]) -> None:
    def margin(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits - 0.5 * F.one_hot(labels, 3), labels)

    def margin_in_place(logits: Tensor, labels: Tensor) -> Tensor:
        logits[torch.arange(len(labels)), labels] -= 0.5
        return F.cross_entropy(logits, labels)

    net = ConvNet(2, 3, 6, 4, 1)
    start = net.init(torch.Generator().manual_seed(0)).double()
    actual, expected = (gradient(net, start, loss=loss, **options) for loss in (margin_in_place, margin))
    assert_close("images", actual, expected, 1e-12)


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}, {"memory_budget": "1GiB"}], ids=["whole", "cut", "saved"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.long])
def test_a_loss_that_writes_into_its_labels_is_taken(dtype: torch.dtype, options: dict[str, Any]) -> None:
    net = ConvNet(2, 3, 6, 4, 1)
    start, images = net.init().double(), torch.randn(6, 2, 6, 6, dtype=torch.float64)

    def gradients(add: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, ...]:
        labels = torch.arange(18).view(6, 3).to(dtype)
        learned = [images.requires_grad_(), *([labels.requires_grad_()] if dtype.is_floating_point else [])]
        path = unroll(
            net, start, images, labels, 0.1, BATCHES, **options,
            loss=lambda logits, labels: F.mse_loss(logits, add(labels, 2).to(logits.dtype)),
        )  # fmt: skip
        return torch.autograd.grad(path[-1].sum(), learned)

    for actual, expected in zip(gradients(Tensor.add_), gradients(Tensor.add), strict=True):
        assert_close("gradient", actual, expected, 1e-12)


class Following:
    """A loss that is divided by a running mean of itself."""

    def __init__(self) -> None:
        self.mean = 1.0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels)
        self.mean = 0.9 * self.mean + 0.2 * float(loss.detach())
        return loss / self.mean


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logits, labels: F.cross_entropy(F.dropout(logits, 0.1), labels), "`loss`: expected no random numbers"),
        (Following(), "`loss`: expected the same outputs"),
    ],
    ids=["random", "following"],
)
def test_a_loss_that_does_not_repeat_itself_is_refused(loss: Any, message: str) -> None:
    net = FlatModule(with_layer(nn.Identity()))
    with pytest.raises(InputError, match=message):
        gradient(net, net.init(), loss=loss)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(reduction="none"), r"`loss`: .* found torch\.float64 of shape \(2,\)"),
        (lambda logits, labels: F.cross_entropy(logits, labels).item(), "`loss`: .* found float"),
        ("cross_entropy", "`loss`: expected a function of logits and labels, found 'cross_entropy'"),
        (nn.CrossEntropyLoss, "`loss`: expected a function, found the class CrossEntropyLoss; call it to make one"),
        (
            lambda logits, labels: F.cross_entropy(logits, labels).detach(),
            "depends on the parameters, found no gradient",
        ),
    ],
    ids=["a loss a sample", "a number", "a name", "a class", "without a graph"],
)
def test_what_is_no_loss_is_refused(loss: Any, message: str) -> None:
    net = FlatModule(with_layer(nn.Identity()))
    with pytest.raises(InputError, match=message):
        gradient(net, net.init(), loss=loss)


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}, {"memory_budget": "64MiB"}], ids=str)
def test_a_loss_without_a_gradient_in_a_later_step_is_refused(options: dict[str, Any]) -> None:
    """Check a loss that is a constant where no sample counts: torch's own loop has no gradient there either."""

    def masked(logits: Tensor, labels: Tensor) -> Tensor:
        return logits.square().mean() if (labels != 2).all() else logits.new_zeros(())

    net = FlatModule(with_layer(nn.Identity()))
    images, labels = torch.randn(6, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 2, 2])
    with pytest.raises(InputError, match="depends on the parameters, found no gradient"):
        unroll(
            net, net.init(), images, labels, 0.3, [torch.tensor([0, 1]), torch.tensor([4, 5])], loss=masked, **options
        )


class OnceDifferentiable(torch.autograd.Function):
    """Twice a tensor, with a derivative that has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


@pytest.mark.parametrize("memory_budget", [None, "auto"])
@pytest.mark.parametrize(
    ("loss", "labels", "found"),
    [
        (nn.MultiMarginLoss(), LABELS, "derivative for aten::multi_margin_loss_backward is not implemented"),
        (nn.SoftMarginLoss(), 2 * F.one_hot(LABELS).float() - 1, "with respect to argument 'target'"),
        (lambda logits, labels: F.cross_entropy(OnceDifferentiable.apply(logits), labels), LABELS, "once_differentiable"),
    ],
    ids=["margin", "labels", "once"],
)  # fmt: skip
def test_a_loss_without_a_second_derivative_is_refused(
    loss: Any, labels: Tensor, found: str, memory_budget: Any
) -> None:
    module = FlatModule(nn.Sequential(nn.Flatten(), nn.Linear(8, 3)))
    images = torch.ones(6, 2, 2, 2).requires_grad_()
    with pytest.raises(
        InputError, match=f"`net`, `loss`: expected operations that torch differentiates twice, .*{found}"
    ):
        unroll(module, module.init(), images, labels, 0.1, BATCHES, loss=loss, memory_budget=memory_budget)[
            -1
        ].sum().backward()


def test_a_loss_without_a_second_derivative_may_train() -> None:
    module = FlatModule(nn.Sequential(nn.Flatten(), nn.Linear(8, 3)))
    start, images, loss = module.init(), torch.ones(6, 2, 2, 2), nn.MultiMarginLoss()
    path = unroll(module, start, images, LABELS, 0.1, BATCHES, loss=loss)
    theta = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(module(theta, images[BATCHES[0]]), LABELS[BATCHES[0]]), theta)
    torch.testing.assert_close(path[1], start - 0.1 * gradient)


def test_a_learned_temperature_may_be_a_column_of_the_labels() -> None:
    """Check the way that the error tells: a loss's own numbers, one a sample, beside the labels."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits / labels[:, 3:], labels[:, :3])

    net, random = FlatModule(with_layer(nn.Identity())), torch.Generator().manual_seed(0)
    images, start = torch.randn(6, 2, 6, 6, dtype=torch.float64, generator=random), net.init()
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    labels = torch.cat([F.one_hot(LABELS, 3).double(), temperature.expand(6, 1)], dim=1)
    end = unroll(net, start, images, labels, 0.3, BATCHES, loss=loss)[-1]
    theta = start.requires_grad_()
    for index in BATCHES:
        step = F.cross_entropy(net(theta, images[index]) / temperature, LABELS[index])
        theta = theta - 0.3 * torch.autograd.grad(step, theta, create_graph=True)[0]
    found, expected = (torch.autograd.grad(row.square().sum(), temperature)[0] for row in (end, theta))
    assert_close("temperature", found, expected, 1e-9)
