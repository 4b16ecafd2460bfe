"""Check that a network that diverged is named as such wherever its accuracy is, and that an expert that holds NaN is named."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast import ConvNet, InputError, SyntheticDataset, TrajectoryStore, compress, evaluate
from mtt_fast.analysis.measured import measurements as grouped
from mtt_fast.baselines import command as baselines
from mtt_fast.commands import cli, tables
from mtt_fast.commands.accuracies import (
    accuracy_by_network,
    accuracy_fields,
    accuracy_record,
    format_accuracy,
    remarks_on,
)
from mtt_fast.cross import command as cross
from mtt_fast.cross.table import markdown
from mtt_fast.data import load
from mtt_fast.distill import command as distill
from mtt_fast.distill.evaluation import evaluate_sets
from mtt_fast.errors import Diverged
from mtt_fast.interop import export_experts
from mtt_fast.networks.by_name import network_by_name
from mtt_fast.storage.trajectories import write_expert
from mtt_fast.storage.waypoints import convexified
from mtt_fast.training.accuracy import count_correct
from mtt_fast.training.evaluation import Accuracy, has_diverged
from mtt_fast.training.evaluation import evaluate as measure
from mtt_fast.training.images import Images
from mtt_fast.training.protocols import EvaluationProtocol
from tests.interop.buffers import NET, flat, imported, metadata, save_buffers, trained

pytestmark = pytest.mark.usefixtures("no_curves")

TOY = (
    "--dataset digits --model ConvNetD1W4 --num_experts 2 --train_epochs 3 --max_start_epoch 2 --expert_epochs 1 --syn_steps 2 "
    "--Iteration 2 --eval_it 2 --num_eval 2 --epoch_eval_train 2 --batch_real 512 --save_seconds 0"
).split()


@pytest.mark.parametrize(
    ("losses", "state", "diverged"),
    [
        ([2.3, 1.0, 0.5], 1.0, False),
        ([2.3, 500.0, 0.5], 1.0, False),  # it came back
        ([2.3, 2.4, 2.5], 1.0, False),  # it has hardly begun
        ([2.3, 500.0, 2.6], 1.0, True),
        ([2.3, 1.0, math.nan], 1.0, True),
        ([2.3, math.inf, 0.1], 1.0, True),
        ([2.3, 1.0, 0.5], math.nan, True),
        ([2.3, 1.0, 0.5], -math.inf, True),
    ],
)
def test_losses_and_parameters_tell_whether_a_training_diverged(
    losses: list[float], state: float, diverged: bool
) -> None:
    assert bool(has_diverged(torch.tensor(losses), torch.ones(3), torch.tensor([0, state]))) is diverged
    assert bool(has_diverged(torch.tensor(losses), torch.ones(3))) is (diverged and math.isfinite(state))


def test_logits_that_are_not_finite_put_an_image_into_no_class() -> None:
    net = ConvNet(in_channels=1, num_classes=3, image_size=6, width=4, depth=1)
    images = Images(torch.randn(30, 1, 6, 6), torch.zeros(30).long())
    assert int(count_correct(net, torch.full((net.num_parameters,), math.nan), images)) == 0
    theta, pixels = net.init(), images.pixels.clone()
    labels = net(theta, pixels).argmax(1)
    pixels[7] = math.nan
    assert int(count_correct(net, theta, Images(pixels, labels))) == 29


@pytest.mark.parametrize("model", ["ConvNetD1W4", "ConvNetD1W4BN", "MLP"])
@pytest.mark.parametrize("best_epoch", [False, True])
def test_a_rate_that_is_too_large_is_told(model: str, best_epoch: bool, caplog: pytest.LogCaptureFixture) -> None:
    net = network_by_name(model, (1, 6, 6), 3)
    images = Images(torch.randn(12, 1, 6, 6), torch.arange(12) % 3)
    protocol = EvaluationProtocol(epochs=12, augment="none", best_epoch=best_epoch)
    good = measure(net, lambda _: images, images, 0.01, protocol, num_networks=2, seed=0)
    assert good.diverged == 0
    assert "diverged" not in good.record()
    assert not caplog.records
    bad = measure(net, lambda _: images, images, 1e9, protocol, num_networks=2, seed=0, name="mine")
    assert bad.values == (0.0, 0.0)
    assert bad.record()["diverged"] == 2
    assert str(bad) == f"0.00 % ± 0.00 (n = 2{', best epoch' if best_epoch else ''}, 2 diverged)"
    (warning,) = caplog.messages
    assert warning == "mine: 2 of 2 networks diverged at the learning rate 1e+09 and count as 0 %; a smaller one may do"


def test_a_network_that_diverged_counts_as_0_where_it_guesses_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtt_fast.training.evaluation.has_diverged", lambda *_: torch.tensor(True))
    net = network_by_name("MLP", (1, 6, 6), 3)
    images = Images(torch.randn(12, 1, 6, 6), torch.arange(12) % 3)
    result = measure(net, lambda _: images, images, 0.01, EvaluationProtocol(epochs=3), num_networks=2, seed=0)
    assert result.values == (0.0, 0.0)
    assert result.diverged == 2


def test_a_training_is_judged_by_the_losses_of_all_its_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def noted(losses: Tensor, *state: Tensor) -> Tensor:
        seen.append(losses)
        return has_diverged(losses, *state)

    monkeypatch.setattr("mtt_fast.training.evaluation.has_diverged", noted)
    net = network_by_name("MLP", (1, 6, 6), 3)
    images = Images(torch.randn(12, 1, 6, 6), torch.arange(12) % 3)
    protocol = EvaluationProtocol(epochs=21, augment="none", best_epoch=True)
    measure(net, lambda _: images, images, 0.01, protocol, num_networks=1, seed=0)
    assert [len(losses) for losses in seen] == [10, 20, 22]
    assert seen[2][:10].equal(seen[0])


def test_a_network_that_diverges_after_its_best_epoch_keeps_that_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    tests: list[bool] = []

    def after_the_first_test(*_: Tensor) -> Tensor:
        tests.append(len(tests) > 0)
        return torch.tensor(tests[-1])

    monkeypatch.setattr("mtt_fast.training.evaluation.has_diverged", after_the_first_test)
    net = network_by_name("MLP", (1, 6, 6), 3)
    images = Images(torch.randn(12, 1, 6, 6), torch.arange(12) % 3)
    protocol = EvaluationProtocol(epochs=20, augment="none", best_epoch=True)
    result = measure(net, lambda _: images, images, 0.01, protocol, num_networks=1, seed=0)
    assert tests == [False, *[True] * (len(tests) - 1)]
    assert len(tests) > 1
    assert result.values[0] > 0
    assert result.diverged == 0


def test_records_tell_how_many_networks_diverged() -> None:
    one, other = Accuracy((0.5, 0.0, 0.0), diverged=2), Accuracy((0.5, 0.6, 0.7), best_epoch=True)
    line = accuracy_fields({"A": one, "B": other})
    assert (line["diverged"], line["diverged/A"], line.get("diverged/B")) == (2, 2, None)
    assert accuracy_record(line)["diverged"] == 2
    by_network = accuracy_by_network(line, "A")
    assert by_network["A"]["diverged"] == 2
    assert "diverged" not in by_network["B"]
    assert format_accuracy(line) == "16.67 % ± 28.87 (2 of 3 diverged)"
    assert "diverged" not in accuracy_fields({"B": other})
    record = one.record() | {"epoch": "best"}
    assert remarks_on(record) == " (best epoch, 2 of 3 diverged)"
    for shown in (tables.percent(record, digits=2), tables.percent(record)):
        assert shown.endswith(remarks_on(record))
    cell = {"set": "mine", "question": {"network": "A", "dataset": "x", "ipc": 1}, "accuracy": record}
    assert "(best epoch, 2 of 3 diverged)" in markdown([cell], [], "p")


def test_the_papers_tables_tell_how_many_networks_diverged() -> None:
    def summary(seed: int, **label: Any) -> dict[str, Any]:
        options = {"dataset": "digits", "model": "MLP", "ipc": 1, "seed": seed}
        return {"accuracy": {"distilled": {"mean": 0.5, "std": 0.1, "n": 5, **label}}, "options": options}

    ((alone,),) = grouped({Path("a"): summary(0, diverged=3)}).values()
    assert tables.percent(alone.record()) == "50.0 ± 10.0 (3 of 5 diverged)"
    ((both,),) = grouped({Path("a"): summary(0, diverged=3), Path("b"): summary(1)}).values()
    assert tables.percent(both.record()) == "50.0 ± 0.0 (1 of 2 diverged)"


def a_set(lr: float = 0.02) -> SyntheticDataset:
    data = load("digits", data_path="data", progress=False)
    recipe: dict[str, Any] = {"dataset": "digits", "model": "ConvNetD1W4", "num_eval": 2, "epoch_eval_train": 9}
    return SyntheticDataset(
        torch.randn(10, 1, 8, 8), torch.arange(10), torch.tensor(lr), data.class_names, data.mean, data.std, recipe=recipe
    )  # fmt: skip


def test_an_evaluation_without_a_trained_network_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    a_set(1e6).save("set.safetensors")
    assert cli.run(evaluate.main, ["set.safetensors", "--out", "x.json"]) == 2
    assert "error: all 2 networks diverged, so there is no accuracy; use a smaller" in capsys.readouterr().err
    accuracy = json.loads(Path("x.json").read_text())["accuracy"]
    assert (accuracy["mean"], accuracy["n"], accuracy["diverged"]) == (0, 2, 2)


def test_a_table_tells_whose_networks_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    a_set(1e6).save("bad.safetensors")
    a_set().save("good.safetensors")
    flags = "--num_eval 2 --epoch_eval_train 9 --models ConvNetD1W4 --out table".split()
    assert cli.run(cross.main, ["bad.safetensors", *flags]) == 2
    assert "all 2 networks diverged" in capsys.readouterr().err
    assert "0.0 ± 0.0 (2 of 2 diverged)" in Path("table/cross.md").read_text()
    assert cli.run(cross.main, ["bad.safetensors", "good.safetensors", *flags]) == 0  # measured once, told again
    assert Path("table/cross.md").read_text().count("diverged") == 1


def test_the_summary_of_a_baseline_tells_how_many_networks_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = (
        "random --dataset digits --model ConvNetD1W4 --num_eval 2 --epoch_eval_train 9 --lr_net 1e6 --out run".split()
    )
    assert cli.run(baselines.main, flags) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["accuracy"]["distilled"]["diverged"] == 2
    assert summary["accuracy_by_network"]["distilled"]["ConvNetD1W4"]["diverged"] == 2
    assert "(2 of 2 diverged)" in summary["text"]


@pytest.mark.parametrize("name", ["images", "labels", "lr"])
def test_a_distillation_whose_set_is_not_finite_is_told_apart(name: str) -> None:
    state = {"images": torch.zeros(1), "labels": torch.zeros(1).long(), "lr": torch.ones(()), "iteration": 7}
    state[name] = torch.tensor(math.nan)

    class Job:
        folder = Path("run")

    with pytest.raises(
        Diverged, match=f"run: iteration 7: the {'learning rates' if name == 'lr' else name} are no longer"
    ):
        evaluate_sets(Job(), type("S", (), state)(), None)  # type: ignore[arg-type]


def write_expert_with_nan(folder: Path, monkeypatch: pytest.MonkeyPatch, index: int, epoch: int) -> None:
    """Put NaN into an expert's file, past the check, with the checksums that belong to it."""
    store = TrajectoryStore(folder)
    rows = torch.stack([store.read(index, e) for e in range(store.epochs(index) + 1)])
    rows[epoch, 5] = math.nan
    with monkeypatch.context() as patch:
        patch.setattr("mtt_fast.storage.trajectories._problem_with", lambda *_: None)
        write_expert(folder, index, rows, store.metadata(index))


def test_a_distillation_names_the_expert_that_holds_nan(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(experts[3], tmp_path / "buffers")
    (folder,) = {path.parent for path in (tmp_path / "buffers").rglob("expert_0000.safetensors")}
    for index in (0, 1):
        write_expert_with_nan(folder, monkeypatch, index, 2)
    flags = [*TOY, "--data_path", experts[1], "--buffer_path", str(tmp_path / "buffers"), "--min_start_epoch", "1"]
    assert cli.run(distill.main, [*flags, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{folder}/expert_000" in error
    assert "the expert's parameters after epoch 2 are not finite" in error
    assert "--lr" not in error
    assert TrajectoryStore(folder).read(0, 3).isfinite().all()


def test_every_reader_names_an_expert_that_holds_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_buffers(tmp_path / "theirs", [trained(0)], 1)
    store = imported(tmp_path / "theirs", tmp_path / "ours")
    write_expert_with_nan(store.folder, monkeypatch, 0, 2)
    message = r"expert_0000\.safetensors: the expert's parameters after epoch 2 are not finite"
    with pytest.raises(InputError, match=message):
        TrajectoryStore(store.folder).read(0, 1.5)  # between it and the epoch before
    with pytest.raises(InputError, match=message):
        compress.compress(store.folder, tmp_path / "compressed", 2, smooth=False)
    with pytest.raises(InputError, match=message):
        list(export_experts(TrajectoryStore(store.folder), tmp_path / "back"))
    assert not (tmp_path / "back").exists()
    assert not list((tmp_path / "compressed").glob("*.safetensors"))


def test_an_expert_that_is_not_finite_is_not_written_and_its_origin_told(tmp_path: Path) -> None:
    rows = flat(trained(0))
    rows[1:, 0] = math.inf
    accuracy = [0.5] * len(rows)
    ours = metadata(hyperparameters={"lr": 0.5}, accuracy=accuracy)
    with pytest.raises(
        InputError,
        match=r"after epoch 1 are not finite; its training diverged; train with a smaller learning rate than 0\.5 \(`expert_lr`, or `lr_teacher` of",
    ):
        write_expert(tmp_path, 0, rows, ours)
    theirs = metadata(hyperparameters={"imported_from": "replay_buffer_0.pt, expert 3"}, accuracy=accuracy)
    with pytest.raises(
        InputError, match=r"epoch 1 are not finite; they are not finite in replay_buffer_0\.pt, expert 3"
    ):
        write_expert(tmp_path, 0, rows, theirs)
    points, course = convexified(flat(trained(0)), NET.layout.sizes, (0, 2, 3), smooth=False)
    points[1] = math.nan
    with pytest.raises(InputError, match=r"after epoch 2 are not finite"):  # of a waypoint, the epoch
        write_expert(tmp_path, 0, points, theirs, course=course)
    assert not list(tmp_path.iterdir())
