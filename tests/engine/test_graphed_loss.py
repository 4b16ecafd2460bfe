"""Test GraphedMatchingLoss: what `unroll` and a loss give, in one call; captured once for each kind of arguments."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtt_fast import (
    Augmentation,
    ConvNet,
    FlatModule,
    GraphedMatchingLoss,
    InputError,
    Plan,
    SiameseAugment,
    masked_matching_loss,
    matching_loss,
    nearest_step_loss,
    path_loss,
    plan,
    unroll,
)
from mtt_fast.augmentation.operations import Draws
from mtt_fast.augmentation.texture import CanvasCrops
from mtt_fast.engine.iteration import Iteration, planned_iteration
from mtt_fast.engine.unroll import checked_plan
from mtt_fast.networks.protocol import Network
from mtt_fast.runtime.cuda_graphs import CapturedCall, GraphedFunction
from mtt_fast.testing import assert_close

NET = ConvNet(in_channels=2, num_classes=3, image_size=8, width=4, depth=2)
MODULE = FlatModule(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(144, 3)).double())
BATCHES = [torch.tensor([5]), torch.tensor([0, 1, 2, 3]), torch.tensor([2, 3, 4, 5])]
FLIP = Augmentation(
    draw=lambda images, generator: torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5,
    apply=lambda images, mirrored: torch.where(mirrored.to(images.device), images.flip(3), images),
)
Loss = Callable[..., Tensor]


def tensors(net: Network = NET, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Any]:
    """Return start, target, and what is learned: images, soft labels and a rate for each step."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    start = 0.3 * randn(net.num_parameters)
    learned = {"images": randn(6, 2, 8, 8), "labels": randn(6, 3), "lr": randn(3).abs()}
    return {
        "start": start, "target": start + 0.1 * randn(len(start)),
        **{name: value.requires_grad_() for name, value in learned.items()},
    }  # fmt: skip


def gradients(loss: Tensor, given: dict[str, Any]) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, [given[name] for name in ("images", "labels", "lr")])


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "augmented": {"augment": SiameseAugment()},
    "augmented by tensors": {"augment": FLIP},
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


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Return the plans of iterations, in the order in which these are made."""
    plans: list[Plan] = []

    def watched(plan: Plan, *arguments: Any, **options: Any) -> Iteration:
        plans.append(plan)
        return planned_iteration(plan, *arguments, **options)

    monkeypatch.setattr("mtt_fast.engine.graphed_loss.planned_iteration", watched)
    return plans


def test_the_plan_has_room_for_the_gradient_of_any_loss_of_the_path(plans: list[Plan]) -> None:
    for of_path in (path_loss, partial(path_loss, match_step="nearest")):
        GraphedMatchingLoss(NET, label_kind="logits", path_loss=of_path)(**tensors(), batches=BATCHES)
    assert [plan.work.path_gradient for plan in plans] == [False, True]
    assert plans[0] == plan(
        NET, images=(6, 2, 8, 8), steps=3, batch=4, memory_budget=None, dtype=torch.float64, label_kind="logits"
    )


def test_images_of_whole_numbers_are_refused_before_anything_is_drawn() -> None:
    given = tensors() | {"images": torch.zeros(6, 2, 8, 8, dtype=torch.uint8)}
    start, images, labels = (given[name] for name in ("start", "images", "labels"))
    with pytest.raises(InputError, match="expected floating-point images"):
        unroll(NET, start, images, labels, 0.1, BATCHES, SiameseAugment(), label_kind="logits")
    with pytest.raises(InputError, match="expected floating-point images"):
        GraphedMatchingLoss(NET, augment=SiameseAugment(), label_kind="logits")(**given, batches=BATCHES)


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


def test_a_second_derivative_is_refused() -> None:
    given = tensors()
    loss = GraphedMatchingLoss(NET, label_kind="logits")(**given, batches=BATCHES)
    with pytest.raises(InputError, match="differentiable once"):
        torch.autograd.grad(loss, given["images"], create_graph=True)


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


def linear_after(change: Callable[[Tensor], Tensor]) -> FlatModule:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(128, 3).double()

        def forward(self, images: Tensor) -> Tensor:
            outputs: Tensor = self.linear(change(images).flatten(1))
            return outputs

    return FlatModule(Linear())


def test_a_network_without_a_gradient_to_the_images_is_refused_by_a_call_that_needs_none() -> None:
    net = linear_after(lambda images: images.detach())
    with torch.no_grad(), pytest.raises(InputError, match="depends on the images"):
        GraphedMatchingLoss(net, label_kind="logits")(**tensors(net), batches=BATCHES)


@pytest.mark.parametrize(
    ("of_path", "found"),
    [
        (lambda path, start, target: float((path[-1] - target).detach().square().sum()), "found float"),
        (lambda path, start, target: (path[-1] - target).square(), r"found shape \(291,\)"),
        (lambda path, start, target: (path[-1].detach() - target).sum(), r"found shape \(\), without a gradient"),
    ],
    ids=["value", "vector", "constant"],
)
def test_what_is_no_loss_of_the_path_is_refused(of_path: Loss, found: str) -> None:
    with pytest.raises(InputError, match=f"`path_loss`: expected a tensor \\(\\) that depends on the path, {found}"):
        GraphedMatchingLoss(NET, label_kind="logits", path_loss=of_path)(**tensors(), batches=BATCHES)


@pytest.mark.parametrize(
    ("of_path", "message"),
    [
        (None, "`path_loss`: expected a function of path, start and target, found None"),
        (
            lambda path, start, target: path[-1].sum() * 1j,
            r"`path_loss`: expected a real number, found torch\.complex128",
        ),
    ],
    ids=["none", "complex"],
)
def test_a_loss_of_the_path_is_a_function_to_real_numbers(of_path: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GraphedMatchingLoss(NET, label_kind="logits", path_loss=of_path)(**tensors(), batches=BATCHES)


def test_a_loss_of_the_path_with_learned_weights_is_refused() -> None:
    """Check what would leave the weights of the rows without a gradient."""
    weights = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def of_path(path: Tensor, start: Tensor, target: Tensor) -> Tensor:
        return (weights.softmax(0) * (path - target).square().sum(1)).sum()

    with pytest.raises(InputError, match="`path_loss`: expected no tensor that requires a gradient besides the path"):
        GraphedMatchingLoss(NET, label_kind="logits", path_loss=of_path)(**tensors(), batches=BATCHES)


def test_a_loss_of_the_path_is_tried_on_a_path_of_its_own() -> None:
    """Check that a loss that writes into the path's rows, which torch refuses, leaves the caller's start as it was."""

    def of_path(path: Tensor, start: Tensor, target: Tensor) -> Tensor:
        return path[-1].sub_(target).square().sum()

    given = tensors()
    before = given["start"].clone()
    with pytest.raises(RuntimeError, match="modified inplace"):
        GraphedMatchingLoss(NET, label_kind="logits", path_loss=of_path)(**given, batches=BATCHES)
    assert torch.equal(given["start"], before)


def test_a_loss_of_the_path_is_tried_on_a_path_laid_out_as_the_students() -> None:
    """Check that a loss may view the path as rows of any length where its rows have no gaps."""
    net = FlatModule(nn.Sequential(nn.Flatten(), nn.Linear(128, 8, bias=False)).double())
    given = tensors(net) | {"labels": torch.zeros(6, 8, dtype=torch.float64)}
    graphed = GraphedMatchingLoss(net, path_loss=lambda path, start, target: path.view(-1)[len(start) :].square().sum())
    path = unroll(net, given["start"], given["images"], given["labels"], given["lr"], BATCHES)
    assert_close("loss", graphed(**given, batches=BATCHES), path[1:].square().sum(), 1e-12)


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


@pytest.fixture
def captured_calls(monkeypatch: pytest.MonkeyPatch) -> list[CapturedCall]:
    """Capture iterations on a CPU as on a GPU; return the captured_calls."""
    captured_calls: list[CapturedCall] = []

    def capture(run: Callable[[], tuple[Tensor, ...]]) -> CapturedCall:
        outputs = run()

        def replay() -> None:
            for output, value in zip(outputs, run(), strict=True):
                output.copy_(value)

        captured_calls.append(CapturedCall(replay, outputs))
        return captured_calls[-1]

    monkeypatch.setattr("mtt_fast.engine.iteration.graphed", lambda function, *_: GraphedFunction(function, capture))
    return captured_calls


def check_equals_unroll(
    graphed: GraphedMatchingLoss, net: Network, given: dict[str, Any], batches: list[Tensor], tolerance: float
) -> None:
    """Check the loss and the gradients of augmented steps, with labels that are logits."""
    random = torch.Generator().manual_seed(4)
    loss = graphed(**given, batches=batches, generator=random)
    path = unroll(
        net, given["start"], given["images"], given["labels"], given["lr"], batches, SiameseAugment(),
        label_kind="logits", generator=random.manual_seed(4),
    )  # fmt: skip
    expected = gradients(matching_loss(path[-1], given["start"], given["target"]), given)
    for mine, theirs in zip(gradients(loss, given), expected, strict=True):
        assert_close("loss or gradient", mine.cpu(), theirs.cpu(), tolerance)


def test_each_kind_of_arguments_is_captured_once(captured_calls: list[CapturedCall]) -> None:
    graphed, given = GraphedMatchingLoss(NET, augment=SiameseAugment(), label_kind="logits"), tensors()
    for batches in (BATCHES, BATCHES, BATCHES[::-1], BATCHES):
        check_equals_unroll(graphed, NET, given, batches, 1e-12)
        with torch.no_grad():
            given["images"] += 0.1
    assert len(captured_calls) == 2


def test_only_so_many_are_captured(captured_calls: list[CapturedCall], caplog: pytest.LogCaptureFixture) -> None:
    graphed, given = GraphedMatchingLoss(NET, label_kind="logits"), tensors()
    for steps in range(1, 11):
        index = torch.arange(2).expand(steps, -1)
        assert graphed(**{**given, "lr": 0.1}, batches=index).isfinite()
        graphed(**{**given, "lr": 0.1}, batches=index)
    assert len(captured_calls) == 8
    assert caplog.text.count("not captured") == 2  # once for each other kind of arguments
    assert graphed.problem == "more than 8 sets of shapes"


def test_on_a_cpu_there_are_not_too_many(caplog: pytest.LogCaptureFixture) -> None:
    graphed, given = GraphedMatchingLoss(NET, label_kind="logits"), tensors()
    for steps in range(1, 11):
        graphed(**{**given, "lr": 0.1}, batches=torch.arange(2).expand(steps, -1))
    assert graphed.problem is None
    assert "not captured" not in caplog.text


def test_a_path_in_host_memory_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    given, expected = tensors(), GraphedMatchingLoss(NET, label_kind="logits")(**tensors(), batches=BATCHES)

    def on_host(*arguments: Any, **options: Any) -> Plan:
        return dataclasses.replace(checked_plan(*arguments, **options), path_on_host=True)

    monkeypatch.setattr("mtt_fast.engine.graphed_loss.checked_plan", on_host)
    graphed = GraphedMatchingLoss(NET, label_kind="logits")
    for _ in range(2):
        assert torch.equal(graphed(**given, batches=BATCHES), expected)
    assert graphed.problem == "path in host memory; raise `memory_budget`"
    assert caplog.text.count("not captured") == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"target": torch.zeros(3)},
            r"`target`: expected the shape and the device of start, \(\d+,\) on cpu, found \(3,\)",
        ),
        ({"target": torch.zeros(291, device="meta")}, r"on cpu, found \(291,\) on meta"),
        ({"target": None}, "`target`: expected a tensor, found NoneType"),
        (
            {"target": torch.zeros(291, dtype=torch.long)},
            r"`target`: expected floating-point numbers, found torch\.int64",
        ),
        ({"start": torch.zeros(3)}, r"^`start`: expected \(291,\) parameters of the network"),
        ({"images": [1.0]}, "`images`: expected a tensor, found list"),
        ({"lr": -1.0}, "`lr`: expected finite numbers of at least 0"),
        ({"batches": [torch.tensor([6])]}, r"expected indices 0 … 5, found 6 … 6 in step 0"),
        ({"labels": torch.zeros(5, 3)}, "as many labels"),
        ({"generator": 3}, "`generator`: expected a torch.Generator, found int"),
    ],
)
def test_arguments_that_do_not_fit_are_told(changed: dict[str, Any], message: str) -> None:
    graphed, given = GraphedMatchingLoss(NET), tensors()
    given["labels"] = given["labels"].detach().softmax(1)
    graphed(**given, batches=BATCHES)
    with pytest.raises(InputError, match=message):
        graphed(**{"batches": BATCHES} | given | changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": "exactly"}, "`gradient`: expected 'exact' or 'truncated'"),
        (
            {"microbatch": 2, "memory_budget": "1GiB"},
            "`microbatch`, `memory_budget`: expected one of these, found 2; give one",
        ),
        ({"momentum": -1.0}, "`momentum`: expected a finite number"),
        ({"augment": "crop"}, "`augment`: expected an augmentation"),
        ({"optimizer": 0.1}, "`optimizer`: expected mtt_fast.Adam"),
    ],
)
def test_wrong_options_are_refused_before_a_call(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        GraphedMatchingLoss(NET, **options)


def test_augmentations_whose_draws_are_no_rows_are_told() -> None:
    given = tensors()
    for augment, message in (
        (
            Augmentation(lambda images, _: 0.5, lambda images, share: images * share),
            "a row for each of 1 images, found float",
        ),
        (
            Augmentation(lambda images, _: torch.ones(2), lambda images, shares: images * shares[0]),
            r"a row for each of 1 images, found shape \(2,\)",
        ),
        (
            Augmentation(lambda images, _: torch.ones(len(images), len(images)), lambda images, _: images),
            "draws of one dtype and shape in all steps",
        ),
    ):
        with pytest.raises(InputError, match=message):
            GraphedMatchingLoss(NET, label_kind="logits", augment=augment)(**given, batches=BATCHES)


def test_a_network_that_draws_is_refused() -> None:
    net = linear_after(nn.functional.dropout)
    with pytest.raises(InputError, match="expected no random numbers"):
        GraphedMatchingLoss(net, label_kind="logits")(**tensors(net), batches=BATCHES)


@pytest.mark.gpu
@pytest.mark.parametrize("net", [NET, MODULE], ids=["ConvNet", "module"])
def test_a_gpu_replays_what_unroll_computes(net: Network) -> None:
    graphed = GraphedMatchingLoss(net, augment=SiameseAugment(), label_kind="logits")
    given = tensors(net, device="cuda")
    for _ in range(3):
        check_equals_unroll(graphed, net, given, BATCHES, 1e-10)
        with torch.no_grad():
            given["images"] += 0.1
    assert graphed.problem is None


@pytest.mark.gpu
def test_a_later_call_on_a_gpu_waits_for_nothing() -> None:
    graphed, given = GraphedMatchingLoss(NET, augment=SiameseAugment(), label_kind="logits"), tensors(device="cuda")
    given["lr"] = 0.1
    graphed(**given, batches=BATCHES)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphed(**given, batches=BATCHES).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_each_dtype_has_a_plan_of_its_own_that_counts_the_velocities(plans: list[Plan]) -> None:
    graphed, dtypes = GraphedMatchingLoss(NET, momentum=0.9, label_kind="logits"), (torch.float32, torch.float64)
    for dtype in dtypes:
        graphed(**tensors(dtype=dtype), batches=BATCHES)
    assert [(plan.work.dtype, plan.work.moments) for plan in plans] == [(dtype, 1) for dtype in dtypes]
