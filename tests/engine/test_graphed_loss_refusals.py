"""Test what GraphedMatchingLoss refuses: losses, networks, augmentations, options and arguments that do not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtt_fast import (
    Augmentation,
    FlatModule,
    GraphedMatchingLoss,
    InputError,
    Plan,
    SiameseAugment,
    unroll,
)
from mtt_fast.engine.unroll import checked_plan
from mtt_fast.testing import assert_close
from tests.engine.graphed_loss_cases import BATCHES, NET, Loss, linear_after, tensors


def test_images_of_whole_numbers_are_refused_before_anything_is_drawn() -> None:
    given = tensors() | {"images": torch.zeros(6, 2, 8, 8, dtype=torch.uint8)}
    start, images, labels = (given[name] for name in ("start", "images", "labels"))
    with pytest.raises(InputError, match="expected floating-point images"):
        unroll(NET, start, images, labels, 0.1, BATCHES, SiameseAugment(), label_kind="logits")
    with pytest.raises(InputError, match="expected floating-point images"):
        GraphedMatchingLoss(NET, augment=SiameseAugment(), label_kind="logits")(**given, batches=BATCHES)


def test_a_second_derivative_is_refused() -> None:
    given = tensors()
    loss = GraphedMatchingLoss(NET, label_kind="logits")(**given, batches=BATCHES)
    with pytest.raises(InputError, match="differentiable once"):
        torch.autograd.grad(loss, given["images"], create_graph=True)


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


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("mode", "`loss`: expected no random numbers"),
        ("weight", "`loss`: expected no tensor that requires a gradient besides its arguments"),
        ("factor", "`path_loss`: expected no tensor that requires a gradient besides the path"),
    ],
)
def test_what_changes_after_the_first_call_on_a_cpu_is_refused(part: str, message: str) -> None:
    dropout, weight, factor = nn.Dropout().eval(), torch.ones(()), torch.ones(())
    graphed = GraphedMatchingLoss(
        NET,
        loss=lambda outputs, labels: (weight * dropout(outputs) - labels).square().mean(),
        path_loss=lambda path, start, target: factor * (path[-1] - target).square().sum(),
    )
    graphed(**tensors(), batches=BATCHES)
    changes = {"mode": dropout.train, "weight": weight.requires_grad_, "factor": factor.requires_grad_}
    changes[part]()
    with pytest.raises(InputError, match=message):
        graphed(**tensors(), batches=BATCHES)
