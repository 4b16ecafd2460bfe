"""Call `unroll` within torch's modes, transforms, hooks and checkpoints: the same as outside them, or refused in one line."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual
from torch.utils.checkpoint import checkpoint

from mtt_fast import (
    Augmentation,
    FlatModule,
    GraphedMatchingLoss,
    InputError,
    SiameseAugment,
    matching_loss,
    plan,
    unroll,
)
from mtt_fast.networks.protocol import Network
from tests.engine.callers import BATCHES, LABELS, MODULE, NETWORK, START, TARGET, Distilled, loss_of_unroll


@pytest.mark.parametrize("network", [NETWORK, FlatModule(MODULE)], ids=["ConvNet", "FlatModule"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast_around_it_changes_nothing(network: Network, dtype: torch.dtype) -> None:
    start, images = START.to(dtype), Distilled().images.detach().to(dtype)

    def gradient(autocast: bool) -> tuple[Tensor, Tensor]:
        leaf = images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            rows = unroll(network, start, leaf, LABELS, 0.2, BATCHES)
            matching_loss(rows[-1], start, TARGET).backward()
        assert leaf.grad is not None
        return rows, leaf.grad

    for actual, expected in zip(gradient(True), gradient(False), strict=True):
        assert actual.dtype == dtype
        assert torch.equal(actual, expected)


def test_autocast_around_it_does_not_reach_the_augmentation() -> None:
    mixed = torch.rand(8, 8).softmax(dim=0)
    # within autocast the product alone would be bfloat16, which lerp refuses
    blur = Augmentation(lambda *_: None, lambda images, _: torch.lerp(images, images @ mixed, 0.5))
    start, images = START.float(), Distilled().images.detach().float()

    def end(autocast: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return unroll(NETWORK, start, images, LABELS, 0.2, BATCHES, blur)[-1]

    assert torch.equal(end(True), end(False))


def test_images_made_under_autocast_keep_their_type() -> None:
    generator = nn.Linear(5, 2 * 64)
    with torch.autocast("cpu", torch.bfloat16):
        images = generator(torch.randn(6, 5)).view(6, 2, 8, 8)
        rows = unroll(NETWORK, START.float(), images, LABELS, 0.2, BATCHES)
    assert images.dtype == torch.bfloat16
    assert rows.dtype == torch.float32
    rows[-1].sum().backward()
    assert generator.weight.grad is not None
    assert generator.weight.grad.isfinite().all()


def test_without_gradients_there_is_the_path_alone() -> None:
    distilled = Distilled()
    arguments = (distilled.images, LABELS, distilled.lr, BATCHES)
    with torch.no_grad():
        rows = unroll(NETWORK, START, *arguments)
    assert not rows.requires_grad
    assert torch.equal(rows, unroll(NETWORK, START, *arguments))


@pytest.mark.parametrize("network", [NETWORK, FlatModule(MODULE)], ids=["ConvNet", "FlatModule"])
def test_inference_mode_is_refused(network: Network) -> None:
    with torch.inference_mode(), pytest.raises(InputError, match=r"use torch\.no_grad"):
        unroll(network, START, Distilled().images, LABELS, 0.2, BATCHES)


@pytest.mark.parametrize("network", [NETWORK, FlatModule(MODULE)], ids=["ConvNet", "FlatModule"])
@pytest.mark.parametrize("options", [{}, {"memory_budget": "64MiB"}, {"augment": SiameseAugment("color")}], ids=str)
def test_a_backward_pass_in_inference_mode_is_that_outside(network: Network, options: dict[str, Any]) -> None:
    gradients = []
    for context in (contextlib.nullcontext, torch.inference_mode):
        images, generator = Distilled().images, torch.Generator().manual_seed(4)
        loss = unroll(network, START, images, LABELS, 0.2, BATCHES, generator=generator, **options)[-1].square().sum()
        with context():
            gradients.append(torch.autograd.grad(loss, images)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("network", [NETWORK, FlatModule(MODULE)], ids=["ConvNet", "FlatModule"])
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd, torch.func.vmap])
def test_functional_transforms_are_refused(network: Network, transform: Callable[..., Any]) -> None:
    def loss(images: Tensor) -> Tensor:
        return unroll(network, START, images, LABELS, 0.2, BATCHES)[-1].sum()

    images = torch.zeros(6, 2, 8, 8, dtype=torch.float64)
    with pytest.raises(InputError, match=r"a transform of torch\.func.*backward\(\)"):
        transform(loss)(images[None] if transform is torch.func.vmap else images)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_a_traced_caller_is_refused() -> None:
    def traced(images: Tensor) -> Tensor:
        return unroll(NETWORK, START, images, LABELS, 0.1, BATCHES)[-1]

    with pytest.raises(InputError, match=r"torch\.jit\.trace"):
        torch.jit.trace(traced, torch.zeros(6, 2, 8, 8))


@pytest.mark.parametrize(
    "call",
    [
        lambda images: unroll(NETWORK, START, images, LABELS, 0.1, BATCHES),
        lambda images: GraphedMatchingLoss(NETWORK)(START, TARGET, images, LABELS, 0.1, BATCHES),
    ],
    ids=["unroll", "graphed"],
)
def test_forward_mode_is_refused(call: Callable[[Tensor], Tensor]) -> None:
    images = Distilled().images.detach()
    with dual_level(), pytest.raises(InputError, match="expected a backward pass, found forward-mode differentiation"):
        call(make_dual(images, torch.ones_like(images)))


def test_a_compiled_caller_is_refused() -> None:
    def loss(images: Tensor) -> Tensor:
        return unroll(NETWORK, START, images, LABELS, 0.2, BATCHES)[-1].sum()

    with pytest.raises(InputError, match=r"torch\.compile, which cannot trace"):
        torch.compile(loss, backend="aot_eager")(torch.zeros(6, 2, 8, 8, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("network", [NETWORK, FlatModule(MODULE)], ids=["ConvNet", "FlatModule"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("reentrant", [False, True])
def test_within_a_checkpoint(network: Network, momentum: float, reentrant: bool) -> None:
    """Compute all steps again in the backward pass, as a caller of several unrolls does to hold one path at a time."""

    def loss(images: Tensor) -> Tensor:
        path = unroll(network, START, images, LABELS, 0.2, BATCHES, momentum=momentum)
        return matching_loss(path[-1], START, TARGET)

    gradients = []
    for call in (loss, functools.partial(checkpoint, loss, use_reentrant=reentrant)):
        distilled = Distilled()
        call(distilled.images).backward()
        gradients.append(distilled.images.grad)
    expected, actual = gradients
    assert expected is not None
    assert actual is not None
    assert torch.equal(actual, expected)


def logged(tensors: list[Tensor], tensor: Tensor) -> Tensor:
    tensors.append(tensor)
    return tensor


@pytest.mark.parametrize("options", [{}, {"memory_budget": "1GiB"}], ids=["", "budget"])
@pytest.mark.parametrize("make", [lambda: NETWORK, lambda: FlatModule(MODULE)], ids=["ConvNet", "FlatModule"])
def test_a_caller_s_hooks_see_what_is_saved_for_the_backward_pass(
    make: Callable[[], Network], options: dict[str, Any]
) -> None:
    """Check that hooks see images, labels, rate and path once each way, and nothing of the graphs of single steps."""
    packed: list[Tensor] = []
    unpacked: list[Tensor] = []
    network, images = make(), Distilled().images  # a new network, whose memory was not yet measured
    with torch.autograd.graph.saved_tensors_hooks(
        functools.partial(logged, packed), functools.partial(logged, unpacked)
    ):
        path = unroll(network, START, images, LABELS, 0.2, BATCHES, **options)
        assert (len(packed), len(unpacked)) == (4, 0)
        path[-1].sum().backward()
    assert (len(packed), len(unpacked)) == (4, 4)


def test_a_caller_s_hooks_see_the_gradients_of_a_graphed_loss() -> None:
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(functools.partial(logged, packed), lambda tensor: tensor):
        GraphedMatchingLoss(FlatModule(MODULE))(START, TARGET, Distilled().images, LABELS, 0.2, BATCHES)
    assert [tuple(tensor.shape) for tensor in packed] == [(6, 2, 8, 8), ()]  # of the images and the rate


@pytest.mark.parametrize("call", [unroll, plan], ids=["unroll", "plan"])
def test_a_budget_with_tensors_saved_on_the_cpu(call: Callable[..., Any]) -> None:
    """Measure the memory of a step, on tensors without data that nothing can save."""
    images, network = Distilled().images, FlatModule(MODULE)
    with torch.autograd.graph.save_on_cpu():
        if call is plan:
            assert plan(network, images=images, steps=3, memory_budget="1GiB").saved_steps == 3
        else:
            unroll(network, START, images, LABELS, 0.2, BATCHES, memory_budget="1GiB")[-1].sum().backward()


class Counted(nn.Module):
    """A module that counts its calls."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        type(self).calls += 1
        return images


def test_a_checkpoint_computes_the_steps_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    network = FlatModule(nn.Sequential(Counted(), MODULE))

    def calls(steps: int) -> int:
        monkeypatch.setattr(Counted, "calls", 0)

        def end(images: Tensor) -> Tensor:
            return unroll(network, START, images, LABELS, 0.2, [BATCHES[0]] * steps)[-1]

        checkpoint(end, Distilled().images, use_reentrant=False).sum().backward()
        return Counted.calls

    assert calls(9) - calls(8) == 3  # a step of each sweep, and of the repeated forward sweep


def test_a_start_made_in_inference_mode_serves() -> None:
    with torch.inference_mode():
        start = START.clone()
    distilled = Distilled()
    rows = unroll(NETWORK, start, distilled.images, distilled.labels, distilled.lr, BATCHES, label_kind="logits")
    actual = torch.autograd.grad(matching_loss(rows[-1], start, TARGET), distilled.images)[0]
    assert torch.equal(actual, torch.autograd.grad(loss_of_unroll(distilled), distilled.images)[0])


def test_a_second_derivative_is_refused() -> None:
    distilled = Distilled()
    with pytest.raises(InputError, match="differentiable once"):
        torch.autograd.grad(loss_of_unroll(distilled), distilled.images, create_graph=True)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("way", ["is_grads_batched", "vectorize", "vmap"])
def test_several_vectors_at_once_are_refused(way: str, momentum: float) -> None:
    images, vectors = Distilled().images, torch.eye(len(START), dtype=torch.float64)[:2]

    def end(images: Tensor) -> Tensor:
        return unroll(NETWORK, START, images, LABELS, 0.2, BATCHES, momentum=momentum)[-1]

    row = end(images)
    ways: dict[str, Callable[[], Any]] = {
        "is_grads_batched": lambda: torch.autograd.grad(row, images, vectors, is_grads_batched=True),
        "vectorize": lambda: torch.autograd.functional.jacobian(end, images.detach(), vectorize=True),
        "vmap": lambda: torch.func.vmap(lambda vector: torch.autograd.grad(row, images, vector)[0])(vectors),
    }
    with pytest.raises(InputError, match="one vector, found several at once"):
        ways[way]()


@pytest.mark.parametrize("network", [NETWORK, FlatModule(MODULE)], ids=["ConvNet", "FlatModule"])
def test_anomalies_may_be_looked_for(network: Network) -> None:
    """Look for NaN in a call that plans its memory, which is counted on tensors without values."""

    def gradient() -> Tensor:
        images = Distilled().images
        path = unroll(copy.copy(network), START, images, LABELS, 0.2, BATCHES, memory_budget="64MiB")
        return torch.autograd.grad(matching_loss(path[-1], START, TARGET), images)[0]

    with torch.autograd.set_detect_anomaly(True):
        found = gradient()
    assert torch.equal(found, gradient())


@pytest.mark.parametrize("network", [NETWORK, FlatModule(MODULE)], ids=["ConvNet", "FlatModule"])
def test_the_default_device_has_no_part_in_it(network: Network) -> None:
    """Take a device that no number can be read from for the default: whatever is made there is noticed."""
    augment = SiameseAugment("color_crop_cutout_flip_scale_rotate")
    images, batches = Distilled().images, cast(Any, [[0, 1], [2, 3]])
    with torch.device("meta"):
        path = unroll(network, START, images, LABELS, 0.2, batches, augment, momentum=0.5)
        matching_loss(path[-1], START, TARGET).backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert images.grad.any()


@pytest.mark.parametrize("network", [NETWORK, FlatModule(MODULE)], ids=["ConvNet", "FlatModule"])
def test_an_expert_may_be_read_in_inference_mode(network: Network) -> None:
    with torch.inference_mode():
        start = START.clone()

    def gradient(theta: Tensor) -> Tensor:
        images = Distilled().images
        path = unroll(network, theta, images, LABELS, 0.2, BATCHES, momentum=0.5)
        return torch.autograd.grad(matching_loss(path[-1], theta, TARGET), images)[0]

    assert torch.equal(gradient(start), gradient(START))


@pytest.mark.parametrize("way", ["unroll", "graphed"])
@pytest.mark.parametrize("network", [NETWORK, FlatModule(MODULE)], ids=["ConvNet", "FlatModule"])
def test_all_arguments_may_be_made_in_inference_mode(network: Network, way: str) -> None:
    def gradient(start: Tensor, target: Tensor, images: Tensor, labels: Tensor, batches: Tensor) -> Tensor:
        rate = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        if way == "graphed":
            loss = GraphedMatchingLoss(network)(start, target, images, labels, rate, batches)
        else:
            loss = matching_loss(unroll(network, start, images, labels, rate, batches)[-1], start, target)
        return torch.autograd.grad(loss, rate)[0]

    arguments = (START, TARGET, Distilled().images.detach(), LABELS, BATCHES)
    with torch.inference_mode():
        copies = [argument.clone() for argument in arguments]
    assert torch.equal(gradient(*copies), gradient(*arguments))
