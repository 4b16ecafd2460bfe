"""Test runs with a network of the user's own, and what they say after a change of its code."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mtt_fast import TrajectoryStore
from mtt_fast.analysis.__main__ import main as analysis
from mtt_fast.analysis.measured import finished_runs, measurements
from mtt_fast.baselines.command import main as baseline
from mtt_fast.commands import cli
from mtt_fast.convert.command import main as convert
from mtt_fast.cross.command import main as cross
from mtt_fast.data import load
from mtt_fast.distill.command import main as distill
from mtt_fast.evaluate import main as evaluate
from mtt_fast.experts.command import main as experts

TOY = (
    "--dataset digits --model nets.py:Net --num_experts 1 --train_epochs 2 --max_start_epoch 1 --expert_epochs 1 --syn_steps 2 "
    "--Iteration 2 --eval_it 2 --num_eval 1 --epoch_eval_train 1 --batch_real 128 --lr_img 50"
).split()
DC = "dc --dataset digits --model nets.py:Net --Iteration 1 --num_eval 1 --epoch_eval_train 1 --batch_real 8 --save_seconds 0".split()
NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, channel, num_classes, im_size):
        super().__init__()
        self.features = nn.Conv2d(channel, 4, 3, padding=1)
        self.classifier = nn.Linear(4 * im_size[0] * im_size[1], num_classes)

    def forward(self, images):
        return self.classifier(torch.tanh(self.features(images)).flatten(1))

class Noisy(Net):
    def forward(self, images):
        return super().forward(images) + torch.randn(1)

class Centred(Net):
    def forward(self, images):
        outputs = super().forward(images)
        return outputs - outputs.mean(0)

class Counting(Net):
    calls = 0

    def forward(self, images):
        self.calls += 1
        return super().forward(images) * self.calls

class OnTheHost(Net):
    def forward(self, images):
        return super().forward(images * torch.ones(1))

class Once(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):
        return gradient * 2

class NoDerivative(Net):
    def forward(self, images):
        return super().forward(images).detach()

class NoDerivativeOfMany(Net):
    def forward(self, images):
        outputs = super().forward(images)
        return outputs.detach() if len(images) == 20 else outputs

class Fails(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        raise RuntimeError("this kernel has no backward pass")

class NoBackward(Net):
    def forward(self, images):
        outputs = super().forward(images)
        return outputs if images.is_meta else Fails.apply(outputs)

class OneDerivative(Net):
    def forward(self, images):
        return Once.apply(super().forward(images) ** 2)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    load("digits", data_path="data", progress=False)
    Path("nets.py").write_text(NETS)
    return tmp_path


def run(command: Callable[[Sequence[str]], None], *flags: str) -> int:
    return cli.run(command, list(flags))


def change(before: str, after: str) -> None:
    """Change the code of the network."""
    assert NETS.count(before)
    Path("nets.py").write_text(NETS.replace(before, after))


def test_a_run_trains_experts_and_is_evaluated() -> None:
    assert run(distill, *TOY, "--out", "run") == 0
    assert TrajectoryStore("buffers/digits/Net").metadata(0).network["kind"] == "Net"
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["network"]["kind"] == "Net"
    assert "nets.py:Net" in summary["accuracy_by_network"]["distilled"]
    assert run(evaluate, "run", "--num_eval", "1", "--out", "result.json") == 0
    assert json.loads(Path("result.json").read_text())["model"] == "nets.py:Net"


def test_a_network_that_mixes_samples_is_told(caplog: pytest.LogCaptureFixture) -> None:
    for name, warned in (("Net", False), ("Centred", True)):
        assert (
            run(experts, *"--dataset digits --num_experts 1 --train_epochs 1 --model".split(), f"nets.py:{name}") == 0
        )
        assert ("the outputs of an image depend on the others of its batch" in caplog.text) == warned


def test_experts_of_another_version_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(distill, *TOY, "--out", "run") == 0
    change("torch.tanh", "torch.sin")
    for flags in (["--out", "other"], ["--out", "run", "--Iteration", "3"]):
        assert run(distill, *TOY, *flags) == 2
        assert (
            "Net had other outputs at the same parameters when the expert was trained; restore its code"
            in capsys.readouterr().err
        )
    change("class Noisy", "# a remark\nclass Noisy")
    assert run(distill, "--out", "run", "--resume", "--Iteration", "3") == 0


def test_experts_of_a_known_network_are_not_those_of_an_edited_copy(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(distill, *TOY, "--model", "ConvNetD1W4", "--out", "run") == 0
    Path("nets.py").write_text(
        """
from torch import nn

class ConvNetD1W4(nn.Module):
    def __init__(self, channel, num_classes, im_size):
        super().__init__()
        layers = nn.Conv2d(channel, 4, 3, padding=3), nn.GroupNorm(4, 4), nn.LeakyReLU(), nn.AvgPool2d(2)
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(144, num_classes)

    def forward(self, images):
        return self.classifier(self.features(images).flatten(1))
"""
    )
    assert run(distill, *TOY, "--model", "nets.py:ConvNetD1W4", "--out", "other") == 2
    assert "expected your own ConvNetD1W4, found ConvNetD1W4ARINAP, whose parameters" in capsys.readouterr().err
    own = "--dataset digits --model nets.py:ConvNetD1W4 --num_experts 1 --train_epochs 1 --buffer_path own".split()
    assert run(experts, *own) == run(convert, "own/digits/ConvNetD1W4", "moved", "--to", "experts") == 0
    assert Path("moved/digits/ConvNetD1W4").is_dir()


def test_a_baseline_does_not_continue_with_another_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(baseline, *DC, "--out", "run") == 0
    change("torch.tanh", "torch.sin")
    assert run(baseline, "dc", "--out", "run", "--resume", "--Iteration", "2") == 2
    assert (
        "Net had other outputs at the same parameters when the run began; restore its code" in capsys.readouterr().err
    )


def test_a_cell_of_another_version_is_measured_again() -> None:
    def cells() -> list[Any]:
        assert run(cross, "run", *"--models nets.py:Net --num_eval 1 --epoch_eval_train 1 --out table".split()) == 0
        return list(json.loads(Path("table/cross.json").read_text())["cells"])

    assert run(distill, *TOY, "--out", "run") == 0
    assert len(cells()) == len(cells()) == 1
    change("torch.tanh", "torch.sin")
    assert len(cells()) == 2


def test_accuracies_of_two_versions_give_no_score(capsys: pytest.CaptureFixture[str]) -> None:
    def score(distilled: str) -> int:
        return run(analysis, *f"score --full 90 --distilled {distilled}.json --random random.json".split())

    words = "--dataset digits --model nets.py:Net --num_eval 1 --epoch_eval_train 1 --out".split()
    assert run(baseline, *DC, "--out", "run") == 0
    assert run(evaluate, "random", *words, "random.json") == run(evaluate, "run", *words, "first.json") == 0
    change("torch.tanh", "torch.sin")
    assert run(evaluate, "run", *words, "second.json") == 0
    assert score("first") == 0
    assert score("second") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error
        == "error: --random: expected the nets.py:Net of the files before it, found another version of its code; evaluate again"
    )


def test_runs_of_two_versions_are_not_one_measurement() -> None:
    for out, seed in (("first", "0"), ("second", "1")):
        assert run(baseline, *DC, "--out", out, "--seed", seed) == 0
    change("torch.tanh", "torch.sin")
    assert run(baseline, *DC, "--out", "third", "--seed", "2") == 0
    (measured,) = measurements(finished_runs(["."])).values()
    assert sorted(len(each.runs) for each in measured) == [1, 2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Noisy", "expected the same outputs for the same arguments"),
        ("Counting", "expected the same outputs for the same arguments"),
        ("OnTheHost", "make its tensors on the device of the images, or dense buffers of a module"),
        ("OneDerivative", "once_differentiable"),
        ("NoDerivative", "expected a loss that depends on the parameters, found no gradient"),
    ],
)
def test_what_cannot_be_differentiated_is_refused_before_any_work(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for others in ([], ["--dry_run"]):
        assert run(distill, *TOY, "--out", "run", "--model", f"nets.py:{name}", *others) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --model nets.py:{name}: ")
        assert message in error
    if name != "OnTheHost":  # only a memory plan needs the count
        assert run(experts, "--dataset", "digits", "--model", f"nets.py:{name}") == 2
        assert message in capsys.readouterr().err
    assert not Path("buffers").exists()
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [(evaluate, "random --model"), (cross, "random --models"), (baseline, "random --out run --model")],
)
def test_what_an_evaluation_cannot_train_is_told(
    command: Callable[[Sequence[str]], None], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "nets.py:NoDerivative"
    assert run(command, *words.split(), name, *"--dataset digits --num_eval 1 --epoch_eval_train 1".split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: --model {name}: expected a loss that depends on the parameters, found no gradient")


@pytest.mark.parametrize(("command", "option"), [(evaluate, "--model"), (cross, "--models")])
def test_an_evaluation_tries_the_backward_pass_first(
    command: Callable[[Sequence[str]], None], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"random --dataset digits --num_eval 1 --epoch_eval_train 1 {option}".split()
    others = ["MLP"] if command is cross else []  # which is not trained first
    assert run(command, *words, *others, "nets.py:NoBackward") == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(
        "error: --model nets.py:NoBackward: RuntimeError: this kernel has no backward pass"
    )
    assert "random on MLP" not in error


def test_what_evaluations_of_a_distillation_cannot_train_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    name = "nets.py:NoDerivativeOfMany"
    assert run(distill, *TOY, "--out", "run", "--model", name, *"--ipc 2 --batch_syn 5".split()) == 2
    expected = f"error: --model {name}: expected a loss that depends on the parameters"
    assert capsys.readouterr().err.splitlines()[-1].startswith(expected)


def test_a_baseline_of_a_network_that_mixes_samples_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(baseline, *DC, "--model", "nets.py:Centred", "--out", "run") == 2
    expected = "error: --model nets.py:Centred: expected a network that does not mix the images of a batch"
    assert capsys.readouterr().err.splitlines()[-1].startswith(expected)
