"""Run the engine and the commands on a GPU that is not there: operands on two devices, waits in captured_calls, waits at every step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils import cpp_extension

from bench.records import read_record
from mtt_fast.data import load

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("emulated_gpu.cpp")
TOY = (
    "--dataset digits --model ConvNetD1W4 --num_experts 1 --train_epochs 3 --max_start_epoch 1 --expert_epochs 1 --syn_steps 2 "
    "--Iteration 2 --eval_it 2 --num_eval 1 --epoch_eval_train 2 --batch_real 512 --ipc 2 --device cuda"
).split()


@dataclass(frozen=True)
class Report:
    """Holds what a process on the device left."""

    waits: list[str]
    refused: list[str]
    output: str

    def waits_below(self, *functions: str) -> list[str]:
        """Return the waits within one of the functions, each as "file.py:line function"."""
        return [wait for wait in self.waits if any(f"{name} <" in wait for name in functions)]


Run = Callable[..., Report]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Yield a function that runs a module with arguments on the device, and checks that it ends well."""
    compiler = shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux") or torch.version.cuda is not None:
        pytest.skip("needs g++, Linux and torch without CUDA")
    folder = tmp_path_factory.mktemp("device")
    library, (libraries, *_) = folder / "device.so", cpp_extension.library_paths()
    places = [f"-I{path}" for path in cpp_extension.include_paths()] + [f"-L{libraries}"]
    build = [
        compiler,
        "-std=c++20",
        "-shared",
        "-fPIC",
        str(SOURCE),
        "-o",
        str(library),
        *places,
        "-lc10",
        "-ltorch_cpu",
    ]
    subprocess.run(build, check=True)
    environment = os.environ | {
        "LD_PRELOAD": str(library), "LD_LIBRARY_PATH": libraries, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"
    }  # fmt: skip

    report, output = folder / "report.json", folder / "output.txt"
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.runtime.emulated_gpu"], cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip

    def run_module(*words: str) -> Report:
        print(json.dumps([str(output), str(report), *words]), file=server.stdin, flush=True)
        status = server.stdout.readline() if server.stdout else ""
        assert status == "0\n", output.read_text()
        found = json.loads(report.read_text())
        assert found["status"] in (0, None), output.read_text()
        return Report(found["waits"], found["refused"], output.read_text())

    with server:
        yield run_module
        os.killpg(server.pid, signal.SIGKILL)


def test_steps_of_an_unroll_wait_for_nothing(run: Run) -> None:
    report = run("tests.runtime.emulated_cases", "compare")
    assert report.refused == []
    # a caller's own network and loss are tried before the first step, and compared after the last one
    known = ("try_step", "adds_up", "check_repeated", "_checked_loss")
    engine = [wait for wait in report.waits if "mtt_fast/engine" in wait and wait not in report.waits_below(*known)]
    assert engine == []
    assert report.waits_below("_call_twice")
    # a buffer or frozen parameter is copied once: of the convolution two, of the norm three
    networks = [wait for wait in report.waits if "mtt_fast/networks" in wait]
    assert len(networks) == 5
    assert all("_on_device_of" in wait for wait in networks)


def test_a_caller_may_capture_the_library(run: Run) -> None:
    assert run("tests.runtime.emulated_cases", "capture").refused == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--lr_y 1 --label_init experts --pix_init samples_predicted_correctly --ema_decay 0.9 --threshold 5 --batch_syn 7",
        "--cam_model ConvNetD2W4 --cam_interval 1 --loss_ratio 0.25 --lr_per_step --student_mom 0.5 --lr_decay --best_epoch",
        "--match_step nearest --depth_ratio 0.25 --zca --num_trajectories 2 --noise_start 0.1 --continuous_start --precision fp32 --msz_per_channel 9",
        "--texture --canvas_size 2 --canvas_samples 2 --rho_max 0.01 --decay --precision tf32",
        "--teacher_label --gradient truncated --microbatch 3 --no_aug --pix_init noise",
        "--model ConvNetD1W4BN --lr_y 1 --num_interpolation 2 --memory_budget 2GiB --pix_init window --score_path {scores} "
        "--distilled_share 0.5 --protocol selmatch",
        "--parametrisation speed --config {speed} --student_mom 0.9 --student_dampening 0.9 --mom_img 0.95",
        "--parametrisation ddif --config {ddif} --lr_img 1e-3 --match_step nearest",
    ],
)
def test_distillations(options: str, run: Run, tmp_path: Path) -> None:
    scores = tmp_path / "scores.npy"
    np.save(scores, np.linspace(0, 1, len(load("digits", data_path=str(tmp_path)).train.labels)))
    speed = tmp_path / "speed.toml"
    speed.write_text(
        'parametrisation_options = "num_saet=4 dim_saet=6 num_head=2 decoder_depth=1 top_k=3 l1_weight=1e-3"\n'
    )
    ddif = tmp_path / "ddif.toml"
    ddif.write_text('parametrisation_options = "num_layers=2 layer_size=4 epochs_init=3"\n')
    words = ["mtt_fast.distill", *TOY, "--buffer_path", str(tmp_path / "buffers"), "--out", str(tmp_path / "run")]
    for more in (["--Iteration", "1"], ["--resume"]):  # the checkpoint, too, comes from the device and goes back to it
        report = run(*words, *options.format(scores=scores, speed=speed, ddif=ddif).split(), *more)
        assert report.refused == []
        assert "not captured" not in report.output
        # of an iteration the loss and the largest magnitudes are read, and the rate after the update
        known = ("finish_gradients", "apply_gradients")
        iterations = report.waits_below("iterations")
        assert [wait for wait in iterations if wait not in report.waits_below(*known)] == []
        assert report.waits_below("finish_gradients")


@pytest.mark.slow
def test_experts_on_a_curriculum(run: Run, tmp_path: Path) -> None:
    labels = load("digits", data_path=str(tmp_path)).train.labels
    torch.save([(labels == label).nonzero().flatten() for label in range(10)], tmp_path / "order.pt")
    report = run(
        "mtt_fast.experts", *"--dataset digits --model ConvNetD1W4 --num_experts 2 --train_epochs 5 --device cuda".split(),
        "--sort_method", str(tmp_path / "order.pt"), *"--add_end_epoch 1 --rm_epoch_first 2 --rm_epoch_second 3".split(),
        "--buffer_path", str(tmp_path / "buffers"),
    )  # fmt: skip
    assert report.refused == []
    assert "not captured" not in report.output
    assert report.waits_below("chunks", "count_correct") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "waits"),
    [
        ("dsa --outer_loop 2 --inner_loop 1", 1),
        ("dm", 1),
        ("ld", 2),
        ("dd --n_nets 2", 2),
        ("ratbptt --minwindow 2 --window 2 --totwindow 4", 1),
        # and for the window and the accuracy of an epoch, here one iteration
        ("atbptt --window 2 --d 1 --totwindow 4", 3),
    ],
    ids=["dsa", "dm", "ld", "dd", "ratbptt", "atbptt"],
)
def test_an_iteration_of_a_baseline_waits_for_what_is_logged(method: str, waits: int, run: Run, tmp_path: Path) -> None:
    words = (
        "--dataset digits --model ConvNetD1W4 --Iteration 2 --eval_it 2 --num_eval 1 --epoch_eval_train 2 --device cuda"
    )
    baseline = ("tests.runtime.emulated_cases", "baseline", *method.split())
    report = run(*baseline, *words.split(), "--out", str(tmp_path / "run"))
    assert report.refused == []
    assert "not captured" not in report.output
    assert len(report.waits_below("_iterate")) == 2 * waits


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["mtt", "ncfm"])
def test_sets_of_several_networks(protocol: str, run: Run, tmp_path: Path) -> None:
    words = "mtt_fast.cross random --dataset digits --models ConvNetD1W4 MLP ConvNetD1W4BN --num_eval 1 --epoch_eval_train 2 --device cuda"
    report = run(*words.split(), "--protocol", protocol, "--out", str(tmp_path))
    assert report.refused == []
    assert "not captured" not in report.output
    assert report.waits_below("chunks", "count_correct") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "meta_step --steps 2 --batch 3 --engines fused-graph,fused-graph@fp16,fused-graph-auto@fp16,generic,checkpointed,whole_graph --precision fp32 --one_process True",
        "experts --images 32 --batch_train 16",
    ],
    ids=["meta_step", "experts"],
)
def test_benchmarks(words: str, run: Run, tmp_path: Path) -> None:
    toy = "--size 16 --depth 2 --width 4 --repetitions 1 --device cuda --name toy --out"
    report = run("tests.runtime.emulated_cases", "bench", *words.split(), *toy.split(), str(tmp_path))
    assert report.refused == []
    assert [row["problem"] for row in read_record(tmp_path / "toy.json")["rows"] if row["problem"]] == []
    # what mtt_fast is compared with is not held up: its steps wait for no augmentation, and each of five calls for its rate once
    assert report.waits_below("augment_with") == []
    rates = [wait for wait in report.waits if wait.startswith("_local_scalar_dense: bench/products.py")]
    assert len(rates) == (5 if "checkpointed" in words else 0)


def test_what_a_gpu_refuses_is_found(run: Run) -> None:
    """Check that the tests here can fail."""
    report = run("tests.runtime.emulated_cases", "mix")
    assert [reason.partition(": ")[0] for reason in report.refused] == [
        "add on ['cpu', 'cuda:0']",
        "randn by a generator of the CPU",
        "cumsum is not deterministic",
    ]
    assert [wait.partition(": ")[0] for wait in report.waits] == ["_local_scalar_dense"]
