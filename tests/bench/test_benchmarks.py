"""Run every benchmark at toy size: its record, its table, and mistakes in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gate, kernels, memory_scaling, meta_step, methods, training
from bench.__main__ import main
from bench.cases import Case, Gradients
from bench.engines import whole_graph
from bench.workers import Here
from mtt_fast import ConvNet
from mtt_fast import kernels as operations
from mtt_fast.baselines.catalogue import METHODS as BASELINES
from mtt_fast.commands import cli, parsing
from mtt_fast.commands.options import EvaluationOptions
from mtt_fast.distill.command_line import parse_options
from tests.bench.helpers import SHAPE, STEP, TOY, bench, linux, rows_of


def noted(case: Case) -> Gradients:
    """Return what `whole_graph` does, and note the process in the file that the environment names."""
    with open(os.environ["PROCESSES"], "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")
    return whole_graph(case)


@pytest.mark.slow
@linux
def test_the_benchmark_of_a_meta_step_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, noted, notes = "tests.bench.test_engines:wrong_in_float32", f"{__name__}:noted", tmp_path / "processes"
    monkeypatch.setenv("PROCESSES", str(notes))
    words = ["--engines", f"whole_graph,fused-budget,{noted},{wrong}", "--memory-budget", "8MiB"]
    bench("meta_step", *TOY, *STEP, *words, "--out", str(tmp_path), "--name", "found")
    rows = {row["engine"]: row for row in rows_of(tmp_path, "found")}

    for name in ("whole_graph", "fused-budget"):
        assert rows[name]["problem"] is None
        assert rows[name]["error"] <= rows[name]["allowed_error"]
        assert rows[name]["seconds"]["n"] == 2
        assert rows[name]["speedup"] > 0
        assert rows[name]["peak"]["bytes"] >= 0
        assert 0 < rows[name]["share_of_peak"] < 1
    assert rows["whole_graph"]["speedup"] == 1
    assert not rows["whole_graph"]["tuned"]
    assert sum(rows["fused-budget"]["shares"].values()) == pytest.approx(1)

    gates, first, again, last, last_again = notes.read_text().split()[-5:]
    assert first == again != last == last_again  # each repetition in a process of its own, after a first iteration
    assert gates not in {first, last}
    assert rows[meta_step.FLOOR]["seconds"]["n"] == 2

    assert rows[wrong]["problem"].startswith("wrong: float32 error 1.0e-03")
    assert rows[wrong]["seconds"] is None
    assert "speedup" not in rows[wrong]
    assert "wrong: float32 error 1.0e-03" in capsys.readouterr().out


@pytest.mark.slow
@linux
def test_the_benchmark_of_modules_runs(tmp_path: Path) -> None:
    few = "--networks ConvNet,ViT --steps 2 --batch 2 --repetitions 2 --device cpu".split()
    bench("modules", *few, "--out", str(tmp_path), "--name", "found")
    rows = rows_of(tmp_path, "found")
    assert [(row["network"], row["engine"]) for row in rows] == [
        (network, engine) for network in ("ConvNet", "ViT") for engine in ("whole_graph", "generic", "generic-auto")
    ]
    for row in rows:
        assert row["problem"] is None
        assert row["error_float64"] <= gate.FLOAT64_TOLERANCE
        assert row["cpu_seconds"]["n"] == row["seconds"]["n"] == 2
        assert row["cpu_of_whole_graph"] == 1 or row["engine"] != "whole_graph"
    products = ["reverse-over-reverse", "forward-over-reverse", "reverse-over-forward"]
    few[1] = "ConvNet"
    bench("modules", *few, "--engines", ",".join(products), "--out", str(tmp_path), "--name", "products")
    rows = rows_of(tmp_path, "products")
    assert [(row["engine"], row["problem"]) for row in rows] == [(name, None) for name in products]
    assert all(0 <= row["error_float64"] <= gate.FLOAT64_TOLERANCE for row in rows)


@pytest.mark.slow
@linux
def test_the_benchmark_of_memory_runs(tmp_path: Path) -> None:
    vary = "--vary-steps 2 --vary-batch 100 --vary-size 32".split()
    bench("memory_scaling", *SHAPE, *STEP, *vary, "--out", str(tmp_path), "--name", "found")
    rows = {row["varied"]: row for row in rows_of(tmp_path, "found")}
    assert (rows["batch"]["batch"], rows["size"]["size"]) == (100, 32)
    assert rows["batch"]["peak"]["bytes"] > rows["steps"]["peak"]["bytes"]
    assert rows["batch"]["planned"] > rows["steps"]["planned"]
    assert 0 < rows["batch"]["peak"]["bytes"] < 2 * rows["batch"]["planned"]


def test_the_memory_that_was_measured_before_a_stop_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = iter([{"bytes": 5, "device": None}])

    def peak(*_: Any) -> dict[str, Any]:
        return next(points, None) or pytest.fail("stopped")

    monkeypatch.setattr(memory_scaling, "Process", Here)
    monkeypatch.setattr(memory_scaling, "peak", peak)
    monkeypatch.setattr(memory_scaling, "build", lambda **_: None)
    with pytest.raises(pytest.fail.Exception, match="stopped"):
        memory_scaling.main(
            memory_scaling.Options(device="cpu", out=str(tmp_path), name="found", vary_steps="2,3"), "a command"
        )
    assert [row["peak"]["bytes"] for row in rows_of(tmp_path, "found.partial")] == [5]


def test_all_that_kernels_are_measured_with_is_compiled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that each operation is called as it is measured, in both precisions, and that one that fails stops none."""
    called = []

    def failing(a: torch.Tensor, b: torch.Tensor) -> None:
        called.append(a.dtype)
        raise ValueError("no kernel")

    monkeypatch.setattr(operations, "squared_distance", failing)
    of_vectors = kernels.Operation("squared_distance", "2", (torch.ones(2), torch.ones(2)), 0, 0)
    kernels.call_all([of_vectors, of_vectors])
    assert called == 2 * [torch.float64, torch.float32]


def test_an_error_in_what_an_operation_adds_to_an_argument_is_found() -> None:
    setting = parsing.parse(kernels.Options, [*TOY, "--batch", "3"], "kernels").resolve()
    every = kernels.operations(setting, torch.device("cpu"))
    (operation,) = (each for each in every if each.name == "adjoint_step" and "images" in each.shape)

    def wrong(*arguments: Any) -> Any:
        return operations.adjoint_step(*arguments[:-1])

    assert kernels.errors(operation)["error"] < 1e-5
    assert kernels.errors(operation, wrong)["error"] > 0.1


@pytest.mark.slow
def test_the_benchmark_of_kernels_runs(tmp_path: Path) -> None:
    bench("kernels", *TOY, "--batch", "3", "--out", str(tmp_path), "--name", "found")
    rows = rows_of(tmp_path, "found")
    assert {row["operation"] for row in rows} >= {
        "adjoint_step", "colour_warp_mask_transpose", "conv3x3_dual", "linear_cross_entropy_dual",
        "norm_relu_pool_dual_backward", "sgd_step", "squared_distance",
    }  # fmt: skip
    for row in rows:
        assert row["problem"] is None
        assert row["error_float64"] <= kernels.FLOAT64_TOLERANCE
        assert row["bytes_per_second"] > 0


@pytest.mark.slow
def test_the_benchmark_of_trajectories_runs(tmp_path: Path) -> None:
    bench(
        "trajectories",
        *TOY,
        "--repetitions",
        "1",
        "--width",
        "64",
        "--experts",
        "4",
        "--epochs",
        "20",
        "--out",
        str(tmp_path),
        "--name",
        "found",
    )
    rows = {row["reader"]: row for row in rows_of(tmp_path, "found")}
    for row in rows.values():
        assert row["problem"] is None
        assert row["first"]["n"] == 1
        assert "sample" not in row
    parameters = 4 * 21 * 4 * ConvNet(3, 10, 16, 64, 2).num_parameters
    assert rows["torch.load"]["disk"] >= parameters
    assert rows["TrajectoryStore"]["resident"] < rows["torch.load"]["resident"]
    assert [row["reader"] for row in rows.values() if "share" in row] == ["TrajectoryStore"]
    assert 0 < rows["TrajectoryStore"]["share"] < 0.5
    assert rows["TrajectoryStore"]["checksums"]["n"] == 100


def test_the_benchmark_of_the_first_block_runs(tmp_path: Path) -> None:
    bench("first_block", *TOY, "--batch", "3", "--out", str(tmp_path), "--name", "found")
    rows = rows_of(tmp_path, "found")
    ways = {"in parts", "products alone"}  # on a CPU
    assert {(row["sweep"], row["way"]) for row in rows} == {(a, b) for a in ("forward", "backward") for b in ways}
    for row in rows:
        assert row["problem"] is None
        assert row["seconds"]["n"] == 2


@pytest.mark.native
def test_the_profile_runs(tmp_path: Path) -> None:
    bench("profile", *TOY, *STEP, "--out", str(tmp_path), "--name", "found")
    events = json.loads((tmp_path / "found.trace.json").read_text())["traceEvents"]
    assert "kernels.norm_relu_pool_dual_backward" in {event.get("name") for event in events}


@pytest.mark.slow
@linux
def test_the_benchmark_of_methods_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setting = "--model ConvNetD1W4 --ipc 3 --num_experts 1 --train_epochs 3 --max_start_epoch 1 --syn_steps 2".split()
    short = "--Iteration 2 --num_eval 2 --epoch_eval_train 1 --methods herding,dc,mtt-ftd --device cpu".split()
    folders = ["--data_path", str(tmp_path), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    bench("methods", *setting, *short, *folders, "--name", "toy")
    experts, herding, dc, ftd = json.loads((tmp_path / "toy.json").read_text())["rows"]
    assert experts["accuracy"]["n"] == 1
    assert dc["problem"].startswith("error: --ipc 3: the papers name loops")
    runs = {
        name: json.loads((tmp_path / "runs" / name / "summary.json").read_text()) for name in ("herding", "mtt-ftd")
    }
    assert herding["accuracy"] == runs["herding"]["accuracy"]["distilled"]
    assert ftd["accuracy"] == runs["mtt-ftd"]["accuracy"]["ema"]
    spent = runs["mtt-ftd"]["seconds"]
    assert ftd["seconds"] == spent["first_iteration"] + spent["iterations"]
    assert ftd["command"].startswith("python -m mtt_fast.distill --dataset digits")
    assert runs["mtt-ftd"]["protocol"] == runs["herding"]["protocol"]
    bench("render", "--results", str(tmp_path), "--documents", "")
    line = next(line for line in (tmp_path / "toy.md").read_text().splitlines() if line.startswith("| MTT"))
    assert f"{100 * ftd['accuracy']['mean']:.1f} % ± {100 * ftd['accuracy']['std']:.1f} (n = 2)" in line
    other = [*short, "--protocol", "datm"]  # which the finished runs do not have
    assert cli.run(main, ["methods", *setting, *other, *folders]) == 2
    assert "herding: holds a run with --protocol mtt, not datm" in capsys.readouterr().err
    assert cli.run(main, ["methods", "--methods", "mttt"]) == 2
    assert "--methods mttt: expected some of random" in capsys.readouterr().err


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_takes_the_options_of_the_setting(name: str) -> None:
    method, setting = methods.METHODS[name], methods.Options(ipc=10).setting(Path("buffers"))
    module, *words = methods.command_of(method, setting)
    if method.command == "distill":
        options: EvaluationOptions = parse_options(words)
    else:
        options = parsing.parse(BASELINES[words[0]].options, words[1:], module)
    assert options.evaluation_protocol() == setting.evaluation_protocol()
    assert (options.dataset, options.model, options.seed) == (setting.dataset, setting.model, setting.seed)
    own = methods.own_flags(method, setting)
    for option in method.needs:
        assert f"--{option}" in own or getattr(options, option) == getattr(setting, option)


@pytest.mark.parametrize(("recipe", "images", "frequencies"), [("digits", 2, 32), ("quick-cifar10", 16, 64)])
def test_frequencies_take_as_many_numbers_as_the_pixels_of_the_setting(
    recipe: str, images: int, frequencies: int
) -> None:
    setting = methods.Options(recipe=recipe).setting(Path("buffers"))
    own = methods.own_flags(methods.METHODS["mtt-fred"], setting)
    assert own[:4] == ["--ipc", str(images), "--msz_per_channel", str(frequencies)]
    assert parse_options(own).lr_img == images * 4 * (images * frequencies) * setting.lr_img


@pytest.mark.slow
@pytest.mark.parametrize(("benchmark", "images"), [("experts", "32"), ("evaluate", "8")])
def test_the_benchmark_of_training_runs(
    benchmark: str, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(training.LOOPS, "plain-tuned")  # for time: the same loop again
    bench(benchmark, *TOY, "--images", images, "--out", str(tmp_path), "--name", "found")
    rows = {row["loop"]: row for row in rows_of(tmp_path, "found")}
    assert list(rows) == ["plain", "mtt_fast"]
    for row in rows.values():
        assert row["problem"] is None
        assert row["error_float64"] <= gate.FLOAT64_TOLERANCE
        assert row["images_per_second"] == pytest.approx(int(images) / row["seconds"]["median"])
    assert rows["plain"]["speedup"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kernals"], "no such benchmark (did you mean kernels?)"),
        (["modules", "--networks", "ConvNet,VGG"], "--networks VGG: expected some of ConvNet, ResNet18, ViT"),
        (
            ["modules", "--engines", "mine"],
            "--engines mine: expected some of whole_graph, generic, generic-auto, reverse",
        ),
        (["kernels", "--bacth", "3"], "--bacth: unknown option (did you mean --batch?)"),
        (["meta_step", "--engines", "quick"], "--engines quick: no such engine"),
        (["meta_step", "--engines", "fused-graph", "--device", "cpu"], "--engines fused-graph: expected a CUDA device"),
        (
            ["meta_step", "--engines", "whole_graph@fp16", "--device", "cpu"],
            "--engines whole_graph@fp16: expected one of",
        ),
        (["meta_step", "--one_process", "True", "--device", "cpu"], "--one_process True: expected a GPU"),
        (["meta_step", "--precision", "fp8"], "--precision fp8: expected fp32, tf32, fp16, bf16"),
        (["meta_step", "--repetitions", "0"], "--repetitions 0: expected at least 1"),
        *(
            ([name, "--repetitions", "2"], "--repetitions: unknown option")
            for name in ("precision", "distillation", "memory_scaling")
        ),
        *(
            ([name, "--steps", "2"], "--steps: unknown option")
            for name in ("kernels", "first_block", "tune", "experts")
        ),
        (["evaluate", "--batch", "2"], "--batch: unknown option"),
        (["kernels", "--batch", "0"], "--batch 0: expected at least 1"),
        (["modules", "--steps", "0"], "--steps 0: expected at least 1"),
        (["experts", "--images", "0"], "--images 0: expected at least 1"),
        (["trajectories", "--epochs", "2"], "--epochs 2: expected at least 3"),
        (["gpu", "--seconds=-1"], "--seconds -1.0: expected at least 0"),
        (["memory_scaling", "--vary-steps", "5,x"], "--vary_steps 5,x: expected numbers"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(main, words) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: ")
    assert message in told
    assert "\n" not in told
