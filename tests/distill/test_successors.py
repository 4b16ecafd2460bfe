"""Test successors' options around the matching: the range of start epochs, a threshold, averaged images."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtt_fast import FlatModule, InputError, SyntheticDataset
from mtt_fast.distill.command_line import parse_options
from mtt_fast.distill.options import DistillOptions
from mtt_fast.distill.segments import read_segment, start_epochs
from mtt_fast.distill.updates import update
from mtt_fast.networks.protocol import Network
from mtt_fast.storage.checkpoint import State, load_checkpoint, save_checkpoint
from mtt_fast.storage.metrics import read_records
from mtt_fast.storage.tensor_files import load_tensors
from mtt_fast.training.evaluation import Accuracy
from mtt_fast.training.evaluation import evaluate as measure
from tests.distill.command_runs import TOY_OF_THREE as TOY
from tests.distill.command_runs import records_of, run, summary_of


def test_the_range_of_start_epochs_grows_linearly() -> None:
    options = DistillOptions(
        min_start_epoch=3, current_max_start_epoch=10, max_start_epoch=20, expansion_end_epoch=1000
    )
    for iteration in (0, 1, 99, 100, 550, 999, 1000, 5000):
        upper = min(10 + int((20 - 10) * iteration / 1000), 20)  # as DATM's code has it
        assert start_epochs(options, iteration) == range(3, upper), iteration
    assert start_epochs(DistillOptions(max_start_epoch=7), 0) == range(7)


def test_the_start_is_multiplied_by_noise_and_the_target_is_not() -> None:
    class Experts:
        folder = Path("buffers")

        def __len__(self) -> int:
            return 2

        def read(self, _: int, row: float) -> torch.Tensor:
            parameters = torch.arange(-10000, 10001) / 10000 * (1 + row)  # one of them is 0
            return parameters.clone()

    def segment(noise: float, number: int) -> tuple[torch.Tensor, ...]:
        options = DistillOptions(syn_steps=2, noise_start=noise)
        run: Any = SimpleNamespace(options=options, experts=Experts())
        return read_segment(run, lambda tensors: lambda: tensors, torch.zeros(4, 1, 8, 8), number).tensors()

    for number in (0, 7):
        (start, target, *_), (noisy, same_target, *_) = segment(0.0, number), segment(0.05, number)
        assert torch.equal(target, same_target)
        assert float(noisy[10000]) == 0
        factors = (noisy / start)[start != 0]
        assert float(factors.mean()) == pytest.approx(1, abs=2e-3)
        assert float(factors.std()) == pytest.approx(0.05, rel=0.03)
        assert all(torch.equal(*pair) for pair in zip(segment(0.05, number), segment(0.05, number), strict=True))
    assert not torch.equal(segment(0.05, 0)[0] / segment(0.0, 0)[0], segment(0.05, 7)[0] / segment(0.0, 7)[0])


def test_the_rate_of_the_images_halves_after_every_2000_iterations() -> None:
    options = DistillOptions(lr_img=8.0, lr_decay=True)
    images = torch.zeros(1, 1, 2, 2)
    for iteration, rate in ((1, 8.0), (2000, 8.0), (2001, 4.0), (4000, 4.0), (4001, 2.0)):
        state = State(iteration, 1, images.clone(), torch.arange(1), torch.tensor(0.1), images.clone(), torch.zeros(()))
        update(options, state, torch.ones_like(images), torch.zeros(()))
        assert torch.equal(state.images, torch.full_like(images, -rate)), iteration
    for iterations, is_told in ((2000, True), (2001, False)):
        remarks = dataclasses.replace(options, Iteration=iterations).remarks(())
        assert any(remark.startswith("--lr_decay has no effect") for remark in remarks) == is_told
    state.iteration = 4001
    update(dataclasses.replace(options, lr_decay=False), state, torch.zeros_like(images), torch.zeros(()))
    assert torch.equal(state.images, torch.full_like(images, -2.0 - 8.0 / 2))  # the momentum is 0.5


@pytest.mark.parametrize(
    ("flags", "is_told"),
    [
        ("--max_start_epoch 4 --Iteration 19", True),
        ("--max_start_epoch 4 --Iteration 20", False),
        ("--max_start_epoch 4 --Iteration 0", False),
        ("--max_start_epoch 2 --Iteration 19", False),
    ],
)
def test_a_range_that_does_not_grow_to_its_end_is_told(
    flags: str, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    parse_options([*TOY, "--current_max_start_epoch", "2", "--expansion_end_epoch", "20", *flags.split()])
    line = (
        "--expansion_end_epoch 20 is beyond --Iteration 19: the bound on the start epoch, 2 at first, does not reach "
        "--max_start_epoch 4"
    )
    assert caplog.messages.count(line) == is_told
    assert sum("beyond --Iteration" in told for told in caplog.messages) == is_told


@pytest.mark.parametrize("more", ["", "--continuous_start --num_trajectories 2"])
def test_a_run_starts_within_the_range(experts: list[str], tmp_path: Path, more: str) -> None:
    flags = (
        "--min_start_epoch 1 --current_max_start_epoch 2 --expansion_end_epoch 20 --Iteration 30 --eval_it 30".split()
    )
    assert run(*TOY, *experts, "--out", str(tmp_path), "--num_eval", "1", *flags, *more.split()) == 0
    drawn = [record["start_epoch"] for record in records_of(tmp_path, "step")]
    assert all(isinstance(epoch, float if more else int) for epoch in drawn)
    epochs = [int(epoch) for epoch in drawn]
    assert set(epochs[:10]) == {1}
    assert set(epochs[10:20]) == {1, 2}
    assert max(epochs[20:]) == 3
    assert min(epochs) == 1


def test_iterations_above_the_threshold_change_nothing_and_are_counted_apart(
    experts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    free, bound = tmp_path / "free", tmp_path / "bound"
    more = ["--Iteration", "30", "--eval_it", "30", "--num_eval", "1"]
    assert run(*TOY, *experts, "--out", str(free), *more, "--threshold", "1e9") == 0
    assert summary_of(free)["iterations_above_threshold"] == 0
    assert run(*TOY, *experts, "--out", str(bound), *more, "--threshold", "1e-9", "--ema_decay", "0.5") == 0
    assert "is above --threshold 1e-09 and no update is made" in caplog.text
    summary = summary_of(bound)
    assert (summary["iterations_above_threshold"], summary["skipped_iterations"]) == (30, 0)
    left = records_of(bound, "above_threshold")
    assert left[0]["loss"] == records_of(free, "step")[0]["loss"]
    assert not records_of(bound, "step")
    tensors, _ = load_tensors(bound / "checkpoint.safetensors")
    start = SyntheticDataset.load(bound / "best.safetensors").images  # that of iteration 0, as no other was better
    assert torch.equal(tensors["images"], start)
    assert torch.equal(tensors["ema"], start)
    assert not tensors["images_velocity"].any()
    assert float(tensors["lr"]) == pytest.approx(0.01)


def test_a_loss_at_the_threshold_passes(experts: list[str], tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert run(*TOY, *experts, "--out", str(whole)) == 0
    first = records_of(whole, "step")[0]["loss"]
    assert run(*TOY, *experts, "--out", str(half), "--threshold", repr(first), "--Iteration", "1") == 0
    assert summary_of(half)["iterations_above_threshold"] == 0


def test_the_average_is_evaluated_on_networks_of_its_own(experts: list[str], tmp_path: Path) -> None:
    """Set the decay to 0, so that the average is the images and networks trained on nothing before reach the same accuracy."""
    same, slow = tmp_path / "same", tmp_path / "slow"
    assert run(*TOY, *experts, "--out", str(same), "--ema_decay", "0", "--epoch_eval_train", "5") == 0
    raw, averaged = (records_of(same, kind) for kind in ("evaluation", "ema_evaluation"))
    assert [record["iteration"] for record in averaged] == [0, 2, 4]
    for one, other in zip(raw, averaged, strict=True):
        assert {**one, "kind": "", "checksum": ""} == {**other, "kind": "", "checksum": ""}
    assert run(*TOY, *experts, "--out", str(slow), "--ema_decay", "0.9") == 0
    sets = {name: SyntheticDataset.load(slow / f"{name}.safetensors") for name in ("synthetic", "ema", "best_ema")}
    assert float((sets["synthetic"].images - sets["ema"].images).abs().max()) > 1e-3
    assert torch.equal(sets["synthetic"].labels, sets["ema"].labels)
    accuracy = summary_of(slow)["accuracy"]
    last = records_of(slow, "ema_evaluation")[-1]
    assert accuracy["ema"] == {"mean": last["accuracy_mean"], "std": last["accuracy_std"], "n": 2}
    best = max(record["accuracy_mean"] for record in records_of(slow, "ema_evaluation"))
    assert accuracy["best_ema_evaluation_chosen_on_the_test_images"]["mean"] == best
    assert "ema" not in summary_of_a_run_without(experts, tmp_path)["accuracy"]


def test_a_run_that_dies_between_two_evaluations_goes_on_with_the_second(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = [*TOY, *experts, "--ema_decay", "0.9"]
    assert run(*words, "--out", str(whole)) == 0
    dies, evaluated = True, list[tuple[str, tuple[int, ...]]]()

    def dying(*arguments: Any, name: str, indices: tuple[int, ...], **options: Any) -> Accuracy:
        if dies and (name[:7], indices) == ("average", (2,)):
            raise SystemExit
        evaluated.append((name[:7], indices))
        return measure(*arguments, name=name, indices=indices, **options)

    monkeypatch.setattr("mtt_fast.commands.run_loop.evaluate", dying)
    with pytest.raises(SystemExit):
        run(*words, "--out", str(broken))
    dies = False
    evaluated.clear()
    assert run("--out", str(broken), "--resume") == 0
    assert evaluated == [("average", (2,)), ("distill", (4,)), ("average", (4,)), ("random ", ())]
    assert read_records(broken / "metrics.jsonl") == read_records(whole / "metrics.jsonl")
    accuracies = [summary_of(folder)["accuracy"] for folder in (broken, whole)]
    assert accuracies[0] == accuracies[1]


def summary_of_a_run_without(experts: list[str], folder: Path) -> dict[str, Any]:
    assert run(*TOY, *experts, "--out", str(folder / "without"), "--Iteration", "0") == 0
    assert not (folder / "without" / "ema.safetensors").exists()
    return summary_of(folder / "without")


EVERYTHING = (
    "--min_start_epoch 1 --current_max_start_epoch 2 --expansion_end_epoch 3 --ema_decay 0.9 "
    "--pix_init samples_predicted_correctly --ipc 2 --batch_syn 7 --num_eval 1 --eval_it 3"
).split()


@pytest.mark.parametrize(
    "labels", ["--lr_y 2 --label_init experts --threshold 0.967", "--teacher_label --threshold 0.9868"]
)
def test_resumed_with_everything_is_bit_identical_to_uninterrupted(
    experts: list[str], tmp_path: Path, labels: str
) -> None:
    chosen = [*EVERYTHING, *labels.split()]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*TOY, *experts, "--out", str(whole), *chosen, "--Iteration", "6") == 0
    assert run(*TOY, *experts, "--out", str(parts), *chosen, "--Iteration", "3") == 0
    assert run("--out", str(parts), "--resume", "--Iteration", "6") == 0
    for name in ("synthetic", "best", "ema", "best_ema", "checkpoint"):
        first, second = (load_tensors(folder / f"{name}.safetensors")[0] for folder in (whole, parts))
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert torch.equal(tensor, second[key]), (name, key)
    for kind in ("step", "above_threshold"):
        assert records_of(whole, kind) == records_of(parts, kind)
        assert records_of(whole, kind)


def test_a_run_stopped_between_its_two_evaluations_makes_the_second_one_later(
    experts: list[str], tmp_path: Path
) -> None:
    flags = [*TOY, *experts, "--out", str(tmp_path), "--ema_decay", "0.9"]
    assert run(*flags) == 0
    whole = records_of(tmp_path, "ema_evaluation")
    metrics, summary = tmp_path / "metrics.jsonl", tmp_path / "summary.json"
    lines = metrics.read_text().splitlines(keepends=True)
    last = max(place for place, line in enumerate(lines) if '"ema_evaluation"' in line)
    metrics.write_text("".join(lines[:last]))
    before = [record for record in read_records(metrics) if record["kind"].endswith("evaluation")]
    state = load_checkpoint(tmp_path, torch.device("cpu"))
    assert state is not None
    save_checkpoint(tmp_path, state, before)  # which has the evaluations too
    summary.unlink()
    assert run(*flags) == 0
    assert records_of(tmp_path, "ema_evaluation") == whole
    assert len(records_of(tmp_path, "evaluation")) == 3


MISTAKES = [
    (["--min_start_epoch", "4"], "--min_start_epoch 4: expected less than --max_start_epoch 4"),
    (["--min_start_epoch", "-1"], "--min_start_epoch -1: expected at least 0"),
    (["--current_max_start_epoch", "2"], "--current_max_start_epoch 2: expected --expansion_end_epoch with it"),
    (["--expansion_end_epoch", "9"], "--expansion_end_epoch 9: has no effect without --current_max_start_epoch"),
    (
        ["--current_max_start_epoch", "5", "--expansion_end_epoch", "9"],
        "--current_max_start_epoch 5: expected at most --max_start_epoch 4",
    ),
    (
        ["--current_max_start_epoch", "2", "--expansion_end_epoch", "9", "--min_start_epoch", "2"],
        "--min_start_epoch 2: expected less than --current_max_start_epoch 2",
    ),
    (["--threshold", "0"], "--threshold 0.0: expected more than 0"),
    (["--ema_decay", "1"], "--ema_decay 1.0: expected at least 0 and less than 1"),
    (["--mom_y", "1.5"], "--mom_y 1.5: expected at least 0 and less than 1"),
    (["--lr_y", "-1"], "--lr_y -1.0: expected at least 0"),
    (["--lr_y", "1", "--teacher_label"], "--teacher_label, --lr_y: expected one of them, found both"),
    (["--label_init", "experts"], "--label_init experts: has no effect without --lr_y"),
    (["--protocol", "ddranking", "--epoch_eval_train", "0"], "`epoch_eval_train` 0: expected at least 1 with"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_mistakes_are_told_before_anything_is_read(flags: list[str], message: str) -> None:
    with pytest.raises(InputError) as told:
        parse_options([*TOY, *flags])
    assert str(told.value).startswith(message)


def test_a_precision_that_a_network_of_the_pool_lacks_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def for_convnet_alone(device: torch.device, network: Network, precision: str) -> str:
        if isinstance(network, FlatModule):
            raise InputError("--precision bf16: only the fused step of ConvNet supports it")
        return "fp32"

    monkeypatch.setattr("mtt_fast.distill.checks.precision_on", for_convnet_alone)
    flags = ["--eval_mode", "A", "--buffer_path", str(tmp_path / "buffers"), "--out", str(tmp_path / "run")]
    assert run(*TOY, "--data_path", str(tmp_path / "data"), *flags) == 2
    assert "--precision bf16: only the fused step" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "buffers").exists()


def test_the_first_of_equal_evaluations_is_the_best(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check the file and the summary."""
    monkeypatch.setattr("mtt_fast.commands.run_loop.evaluate", lambda *_, **__: Accuracy((0.5, 0.5)))
    assert run(*TOY, *experts, "--out", str(tmp_path)) == 0
    assert SyntheticDataset.load(tmp_path / "best.safetensors").recipe["iterations"] == 0
    assert summary_of(tmp_path)["accuracy"]["best_evaluation_chosen_on_the_test_images"]["iteration"] == 0


def test_a_summary_names_the_network_that_was_tested_in_place_of_the_model(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtt_fast.commands.run_loop.evaluate", lambda *_, **__: Accuracy((0.5, 0.5)))
    for mode, words in (("A", "; the images were tested on ConvNetAS"), ("C", "")):
        assert run(*TOY, *experts, "--eval_mode", mode, "--out", str(tmp_path / mode)) == 0
        _, tested, network = summary_of(tmp_path / mode)["text"].partition("; the images were tested on ")
        assert tested + network == words
