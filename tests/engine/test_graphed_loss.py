"""Test GraphedMatchingLoss: one call gives what `unroll` and a loss of its path give."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtt_fast import (
    GraphedMatchingLoss,
    SiameseAugment,
    masked_matching_loss,
    matching_loss,
    nearest_step_loss,
    path_loss,
    unroll,
)
from mtt_fast.augmentation.operations import Draws
from mtt_fast.augmentation.texture import CanvasCrops
from mtt_fast.augmentation.warp import augment_with
from mtt_fast.kernels import WARP_PARAMETERS
from mtt_fast.networks.protocol import Network
from mtt_fast.testing import assert_close
from tests.engine.graphed_loss_cases import BATCHES, FLIP, MODULE, NET, Loss, gradients, tensors


class Halved(SiameseAugment):
    """Half of each operation of DSA."""

    def warp_parameters(self, draws: Draws | Tensor, shape: torch.Size) -> Tensor:
        """See `Warp`."""
        return 0.5 * super().warp_parameters(draws, shape)


class Shift:
    """A warp of a user's own, whose draws are not its parameters: whole pixels down."""

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """See `Augment`."""
        return {"down": torch.randint(-2, 3, (len(images),), generator=generator)}

    def warp_parameters(self, draws: dict[str, Tensor], shape: torch.Size) -> Tensor:
        """See `Warp`."""
        parameters = torch.zeros(shape[0], len(WARP_PARAMETERS), dtype=torch.float64)
        parameters[:, WARP_PARAMETERS.index("row_shift")] = draws["down"].double()
        return parameters

    def __call__(self, images: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """See `Augment`."""
        return augment_with(images, self.warp_parameters(draws, images.shape))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "augmented": {"augment": SiameseAugment()},
    "augmented by tensors": {"augment": FLIP},
    "augmented by half": {"augment": Halved("rotate_scale")},
    "augmented by a warp": {"augment": Shift()},
    "momentum": {"momentum": 0.9, "weight_decay": 0.1},
    "pieces": {"microbatch": 3},
    "budget": {"memory_budget": "64MiB"},
    "truncated": {"gradient": "truncated"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("net", [NET, MODULE], ids=["ConvNet", "module"])
@pytest.mark.parametrize("drawn", ["before", "here"])
def test_equals_unroll_and_its_loss(net: Network, name: str, drawn: str) -> None:
    options, given = {"label_kind": "logits", **OPTIONS[name]}, tensors(net)
    augment, random = options.get("augment"), torch.Generator().manual_seed(1)
    draws = None
    if augment is not None and drawn == "before":
        draws = [augment.draw(given["images"].detach()[index], random) for index in BATCHES]
        random.manual_seed(1)
    path = unroll(
        net, given["start"], given["images"], given["labels"], given["lr"], BATCHES, generator=random, **options
    )
    expected = gradients(matching_loss(path[-1], given["start"], given["target"]), given)
    graphed = GraphedMatchingLoss(net, **options)
    for _ in range(2):
        random.manual_seed(1 if draws is None else 2)  # what was drawn before is not drawn again
        loss = graphed(**given, batches=BATCHES, draws=draws, generator=random)
        assert loss.dtype == torch.float64
        for what, mine, theirs in zip(
            ("loss", "images", "labels", "lr"), gradients(loss, given), expected, strict=True
        ):
            assert_close(what, mine, theirs, 1e-12)
    assert graphed.problem is None


@pytest.mark.parametrize(
    ("of_path", "reference"),
    [
        (partial(path_loss, match_step="nearest"), nearest_step_loss),
        (
            partial(path_loss, loss_ratio=0.4),
            lambda path, start, target: masked_matching_loss(path[-1], start, target, loss_ratio=0.4),
        ),
        (
            lambda path, start, target: (path[1:] - target).abs().mean(),
            lambda path, start, target: (path[1:] - target).abs().mean(),
        ),
    ],
    ids=["nearest", "masked", "own"],
)
def test_any_loss_of_the_path(of_path: Loss, reference: Loss) -> None:
    given = tensors()
    given["labels"] = given["labels"].detach().softmax(1).requires_grad_()
    path = unroll(NET, given["start"], given["images"], given["labels"], given["lr"], BATCHES)
    expected = gradients(reference(path, given["start"], given["target"]), given)
    graphed = GraphedMatchingLoss(NET, path_loss=of_path)
    for mine, theirs in zip(gradients(graphed(**given, batches=BATCHES), given), expected, strict=True):
        assert_close("loss or gradient", mine, theirs, 1e-12)


def test_the_gradient_flows_on_and_is_scaled() -> None:
    given = tensors()
    codes = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    decoder = nn.Sequential(nn.Linear(5, 128), nn.Unflatten(1, (2, 8, 8))).double()
    graphed = GraphedMatchingLoss(NET)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])

    def total(loss_of: Loss) -> Tensor:
        images = decoder(codes)
        value: Tensor = 3 * loss_of(images) + images.square().mean()
        return value

    def unrolled(images: Tensor) -> Tensor:
        path = unroll(NET, given["start"], images, labels, 0.2, BATCHES)
        return matching_loss(path[-1], given["start"], given["target"])

    leaves = [codes, *decoder.parameters()]
    mine = torch.autograd.grad(
        total(lambda images: graphed(given["start"], given["target"], images, labels, 0.2, BATCHES)), leaves
    )
    for actual, expected in zip(mine, torch.autograd.grad(total(unrolled), leaves), strict=True):
        assert_close("gradient", actual, expected, 1e-12)


def test_canvases_are_cropped() -> None:
    given, crops = tensors(), CanvasCrops(2, SiameseAugment())
    canvases = torch.randn(6, 2, 16, 16, dtype=torch.float64, requires_grad=True)
    given = {**given, "images": canvases, "labels": given["labels"].detach().softmax(1).requires_grad_()}
    random = torch.Generator().manual_seed(2)
    path = unroll(NET, given["start"], canvases, given["labels"], given["lr"], BATCHES, crops, generator=random)
    expected = gradients(matching_loss(path[-1], given["start"], given["target"]), given)
    loss = GraphedMatchingLoss(NET, augment=crops)(**given, batches=BATCHES, generator=random.manual_seed(2))
    for mine, theirs in zip(gradients(loss, given), expected, strict=True):
        assert_close("loss or gradient", mine, theirs, 1e-12)


class Seldom(SiameseAugment):
    """DSA without random numbers of its own: it turns no image."""

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Draws:
        return Draws("flip", (torch.ones(len(images), dtype=images.dtype),))


class SeldomCrops(CanvasCrops):
    """Crops from the first corner."""

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.zeros(len(images), 2, dtype=images.dtype)


@pytest.mark.parametrize("augment", [Seldom("flip"), SeldomCrops(2)], ids=["warp", "crops"])
def test_the_draws_are_those_that_a_subclass_makes(augment: Any) -> None:
    given = tensors()
    given["labels"] = given["labels"].detach().softmax(1)
    if isinstance(augment, CanvasCrops):
        given["images"] = given["images"].detach().repeat(1, 1, 2, 2) * torch.linspace(
            1, 2, 2 * given["images"].shape[3]
        )
    found = GraphedMatchingLoss(NET, augment=augment)(**given, batches=BATCHES)
    start, target = given.pop("start"), given.pop("target")
    path = unroll(NET, start, given["images"], given["labels"], given["lr"], BATCHES, augment=augment)
    assert_close("loss", found, matching_loss(path[-1], start, target), 1e-6)


def test_a_used_one_can_be_copied_and_pickled() -> None:
    given, graphed = tensors(), GraphedMatchingLoss(NET, label_kind="logits", augment=SiameseAugment("flip"))
    draws = [SiameseAugment("flip").draw(given["images"][index]) for index in BATCHES]
    loss = graphed(**given, batches=BATCHES, draws=draws)
    for other in (copy.deepcopy(graphed), pickle.loads(pickle.dumps(graphed))):
        assert vars(other).keys() == vars(graphed).keys()
        assert torch.equal(other(**given, batches=BATCHES, draws=draws), loss)


def test_the_images_may_change_before_the_backward_pass() -> None:
    given, graphed = tensors(), GraphedMatchingLoss(NET, label_kind="logits")
    expected, loss = gradients(graphed(**given, batches=BATCHES), given), graphed(**given, batches=BATCHES)
    with torch.no_grad():
        given["images"].zero_()
    assert all(map(torch.equal, gradients(loss, given), expected))


def test_autocast_around_it_does_not_reach_the_loss() -> None:
    def of_path(path: Tensor, start: Tensor, target: Tensor) -> Tensor:
        return torch.einsum("np,p->n", path.float(), target.float()).square().mean()

    given, graphed = tensors(), GraphedMatchingLoss(NET, label_kind="logits", path_loss=of_path)
    expected = gradients(graphed(**given, batches=BATCHES), given)
    with torch.autocast("cpu", torch.bfloat16):
        loss = graphed(**given, batches=BATCHES)
    assert all(map(torch.equal, gradients(loss, given), expected))


@pytest.mark.parametrize("lr", [torch.tensor(1), torch.tensor([1, 0, 2]), torch.tensor(True)], ids=str)
def test_rates_may_be_whole_numbers(lr: Tensor) -> None:
    given, graphed = tensors(), GraphedMatchingLoss(NET, label_kind="logits")
    assert torch.equal(
        graphed(**given | {"lr": lr}, batches=BATCHES), graphed(**given | {"lr": lr.double()}, batches=BATCHES)
    )


def test_draws_may_come_from_an_iterator() -> None:
    given, graphed = tensors(), GraphedMatchingLoss(NET, augment=FLIP, label_kind="logits")
    draws = [torch.rand(len(index), 1, 1, 1) < 0.5 for index in BATCHES]
    expected = graphed(**given, batches=BATCHES, draws=draws)
    assert torch.equal(graphed(**given, batches=BATCHES, draws=(each for each in draws)), expected)  # type: ignore[arg-type]


def test_a_loss_in_float32_is_returned_in_float64() -> None:
    def of_path(path: Tensor, start: Tensor, target: Tensor) -> Tensor:
        return (path[-1] - target).square().sum().float()

    graphed = GraphedMatchingLoss(NET, label_kind="logits", path_loss=of_path)
    assert graphed(**tensors(), batches=BATCHES).dtype == torch.float64


def test_without_gradients_there_is_the_loss_alone() -> None:
    given = tensors()
    graphed = GraphedMatchingLoss(NET, label_kind="logits")
    with torch.no_grad():
        loss = graphed(**given, batches=BATCHES)
    assert not loss.requires_grad
    assert torch.equal(loss, graphed(**given, batches=BATCHES).detach())
