"""Test the comparison of precisions with float64: kernels, golden cases, a distillation, and trainings that are wrong."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench import gate, kernels, training
from bench.__main__ import main
from bench.cases import make_case
from bench.iterations import NamedCase, run_cases
from bench.precision import gradients_of
from mtt_fast import ConvNet
from mtt_fast.commands import cli
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.distill.options import DistillOptions
from mtt_fast.storage.expert_metadata import ExpertMetadata
from mtt_fast.storage.identity import DatasetIdentity
from mtt_fast.storage.run_folder import write_config
from mtt_fast.storage.trajectories import write_expert
from mtt_fast.testing import relative_error
from mtt_fast.training.images import Images
from mtt_fast.training.optimizers import Sgd
from tests.bench.helpers import CPU, SHAPE, STEP, TINY, bench, rows_of

TOY_RUN = (
    "--Iteration 3 --num_experts 1 --train_epochs 3 --max_start_epoch 1 --syn_steps 2 --num_eval 1 --epoch_eval_train 2 --device cpu"
).split()


@pytest.mark.native
def test_the_benchmark_of_precision_runs(tmp_path: Path) -> None:
    bench("precision", *SHAPE, *STEP, "--out", str(tmp_path), "--name", "found")
    (row,) = rows_of(tmp_path, "found")
    assert row["case"].startswith("random, ConvNet depth 2 width 4")
    errors = {name: row[name]["images"] for name in ("fp32", "tf32", "fp16", "bf16")}
    assert errors["fp32"] < 1e-4 < errors["tf32"] < errors["bf16"] < 0.5
    assert row["of_tf32"] == {name: error / errors["tf32"] for name, error in errors.items()}
    assert row["of_tf32"]["fp16"] < 2


@pytest.mark.native
def test_a_distillation_is_compared_in_each_precision(tmp_path: Path) -> None:
    bench("distillation", *TOY_RUN, "--out", str(tmp_path), "--name", "found")
    rows = {row["precision"]: row for row in rows_of(tmp_path, "found")}
    assert list(rows) == ["fp32", "tf32", "fp16", "bf16"]
    exact = rows["fp32"]["loss"]
    assert 0 < abs(rows["tf32"]["loss"] / exact - 1) < 1e-2  # of the last iteration, after two updates of the images
    assert 0 < abs(rows["fp16"]["loss"] / exact - 1) < 1e-2
    assert len({row["loss"] for row in rows.values()}) == 4
    assert all(0 <= row["accuracy"]["mean"] <= 1 for row in rows.values())
    assert all((row["skipped"], row["repeated"]) == (0, 0) for row in rows.values())


@pytest.mark.native
def test_iterations_that_are_too_large_for_fp16_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtt_fast.kernels.reference.linear.LARGEST_COTANGENT", 2.0**40)
    bench("distillation", *TOY_RUN, "--precisions", "fp16", "--out", str(tmp_path), "--name", "found")
    (row,) = rows_of(tmp_path, "found")
    assert (row["skipped"], row["repeated"]) == (0, 3)


@pytest.mark.native
def test_the_precision_of_golden_cases_is_measured(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench(
        "precision",
        *SHAPE,
        *STEP,
        "--precisions",
        "fp32",
        "--golden",
        str(golden),
        "--out",
        str(tmp_path),
        "--name",
        "found",
    )
    rows = {row["case"]: row["fp32"] for row in rows_of(tmp_path, "found")[1:]}
    assert set(rows) == {
        f"golden {name}" for name in ("cifar-d3-n5", "rgb64-d4-n3", "rgb128-d5-n2", "soft-labels-d3-n6")
    }
    assert all(error < 1e-4 for errors in rows.values() for error in errors.values())
    assert "labels" in rows["golden soft-labels-d3-n6"]
    assert cli.run(main, ["precision", *SHAPE, *STEP, "--golden", str(tmp_path)]) == 2
    assert "expected golden cases, found none" in capsys.readouterr().err


@pytest.mark.native
def test_the_precision_of_a_distillation_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = DistillOptions(
        dataset="digits", model="ConvNetD2W8", buffer_path=str(tmp_path), syn_steps=3, expert_epochs=2, student_mom=0.5,
        student_dampening=0.2, lr_y=1.0,
    )  # fmt: skip
    net, generator, half = ConvNet(1, 10, 8, 8, 2), torch.Generator().manual_seed(0), (0.5,)
    names = tuple("0123456789")
    identity = DatasetIdentity("digits", names, (1, 8, 8), half, half, "none", "f00d")
    metadata = ExpertMetadata.of(net, identity, accuracy=[0.5] * 5)
    write_expert(tmp_path / "digits" / "ConvNetD2W8", 0, torch.stack([net.init(generator) for _ in range(5)]), metadata)
    run = tmp_path / "run"
    write_config(run, asdict(options))
    images, labels = torch.randn(10, 1, 8, 8, generator=generator), torch.randn(10, 10, generator=generator)
    SyntheticDataset(images, labels, torch.tensor(0.01), names, half, half, label_kind="logits").save(
        run / "synthetic.safetensors"
    )
    given = ("precision", *SHAPE, *STEP, "--runs", str(run), "--out", str(tmp_path))
    bench(*given, "--starts", "2", "--name", "found")
    bench(*given, "--name", "last")
    assert [row["case"] for row in rows_of(tmp_path, "found")[1:]] == ["run, epoch 1", "run, epoch 2"]
    assert rows_of(tmp_path, "last")[1:] == rows_of(tmp_path, "found")[2:]
    (last,) = run_cases(run, 1)
    assert last.case.lr == pytest.approx(0.8 * 0.01)  # the rate of a student whose gradients are dampened
    for row in rows_of(tmp_path, "found")[1:]:
        assert {"images", "labels", "lr", "path"} == set(row["fp16"])
        assert row["fp32"]["labels"] < row["fp16"]["labels"] < row["bf16"]["labels"]
    for flags, problem in {
        ("--starts", "0"): "--starts 0: expected at least 1",
        ("--runs", str(tmp_path)): "expected the folder of a distillation, found none",
    }.items():
        assert cli.run(main, [*given, *flags]) == 2
        assert problem in capsys.readouterr().err
    write_config(run, asdict(options) | {"option_of_another_version": 1})
    assert cli.run(main, [*given]) == 2
    assert "config.toml: unknown option 'option_of_another_version'" in capsys.readouterr().err


def test_the_rule_of_a_distillations_steps_is_its_own() -> None:
    case = make_case(TINY)
    plain = gradients_of(NamedCase("plain", case, "indices"), torch.float64, "fp32", CPU)
    for rule in ({"momentum": 0.5}, {"weight_decay": 0.5}):
        other = gradients_of(NamedCase("other", case, "indices", **rule), torch.float64, "fp32", CPU)
        assert relative_error(other["path"], plain["path"]) > 1e-3


def test_a_wrong_kernel_shows() -> None:
    operation = next(op for op in kernels.operations(TINY, CPU) if op.name == "conv3x3")
    right = kernels.errors(operation)
    wrong = kernels.errors(operation, lambda *arguments: 1.01 * operation.function()(*arguments))
    assert right["error_float64"] <= kernels.FLOAT64_TOLERANCE
    assert right["error"] <= kernels.FLOAT32_TOLERANCE
    assert wrong["error_float64"] == pytest.approx(0.01)


def test_a_wrong_training_loop_shows() -> None:
    def forgets_momentum(
        net: ConvNet, start: torch.Tensor, images: Images, sgd: Sgd, augment: str, generator: torch.Generator
    ) -> torch.Tensor:
        return training.mtt_fast_loop(
            net, start, images, Sgd(sgd.lr, 0.0, sgd.weight_decay, sgd.batch_size), augment, generator
        )

    sgd = Sgd(0.1, 0.9, 5e-4)
    for loop, _ in training.LOOPS.values():
        assert training.float64_error(loop, sgd, CPU) <= gate.FLOAT64_TOLERANCE
    assert training.float64_error(forgets_momentum, sgd, CPU) > 0.1
