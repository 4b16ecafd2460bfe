"""Run each stage of `python -m bench gpu` on the CPU at toy size; check its records, its limit, and how it continues."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import gpu, suite, tune
from bench.settings import BatchShape, NetworkShape, Shape
from mtt_fast import InputError
from mtt_fast.commands import parsing
from tests.bench.helpers import CPU, rows_of

ROOT = Path(__file__).resolve().parents[2]


def stage(name: str, out: Path, status: int = 0, *flags: str) -> str:
    """Rehearse a stage of `python -m bench gpu`; return what it printed."""
    command = [sys.executable, "-m", "bench", "gpu", name, "--out", str(out), "--rehearse", *flags]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert process.returncode == status, process.stderr
    return process.stdout + process.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "runs"), [("cifar10", ["cifar10-ipc1"]), ("imagenette", ["imagenette-ipc1", "imagenette-ipc10"])]
)
def test_the_stages_of_distillation_run_on_a_cpu(name: str, runs: list[str], tmp_path: Path) -> None:
    stage(name, tmp_path)
    for run in runs:
        summary = json.loads((tmp_path / run / "summary.json").read_text())
        assert summary["accuracy"]["distilled"]["n"] == 1


STEP_RECORDS = ["meta_step-cifar10-ipc1", "kernels-cifar10-ipc1", "memory_scaling"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "records"), [("steps", STEP_RECORDS), ("training", ["experts", "evaluate", "trajectories"])]
)
def test_the_stages_of_benchmarks_run_on_a_cpu(name: str, records: list[str], tmp_path: Path) -> None:
    stage(name, tmp_path)
    for record in records:
        assert [row["problem"] for row in rows_of(tmp_path, record) if row["problem"]] == []
    assert {row["task"]: row["status"] for row in rows_of(tmp_path, f"stage-{name}")} == dict.fromkeys(records, "done")
    if name == "steps":
        ours = next(row for row in rows_of(tmp_path, "meta_step-cifar10-ipc1") if row["engine"] == "fused")
        assert ours["speedup"] > 0  # whole_graph ran beside it


@pytest.mark.slow
def test_the_stage_of_the_table_runs_on_a_cpu(tmp_path: Path) -> None:
    stage("table", tmp_path)
    compiled = {row["operation"]: row for row in rows_of(tmp_path, "compile")}
    tuned = {row["operation"]: row for row in rows_of(tmp_path, "tune")}
    assert tuned.keys() == compiled.keys() > {"conv3x3_dual", "norm_relu_pool"}
    assert all(row["compiled"] == 1 for row in compiled.values())
    for row in tuned.values():
        assert row["problem"] == ""
        assert row["error"] < tune.TOLERANCES["tf32"]
    before = tomllib.loads((ROOT / "kernels/triton/configurations.toml").read_text())
    after = tomllib.loads((tmp_path / "configurations.toml").read_text())
    for operation, classes in before.items():
        for shape_class, kept in classes.items():
            measured = {name for name, row in after[operation][shape_class].items() if "microseconds" in row}
            for name in kept.keys() - measured:
                assert after[operation][shape_class][name] == kept[name]
    assert "microseconds" in after["conv3x3_dual"]["tf32-narrow-64-16"]["sm_80"]

    # cut off after the first row: what was measured stays as it is, and the rest is measured again
    record = json.loads((tmp_path / "tune.json").read_text())
    first = record["rows"][0] | {"error": 0.125}
    record["rows"] = [first]
    (tmp_path / "tune.json").unlink()
    (tmp_path / "tune.partial.json").write_text(json.dumps(record))
    done = (tmp_path / "compile.json").stat().st_mtime_ns
    stage("table", tmp_path)
    again = rows_of(tmp_path, "tune")
    assert again[0] == first
    assert {row["operation"] for row in again} == tuned.keys()
    assert not (tmp_path / "tune.partial.json").exists()
    assert (tmp_path / "compile.json").stat().st_mtime_ns == done


@pytest.mark.slow
def test_the_stage_of_tests_stops_at_its_limit(tmp_path: Path) -> None:
    said = stage("suite", tmp_path, gpu.OUT_OF_TIME, "--seconds", "0.1")
    assert "stage suite: out of time after 0 s; missing: suite; the same command continues" in said
    assert [row["status"] for row in rows_of(tmp_path, "stage-suite")] == ["missing"]
    stage("suite", tmp_path)
    rows = rows_of(tmp_path, "suite")
    assert {row["outcome"] for row in rows} == {"passed"}
    assert all(row["test"].startswith("tests/engine/test_matching.py::") for row in rows)
    assert json.loads((tmp_path / "suite.json").read_text())["conditions"]["passed"] == len(rows) > 3
    (row,) = rows_of(tmp_path, "stage-suite")
    assert (row["task"], row["status"]) == ("suite", "done")
    assert row["seconds"] > 0
    written = (tmp_path / "suite.json").stat().st_mtime_ns
    stage("suite", tmp_path)  # nothing is done twice
    assert (tmp_path / "suite.json").stat().st_mtime_ns == written
    assert rows_of(tmp_path, "stage-suite") == [row]


WAITING = """
import os, pathlib, time, pytest

@pytest.mark.parametrize("number", [1, 2])
def test_it(number):
    pathlib.Path(f"worker-{os.getpid()}").touch()
    time.sleep(100)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_suite_that_is_cut_off_leaves_no_worker_on_the_gpu(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(WAITING)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    options = ["-q", "-n", "2", "-p", "no:cacheprovider", *suite.arguments(tmp_path / "suite.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "pytest", *options], cwd=tmp_path, env=environment)
    while len(workers := list(tmp_path.glob("worker-*"))) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    process.wait()
    time.sleep(1)
    states = [Path("/proc", path.name.removeprefix("worker-"), "stat") for path in workers]
    running = [state for state in states if state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"]
    assert running == []


TESTS = """
import os, pathlib, signal

def ran(name):
    with open("ran", "a") as file:
        print(name, file=file)

def test_one():
    ran("one")

def test_two():
    ran("two")
    if pathlib.Path("kill").exists():
        pathlib.Path("kill").unlink()
        os.kill(os.getpid(), signal.SIGKILL)

def test_three():
    ran("three")
    print("about to fail")
    assert 1 == 2
"""


@pytest.mark.slow
def test_a_killed_suite_keeps_what_passed_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "kill").touch()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "bench.suite",
        "--record",
        str(tmp_path),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    statuses = [subprocess.run(command, cwd=tmp_path, env=environment, check=False).returncode]
    assert [row["test"] for row in rows_of(tmp_path, "suite.partial")] == ["test_it.py::test_one"]
    assert not (tmp_path / "suite.json").exists()
    statuses.append(subprocess.run(command, cwd=tmp_path, env=environment, check=False).returncode)
    assert statuses == [-signal.SIGKILL, 1]
    assert (tmp_path / "ran").read_text().split() == ["one", "two", "two", "three"]
    rows = {row["test"]: (row["outcome"], row["problem"]) for row in rows_of(tmp_path, "suite")}
    assert rows["test_it.py::test_one"] == rows["test_it.py::test_two"] == ("passed", None)
    assert rows["test_it.py::test_three"][0] == "failed"
    assert "assert 1 == 2" in rows["test_it.py::test_three"][1]
    (failed,) = (row for row in rows_of(tmp_path, "suite") if row["outcome"] == "failed")
    assert ">       assert 1 == 2" in failed["traceback"]
    assert failed["output"] == "about to fail\n"
    assert not (tmp_path / "suite.partial.json").exists()


def test_long_tests_start_first_and_have_short_ones_behind_them() -> None:
    seconds = {"a": 1.0, "b": 9.0, "c": 5.0, "d": 0.1, "e": 3.0}
    assert suite.in_order("abcdef", seconds, 1) == list("fbcead")
    assert suite.in_order("abcdef", seconds, 2) == list("fabdce")
    assert suite.in_order("abcdef", seconds, 16) == list("fbcead")


def test_the_last_record_tells_the_seconds(tmp_path: Path) -> None:
    rows = sorted(
        json.loads((ROOT / "bench/results/h200/suite.json").read_text())["rows"], key=lambda row: row["seconds"]
    )
    names = [f"moved/{Path(row['test']).name}" for row in (rows[0], rows[-1])]
    items: Any = [SimpleNamespace(nodeid=name) for name in names]
    config: Any = SimpleNamespace(getoption=lambda _: str(tmp_path))
    suite.pytest_collection_modifyitems(config, items)
    assert [item.nodeid for item in items] == names[::-1]


def stages_on_a_gpu(out: Path) -> dict[gpu.Stage, list[gpu.Group]]:
    return {name: list(groups(gpu.Options(name, str(out)), out)) for name, groups in gpu._STAGES.items()}


def test_benchmarks_take_the_flags_of_a_gpu(tmp_path: Path) -> None:
    """Check what rehearsals, at toy size, do not: a mistake would cost a start of the machine."""
    tasks = [task for groups in stages_on_a_gpu(tmp_path).values() for group in groups for task in group]
    benchmarks = [task.argv[1:] for task in tasks if task.argv[0] == "bench"]
    assert {name for name, *_ in benchmarks} > {"tune", "meta_step", "kernels", "memory_scaling", "trajectories"}
    for name, *flags in benchmarks:
        options = parsing.parse(importlib.import_module(f"bench.{name}").Options, flags, name)
        assert isinstance(options, Shape | BatchShape | NetworkShape)
        options.resolve()


@pytest.mark.slow
def test_distillations_take_the_flags_of_a_gpu(tmp_path: Path) -> None:
    tasks = [task for groups in stages_on_a_gpu(tmp_path).values() for group in groups for task in group]
    runs = [task.argv[1:] for task in tasks if task.argv[0] == "mtt_fast.distill"]
    assert len(runs) == 3
    for flags in runs:
        command = [sys.executable, "-W", "ignore", "-m", "mtt_fast.distill", *flags, "--device", "cpu", "--dry-run"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def test_the_suite_collects_all_tests_of_a_gpu_and_few_others(tmp_path: Path) -> None:
    ((task,),) = stages_on_a_gpu(tmp_path)["suite"]
    files, mark = [Path(word) for word in task.argv if word.endswith(".py")], "mark." + "gpu"
    assert files == [path for path in sorted(ROOT.glob("tests/**/*.py")) if mark in path.read_text()]
    assert 10 < len(files) < 30


def test_a_setting_of_the_table_is_timed_before_the_next_is_compiled(tmp_path: Path) -> None:
    names = [[task.name for task in group] for group in stages_on_a_gpu(tmp_path)["table"]]
    assert names[0] == [f"compile-cifar10-ipc1-{kind}-{block}" for kind in ("tf32", "bf16") for block in (1, 2, 3)]
    assert names[1:3] == [["tune-cifar10-ipc1-tf32"], ["tune-cifar10-ipc1-bf16"]]
    assert names[3][0] == "compile-cifar10-ipc10-tf32-1"


def test_tasks_of_a_group_run_at_the_same_time_and_the_limit_ends_all(tmp_path: Path) -> None:
    """Have two tasks wait for each other; one that waits for ever is cut off."""

    def waiting(mine: str, other: str) -> gpu.Task:
        code = f"import time, pathlib\npathlib.Path('{mine}').touch()\nwhile not pathlib.Path('{other}').exists(): time.sleep(0.01)\n"
        (tmp_path / f"wait_{mine}.py").write_text(code)
        return gpu.Task(mine, [f"wait_{mine}"], tmp_path / mine, {"PYTHONPATH": str(tmp_path)})

    rows = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_ROOT", tmp_path)
        results = gpu.run_group([waiting("a", "b"), waiting("b", "a")], tmp_path, time.monotonic() + 60)
        rows = {row["task"]: row["status"] for row in results}
        assert rows == {"a": "done", "b": "done"}
        results = gpu.run_group([waiting("c", "never")], tmp_path, time.monotonic() + 1)
        assert [row["status"] for row in results] == ["missing"]


JOB = """
import pathlib, signal, sys, time

run = pathlib.Path(sys.argv[1])
run.mkdir(exist_ok=True)

def stop(*_):
    (run / "config.toml").write_text("saved")
    sys.exit(143)

signal.signal(signal.SIGTERM, stop)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
if "--resume" in sys.argv:
    (run / "summary.json").write_text("{}")
else:
    time.sleep(100)
"""


def test_a_job_that_is_cut_off_saves_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.py").write_text(JOB)
    monkeypatch.setattr(gpu, "_ROOT", tmp_path)
    task = gpu.Task("run", ["job", str(tmp_path / "run")], tmp_path / "run" / "summary.json", resumable=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # also in the job, until it is ready for it
    try:
        (row,) = gpu.run_group([task], tmp_path, time.monotonic() + 2)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert row["status"] == "missing"
    assert (tmp_path / "run" / "config.toml").read_text() == "saved"
    (row,) = gpu.run_group([task], tmp_path, time.monotonic() + 60)
    assert row["status"] == "done"
    assert task.result.exists()


@pytest.mark.parametrize("first", [True, False])
def test_a_rehearsal_and_a_stage_on_a_gpu_do_not_pass_for_each_other(
    first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tmp_path / "result.json"
    monkeypatch.setitem(gpu._STAGES, "steps", lambda *_: iter([[gpu.Task("task", ["job"], result)]]))
    monkeypatch.setattr(gpu, "usable_gpus", lambda: 1)
    monkeypatch.setattr(gpu, "choose_device", lambda _: CPU)
    result.touch()
    gpu.main(gpu.Options("steps", str(tmp_path), rehearse=first), "a command")
    with pytest.raises(InputError, match=r"stage-steps.json: expected the record of .*; take another --out"):
        gpu.main(gpu.Options("steps", str(tmp_path), rehearse=not first), "a command")
    monkeypatch.setattr(gpu, "commit", lambda: "another")
    with pytest.raises(InputError, match=r"stage-steps.json: expected the record of commit another, found that of"):
        gpu.main(gpu.Options("steps", str(tmp_path), rehearse=first), "a command")


def test_a_stage_tells_what_failed(tmp_path: Path) -> None:
    failing = gpu.Task("nothing", ["bench", "nothing"], tmp_path / "nothing.json")
    assert gpu._within(failing, tmp_path, time.monotonic() + 60) == 2
    assert "no such benchmark" in gpu._last_line(tmp_path / "nothing.log")
