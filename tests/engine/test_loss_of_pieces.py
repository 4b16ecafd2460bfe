"""Test cut batches of losses that look like a mean over samples where they are tried, against whole-graph autograd in float64."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtt_fast import ConvNet, FlatModule, GraphedMatchingLoss, InputError, matching_loss, plan, unroll
from mtt_fast.engine.students.live_bytes import CountLiveBytes
from mtt_fast.networks.protocol import Network
from mtt_fast.testing import assert_close

Loss = Callable[[Tensor, Tensor], Tensor]
CLASSES = torch.arange(12) % 4
BATCHES = [torch.arange(6), torch.arange(6, 12), torch.tensor([1, 3, 5, 7, 11])]
ONE, SAME = torch.tensor([2]), torch.tensor([2, 2, 2])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp() -> FlatModule:
    torch.manual_seed(0)
    return FlatModule(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double())


def of_pixels() -> FlatModule:
    torch.manual_seed(0)
    return FlatModule(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 1)).double())


def by_autograd(
    net: Network, start: Tensor, images: Tensor, labels: Tensor, lr: float, batches: list[Tensor], loss: Loss
) -> Tensor:
    """Return the gradient of the images with the graphs of all steps."""
    images, theta = images.clone().requires_grad_(), start.clone().requires_grad_()
    for index in batches:
        (gradient,) = torch.autograd.grad(loss(net(theta, images[index]), labels[index]), theta, create_graph=True)
        theta = theta - lr * gradient
    (found,) = torch.autograd.grad(matching_loss(theta[None][-1], start, 1.1 * start), images)
    return found


def spread(logits: Tensor, labels: Tensor) -> Tensor:
    """Add the variance of the outputs, which is zero for one sample and for equal ones."""
    return F.cross_entropy(logits, labels) + (logits - logits.mean(0)).square().mean()


def little_spread(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels) + 1e-4 * (logits - logits.mean(0)).square().mean()


def hard_examples(logits: Tensor, labels: Tensor) -> Tensor:
    """Leave out the samples that are learned, of which there is none at first."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    hard = losses > 0.9
    return losses[hard].mean() if hard.any() else 0 * losses.sum()


def of_known(outputs: Tensor, targets: Tensor) -> Tensor:
    known = ~targets.isnan()
    return (outputs - targets.nan_to_num())[known].square().mean()


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    """Weigh the samples by the last number of their targets."""
    distances, weights = (outputs - targets[:, :4]).square().sum(1), targets[:, 4]
    return (distances * weights).sum() / weights.sum()


def of_waves(outputs: Tensor, waves: Tensor) -> Tensor:
    """Weigh the samples by the imaginary part of their targets."""
    return ((outputs - waves.real).square().sum(1) * waves.imag[:, 0]).sum() / waves.imag[:, 0].sum()


def of_two_views(outputs: Tensor, labels: Tensor) -> Tensor:
    """Take two views of each picture, next to each other."""
    one, other = F.normalize(outputs).view(-1, 2, 4).unbind(1)
    return F.cross_entropy(one @ other.T / 0.1, torch.arange(len(one)))


def of_all_pairs(outputs: Tensor, labels: Tensor) -> Tensor:
    pairs = 1 / (len(outputs) * (len(outputs) - 1))
    return F.cross_entropy(outputs, labels) + pairs * (outputs[:, None] - outputs).square().sum()


def by_counts(outputs: Tensor, labels: Tensor) -> Tensor:
    """Weigh each sample by one over the number of samples of its class in the batch."""
    weights = 1 / labels.bincount()[labels].double()
    return (weights * F.cross_entropy(outputs, labels % 4, reduction="none")).sum() / weights.sum()


def of_a_class(outputs: Tensor, labels: Tensor) -> Tensor:
    """Pull the samples of a class together."""
    pairs = (labels[:, None] == labels).triu(1)
    return outputs.square().mean() + ((outputs[:, None] - outputs).square().sum(2) * pairs).sum() / len(labels)


def of_near_pairs(outputs: Tensor, labels: Tensor) -> Tensor:
    """Push samples apart that are nearer than a margin."""
    distances = ((outputs[:, None] - outputs).square().sum(2) + 1e-9).sqrt()
    return (0.1 - distances).relu().square().triu(1).sum()


def of_hardest(outputs: Tensor, labels: Tensor) -> Tensor:
    """Leave the easiest samples of a batch of more than eight out."""
    losses = F.cross_entropy(outputs, labels, reduction="none")
    return losses.topk(min(8, len(losses))).values.mean()


MISSING = draw(12, 4, seed=1)
MISSING[8:, :2] = torch.nan
WEIGHTS = torch.cat([draw(12, 4, seed=1), torch.ones(12, 1).double()], 1)
WEIGHTS[8:, 4] = 3
MAPS = 3 * torch.randint(2, (12, 5, 5), generator=torch.Generator().manual_seed(0))
MAPS[9] = 2
# one class has two samples; no trial takes both, and no piece
FEW = torch.tensor([1, 0, 2, 3, 4, 5, 6, 0, *range(7, 15)])
NEAR = draw(16, 6)
NEAR[7] = NEAR[1] + 0.05  # no trial takes both, and no piece
ROWS, PIXELS = draw(12, 6), draw(12, 1, 5, 5)
CASES: dict[str, tuple[Callable[[], FlatModule], Tensor, Tensor, Loss, list[Tensor]]] = {
    "a first batch of one": (mlp, ROWS, CLASSES, spread, [ONE, *BATCHES]),
    "a first batch of equal samples": (mlp, ROWS, CLASSES, spread, [SAME, *BATCHES]),
    "a small term": (mlp, ROWS, CLASSES, little_spread, BATCHES),
    "learned samples are left out": (mlp, ROWS, CLASSES, hard_examples, 4 * BATCHES),
    "missing numbers in a later batch": (mlp, ROWS, MISSING, of_known, BATCHES),
    "other weights in a later batch": (mlp, ROWS, WEIGHTS, weighted, BATCHES),
    "complex targets": (mlp, ROWS, torch.complex(draw(12, 4), WEIGHTS[:, 4:].expand(12, 4)), of_waves, BATCHES),
    "a class of maps": (of_pixels, PIXELS, MAPS, nn.CrossEntropyLoss(weight=torch.tensor([1, 1, 5, 1.0]).double()), BATCHES),
    "views of more classes than a batch": (mlp, ROWS, torch.arange(12) % 9, of_two_views, BATCHES[:2]),
    "counts of classes": (mlp, draw(16, 6), FEW, by_counts, 2 * [torch.arange(12)]),
    "pairs of a class": (mlp, draw(16, 6), FEW, of_a_class, 2 * [torch.arange(12)]),
    "the hardest of a batch": (mlp, ROWS, CLASSES, of_hardest, [torch.arange(12), *BATCHES]),
    "near pairs": (mlp, NEAR, torch.arange(16), of_near_pairs, 2 * [torch.arange(12)]),
    "a division by zero": (mlp, ROWS, CLASSES, of_all_pairs, BATCHES),
    "no labels": (mlp, ROWS, torch.zeros(12, 0, dtype=torch.long), lambda outputs, _: outputs.square().sum(), BATCHES),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_cut_batches_are_exact(name: str) -> None:
    make, images, labels, loss, batches = CASES[name]
    net = make()
    start, leaf = net.init(), images.clone().requires_grad_()
    path = unroll(net, start, leaf, labels, 0.7, batches, loss=loss, microbatch=2)
    (found,) = torch.autograd.grad(matching_loss(path[-1], start, 1.1 * start), leaf)
    assert_close("images", found, by_autograd(net, start, images, labels, 0.7, batches, loss), 1e-9)


def test_outputs_may_all_be_equal_at_first() -> None:
    """Check the gradient of the start, in which a loss of differences has a second derivative even where they are zero."""
    torch.manual_seed(0)
    head = nn.Linear(8, 4)
    nn.init.zeros_(head.weight)
    net = FlatModule(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), head).double())

    def gradient(microbatch: int | None) -> Tensor:
        """Return that of a step in pieces of this size, at the start."""
        start = net.init().requires_grad_()
        path = unroll(net, start, ROWS, CLASSES, 0.7, BATCHES[:1], loss=spread, microbatch=microbatch)
        return torch.autograd.grad((path[-1] - 1).square().sum(), start)[0]

    assert_close("start", gradient(2), gradient(None), 1e-9)


def of_one_temperature(outputs: Tensor, targets: Tensor) -> Tensor:
    """Divide by the mean of the last numbers of the targets."""
    return F.cross_entropy(outputs / targets[:, 4].mean(), targets[:, :4].softmax(1))


@pytest.mark.parametrize("loss", [weighted, of_one_temperature])
def test_learned_numbers_may_be_equal_at_first(loss: Loss) -> None:
    """Check the gradient of targets of which the loss takes a mean, and whose equal numbers hide that."""
    net, targets = mlp(), torch.cat([draw(12, 4, seed=1), torch.ones(12, 1).double()], 1).requires_grad_()

    def gradient(size: int | None) -> Tensor:
        path = unroll(net, net.init(), ROWS, targets, 0.7, BATCHES, loss=loss, microbatch=size)
        return torch.autograd.grad(path[-1].square().sum(), targets)[0]

    assert_close("targets", gradient(2), gradient(None), 1e-9)


@pytest.mark.parametrize("options", [{"microbatch": 2}, {"memory_budget": "1GiB"}], ids=str)
def test_a_loss_without_a_gradient_of_its_labels_may_train(options: dict[str, Any]) -> None:
    def of_constants(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, torch.from_numpy(labels.numpy()))  # fails on labels that require a gradient

    net, labels = mlp(), draw(12, 4, seed=1).softmax(1)
    with torch.no_grad():
        path = unroll(net, net.init(), ROWS, labels, 0.7, BATCHES, loss=of_constants, **options)
    assert_close("path", path, unroll(net, net.init(), ROWS, labels, 0.7, BATCHES).detach(), 1e-12)


def test_complex_outputs_are_cut_only_for_a_mean() -> None:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 8)

        def forward(self, rows: Tensor) -> Tensor:
            return torch.view_as_complex(self.layer(rows).view(-1, 4, 2))

    net = FlatModule(Waves().double())

    def of_amplitudes(waves: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(waves.abs(), labels)

    whole, cut, planned = [
        unroll(net, net.init(), ROWS, CLASSES, 0.1, BATCHES, loss=of_amplitudes, **options)
        for options in ({}, {"microbatch": 2}, {"memory_budget": "1GiB"})
    ]
    assert_close("in pieces", cut, whole, 1e-12)
    assert_close("saved", planned, whole, 1e-12)
    with pytest.raises(
        InputError, match=r"`net`: expected real outputs where batches are cut .* found torch.complex128"
    ):
        unroll(net, net.init(), ROWS, CLASSES, 0.1, BATCHES, loss=lambda z, _: (z @ z.mH).abs().sum(), microbatch=2)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(label_smoothing=0.1), lambda outputs, labels: F.cross_entropy(outputs / 0.01, labels)]
)
def test_a_mean_is_taken_for_one(loss: Loss, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that rounding in float32 does not cost the fused step."""
    monkeypatch.setattr(
        "mtt_fast.engine.unroll.plan_of_batch_loss", lambda *_: pytest.fail("a mean was not taken for one")
    )
    net, images = ConvNet(1, 4, 16, 32, 2), draw(12, 1, 16, 16).float()
    unroll(net, net.init(), images, CLASSES, 0.1, 4 * BATCHES, loss=loss, microbatch=size)


@pytest.mark.parametrize("name", ["other weights in a later batch", "a class of maps"])
def test_a_trial_sees_all_labels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the trial alone, since a captured iteration gets other batches later."""
    monkeypatch.setattr("mtt_fast.engine.mean_loss.WatchedLoss", lambda *_: pytest.fail("the trial took it for a mean"))
    test_cut_batches_are_exact(name)


def test_a_graphed_loss_is_exact() -> None:
    net, batches = mlp(), 4 * BATCHES
    start, leaf = net.init(), ROWS.clone().requires_grad_()
    graphed = GraphedMatchingLoss(net, loss=hard_examples, microbatch=2)
    (found,) = torch.autograd.grad(graphed(start, 1.1 * start, leaf, CLASSES, 0.7, batches), leaf)
    assert_close("rows", found, by_autograd(net, start, ROWS, CLASSES, 0.7, batches, hard_examples), 1e-9)


def test_a_graphed_loss_is_exact_where_samples_are_learned_only_later() -> None:
    def hardest(logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, labels, reduction="none")
        return losses[losses > 0.3].mean()

    net, leaf = mlp(), ROWS.clone().requires_grad_()
    new = net.init()
    trained = unroll(net, new, ROWS, CLASSES, 0.7, 8 * BATCHES)[-1]
    graphed = GraphedMatchingLoss(net, loss=hardest, microbatch=2)
    for start in (new, trained, new):
        (found,) = torch.autograd.grad(graphed(start, 1.1 * start, leaf, CLASSES, 0.1, BATCHES[:1]), leaf)
        assert_close("rows", found, by_autograd(net, start, ROWS, CLASSES, 0.1, BATCHES[:1], hardest), 1e-9)


def test_a_graphed_loss_is_freed_at_once() -> None:
    """Check that its graphs, which hold much memory, do not wait for the garbage collector."""
    net = mlp()
    graphed = GraphedMatchingLoss(net, loss=F.cross_entropy, microbatch=2)
    graphed(net.init(), 1.1 * net.init(), ROWS, CLASSES, 0.1, BATCHES[:1])
    gc.collect()  # torch leaves the frames of the trial
    freed = weakref.ref(graphed)
    del graphed
    assert freed() is None


def test_a_callers_capture_of_a_graphed_loss_that_has_to_wait_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp()
    graphed = GraphedMatchingLoss(net, loss=F.cross_entropy, microbatch=2)
    arguments = (net.init(), net.init(torch.Generator().manual_seed(1)), ROWS, CLASSES, 0.1, BATCHES[:1])
    graphed(*arguments)
    monkeypatch.setattr("mtt_fast.engine.graphed_loss.is_capturing", lambda _: True)
    with pytest.raises(InputError, match="`loss`: expected no capture of a CUDA graph"):
        graphed(*arguments)


@pytest.mark.parametrize("images", [ROWS, torch.full_like(ROWS, 0.3)], ids=["images", "equal images"])
@pytest.mark.parametrize("first", [ONE, SAME, BATCHES[0]], ids=["one", "same", "several"])
def test_a_network_that_mixes_samples_is_found(first: Tensor, images: Tensor) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, rows: Tensor) -> Tensor:
            outputs = torch.tanh(self.layer(rows))
            return outputs - outputs.mean(0)

    net = FlatModule(Centred().double())
    with pytest.raises(InputError, match="`net`: expected samples that do not depend on each other"):
        unroll(net, net.init(), images, CLASSES, 0.1, [first, *BATCHES], microbatch=2)


@pytest.mark.parametrize("hidden_by", ["gate", "head"])
def test_a_network_that_mixes_samples_is_found_behind_zeros(hidden_by: str) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gate, self.head = nn.Linear(6, 8), nn.Parameter(torch.ones(())), nn.Linear(8, 4)

        def forward(self, rows: Tensor) -> Tensor:
            features = torch.tanh(self.layer(rows))
            return self.head(features - self.gate * features.mean(0))  # type: ignore[no-any-return]

    module = Centred()
    for parameter in module.head.parameters() if hidden_by == "head" else [module.gate]:
        nn.init.zeros_(parameter)
    net = FlatModule(module)
    for batches in (BATCHES, [ONE, *BATCHES]):
        with pytest.raises(InputError, match="`net`: expected samples that do not depend on each other"):
            unroll(net, net.init(), ROWS.float(), CLASSES, 0.1, batches, loss=spread, microbatch=2)


@pytest.mark.native
def test_the_budget_of_a_plan_holds_for_a_loss_that_is_not_a_mean() -> None:
    """Check a plan for the fused step, in whose place the generic one is taken, which needs more memory for the same pieces."""
    net, images, batches = ConvNet(3, 4, 16, 32, 2), draw(60, 3, 16, 16).float(), torch.arange(60).expand(2, 60)
    steps, start = plan(net, images=images, steps=2, memory_budget="14MiB", loss=spread), net.init()

    def peak(**options: Any) -> int:
        with CountLiveBytes() as counted:
            path = unroll(net, start, images, torch.arange(60) % 4, 0.1, batches, loss=spread, **options)
            path[-1].sum().backward()
        return int(counted.peak)

    images.requires_grad_()
    first = peak(memory_budget="14MiB")  # the memory of steps is counted once, on tensors without data
    assert peak(plan=steps) == peak(memory_budget="14MiB") < first


def test_a_budget_allows_for_the_loss_of_a_whole_batch() -> None:
    """Check a loss whose arguments, a class for each pixel, take more memory than the network."""
    net, images = FlatModule(nn.Conv2d(3, 21, 1)), draw(32, 3, 32, 32).float().requires_grad_()
    labels, loss = torch.arange(32 * 32 * 32).view(32, 32, 32) % 21, nn.CrossEntropyLoss(weight=torch.arange(1.0, 22))
    arguments = (net, net.init(), images, labels, 0.1, torch.arange(32)[None])
    unroll(*arguments, loss=F.cross_entropy, memory_budget="24MiB")  # a mean, whose pieces do not need each other
    with pytest.raises(InputError, match=r"`memory_budget` 24MiB: expected at least 5\d MiB"):
        unroll(*arguments, loss=loss, memory_budget="24MiB")
    with CountLiveBytes() as counted:
        unroll(*arguments, loss=loss, memory_budget="64MiB")[-1].sum().backward()
    assert counted.peak < 64 << 20
