"""Whatever a caller's network does, `unroll` gives the right gradient or says why it cannot."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtt_fast import Augmentation, FlatModule, InputError, SiameseAugment, unroll
from mtt_fast.testing import assert_close, whole_graph
from tests.engine.trial_cases import BATCHES, LABELS, Layer, gradient, gradient_of_module, with_layer


def following_its_mean(images: Tensor, layer: Any) -> Tensor:
    layer.mean.mul_(0.9).add_(0.1 * images.detach().mean() + 1)
    centred: Tensor = images - layer.mean
    return centred


def normalised_over_the_batch(images: Tensor, layer: Any) -> Tensor:
    return images / images.square().mean((0, 2, 3), keepdim=True).sqrt()


def drawing_the_same(images: Tensor, layer: Any) -> Tensor:
    torch.manual_seed(3)
    return images + torch.randn_like(images[:1])


def beside_a_thread_that_draws(images: Tensor, layer: Any) -> Tensor:
    thread = threading.Thread(target=torch.rand, args=(1,))
    thread.start()
    thread.join()
    return images


@pytest.mark.parametrize(
    "layer",
    [
        Layer(lambda images, layer: F.dropout(images, 0.1)),
        Layer(lambda images, layer: images * images.new_empty(len(images), 1, 1, 1).bernoulli_(0.99)),
        Layer(lambda images, layer: images + 1e-6 * torch.randn_like(images)),
        nn.RReLU(),
    ],
    ids=["functional dropout", "stochastic depth", "small noise", "RReLU"],
)
def test_a_network_that_draws_random_numbers_is_refused(layer: nn.Module) -> None:
    with pytest.raises(InputError, match="`net`: expected no random numbers"):
        gradient_of_module(layer)


@pytest.mark.parametrize(
    "layer",
    [
        nn.RReLU().eval(),
        nn.AlphaDropout(0.3).eval(),
        Layer(lambda images, layer: F.dropout(images, 0.0)),
        Layer(drawing_the_same),
        Layer(beside_a_thread_that_draws),
    ],
    ids=["RReLU", "alpha dropout", "no share", "seeds itself", "a thread beside it"],
)
def test_a_random_layer_that_draws_nothing_new_is_taken(layer: nn.Module) -> None:
    assert gradient_of_module(layer).isfinite().all()


@pytest.mark.parametrize(
    "layer",
    [Layer(lambda images, layer: images * random.random()), Layer(lambda images, layer: images / layer.calls)],
    ids=["random numbers of Python", "a count of calls"],
)
def test_a_network_that_changes_from_call_to_call_is_refused(layer: nn.Module) -> None:
    with pytest.raises(InputError, match="`net`: expected the same outputs"):
        gradient_of_module(layer)


@pytest.mark.parametrize(
    "layer", [Layer(following_its_mean), nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 2, 1))],
    ids=["a running mean", "spectral norm"],
)  # fmt: skip
def test_buffers_that_a_layer_writes_keep_their_values(layer: nn.Module) -> None:
    module = with_layer(layer)
    net = FlatModule(module)
    start = net.init()

    def plain(theta: Tensor, images: Tensor) -> Tensor:
        values = dict(zip(net.layout.names, net.layout.split(theta), strict=True))
        return torch.func.functional_call(copy.deepcopy(module), values, (images,))  # type: ignore[no-any-return]

    images = torch.randn(6, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lr = torch.tensor(0.3, dtype=torch.float64)
    expected = whole_graph(plain, start, 1.1 * start, images, LABELS, lr, BATCHES)
    assert_close("images", gradient(net, start), expected.images, 1e-9)


def test_frozen_parameters_stay_what_they_are() -> None:
    module = with_layer(nn.Identity())
    module[1].requires_grad_(False)
    net = FlatModule(module.float())  # its frozen ones follow the others to float64
    start = net.init().double()
    assert net.num_parameters == 64 * 3 + 3
    head, body = module[3:], module[:3].double()

    def plain(theta: Tensor, images: Tensor) -> Tensor:
        return F.linear(body(images).flatten(1), theta[:192].view(3, 64), theta[192:])

    assert torch.equal(start.float(), nn.utils.parameters_to_vector(head.parameters()).float())
    images = torch.randn(6, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lr = torch.tensor(0.3, dtype=torch.float64)
    expected = whole_graph(plain, start, 1.1 * start, images, LABELS, lr, BATCHES)
    assert_close("images", gradient(net, start), expected.images, 1e-9)


def test_a_module_that_is_frozen_as_a_whole_has_all_its_parameters() -> None:
    net = FlatModule(with_layer(nn.Identity()).requires_grad_(False))
    assert net.num_parameters == 2 * 4 * 9 + 4 + 64 * 3 + 3


@pytest.mark.parametrize(
    "options",
    [{}, {"microbatch": 2}, {"memory_budget": "1GiB"}, {"augment": Augmentation(lambda *_: 2, torch.mul)}],
    ids=["whole", "cut", "saved", "augmented"],
)
def test_a_network_that_writes_into_its_images_is_taken(options: dict[str, Any]) -> None:
    actual = gradient_of_module(Layer(lambda images, layer: images.sub_(0.5)), **options)
    expected = gradient_of_module(Layer(lambda images, layer: images - 0.5), **options)
    assert_close("images", actual, expected, 1e-12)


class NormOfHalves(nn.BatchNorm2d):
    """A batch norm over each half of a batch, as large batches are normalised. It takes no batch of another size."""

    def forward(self, input: Tensor) -> Tensor:
        halves = [F.batch_norm(half, None, None, training=True) for half in input.view(2, 2, *input.shape[1:])]
        return torch.cat(halves)


def test_a_network_that_mixes_samples_is_tried_on_a_whole_batch() -> None:
    net = FlatModule(with_layer(NormOfHalves(2)))
    images, batches = torch.randn(6, 2, 6, 6, dtype=torch.float64), torch.tensor([[0, 1, 2, 3], [5, 1, 4, 0]])
    assert unroll(net, net.init(), images, LABELS, 0.3, batches).isfinite().all()


def test_a_network_that_takes_no_sample_alone_may_be_cut_into_others() -> None:
    class Squeezing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3)).squeeze()

    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), Squeezing(), nn.Linear(4, 3)).double()
    net = FlatModule(module)
    start, images = net.init(), torch.randn(6, 2, 6, 6, dtype=torch.float64)
    batches = [torch.tensor([0, 1, 2, 3]), torch.tensor([5, 1])]
    whole, cut = (unroll(net, start, images, LABELS, 0.3, batches, microbatch=size) for size in (None, 2))
    assert_close("path", cut, whole, 1e-12)


@pytest.mark.parametrize(
    "function",
    [
        normalised_over_the_batch,
        lambda images, layer: images - images[:1],
        lambda images, layer: images - images[-1:],
        lambda images, layer: images / len(images),
    ],
    ids=["a norm", "less the first", "less the last", "their number"],
)
def test_samples_that_depend_on_others_are_refused_where_batches_are_cut(function: Any) -> None:
    gradient_of_module(Layer(function))
    with pytest.raises(
        InputError, match="`net`: expected samples that do not depend on each other, since batches are cut"
    ):
        gradient_of_module(Layer(function), microbatch=2)


@pytest.mark.parametrize("pixel", [0, 1])
def test_samples_that_depend_on_those_of_their_group_are_refused_where_batches_are_cut(pixel: int) -> None:
    """Check a mean over the samples of a group, which copies of a sample hide, where no two of the trial are of one group."""

    def mean_of_group(images: Tensor, layer: Any) -> Tensor:
        groups = images[:, 0, 0, pixel]
        same = (groups[:, None] == groups).to(images.dtype)
        return torch.einsum("gs,schw->gchw", same / same.sum(1, keepdim=True), images)

    net, images = FlatModule(with_layer(Layer(mean_of_group))), torch.randn(6, 2, 6, 6, dtype=torch.float64)
    images[:, 0, 0, pixel] = torch.tensor([0, 1, 2, 3, 0, 1])
    steps: dict[str, Any] = {"labels": LABELS, "lr": 0.3, "batches": [torch.arange(4), torch.arange(6)]}
    assert unroll(net, net.init(), images, **steps).isfinite().all()
    with pytest.raises(InputError, match="`net`: expected samples that do not depend on each other"):
        unroll(net, net.init(), images, microbatch=2, **steps)


@pytest.mark.parametrize("microbatch", [None, 2])
def test_samples_may_be_matrices_that_no_mixture_is(microbatch: int | None) -> None:
    """Check that a trial takes no mixture of two samples for a sample where the network fails with it."""
    layer = Layer(lambda images, layer: torch.linalg.cholesky(images))
    matrices = torch.randn(6, 2, 6, 6, dtype=torch.float64)
    matrices = matrices @ matrices.mT + torch.arange(1, 7)[:, None, None, None] * torch.eye(6)
    net = FlatModule(with_layer(layer))
    path = unroll(net, net.init(), matrices, LABELS, 0.3, BATCHES, microbatch=microbatch)
    assert_close("path", path, unroll(net, net.init(), matrices, LABELS, 0.3, BATCHES), 1e-12)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda images, layer: images.transpose(0, 1).flatten(0, 1), r"\(4, 6, 6\)"),
        (lambda images, layer: images.mean(), r"\(\)"),
    ],
    ids=["several rows for each", "a number"],
)
def test_outputs_without_a_row_for_each_sample_are_refused_where_batches_are_cut(function: Any, shape: str) -> None:
    net = FlatModule(nn.Sequential(nn.Conv2d(2, 2, 1), Layer(function)).double())
    loss = {"loss": lambda outputs, labels: outputs.square().mean()}
    assert gradient(net, net.init(), **loss).isfinite().all()
    with pytest.raises(
        InputError, match=rf"`net`: .* a row for each sample, since batches are cut, found shape {shape} of 2"
    ):
        gradient(net, net.init(), **loss, microbatch=2)


def test_a_decision_for_a_whole_batch_is_found_though_most_samples_agree() -> None:
    layer = Layer(lambda images, layer: images if images.sum() > 0 else -images)
    net, images = FlatModule(with_layer(layer)), torch.rand(8, 2, 6, 6, dtype=torch.float64)
    images[5] -= 2
    options: dict[str, Any] = {"labels": torch.arange(8) % 3, "lr": 0.3, "batches": [torch.arange(8)]}
    assert unroll(net, net.init(), images, **options).isfinite().all()
    with pytest.raises(InputError, match="`net`: expected samples that do not depend on each other"):
        unroll(net, net.init(), images, microbatch=2, **options)


def test_a_network_of_several_outputs_is_refused() -> None:
    class Both:
        num_parameters, mixes_samples = 3, False

        def __call__(self, theta: Tensor, images: Tensor) -> Any:
            return images.mean((1, 2, 3))[:, None] * theta, theta

    with pytest.raises(InputError, match="`net`: expected a tensor as its result, found tuple"):
        unroll(cast(Any, Both()), torch.ones(3), torch.randn(6, 2, 6, 6), LABELS, 0.3, BATCHES)


@pytest.mark.parametrize("shape", [(1, 3), (3, 1, 1)])
def test_outputs_that_are_no_logits_need_a_loss(shape: tuple[int, ...]) -> None:
    net = FlatModule(nn.Sequential(with_layer(nn.Identity()), nn.Unflatten(1, shape)))
    with pytest.raises(InputError, match=r"`net`: expected logits \(b, classes\), found shape .* give a `loss`"):
        gradient(net, net.init())


def test_a_network_that_cuts_the_gradient_to_the_images_off_is_refused() -> None:
    """Check what would give images without a gradient: features that are computed under no_grad."""
    net = FlatModule(with_layer(Layer(lambda images, layer: images.detach())))
    with pytest.raises(InputError, match="depends on the images, found no gradient; leave out what cuts it off"):
        gradient(net, net.init())
    with torch.no_grad():  # a training of which no gradient is asked for
        unroll(net, net.init(), torch.zeros(6, 2, 6, 6, requires_grad=True), LABELS, 0.3, BATCHES)


@pytest.mark.parametrize("first", ["1GiB", None])
def test_a_layer_may_keep_what_it_computed_first(first: str | None) -> None:
    """Check that the memory count, on tensors without data, shares no layers with the steps."""

    def positions(images: Tensor, layer: Any) -> Tensor:
        if not hasattr(layer, "positions"):
            layer.positions = torch.arange(6, dtype=images.dtype, device=images.device)
        return images.add(layer.positions)

    net = FlatModule(with_layer(Layer(positions)))
    assert torch.equal(*(gradient(net, net.init(), memory_budget=budget) for budget in (first, "1GiB")))


class Clipped(torch.autograd.Function):
    """The identity, with a backward pass that clips the gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-10, 10)


def with_hook(images: Tensor, hook: Callable[[Tensor], Tensor]) -> Tensor:
    result = images.sin()
    if result.requires_grad:
        result.register_hook(hook)
    return result


@pytest.mark.parametrize(
    "function",
    [
        lambda images, layer: Clipped.apply(images),
        lambda images, layer: with_hook(images, lambda gradient: gradient.clamp(-10, 10)),
        lambda images, layer: with_hook(images, F.normalize),
    ],
    ids=["a function", "a hook", "a norm of one"],
)
@pytest.mark.parametrize("place", ["of the images", "of the outputs"])
def test_a_network_that_clips_its_gradient_is_refused(function: Any, place: str) -> None:
    """Check what would clip other gradients in pieces of a batch, and in the backward sweep, whose gradients have another scale."""
    layers = [Layer(function), with_layer(nn.Identity())]
    net = FlatModule(nn.Sequential(*(layers if place == "of the images" else layers[::-1])).double())
    with pytest.raises(InputError, match="`net`, `loss`: expected a backward pass that is linear in the gradient"):
        gradient(net, net.init())


@pytest.mark.parametrize("microbatch", [None, 2])
def test_a_network_that_scales_its_gradient_is_taken(microbatch: int | None) -> None:
    """Check a gradient reversal."""
    layer = Layer(lambda images, layer: with_hook(images, lambda gradient: -0.5 * gradient))
    net = FlatModule(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), with_layer(layer)).double())
    start, lr = net.init(), torch.tensor(0.3, dtype=torch.float64)
    images = torch.randn(6, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = whole_graph(net, start, 1.1 * start, images, LABELS, lr, BATCHES)
    assert_close("images", gradient(net, start, microbatch=microbatch), expected.images, 1e-12)


class LearnedWarp:
    """A brightness that is learned, as a warp."""

    def __init__(self, strength: Tensor) -> None:
        self.strength, self.warp = strength, SiameseAugment("brightness")

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Any:
        return self.warp.draw(images, generator)

    def __call__(self, images: Tensor, draws: Any) -> Tensor:
        return self.warp(images, draws)

    def warp_parameters(self, draws: Any, shape: torch.Size) -> Tensor:
        return self.strength * self.warp.warp_parameters(draws, shape)


@pytest.mark.parametrize("reader", ["net", "loss", "augment", "warp"])
def test_a_learned_number_besides_the_arguments_is_refused(reader: str) -> None:
    """Check what would leave a temperature, a module's own tensor or an augmentation's strength without a gradient."""
    learned = torch.zeros((), dtype=torch.float64, requires_grad=True).exp()
    layer = Layer(lambda images, layer: images * learned) if reader == "net" else nn.Identity()
    net, options = FlatModule(with_layer(layer)), dict[str, Any]()
    if reader == "loss":
        options["loss"] = lambda logits, labels: F.cross_entropy(logits / learned, labels)
    if reader == "augment":
        options["augment"] = Augmentation(lambda images, generator: None, lambda images, _: images * learned)
    if reader == "warp":
        options["augment"] = LearnedWarp(learned)
    name = "augment" if reader == "warp" else reader
    with pytest.raises(InputError, match=f"`{name}`: expected no tensor that requires a gradient besides its argu"):
        gradient(net, net.init(), **options)
    with torch.no_grad():  # a training of which no gradient is asked for
        unroll(net, net.init(), torch.zeros(6, 2, 6, 6).double(), LABELS, 0.3, BATCHES, **options)
