"""Run every benchmark at toy size, rehearse the GPU's stages, and check that the gate lets nothing wrong be timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench import flops, gate, kernels, methods, training, tune
from bench.__main__ import main
from bench.candidates import BLOCKS, text_of
from bench.cases import case_on, make_case
from bench.engines import ENGINES, Case, Engine, Gradients, checkpointed, fused, whole_graph
from bench.iterations import NamedCase
from bench.measuring import interleaved, peak_above_baseline, spread
from bench.precision import gradients_of
from bench.settings import SETTINGS, Setting, Shape, setting_named
from bench.shares import share_of_operations
from bench.workers import Here, Process, Worker, WorkerError
from mtt_fast import ConvNet, InputError
from mtt_fast import kernels as operations
from mtt_fast.baselines.catalogue import METHODS as BASELINES
from mtt_fast.commands import cli, parsing
from mtt_fast.commands.options import EvaluationOptions
from mtt_fast.data.synthetic import SyntheticDataset
from mtt_fast.distill.options import DistillOptions, parse_options
from mtt_fast.kernels import reference
from mtt_fast.storage.identity import DatasetIdentity
from mtt_fast.storage.run_folder import write_config
from mtt_fast.storage.trajectories import ExpertMetadata, write_expert
from mtt_fast.testing import relative_error
from mtt_fast.training.images import Images
from mtt_fast.training.sgd import Sgd

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TOY = "--size 16 --depth 2 --width 4 --repetitions 2 --device cpu".split()
STEP = "--steps 2 --batch 3".split()

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from Linux's /proc")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # in workers: a toy is slower on several


def bench(*words: str) -> None:
    assert cli.run(main, words) == 0


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    record = json.loads((folder / f"{name}.json").read_text())
    assert {"commit", "dirty", "versions", "device", "command", "time"} <= record.keys()
    assert record["versions"]["torch"] == torch.__version__
    rows: list[dict[str, Any]] = record["rows"]
    return rows


# ------------------------------------------------------------------ engines and their gate


def doubled(case: Case) -> Gradients:
    """Return the gradients of an engine that is wrong."""
    images, lr = whole_graph(case)
    return Gradients(2 * images, lr)


def wrong_in_float32(case: Case) -> Gradients:
    """Return the gradients of an engine that is right only in the small case."""
    images, lr = whole_graph(case)
    return Gradients(images if images.dtype == torch.float64 else images * (1 + 1e-3), lr)


TINY = Setting(ConvNet(3, 10, 16, width=4, depth=2), images=10, steps=2, batch=3)


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "compiled"])
def test_engines_that_claim_to_be_exact_are(name: str) -> None:
    engine = ENGINES[name]
    error = gate.float64_error(engine, TINY, CPU, cut=engine.takes_limits)
    assert (error <= gate.FLOAT64_TOLERANCE) == engine.exact


def test_engines_are_exact_without_a_norm() -> None:
    setting = replace(TINY, net=replace(TINY.net, norm="none"))
    for name in ("whole_graph", "generic", "fused"):
        assert (
            gate.float64_error(ENGINES[name], setting, CPU, cut=ENGINES[name].takes_limits) <= gate.FLOAT64_TOLERANCE
        ), name


def test_the_gate_closes_on_a_wrong_engine() -> None:
    error = gate.float64_error(Engine(doubled), TINY, CPU)
    assert error == pytest.approx(1)
    assert gate.complaint(error, 0.0, None) == "wrong: float64 error 1.0e+00, allowed 1e-09"
    assert gate.complaint(0.0, 3e-3, gate.allowed_float32(1e-3)) == "wrong: float32 error 3.0e-03, allowed 2.0e-03"
    assert gate.complaint(float("nan"), 0.0, None) is not None
    assert gate.complaint(0.0, float("nan"), 1.0) is not None
    assert gate.complaint(1e-12, 1.9e-3, gate.allowed_float32(1e-3)) is None
    assert gate.complaint(1e-12, 1.5e-2, gate.allowed_float32(1e-3, "bf16")) is None


def test_the_truth_in_pieces_is_the_truth() -> None:
    case = make_case(TINY)
    for mine, theirs in zip(checkpointed(case, microbatch=2), whole_graph(case), strict=True):
        assert relative_error(mine, theirs) < 1e-12


class CountOperations(TorchDispatchMode):
    """A mode that adds up the operations by torch's own formulas."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        self.count += formula(*args, **(kwargs or {}), out_val=result) if formula else 0
        return result


@pytest.mark.parametrize("name", ["whole_graph", "checkpointed", "truncated", "generic"])
def test_operations_are_counted_as_torch_counts_them(name: str) -> None:
    setting = Setting(ConvNet(3, 10, 16, width=4, depth=3), images=10, steps=2, batch=3)
    case = case_on(make_case(setting), torch.float32, CPU)
    with CountOperations() as counted:
        ENGINES[name].run(case)
    formula = flops.iteration_flops(setting.net, setting.steps, setting.batch, *ENGINES[name].passes)
    assert counted.count == pytest.approx(formula, rel=0.02)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_follow_the_recipes(name: str) -> None:
    setting = setting_named(name)
    assert setting.images >= setting.batch
    assert setting.images == int(name.rpartition("ipc")[2]) * setting.net.num_classes


def test_the_papers_numbers() -> None:
    assert (setting_named("cifar100-ipc50").steps, setting_named("cifar100-ipc50").batch) == (80, 125)
    assert (
        str(setting_named("imagenet128-ipc50")) == "ConvNet depth 5 width 128, 3×128×128, 10 classes, N = 20, b = 500"
    )
    assert Shape("cifar10-ipc10", steps=10).label() == "cifar10-ipc10-steps10"
    with pytest.raises(InputError, match=r"did you mean cifar10-ipc1"):
        setting_named("cifar-ipc1")
    with pytest.raises(InputError, match="--batch 0: expected at least 1"):
        Shape(batch=0).resolve()


# ------------------------------------------------------------------ measuring


def test_turns_alternate_and_a_failure_is_left_out() -> None:
    order, told = [], []

    def measure(name: str) -> float:
        order.append(name)
        if name == "b" and len(order) > 3:
            raise RuntimeError("no")
        return float(len(order))

    found = interleaved(3, ["a", "b"], measure, lambda name, error: told.append((name, str(error))))
    assert order == ["a", "b", "a", "b", "a"]
    assert found == {"a": spread([1, 3, 5])}
    assert told == [("b", "no")]


@linux
def test_the_peak_is_what_was_allocated_meanwhile() -> None:
    def allocate() -> None:
        torch.ones(16 * 2**20).sum()  # 64 MiB, gone at the end

    found = peak_above_baseline(allocate, CPU)
    assert 60 * 2**20 < found["bytes"] < 80 * 2**20


def test_shares_of_an_iteration_add_up() -> None:
    case = case_on(make_case(TINY), torch.float32, CPU)
    found = share_of_operations(lambda: fused(case), CPU)
    assert sum(found.values()) == pytest.approx(1)
    assert min(found.values()) > 0
    assert share_of_operations(lambda: whole_graph(case), CPU) == {}


def build_number(number: int) -> list[int]:
    return [number]


def add_to(state: list[int], number: int) -> int:
    state[0] += number
    print("noise on stdout")
    return state[0]


def end(state: list[int]) -> None:
    os._exit(3)


@pytest.mark.parametrize("made", [Process, Here])
def test_a_worker_keeps_its_state_and_survives_a_failure(made: Callable[..., Worker]) -> None:
    with made(build_number, number=40) as worker:
        assert worker.ask(add_to, number=1) == 41
        with pytest.raises(WorkerError, match="TypeError: unsupported operand"):
            worker.ask(add_to, number="1")
        assert worker.ask(add_to, number=1) == 42


def test_the_end_of_a_process_is_told() -> None:
    with Process(build_number, number=40) as worker, pytest.raises(WorkerError, match="status 3"):
        worker.ask(end)


# ------------------------------------------------------------------ the commands


@pytest.mark.slow
@linux
def test_meta_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = "tests.test_bench:wrong_in_float32"
    words = ["--engines", f"whole_graph,fused-budget,{wrong}", "--memory-budget", "8MiB", "--no-floor"]
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

    assert rows[wrong]["problem"].startswith("wrong: float32 error 1.0e-03")
    assert rows[wrong]["seconds"] is None
    assert "speedup" not in rows[wrong]
    assert "wrong: float32 error 1.0e-03" in capsys.readouterr().out


@pytest.mark.slow
@linux
def test_modules(tmp_path: Path) -> None:
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


@pytest.mark.slow
@linux
def test_memory_scaling(tmp_path: Path) -> None:
    vary = "--vary-steps 2 --vary-batch 100 --vary-size 32".split()
    bench("memory_scaling", *TOY, *STEP, *vary, "--out", str(tmp_path), "--name", "found")
    rows = {row["varied"]: row for row in rows_of(tmp_path, "found")}
    assert (rows["batch"]["batch"], rows["size"]["size"]) == (100, 32)
    assert rows["batch"]["peak"]["bytes"] > rows["steps"]["peak"]["bytes"]
    assert rows["batch"]["planned"] > rows["steps"]["planned"]
    assert 0 < rows["batch"]["peak"]["bytes"] < 2 * rows["batch"]["planned"]


@pytest.mark.slow
def test_kernels(tmp_path: Path) -> None:
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
def test_the_passes_of_the_first_block_are_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune at a width that has kernels for the block at once."""
    pytest.importorskip("triton", reason="Triton is not installed: it comes for Linux alone")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    words = "--size 8 --depth 1 --width 16 --steps 1 --batch 2 --repetitions 1 --device cpu --blocks 1 --candidates 1"
    command = [sys.executable, "-W", "ignore", "-m", "bench", "tune", *words.split(), "--out", str(tmp_path)]
    table = tmp_path / "configurations.toml"
    subprocess.run([*command, "--name", "tune", "--table", str(table)], cwd=ROOT, check=True, capture_output=True)
    rows = {row["operation"]: row for row in rows_of(tmp_path, "tune")}
    assert rows.keys() >= BLOCKS.keys()
    for name in BLOCKS:
        assert rows[name]["problem"] == ""
        assert rows[name]["error"] < tune.TOLERANCES["tf32"]
    assert tomllib.loads(table.read_text())["conv_norm_relu_pool_columns"]["tf32-256-16"]["sm_80"]["BLOCK_C"] == 16


def test_the_table_is_as_its_writer_writes_it() -> None:
    text = (ROOT / "kernels/triton/configurations.toml").read_text()
    assert text_of(tomllib.loads(text)) == text


def test_the_table_says_what_was_measured() -> None:
    """Check that a time belongs to one architecture, and to a kernel or its prototype; a tile of lines holds its class or is a part's."""
    table = tomllib.loads((ROOT / "kernels/triton/configurations.toml").read_text())
    for operation, classes in table.items():
        for shape_class, rows in classes.items():
            for architecture, row in rows.items():
                where = f"{operation} {shape_class} {architecture}"
                times = {name for name in row if name.endswith("microseconds")}
                assert len(times) <= (architecture != "default"), where
                assert times <= {"microseconds", "prototype_microseconds"}, where
                if shape_class.startswith("channels_last") and operation.startswith(("norm", "bias")):
                    windows = int(shape_class.removesuffix("-partial").rpartition("-")[2])
                    in_parts = operation.startswith("bias") or row["WINDOWS"] < windows
                    assert ("TILES" in row) == in_parts, where


def test_times_of_the_prototype_are_those_of_the_record() -> None:
    record = json.loads((ROOT / "bench/results/h200/norms.json").read_text())
    measured = [row for row in record["rows"] if row["kernel"] == "prototype" and row["dtype"] == "float32"]
    table = tomllib.loads((ROOT / "kernels/triton/configurations.toml").read_text())
    for operation in (name for name in table if name.startswith("norm_relu_pool")):
        for size, samples in ((64, 100), (256, 100), (1024, 20), (4096, 20)):
            row = dict(table[operation][f"channels_last-{size}"]["sm_90"])
            time, side = row.pop("prototype_microseconds"), 2 * int(size**0.5)
            same = {"operation": operation, "planes": [samples, 128, side, side], "tile": row}
            assert time in [each["microseconds"] for each in measured if same.items() <= each.items()]


def test_a_wrong_or_failing_candidate_is_not_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Check that such a candidate is not timed; the others are, and the fastest of them goes into the table."""
    pauses = {"fast": 0.0, "right": 0.005, "slow": 0.05}
    rows: dict[str, Any] = {"op": {"class": {"default": {"backend": "slow"}}}}
    chosen = tune.Table(rows, lambda: None, "sm_90", CPU, tmp_path / "table.toml")

    def run(argument: torch.Tensor) -> torch.Tensor:
        backend = rows["op"]["class"]["sm_90"]["backend"]
        time.sleep(pauses[backend])
        return argument * (1.5 if backend == "fast" else 1)

    monkeypatch.setattr(operations, "conv3x3", run)
    monkeypatch.setattr(reference, "conv3x3", lambda argument: argument)
    candidates = [{"backend": backend} for backend in ("fast", "absent", "right")]
    subject = tune.Subject("op", ("class", "class"), candidates, "conv3x3", lambda: [torch.ones(3)])
    found = tune.tune(subject, chosen, tune.Options(repetitions=2, device="cpu"))
    assert found["chosen"] == "right"
    assert found["problem"] == "fast: wrong: error 5.0e-01; absent: KeyError: 'absent'"
    assert found["others"].keys() == {"slow"}
    assert rows["op"]["class"]["default"] == {"backend": "slow"}
    assert rows["op"]["class"]["sm_90"]["backend"] == "right"
    assert rows["op"]["class"]["sm_90"]["microseconds"] >= 5000
    chosen.write()
    assert tomllib.loads((tmp_path / "table.toml").read_text()) == rows


def test_a_row_has_the_fastest_tile_of_each_back_end() -> None:
    default = {"backend": "triton", "BLOCK_M": 1, "tma": {"BLOCK_M": 2}}
    fast = [
        default | {"backend": "cudnn"},
        default | {"backend": "tma", "tma": {"BLOCK_M": 3}},
        default | {"BLOCK_M": 4},
    ]
    assert tune.fastest_tiles(fast, default) == {"backend": "cudnn", "BLOCK_M": 4, "tma": {"BLOCK_M": 3}}
    assert tune.fastest_tiles(fast[:1], default) == default | {"backend": "cudnn"}
    assert tune.fastest_tiles([{"BLOCK_C": 8}, {"BLOCK_C": 16}], {"BLOCK_C": 4}) == {"BLOCK_C": 8}


def test_precision(tmp_path: Path) -> None:
    bench("precision", *TOY, *STEP, "--out", str(tmp_path), "--name", "found")
    (row,) = rows_of(tmp_path, "found")
    assert row["case"].startswith("random, ConvNet depth 2 width 4")
    errors = {name: row[name]["images"] for name in ("fp32", "tf32", "fp16", "bf16")}
    assert errors["fp32"] < 1e-4 < errors["tf32"] < errors["bf16"] < 0.5
    assert row["of_tf32"] == {name: error / errors["tf32"] for name, error in errors.items()}
    assert row["of_tf32"]["fp16"] < 2


def test_precision_of_golden_cases(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(
        "precision",
        *TOY,
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
    assert cli.run(main, ["precision", *TOY, *STEP, "--golden", str(tmp_path)]) == 2
    assert "expected golden cases, found none" in capsys.readouterr().err


def test_precision_of_a_distillation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = DistillOptions(
        dataset="digits", model="ConvNetD2W8", buffer_path=str(tmp_path), syn_steps=3, expert_epochs=2, student_mom=0.5,
        lr_y=1.0,
    )  # fmt: skip
    net, generator, half = ConvNet(1, 10, 8, 8, 2), torch.Generator().manual_seed(0), (0.5,)
    names = tuple("0123456789")
    identity = DatasetIdentity("digits", names, (1, 8, 8), half, half, "none", "f00d")
    metadata = ExpertMetadata.of(
        identity, network=net.describe(), layout=net.layout.describe(), hyperparameters={}, seed=0, accuracy=[0.5] * 5,
        versions={},
    )  # fmt: skip
    write_expert(tmp_path / "digits" / "ConvNetD2W8", 0, torch.stack([net.init(generator) for _ in range(5)]), metadata)
    run = tmp_path / "run"
    write_config(run, asdict(options))
    images, labels = torch.randn(10, 1, 8, 8, generator=generator), torch.randn(10, 10, generator=generator)
    SyntheticDataset(images, labels, torch.tensor(0.01), names, half, half, label_kind="logits").save(
        run / "synthetic.safetensors"
    )
    given = ("precision", *TOY, *STEP, "--runs", str(run), "--out", str(tmp_path))
    bench(*given, "--starts", "2", "--name", "found")
    bench(*given, "--name", "last")
    assert [row["case"] for row in rows_of(tmp_path, "found")[1:]] == ["run, epoch 1", "run, epoch 2"]
    assert rows_of(tmp_path, "last")[1:] == rows_of(tmp_path, "found")[2:]
    for row in rows_of(tmp_path, "found")[1:]:
        assert {"images", "labels", "lr", "path"} == set(row["fp16"])
        assert row["fp32"]["labels"] < row["fp16"]["labels"] < row["bf16"]["labels"]
    for flags, complaint in {
        ("--starts", "0"): "--starts 0: expected at least 1",
        ("--runs", str(tmp_path)): "expected the folder of a distillation, found none",
    }.items():
        assert cli.run(main, [*given, *flags]) == 2
        assert complaint in capsys.readouterr().err


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


@pytest.mark.slow
def test_trajectories(tmp_path: Path) -> None:
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


def test_first_block(tmp_path: Path) -> None:
    bench("first_block", *TOY, *STEP, "--out", str(tmp_path), "--name", "found")
    rows = rows_of(tmp_path, "found")
    ways = {"in parts", "products alone"}  # on a CPU
    assert {(row["sweep"], row["way"]) for row in rows} == {(a, b) for a in ("forward", "backward") for b in ways}
    for row in rows:
        assert row["problem"] is None
        assert row["seconds"]["n"] == 2


def test_profile(tmp_path: Path) -> None:
    bench("profile", *TOY, *STEP, "--out", str(tmp_path), "--name", "found")
    events = json.loads((tmp_path / "found.trace.json").read_text())["traceEvents"]
    assert "kernels.norm_relu_pool_dual_backward" in {event.get("name") for event in events}


@pytest.mark.slow
@linux
def test_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert cli.run(main, ["methods", "--methods", "mttt"]) == 2
    assert "--methods mttt: expected some of random" in capsys.readouterr().err


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_takes_the_options_of_the_setting(name: str) -> None:
    method, setting = methods.METHODS[name], methods.Options(ipc=10).setting(Path("buffers"))
    module, *words = methods.command_of(method, setting)
    if method.command == "distill":
        found: EvaluationOptions = parse_options(words)
    else:
        found = parsing.parse(BASELINES[words[0]].options, words[1:], module)
    assert found.evaluation_protocol() == setting.evaluation_protocol()
    assert (found.dataset, found.model, found.seed) == (setting.dataset, setting.model, setting.seed)
    own = methods.own_flags(method, setting)
    for option in method.needs:
        assert f"--{option}" in own or getattr(found, option) == getattr(setting, option)


@pytest.mark.slow
@pytest.mark.parametrize(("benchmark", "images"), [("experts", "32"), ("evaluate", "8")])
def test_training(benchmark: str, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        (["memory_scaling", "--vary-steps", "5,x"], "--vary_steps 5,x: expected numbers"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(main, words) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: ")
    assert message in told
    assert "\n" not in told
