"""Test dataset and label distillation, through steps to a real loss, against whole-graph autograd, in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtt_fast import InputError, unroll
from mtt_fast.baselines import learning as learning_module
from mtt_fast.baselines.dd import DdOptions, dd, step_batches
from mtt_fast.baselines.ld import LdOptions, ld, patience, stagnates, steps_of_own_training
from mtt_fast.baselines.real_data import random_batch
from mtt_fast.commands.seconds import Stopwatch
from mtt_fast.runtime.interrupts import Stopped, StopRequest
from mtt_fast.runtime.seeding import generator_for
from mtt_fast.testing import assert_close
from mtt_fast.training.images import RealImages
from tests.baselines.network import F64, NET, plain, random_theta, seeded


def whole_graph_logits(
    theta: Tensor, images: Tensor, labels: Tensor, rates: Tensor, batches: list[Tensor], real: Tensor
) -> Tensor:
    """Return the logits with all steps recorded by autograd."""
    function = plain()
    theta = theta.clone().requires_grad_()
    for n, index in enumerate(batches):
        log_p = F.log_softmax(function(theta, images[index]), dim=1)
        targets = labels[index]
        hard = not targets.is_floating_point()
        loss = -(F.one_hot(targets, 10) * log_p if hard else targets * log_p).sum(1).mean()
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - rates[n] * gradient
    return function(theta, real)


def test_dd_has_the_whole_graphs_gradients() -> None:
    images = torch.randn(20, 1, 8, 8, dtype=F64, requires_grad=True)
    labels, rates = torch.arange(10).repeat_interleave(2), torch.rand(6, dtype=F64, requires_grad=True)
    batches = step_batches(DdOptions(ipc=2), 10)
    real, real_labels = torch.randn(7, 1, 8, 8, dtype=F64), torch.randint(10, (7,))
    results = []
    for logits in (
        NET(unroll(NET, random_theta(), images, labels, rates, batches)[-1], real),
        whole_graph_logits(random_theta(), images, labels, rates, batches, real),
    ):
        loss = F.cross_entropy(logits, real_labels)
        results.append((loss, *torch.autograd.grad(loss, (images, rates))))
    for name, result, expected in zip(("loss", "images", "rates"), *results, strict=True):
        assert_close(name, result, expected, 1e-10)


def test_ld_has_the_whole_graphs_gradients() -> None:
    images, soft = torch.randn(20, 1, 8, 8, dtype=F64), torch.rand(20, 10, dtype=F64).softmax(1).requires_grad_()
    index, rate = torch.randperm(20)[:13], torch.tensor(0.3, dtype=F64)
    real, real_labels = torch.randn(7, 1, 8, 8, dtype=F64), torch.randint(10, (7,))
    gradient, expected = (
        torch.autograd.grad(F.cross_entropy(logits, real_labels), soft)[0]
        for logits in (
            NET(unroll(NET, random_theta(), images, soft, rate, [index])[-1], real),
            whole_graph_logits(random_theta(), images, soft, rate[None], [index], real),
        )
    )
    assert_close("labels", gradient, expected, 1e-10)
    untouched = [row for row in range(20) if row not in index]
    assert not gradient[untouched].any()


def test_the_steps_of_dd_share_the_images_out() -> None:
    batches = step_batches(DdOptions(ipc=6, distilled_images_per_class_per_step=2, distill_epochs=2), 3)
    assert [batch.tolist() for batch in batches[:3]] == [
        [0, 1, 6, 7, 12, 13],
        [2, 3, 8, 9, 14, 15],
        [4, 5, 10, 11, 16, 17],
    ]
    assert len(batches) == 6
    assert torch.equal(torch.stack(batches[:3]), torch.stack(batches[3:]))
    with pytest.raises(InputError, match="expected a divisor of --ipc 5"):
        DdOptions(ipc=5, distilled_images_per_class_per_step=2).check()


def test_dd_lowers_its_loss_and_learns_its_rates(real: RealImages) -> None:
    options = DdOptions(dataset="digits", batch_real=256, lr_img=0.05, train_nets_type="known_init")
    learning = dd(options, real, NET)
    assert float(learning.lr()) == pytest.approx(0.02)
    losses = [learning.step(iteration) for iteration in range(80)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert float(learning.lr()) != pytest.approx(0.02)
    assert learning.own_training is not None
    trained = learning.own_training(seeded(5))
    assert torch.equal(trained, learning.own_training(seeded(6)))  # of one initialisation
    seen, labels = real.test.batch(slice(None))
    assert float((NET(trained, seen).argmax(1) == labels).float().mean()) > 0.3


def test_each_network_of_the_own_training_has_random_numbers_of_its_own(
    real: RealImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that what is tested is the network that the method's own training returns for these numbers."""

    def own_training(generator: torch.Generator) -> Tensor:
        return torch.rand((), generator=generator)

    monkeypatch.setattr(learning_module, "accuracy", lambda network, theta, test: float(theta))
    run: Any = SimpleNamespace(options=DdOptions(num_eval=3, seed=4), network=NET, real=real, seconds=Stopwatch())
    learned: Any = SimpleNamespace(own_training=own_training)
    result = learning_module._own_accuracy(run, learned, StopRequest())
    expected = [float(own_training(generator_for(4, "own training", number))) for number in range(3)]
    assert list(result.values) == expected
    assert len(set(expected)) == 3
    stop = StopRequest()
    stop.signum = 15
    with pytest.raises(Stopped, match="stopped during an evaluation"):
        learning_module._own_accuracy(run, learned, stop)


def test_known_networks_of_dd_are_several(real: RealImages) -> None:
    """Check that each is in every iteration, and that the method's own training takes any of them, as in the public code."""
    options = DdOptions(dataset="digits", batch_real=64, train_nets_type="known_init", n_nets=2, seed=3)
    learning = dd(options, real, NET)
    learning.carried["raw_rates"].fill_(-100)  # no step moves a network
    known = [NET.init(generator_for(3, "dd network", *indices)) for indices in ((), (1,))]
    inputs, targets = random_batch(real.train, torch.arange(len(real.train)), 64, generator_for(3, "dd", 0))
    losses = [F.cross_entropy(NET(theta, inputs), targets) for theta in known]
    assert float(losses[0]) != pytest.approx(float(losses[1]), rel=1e-3)
    assert learning.step(0) == pytest.approx(float(sum(losses) / 2), rel=1e-4)
    assert learning.own_training is not None
    trained = [learning.own_training(seeded(seed)) for seed in range(10)]
    assert all(any(theta.allclose(one) for one in known) for theta in trained)
    assert all(any(theta.allclose(one) for theta in trained) for one in known)


@pytest.mark.parametrize("train_nets_type", ["unknown_init", "known_init"])
def test_dd_moves_images_and_rates_by_adam_through_all_steps(
    real: RealImages, train_nets_type: Literal["unknown_init", "known_init"]
) -> None:
    options = DdOptions(
        dataset="digits", ipc=2, batch_real=64, lr_img=0.05, n_nets=2, seed=3, train_nets_type=train_nets_type
    )
    known = [NET.init(generator_for(3, "dd network", *indices)).double() for indices in ((), (1,))]
    learning, batches, function = dd(options, real, NET), step_batches(options, 10), plain()
    images, raw, labels = learning.images.double(), learning.carried["raw_rates"].double(), learning.labels
    optimizer = torch.optim.Adam([images, raw], lr=0.05, betas=(0.5, 0.999))
    for iteration in range(2):
        generator = generator_for(3, "dd", iteration)
        inputs, targets = random_batch(real.train, torch.arange(len(real.train)), 64, generator)
        pixels, numbers, losses = images.clone().requires_grad_(), raw.clone().requires_grad_(), []
        for number in range(2):
            theta = NET.init(generator).double() if train_nets_type == "unknown_init" else known[number]
            rates = F.softplus(numbers)
            logits = whole_graph_logits(theta, pixels, labels, rates, batches, inputs.double())
            losses.append(F.cross_entropy(logits, targets))
        loss = torch.stack(losses).mean()
        images.grad, raw.grad = torch.autograd.grad(loss, (pixels, numbers))
        optimizer.step()
        assert learning.step(iteration) == pytest.approx(float(loss.detach()), rel=1e-4)
    assert_close("images", learning.images.double(), images, 1e-3)
    assert_close("rates", learning.carried["raw_rates"].double(), raw, 1e-4)
    rates = F.softplus(learning.carried["raw_rates"].copy_(torch.linspace(-5, -2, 6))).double()
    assert float(learning.lr()) == pytest.approx(float(rates.mean()), rel=1e-4)
    assert learning.own_training is not None
    start = NET.init(seeded(5)).double()
    if train_nets_type == "known_init":
        start = known[int(torch.randint(2, (), generator=seeded(5)))]
    theta, trained = start.clone(), learning.own_training(seeded(5)).double()
    for index, rate in zip(batches, rates, strict=True):
        leaf = theta.clone().requires_grad_()
        own = F.cross_entropy(function(leaf, images[index]), labels[index])
        theta = theta - rate * torch.autograd.grad(own, leaf)[0]
    assert_close("own training", trained - start, theta - start, 1e-2)


def test_dd_decays_its_rate(real: RealImages) -> None:
    learning = dd(DdOptions(dataset="digits", batch_real=16, decay_it=2, decay_factor=0.1), real, NET)
    assert learning.optimizer.defaults["betas"] == (0.5, 0.999)  # the public code's
    rates = []
    for iteration in (0, 1, 2, 5):
        learning.step(iteration)
        rates.append(learning.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.0001])


def test_ld_keeps_probabilities_and_moves_its_network(real: RealImages) -> None:
    learning = ld(LdOptions(dataset="digits", ipc=2, batch_real=64, lr_y=0.05), real, NET)
    images, theta = learning.images.clone(), learning.carried["theta"].clone()
    assert learning.labels.unique().tolist() == pytest.approx([0.1])
    for iteration in range(3):
        learning.step(iteration)
    torch.testing.assert_close(learning.labels.sum(1), torch.ones(20))
    assert float(learning.labels.min()) >= 0
    assert float(learning.labels.max()) > 0.11
    assert torch.equal(images, learning.images)
    moved = (learning.carried["theta"] - theta).abs()
    assert 0 < float(moved.max()) < 3.1e-3  # three steps of Adam at 1e-3
    assert len(learning.carried["errors"]) == 3


def test_ld_moves_labels_and_network_by_adam_on_the_images_of_the_step(real: RealImages) -> None:
    options = LdOptions(dataset="digits", ipc=2, batch_real=64, inner_batch_size=7, inner_lr=0.3)
    learning = ld(options, real, NET)
    images, theta, generator = learning.images.double(), learning.carried["theta"], generator_for(0, "ld", 0)
    start = theta.clone().double()
    inputs, targets = random_batch(real.train, torch.arange(len(real.train)), 64, generator)
    index = torch.randperm(20, generator=generator)[:7]
    soft = learning.labels.clone().double().requires_grad_()
    logits = whole_graph_logits(start, images, soft, torch.tensor([0.3]), [index], inputs.double())
    (to_labels,) = torch.autograd.grad(F.cross_entropy(logits, targets), soft)
    leaf = start.clone().requires_grad_()
    loss = -(soft.detach()[index] * F.log_softmax(plain()(leaf, images[index]), dim=1)).sum(1).mean()
    (to_theta,) = torch.autograd.grad(loss, leaf)
    learning.step(0)
    assert learning.labels.grad is not None
    assert theta.grad is not None
    assert_close("labels", learning.labels.grad.double(), to_labels, 1e-4)
    assert_close("theta", theta.grad.double(), to_theta, 1e-4)
    sure = to_theta.abs() > 1e-3  # where the first step of Adam is its rate and the sign
    torch.testing.assert_close(theta[sure].double(), (start - 1e-3 * to_theta.sign())[sure], rtol=0, atol=1e-6)
    assert int(sure.sum()) > 100


def test_ld_gives_the_label_of_its_class_to_most_images(real: RealImages) -> None:
    learning = ld(LdOptions(dataset="digits", ipc=2, batch_real=256, lr_y=0.03, inner_lr=0.1), real, NET)
    for iteration in range(80):
        learning.step(iteration)
    own = torch.arange(10).repeat_interleave(2)
    assert float((learning.labels.argmax(1) == own).float().mean()) > 0.6


def restarts(errors: list[float], window: int) -> tuple[list[int], list[int]]:
    """Return the steps after which the public code takes a fresh network, and the steps of each network to its lowest errors.

    These are its counters, kept one step after the other.
    """
    steps_of_restarts: list[int] = []
    lifetimes: list[int] = []
    last: list[float] = []
    lowest, since, steps = float("inf"), 0, 0
    for step, error in enumerate(errors):
        steps += 1
        full = len(last) == window
        last = [*last[1:], error] if full else [*last, error]
        if len(last) < window:
            continue
        if not full or sum(last) < lowest:
            lowest, since = sum(last), 0
        elif since < window:
            since += 1
        else:
            steps_of_restarts.append(step)
            lifetimes.append(steps - since - 1)
            last, lowest, since, steps = [], float("inf"), 0, 0
    return steps_of_restarts, lifetimes


@pytest.mark.parametrize("seed", range(4))
def test_a_network_is_replaced_when_the_public_code_would(seed: int) -> None:
    errors = [
        float(step % 90 < 20) + float(torch.randint(8, (), generator=seeded(seed * 1000 + step))) for step in range(300)
    ]
    steps_of_restarts, lifetimes, so_far = [], [], torch.empty(0)
    for step, error in enumerate(errors):
        so_far = torch.cat([so_far, torch.tensor([error])])
        if stagnates(so_far, 7):
            steps_of_restarts.append(step)
            lifetimes.append(len(so_far) - 7 - 1)
            so_far = torch.empty(0)
    assert (steps_of_restarts, lifetimes) == restarts(errors, 7)
    assert len(steps_of_restarts) > 3
    assert [patience(100, 10), patience(101, 10), patience(100, 100)] == [50, 200, 100]


def test_ld_begins_a_fresh_network_with_a_fresh_optimizer(real: RealImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtt_fast.baselines.ld.patience", lambda images, classes: 2)
    learning = ld(LdOptions(dataset="digits", batch_real=16, inner_batch_size=4, seed=5), real, NET)
    theta, lengths = learning.carried["theta"], []
    for iteration in range(40):
        learning.step(iteration)
        lengths.append(len(learning.carried["errors"]))
        if lengths[-1] == 0:
            assert theta not in learning.optimizer.state
            assert torch.equal(theta, NET.init(generator_for(5, "ld network", iteration + 1)))  # never one again
    assert lengths.count(0) > 1


def test_ld_trains_by_adam_for_as_many_steps_as_the_last_networks(
    real: RealImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtt_fast.baselines.ld.patience", lambda images, classes: 2)
    learning = ld(LdOptions(dataset="digits", batch_real=16, inner_batch_size=4, seed=5), real, NET)
    lifetimes, steps, function = learning.carried["lifetimes"], 0, plain()
    assert learning.own_training is not None
    assert torch.equal(learning.own_training(seeded()), NET.init(seeded()))
    expected = []
    for iteration in range(60):
        learning.step(iteration)
        steps += 1
        if len(learning.carried["errors"]) == 0:
            expected.append(steps - 2 - 1)
            steps = 0
    assert lifetimes.tolist() == expected
    assert len(set(expected)) > 1
    assert len(expected) > 3
    lifetimes.copy_(
        torch.arange(len(lifetimes)) + 4
    )  # the last three are now different, with a mean that is the middle one
    generator, labels = seeded(7), learning.labels.double()
    theta = NET.init(generator).double().requires_grad_()
    adam = torch.optim.Adam([theta], lr=1e-3)
    for _ in range(int(lifetimes[-2])):
        index = torch.randperm(10, generator=generator)[:4]
        adam.zero_grad()
        (-(labels[index] * function(theta, learning.images[index].double()).log_softmax(1)).sum(1).mean()).backward()
        adam.step()
    trained, start = learning.own_training(seeded(7)).double(), NET.init(seeded(7)).double()
    has_effect = theta.grad.abs() > 1e-6  # type: ignore[union-attr]
    assert_close("own training", (trained - start)[has_effect], (theta.detach() - start)[has_effect], 1e-2)
    assert steps_of_own_training(torch.empty(0), torch.empty(7)) == 7
    assert steps_of_own_training(torch.tensor([9.0, 4.0, 5.0, 5.0]), torch.empty(7)) == 4
