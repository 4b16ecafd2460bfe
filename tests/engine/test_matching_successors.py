"""Test ATT's nearest step and PAD's dropped parameters, and the student's momentum, against autograd written out here."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast import (
    ConvNet,
    InputError,
    masked_matching_loss,
    matching_loss,
    nearest_step,
    nearest_step_loss,
    plan,
    unroll,
)
from mtt_fast.engine.iteration import iteration, planned_iteration
from mtt_fast.engine.matching import MatchStep, path_loss
from mtt_fast.engine.optimizers import StudentSgd
from mtt_fast.engine.students.fused import FusedConvNetStudent
from mtt_fast.engine.students.generic import GenericStudent
from mtt_fast.runtime.cuda_graphs import GraphedFunction
from mtt_fast.testing import assert_close, module_function, reference_convnet
from tests.engine.no_values import NoValues
from tests.engine.optimizer_cases import Case, sgd_written_out

NET = ConvNet(in_channels=3, num_classes=4, image_size=9, width=6, depth=2)
ORACLE = module_function(reference_convnet(3, 4, 9, 6, 2))
STEPS, LENGTHS = 6, (2, 4, 4, 2, 4, 4)
NEAREST = 4  # the step that the cases' target is near to


def case(per_step: bool = False, soft: bool = False) -> dict[str, Tensor]:
    """Return the arguments of an iteration, in float64; the target lies near the path's row `NEAREST`."""
    generator = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    start, logits = NET.init(generator).double(), randn(10, 4)
    given = {
        "start": start,
        "target": start,
        "images": randn(10, 3, 9, 9),
        "labels": logits.softmax(1) if soft else logits.argmax(1),
        "lr": 0.3 + 0.2 * torch.rand(STEPS, generator=generator).double() if per_step else torch.tensor(0.3).double(),
        "indices": torch.cat([torch.randperm(10, generator=generator)[:length] for length in LENGTHS]),
    }
    path = written_out(given)[0]
    given["target"] = path[NEAREST].detach() + 0.003 * randn(len(start))
    return given


def written_out(given: dict[str, Tensor], momentum: float = 0.0, weight_decay: float = 0.0) -> tuple[Tensor, ...]:
    """Return the student's path with its graph, and the leaves images, lr and, if they are soft, labels."""
    images, lr = (given[name].clone().requires_grad_() for name in ("images", "lr"))
    labels = given["labels"].clone().requires_grad_(given["labels"].is_floating_point())
    start = given["start"].clone().requires_grad_()
    case, batches = Case(start, torch.zeros_like(start), images, labels, lr), given["indices"].split(LENGTHS)
    path, _ = sgd_written_out(case, momentum, weight_decay, network=ORACLE, batches=batches)
    return path, images, lr, *([labels] if labels.requires_grad else [])


def loss_of(row: Tensor, given: dict[str, Tensor], loss_ratio: float, depth_ratio: float = 0.0) -> Tensor:
    """Return the loss without the first parameters (PAD) and, of the others, those of lowest loss (EDF), in both sums."""
    errors, moves = (row - given["target"]) ** 2, (given["start"] - given["target"]) ** 2
    first = int(depth_ratio * len(row))
    saved = first + errors.detach()[first:].sort().indices[int(loss_ratio * (len(row) - first)) :]
    return errors[saved].sum() / moves[saved].sum()


@pytest.mark.parametrize(("loss_ratio", "depth_ratio"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.3, 0.4)])
@pytest.mark.parametrize("match_step", ["last", "nearest"])
@pytest.mark.parametrize("soft", [False, True])
def test_iterate_equals_autograd(match_step: MatchStep, loss_ratio: float, depth_ratio: float, soft: bool) -> None:
    given = case(per_step=soft, soft=soft)
    path, *leaves = written_out(given)
    distances = (path - given["target"]).abs().sum(1)
    assert int(distances[1:].argmin()) + 1 == NEAREST
    expected_loss = loss_of(path[NEAREST if match_step == "nearest" else -1], given, loss_ratio, depth_ratio)
    expected = torch.autograd.grad(expected_loss, leaves)
    loss = partial(path_loss, match_step=match_step, loss_ratio=loss_ratio, depth_ratio=depth_ratio)
    for student in (GenericStudent(NET), FusedConvNetStudent(NET, "probabilities" if soft else "indices")):
        results = iteration(student, None, LENGTHS, loss=loss)(*given.values())
        assert len(results) == 1 + len(expected)
        for name, actual, wanted in zip(
            ("loss", "images", "lr", "labels"), results, (expected_loss, *expected), strict=False
        ):
            assert_close(name, actual, wanted.detach(), 1e-9)


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.9, 0.0), (0.0, 0.1), (0.6, 0.1)])
@pytest.mark.parametrize("match_step", ["last", "nearest"])
def test_momentum_and_weight_decay_of_the_student(momentum: float, weight_decay: float, match_step: MatchStep) -> None:
    given = case(per_step=True)
    path, *leaves = written_out(given, momentum, weight_decay)
    row = 1 + int((path[1:] - given["target"]).abs().sum(1).argmin()) if match_step == "nearest" else STEPS
    expected_loss = loss_of(path[row], given, 0.0)
    expected = torch.autograd.grad(expected_loss, leaves)
    steps = plan(
        NET, images=(10, 3, 9, 9), steps=STEPS, batch=4, microbatch=3, dtype=torch.float64, momentum=momentum,
        path_gradient=match_step == "nearest",
    )  # fmt: skip
    run = planned_iteration(
        steps, None, LENGTHS, loss=partial(path_loss, match_step=match_step),
        optimizer=StudentSgd(momentum, weight_decay),
    )  # fmt: skip
    for name, actual, wanted in zip(
        ("loss", "images", "lr"), run(*given.values()), (expected_loss, *expected), strict=True
    ):
        assert_close(name, actual, wanted.detach(), 1e-9)


def test_the_public_functions_on_a_path() -> None:
    given = case()
    expected_path, images, _ = written_out(given)
    pixels = given["images"].clone().requires_grad_()
    path = unroll(NET, given["start"], pixels, given["labels"], given["lr"], given["indices"].split(LENGTHS))
    assert int(nearest_step(path, given["target"])) == NEAREST
    for distance, row, ratio in (
        (nearest_step_loss(path, given["start"], given["target"]), NEAREST, 0.0),
        (masked_matching_loss(path[-1], given["start"], given["target"], 0.3), STEPS, 0.3),
    ):
        expected = loss_of(expected_path[row], given, ratio)
        assert_close("loss", distance.detach(), expected.detach(), 1e-11)
        actual = torch.autograd.grad(distance, pixels, retain_graph=True)[0]
        assert_close("images", actual, torch.autograd.grad(expected, images, retain_graph=True)[0], 1e-9)


def test_the_nearest_step_is_by_the_sum_of_magnitudes() -> None:
    target = torch.zeros(4)
    path = torch.tensor([[0.0, 0, 0, 0], [1.0, 1, 1, 1], [3.0, 0, 0, 0], [2.0, 2, 0, 0], [0.0, 3, 0, 0]])
    # the start is no step; [1, 1, 1, 1] is nearest by squares; of two at 3 the last one
    assert int(nearest_step(path, target)) == 4
    beyond_float32 = torch.tensor([[0.0, 0.0], [2.0**24, 0.0], [2.0**24, 1.0]])
    assert int(nearest_step(beyond_float32, torch.zeros(2))) == 1


def test_a_step_that_is_not_finite_is_never_the_nearest() -> None:
    rows = [[0.0, 0.0], [9.0, 9.0], [torch.nan, 0.0], [torch.inf, 0.0]]
    assert int(nearest_step(torch.tensor(rows), torch.zeros(2))) == 1


def test_dropped_parameters_get_no_gradient_and_do_not_count() -> None:
    end = torch.tensor([0.1, -3.0, 2.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    target, start = torch.zeros(5, dtype=torch.float64), torch.tensor([9.0, 1, 1, 9, 2], dtype=torch.float64)
    loss = masked_matching_loss(end, start, target, 0.5)  # two of five: 0.0 and 0.1
    assert float(loss.detach()) == pytest.approx((9 + 4 + 1) / (1 + 1 + 4))
    loss.backward()
    assert end.grad is not None
    assert end.grad.tolist() == pytest.approx([0, -6 / 6, 4 / 6, 0, 2 / 6])


def test_the_experts_parameters_are_constants_even_if_they_require_a_gradient() -> None:
    end, start, target = (torch.randn(50, requires_grad=True) for _ in range(3))
    matching_loss(end, start, target).backward()
    masked_matching_loss(end, start, target, 0.5).backward()
    nearest_step_loss(torch.stack([start.detach(), end]), start, target).backward()
    assert end.grad is not None
    assert start.grad is None
    assert target.grad is None


def test_of_parameters_of_equal_loss_the_first_are_dropped() -> None:
    start = torch.arange(1, 1001, dtype=torch.float64)
    loss = masked_matching_loss(torch.ones(1000).double(), start, torch.zeros(1000).double(), 0.5)
    assert float(loss) == pytest.approx(500 / float(start[500:].square().sum()))


@pytest.mark.parametrize("student", [GenericStudent(NET), FusedConvNetStudent(NET)], ids=["generic", "fused"])
def test_nothing_waits_for_a_value(student: Any) -> None:
    """Check that a CUDA graph can capture the choice of step and parameters, and momentum, weight decay and truncation."""
    inputs = [tensor.to("meta") for tensor in case(per_step=True).values()]
    loss = partial(path_loss, match_step="nearest", loss_ratio=0.3)
    with NoValues():
        actual = iteration(student, None, LENGTHS, loss=loss, optimizer=StudentSgd(0.5, 0.1), gradient="truncated")(
            *inputs
        )
    assert [tensor.shape for tensor in actual] == [(), (10, 3, 9, 9), (STEPS,)]


@pytest.mark.gpu
def test_a_replay_gives_the_bits_of_the_call_on_a_gpu() -> None:
    device = torch.device("cuda")
    loss = partial(path_loss, match_step="nearest", loss_ratio=0.3)
    steps = plan(
        NET, images=(10, 3, 9, 9), steps=STEPS, batch=4, memory_budget=None, device=device, dtype=torch.float64,
        momentum=0.5, path_gradient=True,
    )  # fmt: skip
    graph, call = (
        planned_iteration(
            steps, None, LENGTHS, loss=loss, optimizer=StudentSgd(0.5, 0.1), gradient="truncated", graph=graph
        )
        for graph in (True, False)
    )
    inputs = [tensor.to(device) for tensor in case(per_step=True).values()]
    for _ in range(2):
        for actual, expected in zip(graph(*inputs), call(*inputs), strict=True):
            assert torch.equal(actual, expected)
    assert isinstance(graph, GraphedFunction)
    assert graph.problem is None


def test_a_path_in_host_memory() -> None:
    given = case()
    loss = partial(path_loss, match_step="nearest", loss_ratio=0.3)
    runs = [
        iteration(GenericStudent(NET), None, LENGTHS, loss=loss, optimizer=StudentSgd(0.5), path_on_host=on_host)(
            *given.values()
        )
        for on_host in (False, True)
    ]
    for actual, expected in zip(*runs, strict=True):
        assert torch.equal(actual, expected)


def test_the_plan_counts_a_gradient_of_the_whole_path() -> None:
    last, nearest = (
        plan(NET, images=(10, 3, 9, 9), steps=30, memory_budget=None, path_gradient=whole).parts["path"]
        for whole in (False, True)
    )
    assert last == 31 * NET.num_parameters * 4
    assert nearest == 2 * last


@pytest.mark.parametrize("loss_ratio", [-0.1, 1.0, float("nan")])
def test_shares_that_cannot_be(loss_ratio: float) -> None:
    with pytest.raises(InputError, match="loss_ratio: expected at least 0 and less than 1"):
        masked_matching_loss(torch.ones(3), torch.zeros(3), torch.ones(3), loss_ratio)


def test_an_expert_that_did_not_move_is_named() -> None:
    still = torch.ones(3)
    with pytest.raises(InputError, match="masked_matching_loss: start and target are equal"):
        masked_matching_loss(torch.zeros(3), still, still, 0.3)
    with pytest.raises(InputError, match="start and target are equal"):
        nearest_step_loss(torch.zeros(4, 3), still, still)
    for path in (torch.zeros(1, 3), torch.zeros(4, 2), still):
        with pytest.raises(InputError, match=r"nearest_step: expected a path \(N \+ 1, P\) of at least one step"):
            nearest_step_loss(path, torch.zeros(3), still)
    with pytest.raises(InputError, match="nearest_step target: expected a tensor, found list"):
        nearest_step_loss(torch.zeros(4, 3), still, list(still))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="masked_matching_loss: expected three vectors"):
        masked_matching_loss(torch.zeros(4), still, still, 0.3)


@pytest.mark.parametrize("match_step", ["last", "nearest"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": [torch.zeros(3)] * 4}, "path_loss path: expected a tensor, found list"),
        (
            {"path": torch.zeros(3)},
            r"path_loss: expected a path \(N \+ 1, P\) of at least one step .* shapes \(3,\) and",
        ),
        (
            {"path": torch.zeros(4, 3).half()},
            "path_loss: expected path float32, float64 or bfloat16, .* found torch.float16",
        ),
        (
            {"path": torch.zeros(4, 3).to_sparse()},
            "path_loss path: expected an ordinary tensor, found a tensor of layout",
        ),
        ({"start": torch.zeros(())}, r"path_loss start: expected a flat vector \(P,\), found shape \(\)"),
        ({"start": torch.zeros(2)}, r"path_loss: expected three vectors of one shape, .* start \(2,\)"),
        ({"start": torch.zeros(3, dtype=torch.complex64)}, "and start and target floating, found .*complex64"),
        ({"start": torch.zeros(3, device="meta")}, "path_loss: expected all vectors with numbers, or none"),
        ({"target": None}, "path_loss target: expected a tensor, found NoneType"),
        ({"target": torch.zeros(3).long()}, "floating, found .* torch.int64; use .float"),
    ],
)
def test_tensors_that_do_not_fit_are_told_without_reading_them(
    change: dict[str, Any], message: str, match_step: Any
) -> None:
    given = {"path": torch.rand(4, 3), "start": torch.zeros(3), "target": torch.ones(3)} | change
    with pytest.raises(InputError, match=message):
        path_loss(**given, match_step=match_step)
