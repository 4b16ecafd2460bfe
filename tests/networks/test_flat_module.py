from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from mtt_fast import FlatModule, InputError, matching_loss, plan, unroll
from mtt_fast.testing import assert_close, whole_graph


def small_module(norm: nn.Module | None = None) -> nn.Sequential:
    layers = [nn.Conv2d(2, 4, 3), norm or nn.Identity(), nn.GELU(), nn.Flatten(), nn.Linear(4 * 16, 3)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("norm", [None, nn.GroupNorm(2, 4), nn.BatchNorm2d(4)], ids=["none", "group", "batch"])
def test_the_meta_gradient_of_a_third_party_module_is_that_of_autograd(norm: nn.Module | None) -> None:
    module = small_module(norm)
    net = FlatModule(module)
    start = net.init()
    target = start + 0.05 * torch.randn_like(start)
    images = torch.randn(5, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    labels, lr = torch.tensor([0, 1, 2, 0, 1]), torch.tensor(0.3, dtype=torch.float64)
    batches = torch.tensor([[0, 1, 2], [2, 3, 4]])
    matching_loss(unroll(net, start, images, labels, lr, batches)[-1], start, target).backward()

    def plain(theta: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        fresh = copy.deepcopy(module)
        for part in fresh.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.track_running_stats, part.running_mean, part.running_var = False, None, None
                part.num_batches_tracked = None
        values, begin = {}, 0
        for name, value in module.named_parameters():
            values[name] = theta[begin : begin + value.numel()].view_as(value)
            begin += value.numel()
        return torch.func.functional_call(fresh, values, (seen,))  # type: ignore[no-any-return]

    expected = whole_graph(plain, start, target, images, labels, lr, list(batches))
    assert images.grad is not None
    assert_close("images", images.grad, expected.images, 1e-9)


def test_a_module_whose_parameters_are_not_contiguous() -> None:
    module, images = small_module(), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    expected = FlatModule(module).init()
    net = FlatModule(module.to(memory_format=torch.channels_last))  # type: ignore[call-overload]  # torch does not list it
    assert torch.equal(net.init(), expected)  # in the order of the indices, not of the memory
    assert_close("logits", net(net.init(), images), module(images), 1e-12)


def test_parameters_on_two_devices_are_refused() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(InputError, match="expected parameters on one device, found cpu and meta; move the module"):
        FlatModule(module)


def test_wrapping_leaves_the_module_alone() -> None:
    module = small_module(nn.BatchNorm2d(4))
    before = copy.deepcopy(module.state_dict())
    net = FlatModule(module)
    net(net.init(), torch.randn(3, 2, 6, 6, dtype=torch.float64))
    net.init().zero_()  # whose own it is
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(net.init(), nn.utils.parameters_to_vector(module.parameters()))
    assert net.describe() == {"kind": "Sequential"}


def test_the_function_equals_the_module_in_evaluation_mode() -> None:
    module = small_module(nn.BatchNorm2d(4)).eval()
    net, images = FlatModule(module), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    assert torch.equal(net(net.init(), images), module(images))
    assert not net.mixes_samples


def test_buffers_follow_the_parameters_where_images_are_numbers_of_tokens() -> None:
    module = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 2)).eval()
    net, tokens = FlatModule(module), torch.tensor([[0, 6], [2, 1]])
    assert_close("logits", net(net.init().double(), tokens), module.double()(tokens), 1e-6)


class Reordered(nn.Module):
    """A module of two results, by an order that it keeps in a buffer."""

    order: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(2, 2)
        self.register_buffer("order", torch.tensor([1, 0]))

    def forward(self, rows: torch.Tensor) -> Any:
        return self.last(rows[:, self.order]), rows


class First(nn.Module):
    """A module that returns the first of several results."""

    def forward(self, results: Any) -> Any:
        return results[0]


def test_buffers_of_whole_numbers_stay_so() -> None:
    rows = torch.randn(3, 2)
    net = FlatModule(nn.Sequential(Reordered(), First()))
    weight, bias = net.init()[:4].view(2, 2), net.init()[4:]
    torch.testing.assert_close(net(net.init(), rows), rows.flip(1) @ weight.T + bias)


def test_a_module_of_several_results_is_refused() -> None:
    net = FlatModule(Reordered())
    with pytest.raises(InputError, match="FlatModule: expected the module to return logits, found tuple"):
        net(net.init(), torch.randn(3, 2))


def test_batch_statistics_cannot_be_cut() -> None:
    net = FlatModule(small_module(nn.BatchNorm2d(4)))
    assert net.mixes_samples
    assert FlatModule(small_module(nn.BatchNorm2d(4, track_running_stats=False)).eval()).mixes_samples
    images, cut = torch.randn(4, 2, 6, 6), plan(FlatModule(small_module()), images=(4, 2, 6, 6), steps=1, microbatch=2)
    given: Any = (net, net.init(), images, torch.zeros(4, dtype=torch.long), torch.tensor(0.1), [torch.arange(4)])
    for limit in ({"microbatch": 2}, {"plan": cut}):  # a plan may have been made for another network
        limits: Any = limit
        with pytest.raises(InputError, match="batch norm uses batch statistics"):
            unroll(*given, **limits)


def test_torch_func_takes_several_parameters_of_a_module_with_batch_statistics() -> None:
    net, images = FlatModule(small_module(nn.BatchNorm2d(4))), torch.randn(4, 2, 6, 6, dtype=torch.float64)
    thetas = torch.stack([net.init(), 1.1 * net.init()])
    for function in (net, net.embed):
        expected = torch.stack([function(theta, images) for theta in thetas])
        actual = torch.func.vmap(lambda theta, function=function: function(theta, images))(thetas)
        assert_close("outputs", actual, expected, 1e-12)


def test_running_statistics_are_constants() -> None:
    net, images = FlatModule(small_module(nn.BatchNorm2d(4))), torch.randn(4, 2, 6, 6, dtype=torch.float64)
    assert net.statistics is not None
    before = net.statistics.clone()
    after = net.track(net.init().requires_grad_(), images, net.statistics)
    assert not after.requires_grad
    assert torch.equal(net.statistics, before)
    assert not torch.equal(after, before)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None), nn.InstanceNorm2d(4, track_running_stats=True)],
    ids=["batch", "averages over all batches", "instance"],
)  # fmt: skip
def test_an_evaluation_takes_the_running_statistics_of_a_training_in_torch(norm: nn.Module) -> None:
    module = small_module(norm)
    net, statistics = FlatModule(module), FlatModule(module).statistics
    assert statistics is not None
    for images in torch.randn(3, 4, 2, 6, 6, dtype=torch.float64):
        module(images)
        statistics = net.track(net.init(), images, statistics)
    assert torch.equal(net.evaluated(statistics)(net.init(), images), module.eval()(images))


def test_active_dropout_is_refused() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 2))
    with pytest.raises(InputError, match="layer 1 draws random numbers"):
        FlatModule(module)
    FlatModule(module.eval())


@pytest.mark.parametrize(
    "layer",
    [nn.MultiheadAttention(4, 2, dropout=0.1), nn.LSTM(4, 4, num_layers=2, dropout=0.1)],
    ids=["attention", "lstm"],
)
def test_dropout_inside_a_layer_is_refused_too(layer: nn.Module) -> None:
    for module, name in ((nn.Sequential(layer), "0"), (layer, type(layer).__name__)):
        with pytest.raises(InputError, match=f"layer {name} draws random numbers"):
            FlatModule(module)
    FlatModule(nn.Sequential(layer).eval())
    FlatModule(nn.Sequential(nn.MultiheadAttention(4, 2)))


def compiled(module: nn.Module) -> nn.Module:
    made: Any = torch.compile(module)
    return made  # type: ignore[no-any-return]


def hooked(module: nn.Module) -> nn.Module:
    next(module.parameters()).register_hook(torch.neg)
    return module


def with_learned_buffer(module: nn.Module) -> nn.Module:
    module.register_buffer("edges", torch.eye(2, requires_grad=True))
    return module


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (compiled(nn.Linear(2, 2)), "the module is compiled, .* wrap it before torch.compile"),
        (nn.Sequential(compiled(nn.Linear(2, 2))), "layer 0 is compiled"),
        (nn.DataParallel(nn.Linear(2, 2)), "the module is DataParallel, .* wrap its .module"),
        (torch.jit.script(nn.Linear(2, 2)), "the module is compiled by torch.jit"),
        (nn.Sequential(nn.LazyLinear(2)), ".* lazy layer before its first call; call the module once"),
        (
            nn.Linear(2, 2, dtype=torch.complex64),
            "expected real parameters, found weight complex; .* torch.view_as_complex",
        ),
        (nn.EmbeddingBag(5, 2), r"the module is nn\.EmbeddingBag, .* use nn\.Embedding, and \.mean"),
        (
            nn.Sequential(nn.Embedding(5, 2, sparse=True)),
            r"layer 0 is nn\.Embedding\(sparse=True\), .* use sparse=False",
        ),
        (nn.Embedding(5, 2, max_norm=1.0), r"the module is nn\.Embedding\(max_norm=…\), .* leave max_norm out"),
        (nn.Embedding(5, 2, scale_grad_by_freq=True), r".* use scale_grad_by_freq=False"),
        (nn.Flatten(), "expected a module with parameters, found Flatten without any"),
        (hooked(nn.Sequential(nn.Linear(2, 2))), "parameter 0.weight has a hook on its gradient, .* remove it"),
        (
            nn.Sequential(with_learned_buffer(nn.Linear(2, 2))),
            "buffer 0.edges requires a gradient, .* detach it, or make it a parameter",
        ),
        (nn.Linear(2, 2).forward, "expected a torch.nn.Module, found method"),
    ],
)
def test_a_module_that_cannot_be_wrapped_is_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=f"FlatModule: {message}"):
        FlatModule(module)


@pytest.mark.parametrize(
    "embedding",
    [nn.Embedding(7, 4, sparse=True), nn.Embedding(7, 4, max_norm=1.0), nn.EmbeddingBag(7, 4, mode="sum")],
    ids=["sparse", "max_norm", "bag"],
)
def test_a_frozen_embedding_may_be_of_any_kind(embedding: nn.Module) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.linear = embedding.requires_grad_(False), nn.Linear(4, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            embedded = self.embedding(tokens.long())
            logits: torch.Tensor = self.linear(embedded if embedded.dim() == 2 else embedded.sum(1))
            return logits

    net = FlatModule(Classifier().double())
    labels = torch.full((2, 3), 1 / 3, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[0, 1], [2, 6]], dtype=torch.float64)
    path = unroll(net, net.init(), tokens, labels, 0.1, torch.tensor([[0, 1], [1, 0]]))
    assert torch.autograd.grad(path[-1].square().sum(), labels)[0].abs().sum() > 0


class Permuted(nn.Module):
    """A linear layer whose inputs are permuted, and whose weight is a buffer, too."""

    again: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.order = nn.Parameter(torch.tensor([2, 0, 1]), requires_grad=False)
        self.linear = nn.Linear(3, 3)
        self.register_buffer("again", self.linear.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(images[:, self.order])) @ self.again


@pytest.mark.parametrize("frozen", [False, True])
def test_whole_numbers_are_no_parameters_and_a_buffer_may_be_one(frozen: bool) -> None:
    module, images = Permuted().double(), torch.randn(4, 3, dtype=torch.float64)
    net = FlatModule(module.requires_grad_(False) if frozen else module)
    theta = torch.randn(net.num_parameters, dtype=torch.float64)
    weight, bias = theta[:9].view(3, 3), theta[9:]
    expected = torch.tanh(images[:, [2, 0, 1]] @ weight.T + bias) @ weight
    torch.testing.assert_close(net(theta, images), expected)


def test_a_layer_in_two_places_keeps_no_parameters_and_may_share_them() -> None:
    layer, tied, rows = nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(2, 4)
    tied.weight = layer.weight
    module = nn.Sequential(layer, layer, tied)
    net = FlatModule(module)
    for _ in range(2):
        theta = net.init()
        memory = weakref.ref(theta.untyped_storage())
        torch.testing.assert_close(net(theta, rows), module(rows))
        del theta
        assert memory() is None


def test_a_module_compiled_in_place_is_refused() -> None:
    module = nn.Linear(2, 2)
    module.compile()
    with pytest.raises(InputError, match="FlatModule: the module is compiled"):
        FlatModule(module)


class ByLambda(nn.Module):
    """A layer that is called by a lambda, which copies of the module share."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.calls = [lambda rows: self.layer(rows)]

    def forward(self, rows: torch.Tensor) -> Any:
        return self.calls[0](rows)


def with_compiled_method(module: nn.Module) -> nn.Module:
    module.forward = torch.compile(module.forward, backend="eager")
    return module


@pytest.mark.parametrize("make", [ByLambda, lambda: with_compiled_method(nn.Linear(2, 2))], ids=["lambda", "compiled"])
def test_functions_that_hold_parts_of_the_module_are_refused(make: Callable[[], nn.Module]) -> None:
    labels = torch.tensor([0, 1])
    net = FlatModule(make())
    with pytest.raises(InputError, match=r"found one of shape .* a module's lambda over self"):
        unroll(net, net.init(), torch.randn(2, 2), labels, 0.1, [labels])
    with pytest.raises(InputError, match=r"keeps a function, .* make it a method of the layer's class"):
        FlatModule(make().requires_grad_(False))


class Averaging(nn.Module):
    """A trained layer beside three frozen averages that each call updates, two of them as MoCo does."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(4, 3)
        nn.init.zeros_(self.trained.bias)
        self.average, self.momentum, self.bias = (nn.Parameter(torch.zeros(3), requires_grad=False) for _ in range(3))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.average.add_(1)
        self.momentum.data.add_(1)  # which torch does not count as a write
        self.bias.data.lerp_(self.trained.bias.detach(), 0.5)  # which changes nothing at first
        return self.trained(rows) + self.average + self.momentum + self.bias  # type: ignore[no-any-return]


def test_each_call_finds_frozen_parameters_as_they_were() -> None:
    net, rows = FlatModule(Averaging()), torch.randn(2, 4)
    for theta in (net.init(), net.init() + 1):
        first, *others = [net(theta, rows) for _ in range(4)]
        assert all(torch.equal(other, first) for other in others)


def test_a_module_wrapped_in_inference_mode_gives_gradients() -> None:
    with torch.inference_mode():
        net = FlatModule(nn.Sequential(nn.Linear(4, 3).requires_grad_(False), nn.Linear(3, 2)))
    theta, rows = net.init().requires_grad_(), torch.randn(2, 4, requires_grad=True)
    first, *others = [torch.autograd.grad(net(theta, rows).sum(), theta)[0] for _ in range(3)]
    assert all(torch.equal(other, first) for other in others)


def test_a_module_with_frozen_parameters_is_traced_and_transformed() -> None:
    net = FlatModule(nn.Sequential(nn.Linear(4, 3).requires_grad_(False), nn.Linear(3, 2)))
    theta, rows = net.init(), torch.randn(2, 4)
    traced = make_fx(net)(theta, rows)
    each = torch.func.vmap(lambda row: net(theta, row[None])[0])(rows)
    torch.testing.assert_close(each, traced(theta, rows))
    torch.testing.assert_close(each, net(theta, rows))


def keep_a_view_of_a_vector(linear: nn.Module) -> None:
    """Do what the public code's ReparamModule does."""
    vector = nn.Parameter(torch.zeros(4))
    del linear.weight
    linear.vector, linear.weight = vector, vector.view(2, 2)


@pytest.mark.parametrize(
    "keep",
    [
        keep_a_view_of_a_vector,
        nn.utils.weight_norm,
        lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
        lambda linear: nn.utils.spectral_norm(linear)(torch.randn(1, 2)),
    ],
    ids=["ReparamModule", "weight norm", "pruned", "spectral norm, called"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_module_that_keeps_what_it_computed_is_refused(keep: Callable[[nn.Module], Any]) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    keep(module[1])
    with pytest.raises(
        InputError,
        match=r"FlatModule: expected .* computes 1\.weight in its forward pass, found .*before ReparamModule does, .*prune call its remove, .*parametrizations",
    ):
        FlatModule(module)


def test_a_pruned_module_of_which_the_pruning_is_removed_is_taken() -> None:
    linear = prune.remove(prune.l1_unstructured(nn.Linear(2, 2), "weight", 0.5), "weight")
    assert FlatModule(linear).layout.names == ("bias", "weight")


def test_a_module_that_cannot_be_copied_is_refused() -> None:
    class Locked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.lock = threading.Lock()

    with pytest.raises(
        InputError, match=r"FlatModule: expected a module that copy\.deepcopy copies, found Locked: .*lock"
    ):
        FlatModule(Locked())


class Checkpointed(nn.Module):
    """A module that computes `part` again in the backward pass, when its tensors are no longer those of the call."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.last = part, nn.Linear(4 * 16, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = checkpoint(self.part, images, use_reentrant=False)
        return self.last(features.flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", [{}, {"memory_budget": "64MiB"}, {"microbatch": 2}], ids=str)
@pytest.mark.parametrize(
    "part", [nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh()), nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4))]
)
def test_a_module_that_reads_its_parameters_in_the_backward_pass_is_refused(
    part: nn.Module, options: dict[str, Any]
) -> None:
    net = FlatModule(Checkpointed(part).double())
    images, batches = (
        torch.randn(5, 2, 6, 6, dtype=torch.float64, requires_grad=True),
        torch.tensor([[0, 1, 2], [2, 3, 4]]),
    )
    with pytest.raises(InputError, match=r"again in the backward pass.*checkpoint"):
        unroll(net, net.init(), images, torch.tensor([0, 1, 2, 0, 1]), 0.3, batches, **options)


def test_a_used_module_can_be_copied_and_pickled() -> None:
    net, images = FlatModule(small_module(nn.BatchNorm2d(4))), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    logits = net(net.init(), images)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(net.init(), images), logits)


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # on Python 3.13.0
@pytest.mark.parametrize("called_before", [False, True])
def test_a_function_that_calls_it_can_be_compiled(called_before: bool) -> None:
    net, images = FlatModule(small_module(nn.BatchNorm2d(4))), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    compiled_call = torch.compile(lambda theta, images: net(theta, images).sin().sum(), backend="aot_eager")
    if called_before:
        net(net.init(), images)
    thetas = [net.init().requires_grad_() for _ in range(2)]
    compiled_call(thetas[0], images).backward()
    net(thetas[1], images).sin().sum().backward()
    first, second = (theta.grad for theta in thetas)
    assert first is not None
    assert second is not None
    assert_close("gradient", first, second, 1e-12)


def test_the_embedding_is_what_the_last_linear_layer_sees() -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    net, images = FlatModule(module), torch.randn(4, 3, 2, 2)
    theta = torch.randn(net.num_parameters)
    embedding = net.embed(theta, images)
    weight, bias = theta[-18:-3].view(3, 5), theta[-3:]
    torch.testing.assert_close(embedding @ weight.T + bias, net(theta, images))
    assert embedding.shape == (4, 5)
    with pytest.raises(InputError, match="expected a network with a linear layer, found none in Sequential"):
        FlatModule(torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1))).embed(torch.zeros(8), images)
