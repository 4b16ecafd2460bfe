"""Call `unroll` as other people's code does: their optimizers, modules, rows and batches, against whole-graph autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_leaves

from mtt_fast import (
    Augmentation,
    ConvNet,
    FlatModule,
    InputError,
    SiameseAugment,
    matching_loss,
    unroll,
)
from mtt_fast.networks.protocol import Network
from mtt_fast.testing import assert_close, module_function, whole_graph
from tests.engine.callers import BATCHES, LABELS, MODULE, NETWORK, START, TARGET, Distilled, loss_of_unroll

Loss = Callable[[Distilled], Tensor]


def plain(distilled: Distilled) -> Tensor:
    """Compute the same by whole-graph autograd."""
    network, theta = module_function(MODULE), START.clone().requires_grad_()
    for index in BATCHES:
        logits = network(theta, distilled.images[index])
        loss = F.cross_entropy(logits, distilled.labels[index].softmax(1))
        theta = theta - distilled.lr * torch.autograd.grad(loss, theta, create_graph=True)[0]
    return (theta - TARGET).square().sum() / (START - TARGET).square().sum()


def by_adam(distilled: Distilled, loss: Loss) -> nn.Module:
    optimizer = torch.optim.Adam(distilled.parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        loss(distilled).backward()
        optimizer.step()
    return distilled


def by_sgd_with_groups(distilled: Distilled, loss: Loss) -> nn.Module:
    optimizer = torch.optim.SGD(distilled.groups(), momentum=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for _ in range(3):
        optimizer.zero_grad()
        loss(distilled).backward()
        nn.utils.clip_grad_norm_([distilled.images], 0.1)
        optimizer.step()
        schedule.step()
    return distilled


def by_lbfgs(distilled: Distilled, loss: Loss) -> nn.Module:
    optimizer = torch.optim.LBFGS(distilled.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(distilled)
        value.backward()
        return value

    optimizer.step(closure)
    return distilled


def by_accumulation(distilled: Distilled, loss: Loss) -> nn.Module:
    optimizer = torch.optim.SGD(distilled.parameters(), lr=0.02)
    for _ in range(2):
        (loss(distilled) / 2).backward()
        (loss(distilled).square() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return distilled


def by_moving_average(distilled: Distilled, loss: Loss) -> nn.Module:
    average = AveragedModel(distilled, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(distilled.parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        loss(distilled).backward()
        optimizer.step()
        average.update_parameters(distilled)
    return average.module


@pytest.mark.parametrize(
    "optimize",
    [by_adam, by_sgd_with_groups, by_lbfgs, by_accumulation, by_moving_average],
    ids=lambda way: way.__name__,
)
def test_an_optimizer_of_torch_ends_where_it_does_by_whole_graph_autograd(
    optimize: Callable[[Distilled, Loss], nn.Module],
) -> None:
    actual, expected = optimize(Distilled(), loss_of_unroll), optimize(Distilled(), plain)
    for (name, value), wanted, before in zip(
        actual.named_parameters(), expected.parameters(), Distilled().parameters(), strict=True
    ):
        assert_close(name, value - before, wanted - before, 1e-8)


def test_images_that_a_network_makes_pass_the_gradient_on() -> None:
    """Learn a generator's latent codes, and its own weights, as in GLaD."""
    generator = nn.Sequential(nn.Linear(5, 2 * 64), nn.Tanh(), nn.Unflatten(1, (2, 8, 8))).double()
    codes = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    distilled, leaves = Distilled(), [codes, *generator.parameters()]
    gradients = []
    for loss in (loss_of_unroll, plain):
        del distilled.images
        distilled.images = generator(codes)
        gradients.append(torch.autograd.grad(loss(distilled), leaves))
    for actual, expected in zip(*gradients, strict=True):
        assert_close("leaf", actual, expected, 1e-10)


def test_images_in_any_memory_format_and_as_part_of_a_larger_tensor() -> None:
    distilled = Distilled()
    images = distilled.images.detach()
    expected = torch.autograd.grad(loss_of_unroll(distilled), distilled.images)[0]
    for whole in (images.contiguous(memory_format=torch.channels_last), torch.cat([images, images], 1)[:, 2:]):
        leaf = whole.detach().requires_grad_()
        actual = unroll(NETWORK, START, leaf, distilled.labels, distilled.lr, BATCHES, label_kind="logits")
        matching_loss(actual[-1], START, TARGET).backward()
        assert leaf.grad is not None
        assert_close("images", leaf.grad, expected, 1e-12)


def test_images_changed_before_the_backward_pass_are_noticed() -> None:
    distilled = Distilled()
    loss = loss_of_unroll(distilled)
    with torch.no_grad():
        distilled.images.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def trained_further(row: Tensor) -> None:
    """Train a module that has the `row` as its parameters, as a fine-tuning does."""
    module = copy.deepcopy(MODULE)
    nn.utils.vector_to_parameters(row, module.parameters())
    images = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    module(images).square().mean().backward()
    torch.optim.SGD(module.parameters(), lr=1e-6).step()


WRITES: dict[str, Callable[[Distilled, Tensor], object]] = {
    "images": lambda distilled, path: distilled.images.data.mul_(2),  # an instance norm takes this factor out again
    "labels": lambda distilled, path: setattr(distilled.labels, "data", distilled.labels.data.roll(1, 0)),
    "lr": lambda distilled, path: distilled.lr.data.clamp_(0, 0.1),
    "path": lambda distilled, path: trained_further(path[-1]),
}


@pytest.mark.parametrize("network", [NETWORK, FlatModule(MODULE)], ids=["ConvNet", "FlatModule"])
@pytest.mark.parametrize("name", WRITES)
def test_writes_that_autograd_does_not_see_are_noticed(network: Network, name: str) -> None:
    distilled = Distilled()
    path = unroll(network, START, distilled.images, distilled.labels, distilled.lr, BATCHES, label_kind="logits")
    loss = matching_loss(path[-1], START, TARGET)
    WRITES[name](distilled, path)
    with pytest.raises(
        InputError, match=f"`{name}`: expected the same values in the backward pass as in the call, found others"
    ):
        loss.backward()


@pytest.mark.parametrize("network", [NETWORK, FlatModule(MODULE)], ids=["ConvNet", "FlatModule"])
def test_writes_into_what_is_copied_are_allowed(network: Network) -> None:
    """Check that the start and the modules that were wrapped may be written into before the backward pass, and between two calls."""
    gradients = []
    for writes in (False, True):
        images, start = Distilled().images, START.clone().requires_grad_()
        path = unroll(network, start, images, LABELS, 0.2, BATCHES)
        if writes:
            start.data.zero_()
            trained_further(path[-1].clone())
        gradients.append(torch.autograd.grad(path[-1].square().sum(), images)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("network", [NETWORK, FlatModule(MODULE)], ids=["ConvNet", "FlatModule"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS - 1, r"expected class indices 0 … 2, found"),
        (torch.where(LABELS == 0, -100, LABELS), r"expected class indices 0 … 2, found"),
        (LABELS + 1, r"expected class indices 0 … 2, found"),
        (F.one_hot(LABELS, 5).double(), r"expected probabilities \(\d, 3\), float64, found float64 of shape \(\d, 5\)"),
    ],
)
def test_labels_of_other_classes_are_refused(network: Network, labels: Tensor, message: str) -> None:
    """Refuse -100 too, which torch's cross-entropy leaves out: a batch that is cut would no longer have its mean."""
    with pytest.raises(InputError, match=message):
        unroll(network, START, Distilled().images, labels, 0.2, BATCHES, microbatch=2)


class Scaled(ConvNet):
    """ConvNet with other logits."""

    def __call__(self, theta: Tensor, images: Tensor) -> Tensor:
        return 2 * super().__call__(theta, images)


class Wavy(ConvNet):
    """ConvNet with other features, and so other logits."""

    def _features(self, blocks: Any, images: Tensor) -> Tensor:
        return super()._features(blocks, images).sin()


class Standardised(ConvNet):
    """ConvNet with filters of mean zero."""

    def split(self, theta: Tensor) -> list[tuple[Tensor, ...]]:
        *blocks, classifier = super().split(theta)
        return [*((w - w.mean((1, 2, 3), keepdim=True), *others) for w, *others in blocks), classifier]


class Frozen(ConvNet):
    """ConvNet of which only the classifier learns."""

    def split(self, theta: Tensor) -> list[tuple[Tensor, ...]]:
        *blocks, classifier = super().split(theta)
        return [*(tuple(tensor.detach() for tensor in block) for block in blocks), classifier]


class Clipped(SiameseAugment):
    """DSA within bounds."""

    def __call__(self, images: Tensor, draws: Any) -> Tensor:
        return super().__call__(images, draws).clamp(-0.8, 0.8)


class Logged:
    """A wrapper that passes on all that it does not change."""

    def __init__(self, inner: SiameseAugment) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, images: Tensor, draws: Any) -> Tensor:
        return self.inner(images, draws).clamp(-0.8, 0.8)


@pytest.mark.parametrize(
    ("network", "augment"),
    [
        (Scaled(2, 3, 8, 4, 2), None),
        (Wavy(2, 3, 8, 4, 2), None),
        (Standardised(2, 3, 8, 4, 2), None),
        (Frozen(2, 3, 8, 4, 2), None),
        (NETWORK, Clipped("flip_color")),
        (NETWORK, Logged(SiameseAugment("flip_color"))),
    ],
    ids=["logits", "features", "filters", "what learns", "augmentation", "wrapper"],
)
def test_what_a_subclass_overrides_is_used(network: ConvNet, augment: Any) -> None:
    """Compare with the subclass itself: ConvNet's fused steps and DSA as a warp are short cuts that know only the base class."""
    images, lr = Distilled().images, torch.tensor(0.2, dtype=torch.float64)
    random = torch.Generator().manual_seed(4)
    draws = None if augment is None else [augment.draw(images[index], random) for index in BATCHES]
    path = unroll(network, START, images, LABELS, lr, BATCHES, augment=augment, draws=draws)
    matching_loss(path[-1], START, TARGET).backward()
    apply = None if draws is None else (lambda rows, n: augment(rows, draws[n]))
    expected = whole_graph(network, START, TARGET, images, LABELS, lr, list(BATCHES), augment=apply)
    assert_close("end", path[-1] - START, expected.end - START, 1e-10)
    assert images.grad is not None
    assert_close("images", images.grad, expected.images, 1e-9)


@pytest.mark.parametrize("network", [NETWORK, FlatModule(MODULE)], ids=["ConvNet", "FlatModule"])
def test_a_rate_may_be_a_negative_view(network: Network) -> None:
    """Take a rate that torch keeps as a view with another sign, as it does the imaginary part of a conjugate."""
    rate = torch.tensor(-0.2j, dtype=torch.complex128).conj().imag
    assert rate.is_neg()
    images = Distilled().images
    assert torch.equal(*(unroll(network, START, images, LABELS, lr, BATCHES) for lr in (rate, 0.2)))


def test_the_matching_loss_alone_has_second_derivatives() -> None:
    """Use a path that the caller records: the loss's Hessian is 2 / |θ_0 − θ*|² times the identity."""
    end = torch.randn(len(START), dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(end)
    (gradient,) = torch.autograd.grad(matching_loss(end, START, TARGET), end, create_graph=True)
    (product,) = torch.autograd.grad(gradient @ direction, end)
    assert_close("product", product, 2 * direction / (START - TARGET).square().sum(), 1e-12)


@pytest.mark.parametrize("network", [NETWORK, FlatModule(MODULE)], ids=["ConvNet", "FlatModule"])
@pytest.mark.parametrize("kind", ["tensor", "arrays"])
def test_batches_may_be_filled_again_before_the_backward_pass(network: Network, kind: str) -> None:
    def gradient(*, refill: bool) -> Tensor:
        images, batches = Distilled().images, BATCHES.clone()
        path = unroll(network, START, images, LABELS, 0.2, batches if kind == "tensor" else list(batches.numpy()))
        if refill:
            batches.zero_()
        return torch.autograd.grad(matching_loss(path[-1], START, TARGET), images)[0]

    assert torch.equal(gradient(refill=True), gradient(refill=False))


@pytest.mark.parametrize("network", [NETWORK, FlatModule(MODULE)], ids=["ConvNet", "FlatModule"])
@pytest.mark.parametrize("hold", [torch.clone, lambda numbers: {"by": [numbers]}, lambda numbers: (numbers.numpy(),)])
@pytest.mark.parametrize("refilled", ["before the backward pass", "at each draw"])
def test_draws_may_be_filled_again(network: Network, hold: Callable[[Tensor], Any], refilled: str) -> None:
    """Draw into the same numbers in every step, and give draws that are overwritten as soon as the call is over."""

    def shifted(images: Tensor, draws: Any) -> Tensor:
        (by,) = tree_leaves(draws)
        return images + torch.as_tensor(by) * images.roll(1, 3)

    def fill(draws: Any, value: float) -> Any:
        for numbers in tree_leaves(draws):
            numbers[...] = value
        return draws

    def gradient(**options: Any) -> Tensor:
        images = Distilled().images
        path = unroll(network, START, images, LABELS, 0.2, BATCHES, **options)
        if "draws" in options:
            fill(options["draws"], 9.0)
        return torch.autograd.grad(matching_loss(path[-1], START, TARGET), images)[0]

    numbers = torch.tensor([[0.5], [1.0], [-0.5]], dtype=torch.float64)
    values, one, apart = iter(numbers), hold(numbers[0].clone()), Augmentation(lambda *_: None, shifted)
    if refilled == "at each draw":
        found = gradient(augment=Augmentation(lambda *_: fill(one, float(next(values))), shifted))
    else:
        found = gradient(augment=apart, draws=[hold(each.clone()) for each in numbers])
    steps = iter([*numbers.tolist()])
    drawn = Augmentation(lambda *_: torch.tensor(next(steps), dtype=torch.float64), shifted)
    assert torch.equal(found, gradient(augment=drawn))


def test_draws_are_those_of_each_step_of_an_augmentation() -> None:
    images, by = Distilled().images, torch.ones((), dtype=torch.float64, requires_grad=True)
    shifted = Augmentation(lambda *_: None, lambda rows, by: rows + by)
    for count, augment, found in ((2, shifted, "2"), (4, shifted, "4"), (3, None, "3 and no `augment`")):
        with pytest.raises(InputError, match=f"^`draws`: expected the draws of .* each of 3 steps, found {found}$"):
            unroll(NETWORK, START, images, LABELS, 0.2, BATCHES, augment, draws=[by.detach()] * count)
    with torch.no_grad():  # no gradient is missed
        path = unroll(NETWORK, START, images, LABELS, 0.2, BATCHES, shifted, draws=[by] * 3)
    assert torch.equal(path, unroll(NETWORK, START, images + 1, LABELS, 0.2, BATCHES))


def test_a_saved_path_is_an_ordinary_tensor(tmp_path: Path) -> None:
    """Save a path as trajectories are saved: in files that torch.load reads without this library."""
    with torch.no_grad():
        path = unroll(NETWORK, START, Distilled().images, LABELS, 0.2, BATCHES)
    torch.save({"path": path}, tmp_path / "path.pt")
    for other in (torch.load(tmp_path / "path.pt", weights_only=True)["path"], copy.deepcopy(path)):
        assert type(other) is Tensor
        assert torch.equal(other, path)


def test_a_row_may_be_chosen_by_a_number_of_numpy() -> None:
    """Check what would give the row a gradient as large as the path, and leave it in host memory where the path is there."""
    path = unroll(NETWORK, START, Distilled().images, LABELS, 0.2, BATCHES)
    assert path[np.random.default_rng(0).integers(1, 4)].grad_fn is path[1].grad_fn is path[np.int64(-1)].grad_fn


def test_a_row_is_not_chosen_by_a_truth_value() -> None:
    """Index by True as torch does, which adds a dimension: only to Python is it a number."""
    path = unroll(NETWORK, START, Distilled().images, LABELS, 0.2, BATCHES)
    assert path[True].shape == (1, 4, len(START))
    assert torch.equal(path[True][0], path)


@pytest.mark.parametrize("network", [NETWORK, FlatModule(MODULE)], ids=["ConvNet", "FlatModule"])
def test_a_student_may_have_another_optimizer(network: Any) -> None:
    """Take the gradient of each step from `unroll`, and Adam's steps, with a learned rate for each parameter, from autograd."""
    learned, rates = Distilled(), torch.full_like(START, 0.01, requires_grad=True)
    decay, start = torch.tensor(0.9, dtype=torch.float64, requires_grad=True), START.clone().requires_grad_()

    def end(gradient: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        theta, first, second = start, torch.zeros_like(start), torch.zeros_like(start)
        for index in BATCHES:
            g = gradient(theta, index)
            first, second = decay * first + (1 - decay) * g, 0.99 * second + 0.01 * g.square()
            theta = theta - rates * first / (second + 1e-6).sqrt()
        return theta

    def one_step(theta: Tensor, index: Tensor) -> Tensor:
        return unroll(network, theta, learned.images, LABELS, 0.0, [index], return_velocity=True)[1]

    def recorded(theta: Tensor, index: Tensor) -> Tensor:
        loss = F.cross_entropy(module_function(MODULE)(theta, learned.images[index]), LABELS[index])
        return torch.autograd.grad(loss, theta, create_graph=True)[0]

    leaves = (learned.images, rates, decay, start)
    found, expected = (torch.autograd.grad(end(way).sub(TARGET).square().sum(), leaves) for way in (one_step, recorded))
    for name, one, other in zip(("images", "rates", "decay", "start"), found, expected, strict=True):
        assert_close(name, one, other, 1e-9)


@pytest.mark.parametrize("network", [NETWORK, FlatModule(MODULE)], ids=["ConvNet", "FlatModule"])
@pytest.mark.parametrize("options", [{}, {"microbatch": 3}], ids=["whole", "cut"])
def test_labels_may_be_weighted(network: Any, options: dict[str, Any]) -> None:
    """Learn a rate for each class, as the weight of its images' labels, whose rows then do not sum to 1."""
    learned, log_rates = Distilled(), torch.tensor([-1.0, -2.0, -1.5], dtype=torch.float64, requires_grad=True)
    rates = log_rates.exp()[LABELS]
    end = unroll(
        network, START, learned.images, rates[:, None] * learned.labels.softmax(1), 1.0, BATCHES, momentum=0.5, **options
    )[-1]  # fmt: skip
    theta, velocity = START.clone().requires_grad_(), torch.zeros_like(START)
    for index in BATCHES:
        log_p = module_function(MODULE)(theta, learned.images[index]).log_softmax(1)
        loss = -(rates[index] * (learned.labels[index].softmax(1) * log_p).sum(1)).mean()
        velocity = 0.5 * velocity + torch.autograd.grad(loss, theta, create_graph=True)[0]
        theta = theta - velocity
    leaves = (learned.images, learned.labels, log_rates)
    found, expected = (
        torch.autograd.grad(row.sub(TARGET).square().sum(), leaves, retain_graph=True) for row in (end, theta)
    )
    for name, one, other in zip(("images", "labels", "rates"), found, expected, strict=True):
        assert_close(name, one, other, 1e-9)


def test_the_mean_of_the_rows_of_parts_is_the_row_of_a_batch() -> None:
    """Average the rows after each step, as processes do that have a part of the batch each."""
    learned, mean = Distilled(), START
    for index in BATCHES:
        rows = [unroll(NETWORK, mean, learned.images, LABELS, learned.lr, [part])[-1] for part in index.chunk(2)]
        mean = torch.stack(rows).mean(0)
    row = unroll(NETWORK, START, learned.images, LABELS, learned.lr, BATCHES)[-1]
    leaves = (learned.images, learned.lr)
    found, expected = (torch.autograd.grad(matching_loss(end, START, TARGET), leaves) for end in (mean, row))
    for name, one, other in zip(("images", "lr"), found, expected, strict=True):
        assert_close(name, one, other, 1e-9)


def test_stretches_may_have_images_of_other_sizes() -> None:
    """Train on small images and then on large ones, with the velocity handed on, through a network that takes both."""
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    net, large, lr = FlatModule(module), Distilled().images, torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    small = large.detach()[:, :, ::2, ::2].clone().requires_grad_()
    start, order = net.init(), [torch.tensor(index) for index in ([0, 0, 5], [3], [1, 2, 3, 4], [5, 5])]
    stretches = [(small, order[:2]), (large, order[2:])]
    end, last = start, torch.zeros_like(start)
    theta, velocity = start.clone().requires_grad_(), torch.zeros_like(start)
    for images, batches in stretches:
        path, last = unroll(
            net, end, images, LABELS, lr, batches, momentum=0.9, velocity=last, return_velocity=True
        )  # fmt: skip
        end = path[-1]
        for index in batches:
            loss = F.cross_entropy(module_function(module)(theta, images[index]), LABELS[index])
            velocity = 0.9 * velocity + torch.autograd.grad(loss, theta, create_graph=True)[0]
            theta = theta - lr * velocity
    found, expected = (torch.autograd.grad(row.square().sum(), (small, large, lr)) for row in (end, theta))
    for name, one, other in zip(("small", "large", "lr"), found, expected, strict=True):
        assert_close(name, one, other, 1e-9)


def test_images_need_not_be_pictures() -> None:
    """Distil rows of a table for an MLP, as embeddings and measurements are distilled."""
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    net, rows = FlatModule(module), torch.randn(6, 5, dtype=torch.float64)
    start, lr = net.init(), torch.tensor(0.2, dtype=torch.float64)
    expected = whole_graph(module_function(module), start, 1.1 * start, rows, LABELS, lr, list(BATCHES))
    for options in ({}, {"microbatch": 2}, {"memory_budget": "64MiB"}):
        leaf = rows.clone().requires_grad_()
        path = unroll(net, start, leaf, LABELS, lr, BATCHES, **options)
        (actual,) = torch.autograd.grad(matching_loss(path[-1], start, 1.1 * start), leaf)
        assert_close("rows", actual, expected.images, 1e-9)


@pytest.mark.parametrize(
    "batches", [5, None, torch.tensor(1), ["ab"], [(START, LABELS)], [torch.tensor([1j])]], ids=type
)
def test_what_are_no_batches_is_refused(batches: Any) -> None:
    with pytest.raises(InputError, match="`batches`: expected"):
        unroll(NETWORK, START, Distilled().images, LABELS, 0.2, batches)
