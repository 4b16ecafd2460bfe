"""Everything that needs a GPU, in stages that each fit a limit: `python -m bench gpu STAGE --out FOLDER`.

| stage | seconds | what it does | result in FOLDER |
|---|---|---|---|
| suite | 180 | the tests marked gpu, in parallel processes | suite.json |
| table | 240 | new launch configurations: a setting's candidates compiled in parallel, then timed one at a time | configurations.toml, tune-*.json |
| steps | 180 | one iteration beside whole-graph autograd, kernels, memory | meta_step-*.json, kernels-*.json, memory_scaling.json |
| cifar10 | 300 | CIFAR-10, 1 image per class, from 100 experts to accuracy | cifar10-ipc1/ |
| training | 300 | experts, evaluations, reading trajectories | experts.json, evaluate.json, trajectories.json |
| imagenette | 520 | ImageNette at 128×128, 1 and 10 images per class, in 8 GiB | imagenette-ipc1/, imagenette-ipc10/ |

The first four fit in 15 minutes. Results are written as they come, and stage-STAGE.json lists the finished tasks. A stage that
reaches its limit stops and names the missing tasks; the same command continues, and repeats no finished task. With --rehearse
everything is done on the CPU at toy size; take another folder for it.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bench import suite
from bench.pictures import write_pictures
from bench.records import commit, read_record, write_record
from mtt_fast.commands.option_fields import Checked, Range, fields_of
from mtt_fast.errors import InputError
from mtt_fast.runtime.provenance import choose_device, usable_gpus, why_no_gpu
from mtt_fast.storage.outputs import check_output_folder
from mtt_fast.storage.run_files import CONFIG, SUMMARY

log = logging.getLogger("mtt_fast")

OUT_OF_TIME = 75
"""Exit status of a stage that its limit cut off (EX_TEMPFAIL): the same command continues it."""
_ROOT = Path(__file__).resolve().parents[1]
_BUDGET = "8GiB"
_SETTINGS = ("cifar10-ipc1", "cifar10-ipc10", "imagenet128-ipc10")
_TUNED = {"cifar10-ipc1": 3, "cifar10-ipc10": 3, "imagenet128-ipc10": 5}  # blocks of the networks
_PRECISIONS = ("tf32", "bf16")
_ENGINES = "whole_graph,fused-graph,fused-graph@fp16,fused-graph-auto,fused-graph-auto@fp16"
_TOY = {"steps": "2", "batch": "3", "size": "16", "depth": "2", "width": "4", "repetitions": "1"}
_TOY_RUN = (
    "--train_epochs 4 --num_experts 1 --max_start_epoch 1 --expert_epochs 1 --syn_steps 2 --Iteration 2 --num_eval 1 "
    "--epoch_eval_train 2"
).split()
_GRACE_SECONDS = 30.0  # seconds that a command gets to save its work and to stop

Stage = Literal["suite", "table", "steps", "cifar10", "training", "imagenette"]
SECONDS: dict[Stage, float] = {
    "suite": 180, "table": 240, "steps": 180, "cifar10": 300, "training": 300, "imagenette": 520,
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Do one stage of the work that needs a GPU."""

    stage: tyro.conf.Positional[Stage] = "suite"
    """stage to do: suite, table, steps, cifar10, training or imagenette"""
    out: Annotated[str, Checked(check_output_folder)] = "gpu"
    """folder of records, logs and runs"""
    seconds: Annotated[float, Range(0, allow_infinity=True)] | None = None
    """time limit; default the stage's own"""
    rehearse: bool = False
    """do the stage on the CPU at toy size"""
    data_path: str = "data"
    """folder of the data sets, for cifar10 and imagenette (CIFAR-10 is fetched if it is not there)"""


@dataclass(frozen=True)
class Task:
    """A command of a stage, and the file that it leaves when it is done."""

    name: str
    argv: Sequence[str]
    result: Path
    environment: dict[str, str] = field(default_factory=dict)
    resumable: bool = False
    """whether the command continues with --resume after a stop"""


Row = dict[str, Any]
Group = Sequence[Task]
"""Tasks that are done at the same time."""


def main(options: Options, command: str) -> None:
    """Do the stage. Exits with `OUT_OF_TIME` where the limit cuts it off, and with 1 if a command failed."""
    if not (options.rehearse or usable_gpus()):
        raise InputError(
            f"{options.stage}: expected a GPU, found none ({why_no_gpu()}); rehearse on the CPU with --rehearse"
        )
    limit = SECONDS[options.stage] if options.seconds is None else options.seconds
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    device, deadline = choose_device("cpu" if options.rehearse else "cuda"), time.monotonic() + limit
    name = f"stage-{options.stage}"
    rows = _rows_before(out / f"{name}.json", is_rehearsal=options.rehearse)
    groups = list(_STAGES[options.stage](options, out))
    conditions = {"seconds": limit, "rehearsal": options.rehearse}
    for tasks in groups:
        todo = [task for task in tasks if not _is_done(task, rows)]
        rows |= {row["task"]: row for row in run_group(todo, out, deadline)}
        write_record(str(out), name, "gpu", device, conditions, list(rows.values()), command)
    found = [rows[task.name] for tasks in groups for task in tasks]
    for row in found:
        if row["status"] == "failed":
            print(f"{row['task']}: {row['problem']}", file=sys.stderr)
    if missing := [row["task"] for row in found if row["status"] == "missing"]:
        print(
            f"stage {options.stage}: out of time after {limit:.0f} s; missing: {', '.join(missing)}; the same command continues",
            file=sys.stderr,
        )
        raise SystemExit(OUT_OF_TIME)
    if any(row["status"] == "failed" for row in found):
        raise SystemExit(1)


def _rows_before(path: Path, *, is_rehearsal: bool) -> dict[str, Row]:
    """Return what an earlier command of the stage recorded, by task.

    Raises `InputError` if only one of both is a rehearsal, and for the record of another commit.
    """
    if not path.exists():
        return {}
    record = read_record(path)
    kinds = {True: "a rehearsal", False: "a stage on a GPU"}
    for found, expected in (
        (kinds[record["conditions"].get("rehearsal", is_rehearsal)], kinds[is_rehearsal]),
        (f"commit {record.get('commit')}", f"commit {commit()}"),
    ):
        if found != expected:
            raise InputError(f"{path}: expected the record of {expected}, found that of {found}; take another --out")
    return {row["task"]: row for row in record["rows"]}


def _is_done(task: Task, rows: dict[str, Row]) -> bool:
    """Return whether a task's result exists and the task did not fail; if so, update its row in `rows`."""
    if not task.result.exists() or rows.get(task.name, {}).get("status") == "failed":
        return False
    rows[task.name] = {"seconds": None, **rows.get(task.name, {}), "task": task.name, "status": "done", "problem": None}
    return True


def run_group(tasks: Group, out: Path, deadline: float) -> list[Row]:
    """Run tasks at the same time, as many as there are processors; return their rows of the stage's record."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(partial(_done, out=out, deadline=deadline), tasks))


def _done(task: Task, out: Path, deadline: float) -> Row:
    """Run a task until it ends, or the deadline comes, and return its row of the stage's record."""
    start = time.monotonic()
    status = _within(task, out, deadline)
    row = {"task": task.name, "seconds": time.monotonic() - start, "problem": None}
    if status == OUT_OF_TIME:
        return row | {"status": "missing"}
    log.info("%s: %s in %.0f s", task.name, "failed" if status else "done", row["seconds"])
    return row | (
        {"status": "failed", "problem": _last_line(out / f"{task.name}.log")} if status else {"status": "done"}
    )


def _within(task: Task, out: Path, deadline: float) -> int:
    """Run a command until it ends, or the deadline comes; return its exit status, or `OUT_OF_TIME`.

    At the deadline the command gets SIGTERM, on which the project's commands save their work and stop.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        return OUT_OF_TIME
    resume = ["--resume"] if task.resumable and (out / task.name / CONFIG).exists() else []
    with open(out / f"{task.name}.log", "a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *task.argv, *resume], cwd=_ROOT, stdout=output,
            stderr=subprocess.STDOUT, env=os.environ | task.environment,
        )  # fmt: skip
        try:
            return process.wait(timeout=left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return OUT_OF_TIME


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1] if lines else "failed without output"


def _suite(options: Options, out: Path) -> Iterator[Group]:
    # only files that have such tests: to collect all others takes each process a quarter of a minute
    files = [str(path) for path in sorted(_ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    selected = ["tests/engine/test_matching.py", "-n", "2"] if options.rehearse else ["-m", "gpu", "-n", "auto", *files]
    record = out / f"{suite.NAME}.json"
    yield [Task("suite", ["pytest", "-q", *selected, *suite.arguments(record)], record)]


def _bench(options: Options, out: Path, name: str, *argv: str, **environment: str) -> Task:
    known = fields_of(importlib.import_module(f"bench.{argv[0]}").Options)
    toy = (
        [word for flag, value in _TOY.items() if flag in known for word in (f"--{flag}", value)]
        if options.rehearse
        else []
    )
    threads = {"OMP_NUM_THREADS": "1"} if options.rehearse else {}  # a toy is slower on several
    device = "cpu" if options.rehearse else "cuda"
    words = ["bench", *argv, *toy, "--device", device, "--out", str(out), "--name", name]
    return Task(name, words, out / f"{name}.json", threads | environment)


def _table(options: Options, out: Path) -> Iterator[Group]:
    configurations = ("--table", str(out / "configurations.toml"))
    if options.rehearse:
        toy = ("tune", "--blocks", "2", *configurations, "--candidates", "1")
        for name, more in (("compile", ("--compile-only",)), ("tune", ())):
            yield [_bench(options, out, name, *toy, *more, TRITON_INTERPRET="1")]
        return

    def words(name: str, precision: str) -> tuple[str, ...]:
        return "tune", "--setting", name, "--precision", precision, *configurations

    # the rows of a setting are written before the candidates of the next are compiled
    for name, blocks in _TUNED.items():
        yield [
            _bench(options, out, f"compile-{name}-{precision}-{block}", *words(name, precision), "--blocks", f"{block}", "--compile-only")
            for precision in _PRECISIONS
            for block in range(1, blocks + 1)
        ]  # fmt: skip
        for precision in _PRECISIONS:  # in turn, so that each has the GPU to itself, and all add to the same table
            yield [_bench(options, out, f"tune-{name}-{precision}", *words(name, precision))]


def _steps(options: Options, out: Path) -> Iterator[Group]:
    settings, engines, vary = list(_SETTINGS), _ENGINES, ""
    if options.rehearse:
        settings, engines, vary = settings[:1], "whole_graph,fused", "--vary-steps 2,3 --vary-batch 3 --vary-size 16"
    repetitions = () if options.rehearse else ("--repetitions", "3")
    # in one process, since each worker of its own takes seconds of the limit to start
    more = () if options.rehearse else ("--floor", "False", "--one_process", "True")
    for setting in settings:
        words = ("meta_step", "--setting", setting, "--engines", engines, *repetitions, *more)
        yield [_bench(options, out, f"meta_step-{setting}", *words)]
    for setting in settings[-2:]:
        yield [_bench(options, out, f"kernels-{setting}", "kernels", "--setting", setting, *repetitions)]
    yield [_bench(options, out, "memory_scaling", "memory_scaling", "--setting", "cifar10-ipc10", *vary.split())]


def _training(options: Options, out: Path) -> Iterator[Group]:
    images, experts, epochs = ("32", "1", "3") if options.rehearse else ("50000", "10", "50")
    yield [_bench(options, out, "experts", "experts", "--images", images)]
    yield [_bench(options, out, "evaluate", "evaluate")]
    yield [_bench(options, out, "trajectories", "trajectories", "--experts", experts, "--epochs", epochs)]


def _distillation(options: Options, out: Path, name: str, *argv: str) -> Task:
    device = "cpu" if options.rehearse else "cuda"
    places = ["--out", str(out / name), "--buffer_path", str(out / "buffers"), "--device", device]
    return Task(name, ["mtt_fast.distill", *places, *argv], out / name / SUMMARY, resumable=True)


def _cifar10(options: Options, out: Path) -> Iterator[Group]:
    if options.rehearse:
        toy = ("--recipe", "digits", "--model", "ConvNetD2W4", *_TOY_RUN)
        yield [_distillation(options, out, "cifar10-ipc1", *toy)]
        return
    data = ("--data_path", str(Path(options.data_path).resolve()), "--download", "--save_seconds", "20")
    size = "--num_experts 100 --train_epochs 5 --Iteration 5000 --eval_it 1000".split()
    yield [_distillation(options, out, "cifar10-ipc1", "--recipe", "cifar10-ipc1", *data, *size)]


def _imagenette(options: Options, out: Path) -> Iterator[Group]:
    pictures = out / "pictures"
    if options.rehearse:
        shutil.rmtree(pictures, ignore_errors=True)
        write_pictures(pictures)
    for ipc in ("1", "10"):
        name, budget = f"imagenette-ipc{ipc}", ("--memory_budget", _BUDGET)
        if options.rehearse:
            toy = ("--dataset", str(pictures), "--res", "16", "--model", "ConvNetD2W4", "--ipc", ipc)
            yield [_distillation(options, out, name, *toy, *budget, *_TOY_RUN)]
            continue
        data = ("--data_path", str(Path(options.data_path).resolve()), "--save_seconds", "20")
        size = "--num_experts 20 --train_epochs 11 --Iteration 1000 --eval_it 100 --num_eval 3 --epoch_eval_train 300"
        yield [_distillation(options, out, name, "--recipe", name, *data, *budget, *size.split())]


_STAGES: dict[Stage, Callable[[Options, Path], Iterator[Group]]] = {
    "suite": _suite,
    "table": _table,
    "steps": _steps,
    "cifar10": _cifar10,
    "training": _training,
    "imagenette": _imagenette,
}
