"""Everything that needs a GPU, in stages that each fit a limit: `python -m bench gpu STAGE --out FOLDER`.

| stage | what it does | result in FOLDER |
|---|---|---|
| suite | the tests marked gpu, and the engine's | tests-*.xml |
| table | new launch configurations, block by block; the kernels with them | configurations.toml, tune-*.json, kernels-*.json |
| steps | one iteration by every engine, and its memory | meta_step-*.json, memory_scaling.json |
| training | experts, evaluations, reading trajectories | experts.json, evaluate.json, trajectories.json |
| cifar10 | CIFAR-10, 1 image a class, from experts to accuracy | cifar10-ipc1/ |
| imagenette | ImageNette at 128×128, 1 and 10 images a class, in 8 GiB | imagenette-ipc1/, imagenette-ipc10/ |

A task that has its result is not done again, so a stage that its limit cuts off goes on with the same command. With --rehearse
all is done on the CPU at toy size, in seconds.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from bench.pictures import write_pictures
from bench.settings import SETTINGS
from mtt_fast.errors import InputError

log = logging.getLogger("mtt_fast")

OUT_OF_TIME = 75
"""Exit status of a stage that its limit cut off (EX_TEMPFAIL): the same command goes on."""
_ROOT = Path(__file__).resolve().parents[1]
_BUDGET = "8GiB"
_TUNED = {"cifar10-ipc10": 3, "tiny-ipc10": 4, "imagenet128-ipc10": 5}  # blocks of the networks
_TOY = "--steps 2 --batch 3 --size 16 --depth 2 --width 4 --repetitions 1".split()
_TOY_RUN = (
    "--train_epochs 4 --num_experts 1 --max_start_epoch 1 --expert_epochs 1 --syn_steps 2 --Iteration 2 --num_eval 1 "
    "--epoch_eval_train 2"
).split()

Stage = Literal["suite", "table", "steps", "training", "cifar10", "imagenette"]


@dataclass(frozen=True)
class Options:
    """Do one stage of the work that needs a GPU."""

    stage: tyro.conf.Positional[Stage] = "suite"
    """stage to do: suite, table, steps, training, cifar10 or imagenette"""
    out: str = "gpu"
    """folder of records, logs and runs"""
    seconds: float = 520.0
    """time limit of the stage"""
    rehearse: bool = False
    """do the stage on the CPU at toy size"""
    data_path: str = "data"
    """folder of the data sets, for cifar10 and imagenette (CIFAR-10 is fetched if it is not there)"""
    num_experts: int = 20
    """experts to train, for cifar10 and imagenette"""
    train_epochs: int = 10
    """epochs of each expert"""
    iterations: int = 1000
    """iterations of the distillation"""


@dataclass(frozen=True)
class Task:
    """A command of a stage, and the file that it leaves when it is done."""

    name: str
    argv: Sequence[str]
    result: Path
    environment: dict[str, str] = field(default_factory=dict)
    resumable: bool = False
    """whether the command goes on with --resume after a stop"""


def main(options: Options, command: str) -> None:
    """Do the stage. Exits with `OUT_OF_TIME` where the limit cuts it off, and with 1 if a command failed."""
    if not options.seconds >= 0:
        raise InputError(f"--seconds {options.seconds}: expected at least 0")
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    failed = False
    for task in _STAGES[options.stage](options, out):
        if task.result.exists():
            continue
        log.info("stage %s: %s", options.stage, task.name)
        status = _within(task, out, deadline)
        if status == OUT_OF_TIME:
            print(f"stage {options.stage}: out of time; the same command goes on", file=sys.stderr)
            raise SystemExit(OUT_OF_TIME)
        if status != 0:
            failed = True
            print(f"{task.name}: {_last_line(out / f'{task.name}.log')}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


def _within(task: Task, out: Path, deadline: float) -> int:
    """Run a command until it ends, or the deadline comes; return its exit status, or `OUT_OF_TIME`.

    At the deadline the command gets SIGTERM, on which the project's commands save their work and stop.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        return OUT_OF_TIME
    resume = ["--resume"] if task.resumable and (out / task.name / "config.toml").exists() else []
    with open(out / f"{task.name}.log", "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *task.argv, *resume], cwd=_ROOT, stdout=output,
            stderr=subprocess.STDOUT, env=os.environ | task.environment,
        )  # fmt: skip
        try:
            return process.wait(timeout=left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return OUT_OF_TIME


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1] if lines else "failed without a word"


def _suite(options: Options, out: Path) -> Iterator[Task]:
    tests = {"tests-gpu": ["-m", "gpu"], "tests-engine": ["tests/engine"]}
    if options.rehearse:
        tests = {"tests-gpu": ["tests/engine/test_matching.py"]}
    for name, selected in tests.items():
        report = out / f"{name}.xml"
        yield Task(name, ["pytest", "-q", *selected, f"--junit-xml={report}"], report)


def _bench(options: Options, out: Path, name: str, *argv: str, **environment: str) -> Task:
    toy = _TOY if options.rehearse else []
    threads = {"OMP_NUM_THREADS": "1"} if options.rehearse else {}  # a toy is slower on several
    device = "cpu" if options.rehearse else "cuda"
    words = ["bench", *argv, *toy, "--device", device, "--out", str(out), "--name", name]
    return Task(name, words, out / f"{name}.json", threads | environment)


def _table(options: Options, out: Path) -> Iterator[Task]:
    configurations = str(out / "configurations.toml")
    if options.rehearse:
        toy = ("--blocks", "2", "--table", configurations, "--candidates", "1")
        yield _bench(options, out, "tune", "tune", *toy, TRITON_INTERPRET="1")
        yield _bench(options, out, "kernels-cifar10-ipc10", "kernels", "--setting", "cifar10-ipc10")
        return
    for setting, blocks in _TUNED.items():
        for precision in ("tf32", "bf16"):
            for block in map(str, range(1, blocks + 1)):
                yield _bench(
                    options, out, f"tune-{setting}-{precision}-{block}", "tune", "--setting", setting, "--precision",
                    precision, "--blocks", block, "--table", configurations,
                )  # fmt: skip
    for setting in ("cifar10-ipc10", "imagenet128-ipc10"):
        yield _bench(options, out, f"kernels-{setting}", "kernels", "--setting", setting)


def _steps(options: Options, out: Path) -> Iterator[Task]:
    settings: Sequence[str] = SETTINGS
    engines = "whole_graph,checkpointed,truncated,generic,compiled,fused,fused-budget,fused-auto,fused-graph"
    few, vary = "whole_graph,fused,fused-graph", ""
    if options.rehearse:
        settings, engines, few = ("cifar10-ipc1",), "whole_graph,generic,fused", "whole_graph,fused"
        vary = "--vary-steps 2,3 --vary-batch 3 --vary-size 16"
    for setting in settings:
        chosen = ("--setting", setting, "--engines", engines, "--memory-budget", _BUDGET)
        yield _bench(options, out, f"meta_step-{setting}", "meta_step", *chosen)
    for precision in ("fp32", "bf16"):  # the others are in tf32
        chosen = ("--setting", "cifar10-ipc10", "--engines", few, "--precision", precision)
        yield _bench(options, out, f"meta_step-cifar10-ipc10-{precision}", "meta_step", *chosen)
    yield _bench(
        options, out, "memory_scaling", "memory_scaling", "--setting", "cifar10-ipc10", *vary.split()
    )  # fmt: skip


def _training(options: Options, out: Path) -> Iterator[Task]:
    images, experts, epochs = ("32", "1", "3") if options.rehearse else ("50000", "10", "50")
    yield _bench(options, out, "experts", "experts", "--images", images)
    yield _bench(options, out, "evaluate", "evaluate")
    yield _bench(options, out, "trajectories", "trajectories", "--experts", experts, "--epochs", epochs)


def _distillation(options: Options, out: Path, name: str, *argv: str) -> Task:
    device = "cpu" if options.rehearse else "cuda"
    places = ["--out", str(out / name), "--buffer_path", str(out / "buffers"), "--device", device]
    return Task(name, ["mtt_fast.distill", *places, *argv], out / name / "summary.json", resumable=True)


def _size(options: Options) -> list[str]:
    counts = {
        "num_experts": options.num_experts,
        "train_epochs": options.train_epochs,
        "Iteration": options.iterations,
    }
    return [word for name, count in counts.items() for word in (f"--{name}", str(count))]


def _cifar10(options: Options, out: Path) -> Iterator[Task]:
    if options.rehearse:
        yield _distillation(options, out, "cifar10-ipc1", "--recipe", "digits", "--model", "ConvNetD2W4", *_TOY_RUN)
        return
    data = ("--data_path", str(Path(options.data_path).resolve()), "--download", "--save_seconds", "20")
    yield _distillation(
        options, out, "cifar10-ipc1", "--recipe", "cifar10-ipc1", *data, "--eval_it", "500", *_size(options)
    )


def _imagenette(options: Options, out: Path) -> Iterator[Task]:
    for ipc in ("1", "10"):
        name, budget = f"imagenette-ipc{ipc}", ("--memory_budget", _BUDGET)
        if options.rehearse:
            pictures = out / "pictures"
            shutil.rmtree(pictures, ignore_errors=True)
            write_pictures(pictures)
            toy = ("--dataset", str(pictures), "--res", "16", "--model", "ConvNetD2W4", "--ipc", ipc)
            yield _distillation(options, out, name, *toy, *budget, *_TOY_RUN)
            continue
        data = ("--data_path", str(Path(options.data_path).resolve()), "--save_seconds", "20")
        evaluation = "--eval_it 100 --num_eval 3 --epoch_eval_train 300".split()
        yield _distillation(options, out, name, "--recipe", name, *data, *budget, *evaluation, *_size(options))


_STAGES: dict[Stage, Callable[[Options, Path], Iterator[Task]]] = {
    "suite": _suite,
    "table": _table,
    "steps": _steps,
    "training": _training,
    "cifar10": _cifar10,
    "imagenette": _imagenette,
}
