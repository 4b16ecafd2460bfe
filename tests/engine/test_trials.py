"""Whatever a caller's network, loss or augmentation does, `unroll` gives the right gradient or says why it cannot."""

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

from mtt_fast import Augmentation, ConvNet, FlatModule, InputError, SiameseAugment, matching_loss, unroll
from mtt_fast.engine.backward_checks import check_repeated
from mtt_fast.networks.protocol import Network
from mtt_fast.testing import assert_close, whole_graph

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
BATCHES = [torch.tensor([0, 1, 2, 3]), torch.tensor([5, 1, 4])]


class Layer(nn.Module):
    """A layer that is a function of the images and of the layer itself."""

    def __init__(self, function: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.function, self.calls = function, 0
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = self.function(images, self)
        return result


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


def with_layer(layer: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(layer, nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    return module.double()


def gradient(net: Network, start: Tensor, **options: Any) -> Tensor:
    images = torch.randn(6, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    path = unroll(net, start, images, LABELS, 0.3, BATCHES, **options)
    (result,) = torch.autograd.grad(matching_loss(path[-1], start, 1.1 * start), images)
    return result


def gradient_of_module(layer: nn.Module, **options: Any) -> Tensor:
    net = FlatModule(with_layer(layer))
    return gradient(net, net.init(), **options)


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
    for check in ("unroll.try_step", "mean_loss.WatchedLoss.adds_up"):
        monkeypatch.setattr(f"mtt_fast.engine.{check}", lambda *_, **__: True)  # as a mean over the samples
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


@pytest.mark.parametrize(
    "options",
    [{}, {"microbatch": 2}, {"memory_budget": "1GiB"}, {"augment": Augmentation(lambda *_: 2, torch.mul)}],
    ids=["whole", "cut", "saved", "augmented"],
)
def test_a_network_that_writes_into_its_images_is_taken(options: dict[str, Any]) -> None:
    actual = gradient_of_module(Layer(lambda images, layer: images.sub_(0.5)), **options)
    expected = gradient_of_module(Layer(lambda images, layer: images - 0.5), **options)
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
    [normalised_over_the_batch, lambda images, layer: images - images[:1], lambda images, layer: images - images[-1:]],
    ids=["a norm", "less the first", "less the last"],
)
def test_samples_that_depend_on_others_are_refused_where_batches_are_cut(function: Any) -> None:
    gradient_of_module(Layer(function))
    with pytest.raises(
        InputError, match="`net`: expected samples that do not depend on each other, since batches are cut"
    ):
        gradient_of_module(Layer(function), microbatch=2)


def test_a_decision_for_a_whole_batch_is_found_though_most_samples_agree() -> None:
    layer = Layer(lambda images, layer: images if images.sum() > 0 else -images)
    net, images = FlatModule(with_layer(layer)), torch.rand(8, 2, 6, 6, dtype=torch.float64)
    images[5] -= 2
    options: dict[str, Any] = {"labels": torch.arange(8) % 3, "lr": 0.3, "batches": [torch.arange(8)]}
    assert unroll(net, net.init(), images, **options).isfinite().all()
    with pytest.raises(InputError, match="`net`: expected samples that do not depend on each other"):
        unroll(net, net.init(), images, microbatch=2, **options)


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


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(reduction="none"), r"`loss`: .* found torch\.float64 of shape \(2,\)"),
        (lambda logits, labels: F.cross_entropy(logits, labels).item(), "`loss`: .* found float"),
        ("cross_entropy", "`loss`: expected a function of logits and labels, found 'cross_entropy'"),
        (nn.CrossEntropyLoss, "`loss`: expected a function, found the class CrossEntropyLoss; call it to make one"),
        (
            lambda logits, labels: F.cross_entropy(logits, labels).detach(),
            "depends on the parameters, found none of their gradients",
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
    with pytest.raises(InputError, match="depends on the parameters, found none of their gradients"):
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


def test_a_network_that_cuts_the_gradient_to_the_images_off_is_refused() -> None:
    """Check what would give images without a gradient: features that are computed under no_grad."""
    net = FlatModule(with_layer(Layer(lambda images, layer: images.detach())))
    with pytest.raises(InputError, match="depends on the images, found none of their gradients; `net` or `loss` cuts"):
        gradient(net, net.init())
    with torch.no_grad():  # a training of which no gradient is asked for
        unroll(net, net.init(), torch.zeros(6, 2, 6, 6, requires_grad=True), LABELS, 0.3, BATCHES)


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


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("entry", ["a tensor", "a tuple"])
@pytest.mark.parametrize("source", ["given", "drawn"])
def test_learned_draws_are_refused_in_every_step(step: int, entry: str, source: str) -> None:
    """Check what would leave the strength of an augmentation without a gradient, where only one step's numbers are learned."""
    net, augment = FlatModule(with_layer(nn.Identity())), SiameseAugment("brightness")
    draw = augment.draw if entry == "a tuple" else lambda images: augment.draw_parameters([images])
    draws: list[Any] = [draw(torch.zeros(len(index), 2, 6, 6)) for index in BATCHES]
    (draws[step].numbers[0] if entry == "a tuple" else draws[step]).requires_grad_()

    def options() -> dict[str, Any]:
        if source == "given":
            return {"augment": augment, "draws": draws}
        drawn = iter(draws)
        return {
            "augment": Augmentation(
                lambda *_: {"of a step": next(drawn)}, lambda images, of_step: augment(images, of_step["of a step"])
            )
        }

    with pytest.raises(InputError, match="`draws`: expected no tensor that requires a gradient"):
        gradient(net, net.init(), **options())
    with torch.no_grad():  # a training of which no gradient is asked for
        unroll(net, net.init(), torch.zeros(6, 2, 6, 6).double(), LABELS, 0.3, BATCHES, **options())


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


def noisy(images: Tensor, _: Any) -> Tensor:
    return images + torch.randn_like(images)


@pytest.mark.parametrize("network", ["ConvNet", "FlatModule"])
def test_an_augmentation_that_draws_as_it_applies_is_refused(network: str) -> None:
    net: Any = ConvNet(2, 3, 6, 4, 1) if network == "ConvNet" else FlatModule(with_layer(nn.Identity()))
    start = net.init().double()
    with pytest.raises(InputError, match=r"same images for the same draws, .* take all random numbers in its draw"):
        gradient(net, start, augment=Augmentation(lambda images, generator: None, noisy))

    def hardly_noisy(images: Tensor, _: Any) -> Tensor:
        return images + torch.randn_like(images) / 255

    augment, images = Augmentation(lambda images, generator: None, hardly_noisy), torch.randn(6, 2, 6, 6)
    with pytest.raises(InputError, match="same images for the same draws, found random numbers"):
        unroll(net, net.init(), images, LABELS, 0.1, BATCHES, augment=augment)

    def seeded(images: Tensor, seed: int) -> Tensor:  # as the public code's DiffAugment
        torch.manual_seed(seed)
        return noisy(images, None)

    assert gradient(net, start, augment=Augmentation(lambda images, generator: 3, seeded)).isfinite().all()


def test_a_student_that_has_diverged_is_not_taken_for_one_that_changes() -> None:
    net = FlatModule(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    start = torch.full((net.num_parameters,), torch.nan)
    path = unroll(net, start, torch.randn(6, 3, 2, 2), LABELS, 0.1, BATCHES, microbatch=2)
    assert path.isnan().all()


class Changing:
    """A network, a loss and an augmentation that read an attribute, which may change after the call."""

    mixes_samples = False

    def __init__(self) -> None:
        self.net, self.factor = FlatModule(with_layer(nn.Identity())), 1.0
        self.num_parameters = self.net.num_parameters

    def __call__(self, theta: Tensor, images: Tensor) -> Tensor:
        return self.net(theta, images) * self.factor


@pytest.mark.parametrize("options", [{}, {"microbatch": 2}], ids=str)
@pytest.mark.parametrize("part", ["net", "loss", "augment"])
def test_what_changes_before_the_backward_pass_is_refused(part: str, options: dict[str, Any]) -> None:
    """Sum the losses of several calls, one for each factor, as of several experts: each call's steps are computed again at the last one."""
    changing, images = Changing(), torch.randn(6, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    loss = (lambda logits, labels: F.cross_entropy(logits * changing.factor, labels)) if part == "loss" else None
    augment = Augmentation(lambda *_: None, lambda rows, _: rows * changing.factor) if part == "augment" else None
    net: Any = changing if part == "net" else ConvNet(2, 3, 6, 4, 1)
    start = changing.net.init() if part == "net" else net.init(torch.Generator().manual_seed(0)).double()

    def end(factor: float) -> Tensor:
        changing.factor = factor
        path: Tensor = unroll(net, start, images, LABELS, 0.3, BATCHES, loss=loss, augment=augment, **options)
        return path[-1].sum()

    end(1.0).backward()
    (end(1.0) + end(1.0)).backward()
    with pytest.raises(InputError, match="expected in the backward pass the network, loss, augmentation and path"):
        (end(1.0) + end(1.5)).backward()


def test_an_augmentation_that_is_another_where_images_are_learned_is_refused() -> None:
    augment = Augmentation(lambda *_: None, lambda rows, _: 1.5 * rows if rows.requires_grad else rows)
    for net in (ConvNet(2, 3, 6, 4, 1), FlatModule(with_layer(nn.Identity()))):
        start = net.init(torch.Generator().manual_seed(0)).double()
        with pytest.raises(InputError, match="in the backward pass"):
            gradient(net, start, augment=augment)


def test_an_augmentation_may_write_into_its_images() -> None:
    def cut_out(images: Tensor, rows: int) -> Tensor:
        images[:, :, :rows] = 0
        return images

    images = torch.randn(6, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    net = ConvNet(2, 3, 6, 4, 1)
    start = net.init(torch.Generator().manual_seed(0)).double()

    def gradient(apply: Callable[[Tensor, Any], Tensor]) -> Tensor:
        path = unroll(net, start, images, LABELS, 0.3, BATCHES, augment=Augmentation(lambda *_: 2, apply))
        return torch.autograd.grad(path[-1].square().sum(), images)[0]

    def masked(images: Tensor, rows: int) -> Tensor:
        return images * (torch.arange(6) >= rows)[:, None]

    assert_close("images", gradient(cut_out), gradient(masked), 1e-12)


@pytest.mark.parametrize("result", [lambda images: images.repeat(2, 1, 1, 1), torch.mean, lambda _: None])
def test_an_augmentation_of_another_number_of_images_is_refused(result: Callable[[Tensor], Any]) -> None:
    class Other:
        def draw(self, images: Tensor, generator: torch.Generator | None, /) -> None:
            pass

        def __call__(self, images: Tensor, draws: None) -> Tensor:
            return cast(Tensor, result(images))

    net = ConvNet(2, 3, 6, 4, 1)
    with pytest.raises(InputError, match="`augment`: expected one image for each of the 4 of a step, found "):
        unroll(net, net.init(), torch.randn(6, 2, 6, 6), LABELS, 0.3, BATCHES, augment=Other())


class Dropping:
    """An augmentation whose second step leaves the images out."""

    def draw(self, images: Tensor, generator: torch.Generator | None, /) -> bool:
        return len(images) == 2

    def __call__(self, images: Tensor, draws: bool) -> Tensor:
        return torch.zeros_like(images) if draws else 2 * images


@pytest.mark.parametrize("microbatch", [None, 1])
def test_an_augmentation_that_cuts_the_gradient_off_is_refused(microbatch: int | None) -> None:
    net, images = ConvNet(2, 3, 6, 4, 1), torch.randn(6, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    start = net.init(torch.Generator().manual_seed(0)).double()
    batches = [torch.tensor([0, 1, 2]), torch.tensor([3, 4])]
    path = unroll(net, start, images, LABELS, 0.3, batches, augment=Dropping(), microbatch=microbatch)
    with pytest.raises(
        InputError, match=r"`augment`: expected a differentiable .* cuts the gradient off; .* multiply them by zero"
    ):
        path[-1].sum().backward()


def test_attention_in_half_precision_is_not_taken_for_a_change() -> None:
    """Take other kernels in the two sweeps: a second derivative has only that of attention by its definition."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pieces, self.scores, self.logits = nn.Conv2d(2, 8, 1), nn.Linear(8, 24), nn.Linear(8, 3)

        def forward(self, images: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                query, key, value = self.scores(self.pieces(images).flatten(2).mT)[:, None].chunk(3, -1)
                logits: Tensor = self.logits(F.scaled_dot_product_attention(8 * query, key, value)[:, 0].mean(1))
                return logits

    torch.manual_seed(0)
    net, images = FlatModule(Attention()), (4 * torch.randn(6, 2, 6, 6)).requires_grad_()
    path = unroll(net, 2 * net.init(), images, LABELS, 0.1, BATCHES)
    matching_loss(path[-1], net.init(), 1.1 * net.init()).backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


def test_a_row_that_is_trained_further_before_the_backward_pass_is_noticed() -> None:
    """Write into a row by the parameters of a module, which torch does not notice."""
    module = with_layer(nn.Identity())
    net, images = FlatModule(module), torch.randn(6, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    path = unroll(net, net.init(), images, LABELS, 0.3, BATCHES)
    nn.utils.vector_to_parameters(path[1], module.parameters())
    with torch.no_grad():
        next(module.parameters()).mul_(3)
    with pytest.raises(InputError, match="in the backward pass"):
        path[-1].sum().backward()


def test_sweeps_differ_by_no_more_than_rounding() -> None:
    first = torch.tensor([[0.0], [100.0], [torch.nan], [1.0], [torch.inf]], dtype=torch.float64)
    again = torch.tensor([[0.0009], [100.09], [3.0], [torch.nan], [5.0]], dtype=torch.float64)
    check_repeated(first, again, lambda n: pytest.fail(f"step {n} is repeated"))  # what is not finite is told elsewhere
    for step, now, told in (
        (0, 0.002, "0.002 in place of 0 in step 0;"),
        (1, 100.2, "100.2 in place of 100 in step 1;"),
    ):
        other = again.clone()
        other[step] = now
        with pytest.raises(InputError, match=f"of the call, found {told}"):
            check_repeated(first, other, other.__getitem__)
        one, another = (torch.cat([torch.ones_like(each), each], dim=1) for each in (first, other))
        with pytest.raises(InputError, match=f"of the call, found {told}"):
            check_repeated(one, another, another.__getitem__)  # beside a number that is the same
        check_repeated(first, other, first.__getitem__)  # the forward sweep's operations find the same again
