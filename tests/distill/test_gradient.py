"""Test options of the gradient, the student and the matching in toy runs, also when a run is continued."""

from __future__ import annotations

import dataclasses
import json
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast import ConvNet, SyntheticDataset, evaluate
from mtt_fast.commands import cli
from mtt_fast.distill.gradients import (
    PendingGradients,
    cached_iterations,
    compare_with_exact,
    finish_gradients,
    iteration_of,
    mean_gradients,
    start_gradients,
)
from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.parametrised import ImageParameters
from mtt_fast.distill.planning import plan_in_tf32, plan_steps
from mtt_fast.distill.segments import Segment, log_fields, segment_numbers
from mtt_fast.distill.updates import update
from mtt_fast.engine.iteration import planned_iteration
from mtt_fast.engine.memory_plan import Plan, Work, plan
from mtt_fast.engine.students.choice import precision_on
from mtt_fast.errors import InputError
from mtt_fast.kernels import Precision
from mtt_fast.storage.checkpoint import State
from mtt_fast.storage.metrics import MetricsLog
from mtt_fast.storage.tensor_files import load_tensors
from mtt_fast.testing import assert_close
from mtt_fast.training.evaluation import Accuracy
from tests.distill.command_runs import images_of, records_of, run, summary_of

TOY = (
    "--dataset digits --model ConvNetD1W4 --num_experts 3 --train_epochs 3 --max_start_epoch 2 --expert_epochs 1 "
    "--syn_steps 3 --Iteration 4 --eval_it 2 --num_eval 1 --epoch_eval_train 1 --batch_real 512 --lr_img 10 "
    "--save_seconds 0"
).split()


OPTIONS = {
    "plain": [],
    "truncated": ["--gradient", "truncated"],
    "fast": ["--lr_teacher", "0.3"],  # steps so long that the last is not the nearest
    "nearest": ["--lr_teacher", "0.3", "--match_step", "nearest"],
    "loss-ratio": ["--loss_ratio", "0.4"],
    "depth-ratio": ["--depth_ratio", "0.4"],
    "trajectories": ["--num_trajectories", "2"],
    "lr-per-step": ["--lr_per_step", "--lr_lr", "1e-4"],
    "momentum": ["--student_mom", "0.9"],
    "weight-decay": ["--student_l2", "0.1"],
}


@pytest.fixture(scope="module")
def runs(experts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run each option in two parts; return the run folders."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in OPTIONS.items():
        out = ["--out", str(folder / name)]
        assert run(*TOY, *experts, *flags, *out, "--Iteration", "2") == 0
        assert run(*out, "--resume", "--Iteration", "4") == 0
    return {name: folder / name for name in OPTIONS}


@pytest.mark.parametrize("name", OPTIONS)
def test_resumed_is_bit_identical_and_the_option_counts(
    name: str, runs: dict[str, Path], experts: list[str], tmp_path: Path
) -> None:
    assert run(*TOY, *experts, *OPTIONS[name], "--out", str(tmp_path)) == 0
    assert torch.equal(images_of(tmp_path), images_of(runs[name]))
    assert records_of(tmp_path, "step") == records_of(runs[name], "step")
    assert records_of(tmp_path, "gradient") == records_of(runs[name], "gradient")
    if name != "plain":
        without = "fast" if name == "nearest" else "plain"
        assert not torch.equal(images_of(runs[name]), images_of(runs[without]))


def test_a_truncated_run_says_so(
    experts: list[str], tmp_path: Path, runs: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert run(*TOY, *experts, *OPTIONS["truncated"], "--out", str(tmp_path)) == 0
    assert "gradient: truncated (approximate" in caplog.text
    assert "cosine of the truncated image gradient to the exact one" in caplog.text
    assert "approximate" in (tmp_path / "config.toml").read_text()
    told = summary_of(tmp_path)["gradient"]
    assert "approximate" in told["kind"]
    records = records_of(tmp_path, "gradient")
    assert [record["iteration"] for record in records] == [0, 2, 4]
    assert told["cosines_to_exact"] == [record["cosine"] for record in records]
    assert all(0.5 < record["cosine"] < 1 - 1e-9 for record in records)
    exact = summary_of(runs["plain"])["gradient"]
    assert exact == {"kind": "exact", "cosines_to_exact": []}
    assert "approximate" not in (runs["plain"] / "config.toml").read_text()


def test_each_step_has_a_learning_rate_of_its_own(runs: dict[str, Path], experts: list[str], tmp_path: Path) -> None:
    folder = runs["lr-per-step"]
    distilled = SyntheticDataset.load(folder / "synthetic.safetensors")
    rates = distilled.lr_per_step
    assert rates is not None
    assert rates.shape == (3,)
    assert len(set(rates.tolist())) == 3
    assert distilled.lr.shape == ()
    assert float(distilled.lr) == pytest.approx(float(rates.mean()))
    assert records_of(folder, "step")[-1]["lr"] == pytest.approx(float(rates.mean()))
    summary = summary_of(folder)
    assert summary["learning_rate_per_step"] == pytest.approx(rates.tolist())
    exported = {path.name: torch.load(path) for path in distilled.export("mtt", tmp_path)}
    assert exported["lr_best.pt"].shape == ()
    moved = distilled.to("cpu").lr_per_step
    assert moved is not None
    assert torch.equal(moved, rates)
    flags = [*experts[:2], "--num_eval", "1", "--epoch_eval_train", "0", "--out", str(tmp_path / "result.json")]
    assert cli.run(evaluate.main, [str(folder), *flags]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["lr"] == pytest.approx(float(rates.mean()))
    plain = SyntheticDataset.load(runs["plain"] / "synthetic.safetensors")
    assert plain.lr_per_step is None


def test_each_learning_rate_stays_positive() -> None:
    options = DistillOptions(lr_lr=1.0)
    images = torch.zeros(2, 1, 4, 4)
    state = State(
        0, 1, images, torch.zeros(2), torch.tensor([0.5, 0.5, 0.5]), torch.zeros_like(images),
        torch.tensor([0.0, 0.2, 0.0]),
    )  # fmt: skip
    update(options, state, images, torch.tensor([0.25, 0.6, -1.0]))
    assert state.lr.tolist() == pytest.approx([0.25, 0.5, 1.5])  # 0.5 − 0.7 would be negative
    assert state.lr_velocity.tolist() == pytest.approx([0.25, 0.0, -1.0])
    assert state.lr_kept == 1


def test_segments_of_several_trajectories_follow_each_other(runs: dict[str, Path]) -> None:
    options = DistillOptions(num_trajectories=3)
    assert list(segment_numbers(options, range(4, 6))) == [12, 13, 14, 15, 16, 17]
    assert list(segment_numbers(DistillOptions(), range(4, 6))) == [4, 5]
    one, two = (records_of(runs[name], "step") for name in ("plain", "trajectories"))
    singles = [(record["expert"], record["start_epoch"]) for record in one]
    in_pairs = [(record[f"expert{which}"], record[f"start_epoch{which}"]) for record in two for which in ("", "_2")]
    assert in_pairs[:4] == singles
    assert {expert for expert, _ in in_pairs[:3]} == {0, 1, 2}  # different experts in turn
    assert log_fields([Segment(1, 2, tuple)]) == {"start_epoch": 2, "expert": 1}


def test_gradients_are_the_mean_over_the_segments() -> None:
    """Compare with autograd of the mean of the losses, in one graph for all."""
    net = ConvNet(1, 3, 4, width=3, depth=1)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    images, labels, lr = randn(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1]), torch.tensor(0.3).double()
    state = State(0, 2, images, labels, lr, images, lr)
    parts, given = [], []
    for _ in range(3):
        start = randn(net.num_parameters)
        index = torch.randperm(5, generator=generator)
        given.append((start, start + 0.1 * randn(len(start)), index))
        parts.append(Segment(0, 0, partial(tuple, given[-1])))
    steps = plan(net, images=images, steps=2, batch=3, memory_budget=None, dtype=torch.float64)
    gradients = mean_gradients(planned_iteration(steps, None, (2, 3)), state, parts)

    pixels, rate = images.clone().requires_grad_(), lr.clone().requires_grad_()
    losses = []
    for start, target, order in given:
        theta = start.clone().requires_grad_()
        for index in order.split((2, 3)):
            loss = torch.nn.functional.cross_entropy(net(theta, pixels[index]), labels[index])
            theta = theta - rate * torch.autograd.grad(loss, theta, create_graph=True)[0]
        losses.append((theta - target).square().sum() / (start - target).square().sum())
    mean = torch.stack(losses).mean()
    expected = (mean.detach(), *torch.autograd.grad(mean, (pixels, rate)))
    for name, mine, theirs in zip(("loss", "images", "lr"), gradients, expected, strict=True):
        assert_close(name, mine, theirs, 1e-10)


def test_a_checkpoint_holds_the_rates_of_all_steps(runs: dict[str, Path]) -> None:
    tensors, _ = load_tensors(runs["lr-per-step"] / "checkpoint.safetensors")
    assert tensors["lr"].shape == tensors["lr_velocity"].shape == (3,)


def test_a_student_that_diverges_is_not_compared(
    experts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = [*OPTIONS["truncated"], "--lr_teacher", "1e38", "--Iteration", "0"]
    assert run(*TOY, *experts, "--out", str(tmp_path), *flags) == 0
    assert "so the gradients are not compared" in caplog.text
    assert not records_of(tmp_path, "gradient")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss_ratio", "1"], "--loss_ratio 1.0: expected at least 0 and less than 1"),
        (["--depth_ratio", "1"], "--depth_ratio 1.0: expected at least 0 and less than 1"),
        (
            ["--loss_ratio", "0.5", "--depth_ratio", "0.25"],
            "--loss_ratio 0.5, --depth_ratio 0.25: expected one of them, found both",
        ),
        (["--student_mom", "-0.1"], "--student_mom -0.1: expected at least 0 and less than 1"),
        (["--student_l2", "-1"], "--student_l2 -1.0: expected at least 0"),
        (["--num_trajectories", "0"], "--num_trajectories 0: expected at least 1"),
    ],
)
def test_mistakes_are_told(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert run(*TOY, *experts, "--out", str(tmp_path / "run"), *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.json").exists()


def test_the_plan_knows_the_options_that_take_memory() -> None:
    def work(**options: Any) -> Work:
        given = DistillOptions(syn_steps=3, memory_budget="1GiB", **options)
        return plan_steps(given, ConvNet(1, 10, 8, 4, 1), (10, 1, 8, 8), torch.device("cpu"), "fp32").work

    plain = work()
    assert plain == dataclasses.replace(plain, batch=10, steps=3, moments=0, augment=True, path_gradient=False)
    assert work(student_mom=0.9) == dataclasses.replace(plain, moments=1)
    assert work(match_step="nearest") == dataclasses.replace(plain, path_gradient=True)
    assert work(no_aug=True) == dataclasses.replace(plain, augment=False)
    assert work(batch_syn=7) == dataclasses.replace(plain, batch=7)
    crops = work(texture=True, canvas_size=3, canvas_samples=2, batch_syn=7, no_aug=True)
    assert (crops.batch, crops.images, crops.input_shape) == (14, (10, 1, 24, 24), (1, 8, 8))
    assert crops.augment_bytes > 2 * plain.images[1:].numel() * 9 * 4
    assert work(lr_y=1.0).student != plain.student


def test_networks_are_evaluated_at_the_learned_rate_and_with_other_random_numbers_each_time(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(network: Any, train: Any, test: Any, lr: float, *_: Any, indices: Any = (), **__: Any) -> Accuracy:
        asked.append((lr, tuple(indices)))
        return Accuracy((0.5,))

    monkeypatch.setattr("mtt_fast.commands.run_loop.evaluate", measured)
    assert run(*TOY, *experts, "--lr_per_step", "--lr_lr", "1e-4", "--out", str(tmp_path)) == 0
    rates = {0: pytest.approx(0.01)} | {
        record["iteration"]: pytest.approx(record["lr"]) for record in records_of(tmp_path, "step")
    }
    assert asked[:-1] == [(rates[iteration], (iteration,)) for iteration in (0, 2, 4)]
    assert abs(asked[2][0] - 0.01) > 1e-5
    assert asked[-1] == (0.01, ())  # random real images
    assert float(SyntheticDataset.load(tmp_path / "synthetic.safetensors").lr) == pytest.approx(asked[2][0])


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
@pytest.mark.parametrize("place", range(4))
def test_a_loss_or_a_gradient_that_is_not_finite_makes_no_update(place: int, precision: Precision) -> None:
    made, magnitudes = (
        plan(ConvNet(width=4, depth=1), images=(2, 3, 32, 32), steps=1, precision=precision),
        torch.ones(4, dtype=torch.float64),
    )
    unasked: Any = None
    for value, gradients in ((1.0, []), (torch.nan, None), (torch.inf, None)):
        magnitudes[place] = value  # of the loss, or of the gradient to images, rate or labels
        pending = PendingGradients([], [], magnitudes, made, unasked)
        assert finish_gradients(unasked, pending).gradients == gradients


def test_the_plan_that_was_enough_is_returned_with_the_gradients_it_gave() -> None:
    first = plan(ConvNet(width=4, depth=1), images=(4, 3, 32, 32), steps=1, memory_budget=None)
    enough, made = first.smaller().smaller(), []
    gradients = [torch.tensor([3.0, -4.0]), torch.tensor(-0.5), torch.tensor([[1.0], [-7.0]])]

    def iteration_for(plan: Plan, *, graph: bool) -> Any:
        made.append((plan.microbatch, graph))

        def iteration(*_: Tensor) -> tuple[Tensor, ...]:
            if plan != enough:
                raise MemoryError
            return torch.tensor(2.0), *(gradient.clone() for gradient in gradients)

        return iteration

    images = torch.zeros(4, 3, 32, 32)
    state = State(0, 1, images, torch.arange(4), torch.tensor(0.1), images, torch.tensor(0.0))
    pending = start_gradients(state, [Segment(0, 0, lambda: (images, images))], first, iteration_for, graph=False)
    assert made == [(4, False), (2, False), (1, False)]
    assert (pending.plan, pending.graph) == (enough, False)
    assert pending.magnitudes.dtype == torch.float64
    assert pending.magnitudes.tolist() == [2.0, 4.0, 0.5, 7.0]
    finished = finish_gradients(state, pending)
    assert (finished.loss, finished.plan, finished.repeated) == (2.0, enough, False)
    assert finished.gradients is not None
    assert all(map(torch.equal, finished.gradients, gradients))


@pytest.mark.parametrize(("room", "both_are_held"), [(0, True), (-1, False), (None, False)])
def test_iterations_are_held_where_the_budget_has_room_for_all(room: int | None, both_are_held: bool) -> None:
    net, made = ConvNet(width=4, depth=1), []
    one, other = (plan(net, images=(4, 3, 32, 32), steps=steps, memory_budget=None) for steps in (1, 2))
    budget = None if room is None else one.peak_bytes + other.peak_bytes + room
    one, other = (dataclasses.replace(each, budget=budget) for each in (one, other))
    smaller = one.smaller()

    def make(plan: Plan, *, graph: bool) -> Any:
        made.append((plan, graph))
        return lambda: (plan, graph)  # a new one each time

    iteration_for = cached_iterations(make)
    first = iteration_for(one)
    assert iteration_for(one) is first
    iteration_for(other)
    assert (iteration_for(one) is first) == both_are_held
    assert made == [(one, True), (other, True)] + [(one, True)] * (not both_are_held)
    iteration_for(smaller)  # for the same work, so the larger one is never needed again
    del made[:]
    iteration_for(one, graph=False)
    iteration_for(one)
    assert made == [(one, False), (one, True)]


def test_the_gradients_of_the_next_iteration_are_compared(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[Tensor] = []

    def finished(*arguments: Any) -> Any:
        result = finish_gradients(*arguments)
        assert result.gradients is not None
        computed.append(result.gradients[0].clone())
        return result

    for module in ("command", "gradients"):
        monkeypatch.setattr(f"mtt_fast.distill.{module}.finish_gradients", finished)
    assert run(*TOY, *experts, *OPTIONS["truncated"], "--Iteration", "1", "--out", str(tmp_path)) == 0
    _, truncated, of_iteration, *_ = computed
    assert torch.equal(truncated, of_iteration)


def test_a_comparison_that_is_recorded_is_not_made_again(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(metrics=MetricsLog(tmp_path, 2))
    state: Any = SimpleNamespace(iteration=2)
    run.metrics.write("gradient", 2, cosine=0.5)
    unasked: Any = None
    compare_with_exact(run, state, unasked, unasked)
    run.metrics.close()
    assert [record["cosine"] for record in records_of(tmp_path, "gradient")] == [0.5]


def test_networks_are_evaluated_as_the_run_says(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(network: Any, train: Any, test: Any, lr: float, protocol: Any, **others: Any) -> Accuracy:
        named = ("num_networks", "seed", "precision", "at_once", "memory_budget")
        images = len(train(torch.Generator()).labels)
        asked.append((images, protocol.epochs, *(others[name] for name in named)))
        return Accuracy((0.0,))

    monkeypatch.setattr("mtt_fast.commands.run_loop.evaluate", measured)
    monkeypatch.setattr("mtt_fast.commands.run_loop.precision_on", lambda *_: "tf32")  # a CPU's is always fp32
    flags = "--Iteration 0 --ipc 2 --epoch_eval_train 4 --num_eval 3 --seed 7 --networks_at_once 2 --memory_budget 1GiB".split()
    assert run(*TOY, *experts, *flags, "--out", str(tmp_path)) == 0
    assert asked == [(20, 4, 3, 7, "tf32", 2, "1GiB")] * 2  # the set, and random real images
    assert (tmp_path / "best.safetensors").exists()  # even where no image is classified correctly


@pytest.mark.native
def test_what_overflows_in_fp16_is_repeated_in_tf32(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Run both precisions on a CPU, where the reference emulates them."""
    precision = "tf32"
    monkeypatch.setattr("mtt_fast.distill.command.precision_on", lambda *_, **__: precision)
    assert run(*TOY, *experts, "--out", str(tmp_path / "tf32")) == 0
    assert "fp16" not in caplog.text
    precision = "fp16"
    assert run(*TOY, *experts, "--out", str(tmp_path / "fp16")) == 0
    assert "repeated in tf32" not in caplog.text
    assert not torch.equal(images_of(tmp_path / "fp16"), images_of(tmp_path / "tf32"))
    monkeypatch.setattr("mtt_fast.kernels.reference.linear.LARGEST_COTANGENT", 2.0**40)
    assert run(*TOY, *experts, "--out", str(tmp_path / "overflowing")) == 0
    assert "iteration 4: a number is too large for fp16; repeated in tf32" in caplog.text
    assert torch.equal(images_of(tmp_path / "overflowing"), images_of(tmp_path / "tf32"))
    assert records_of(tmp_path / "overflowing", "step") == records_of(tmp_path / "tf32", "step")
    assert [summary_of(tmp_path / name)["iterations_repeated_in_tf32"] for name in ("tf32", "fp16", "overflowing")] == [
        0,
        0,
        4,
    ]


@pytest.mark.native
@pytest.mark.parametrize(("budget", "at_once"), [("auto", 2), ("least", 1)])
def test_auto_is_fp16_and_what_overflows_fits_in_its_memory(
    budget: str,
    at_once: int,
    experts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Choose on a CPU as on a GPU; the reference emulates both precisions."""
    pytest.importorskip("triton")
    made: list[bool] = []
    held: weakref.WeakSet[Any] = weakref.WeakSet()
    held_while_computing = []

    def watched(*arguments: Any, graph: bool = True) -> Any:
        iteration = iteration_of(*arguments, graph=graph)
        made.append(graph)

        def watched_iteration(*tensors: Tensor) -> tuple[Tensor, ...]:
            held_while_computing.append(len(held))
            return iteration(*tensors)

        held.add(watched_iteration)
        return watched_iteration

    chosen: list[str] = []

    def chosen_as_on_a_gpu(_: Any, network: Any, requested: Any, **options: Any) -> str:
        chosen.append(precision_on(torch.device("cuda"), network, requested, **options))
        return chosen[-1]

    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("mtt_fast.distill.command.precision_on", chosen_as_on_a_gpu)
    monkeypatch.setattr("mtt_fast.distill.command.iteration_of", watched)
    if budget == "least":
        toy = DistillOptions(syn_steps=3, microbatch=1)
        budget = str(plan_steps(toy, ConvNet(1, 10, 8, 4, 1), (10, 1, 8, 8), torch.device("cpu"), "tf32").peak_bytes)
    common = [*TOY, *experts, "--memory_budget", budget]
    assert run(*common, "--precision", "tf32", "--out", str(tmp_path / "tf32")) == 0
    assert run(*common, "--out", str(tmp_path / "auto")) == 0
    assert run(*common, "--precision", "fp16", "--out", str(tmp_path / "fp16")) == 0
    assert chosen == ["tf32", "fp16", "fp16"]
    assert torch.equal(images_of(tmp_path / "auto"), images_of(tmp_path / "fp16"))
    assert not torch.equal(images_of(tmp_path / "auto"), images_of(tmp_path / "tf32"))
    assert "repeated in tf32" not in caplog.text
    assert made == [True] * 3
    monkeypatch.setattr("mtt_fast.kernels.reference.linear.LARGEST_COTANGENT", 2.0**40)
    assert run(*common, "--out", str(tmp_path / "overflowing")) == 0
    assert caplog.text.count("a number is too large for fp16; repeated in tf32") == 4
    assert torch.equal(images_of(tmp_path / "overflowing"), images_of(tmp_path / "tf32"))
    assert len(held_while_computing) == 3 * 4 + 2 * 4
    # a recorded iteration keeps its memory for as long as it is held
    assert set(held_while_computing) == {*range(1, at_once + 1)}
    # both are captured once; or else the repetition never is, and what it takes the memory of is recorded again
    assert made[3:] == ([True] * 2 if at_once == 2 else [True, False] * 4)


@pytest.mark.native
@pytest.mark.parametrize("batch", [None, 60])
def test_what_is_planned_in_fp16_can_be_repeated_in_tf32_in_the_same_memory(batch: int | None) -> None:
    def plan_of(precision: Precision, **options: Any) -> Plan:
        given = DistillOptions(ipc=10, syn_steps=3, batch_syn=batch, **options)
        return plan_steps(given, ConvNet(3, 10, 32, 16, 3), (100, 3, 32, 32), torch.device("cpu"), precision)

    least: dict[Precision, int] = {
        precision: plan_of(precision, microbatch=1).peak_bytes for precision in ("fp16", "tf32")
    }
    assert least["fp16"] < least["tf32"]
    for budget in (least["tf32"], 3 * least["tf32"] // 2, 2 * least["tf32"], 20 * least["tf32"]):
        first = plan_of("fp16", memory_budget=str(budget))
        again = plan_in_tf32(first)
        assert again == plan_of("tf32", memory_budget=str(budget))
        assert max(first.peak_bytes, again.peak_bytes) <= budget
    # what fp16 alone would fit in is refused before the first iteration
    with pytest.raises(InputError, match=r"`memory_budget` \d+: expected at least"):
        plan_of("fp16", memory_budget=str(least["tf32"] - 1))
    assert plan_in_tf32(plan_of("fp16", microbatch=7)) == plan_of("tf32", microbatch=7)


@pytest.mark.native
def test_the_parameters_of_the_images_have_room_beside_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan_of(available: int, precision: Precision, budget: str = "auto", parameters: int = 1000) -> Plan:
        monkeypatch.setattr("mtt_fast.engine.memory_plan.free_bytes", lambda _: -(-available * 5 // 4))
        given = DistillOptions(syn_steps=3, memory_budget=budget)
        shape = (10, 3, 32, 32)
        learned = ImageParameters(parameters, in_checkpoint=3 * parameters)
        return plan_steps(
            given, ConvNet(3, 10, 32, 16, 3), shape, torch.device("cpu"), precision, image_parameters=learned
        )

    # float32 parameters with Adam's two averages, their copy in a module and its gradients
    assert plan_of(2**30, "tf32").budget == 2**30 - 5 * 4 * 1000
    assert plan_of(0, "tf32", budget="1GiB").budget == 2**30
    least = plan_of(2**30, "tf32", parameters=0)
    least = dataclasses.replace(least, microbatch=1, saved_steps=0)
    assert plan_of(least.peak_bytes, "fp16", parameters=0)
    with pytest.raises(InputError, match="`memory_budget` auto: expected at least"):  # for the repetition in tf32
        plan_of(least.peak_bytes, "fp16")
