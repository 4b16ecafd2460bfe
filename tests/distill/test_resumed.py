"""Test runs that are stopped, that die, that are continued, and the checkpoints that they continue from."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from mtt_fast import SyntheticDataset, TrajectoryStore
from mtt_fast.commands import cli
from mtt_fast.commands.pictures import save_grid
from mtt_fast.distill.command import main
from mtt_fast.distill.experts import prepare_experts
from mtt_fast.distill.updates import apply_gradients
from mtt_fast.storage.tensor_files import load_tensors, save_tensors
from mtt_fast.training.evaluation import Accuracy
from tests.distill.command_runs import TOY, images_of, metrics_of, run, summary_of


def test_a_finished_run_is_not_repeated(experts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "run"
    flags = [*TOY, *experts, "--out", str(out)]
    assert run(*flags) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    caplog.set_level("INFO")
    assert run(*flags) == 0
    assert "is finished: distilled" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_resumed_is_bit_identical_to_uninterrupted(experts: list[str], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*TOY, *experts, "--out", str(whole)) == 0
    assert run(*TOY, *experts, "--out", str(parts), "--Iteration", "3") == 0
    assert run("--out", str(parts), "--resume", "--Iteration", "6") == 0
    one, other = (SyntheticDataset.load(out / "synthetic.safetensors") for out in (whole, parts))
    assert torch.equal(one.images, other.images)
    assert one.recipe == other.recipe | {"out": str(whole)}
    steps = [[record for record in metrics_of(out) if record["kind"] == "step"] for out in (whole, parts)]
    assert steps[0] == steps[1]


def test_a_run_whose_folder_another_took_while_its_experts_were_trained_leaves_that_alone(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    def replaced(*given: Any) -> Any:
        out.rename(tmp_path / "moved")
        out.mkdir()
        (out / ".lock").touch()
        return prepare_experts(*given)

    monkeypatch.setattr("mtt_fast.distill.command.prepare_experts", replaced)
    assert run(*TOY, *experts, "--out", str(out)) == 2
    assert f"{out}: another run has taken this folder" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["best.safetensors", "synthetic.safetensors"])
def test_a_run_that_dies_while_it_writes_a_set_writes_it_again(
    name: str, experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Give later sets higher accuracies: the record of an evaluation may stand only where the sets that it is of do."""
    flags = [*TOY, *experts, "--out", str(tmp_path), "--Iteration", "3"]
    save = SyntheticDataset.save

    def dying(self: SyntheticDataset, path: Path) -> None:
        if (path.name, self.recipe["iterations"]) == (name, 3):
            raise SystemExit
        save(self, path)

    def evaluated(*_: Any, indices: tuple[int, ...], **__: Any) -> Accuracy:
        return Accuracy((sum(indices) / 10,))

    monkeypatch.setattr("mtt_fast.commands.run_loop.evaluate", evaluated)
    monkeypatch.setattr(SyntheticDataset, "save", dying)
    with pytest.raises(SystemExit):
        run(*flags)
    monkeypatch.setattr(SyntheticDataset, "save", save)
    assert run(*flags) == 0
    for each in ("best.safetensors", "synthetic.safetensors"):
        assert SyntheticDataset.load(tmp_path / each).recipe["iterations"] == 3


def test_a_run_that_dies_between_an_evaluation_and_its_pictures_draws_them_when_it_goes_on(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*TOY, *experts, "--ema_decay", "0.5", "--Iteration", "3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*flags, "--out", str(whole)) == 0

    calls = itertools.count()

    def dying_every_other_time(*arguments: Any) -> None:
        if next(calls) % 2 == 0:
            raise SystemExit
        save_grid(*arguments)

    monkeypatch.setattr("mtt_fast.commands.run_loop.save_grid", dying_every_other_time)
    for iteration in (0, 3):
        with pytest.raises(SystemExit):
            run(*flags, "--out", str(parts))
        last = metrics_of(parts)[-1]
        assert (last["kind"], last["iteration"]) == ("ema_evaluation", iteration)
    assert run(*flags, "--out", str(parts)) == 0
    for name in ("images.png", "history/iteration_000000.png", "history/iteration_000003.png"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    kinds = [[(record["kind"], record["iteration"]) for record in metrics_of(out)] for out in (whole, parts)]
    assert kinds[0] == kinds[1]


@pytest.mark.usefixtures("default_signals")
def test_a_run_that_goes_on_with_fewer_iterations_than_it_did_is_evaluated_as_it_is(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(options: Any, state: Any, *others: Any) -> Any:
        if state.iteration == 4:
            signal.raise_signal(signal.SIGTERM)
        return apply_gradients(options, state, *others)

    monkeypatch.setattr("mtt_fast.distill.command.apply_gradients", stopping)
    assert run(*TOY, *experts, "--out", str(tmp_path)) == 128 + signal.SIGTERM
    assert run("--out", str(tmp_path), "--resume", "--Iteration", "4") == 0
    summary, last = summary_of(tmp_path), metrics_of(tmp_path)[-2]
    assert (summary["iterations"], last["kind"], last["iteration"]) == (5, "evaluation", 5)
    assert summary["accuracy"]["distilled"]["mean"] == last["accuracy_mean"]
    assert SyntheticDataset.load(tmp_path / "synthetic.safetensors").recipe["iterations"] == 5


def test_experts_trained_meanwhile_do_not_change_a_run(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(experts[-1], tmp_path / "buffers")
    flags = [*TOY, *experts, "--buffer_path", str(tmp_path / "buffers")]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*flags, "--out", str(whole)) == 0
    assert run(*flags, "--out", str(parts), "--Iteration", "3") == 0
    assert run("--out", str(parts), "--resume", "--Iteration", "6", "--num_experts", "4") == 0
    assert torch.equal(images_of(whole), images_of(parts))
    for path in (tmp_path / "buffers").rglob("expert_000[123].safetensors"):
        path.unlink()
    assert run("--out", str(parts), "--resume", "--Iteration", "7", "--num_experts", "1") == 2
    assert "the run was started with 2 experts, found 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    ["--num_eval 1", "--epoch_eval_train 3", "--protocol datm", "--batch_train 9", "--eval_mode C", "--best_epoch"],
)
def test_a_run_goes_on_with_the_evaluation_it_began_with(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    """Check that no summary compares the set with random images, or with an earlier one, that were evaluated in another way."""
    assert run(*TOY, *experts, "--out", str(tmp_path), "--Iteration", "0") == 0
    before = (tmp_path / "summary.json").read_bytes()
    for others in (["--Iteration", "1"], ["--Iteration", "1", "--dry_run"]):
        assert run("--out", str(tmp_path), "--resume", *others, *option.split()) == 2
        assert "compares all its evaluations" in capsys.readouterr().err
    for others in ([], ["--dry_run"]):  # nothing is left to evaluate
        assert run("--out", str(tmp_path), "--resume", *others, *option.split()) == 0
    assert (tmp_path / "summary.json").read_bytes() == before


def test_a_run_goes_on_with_the_experts_it_began_with(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    store = TrajectoryStore(next(Path(experts[-1]).glob("*/*")))
    for number, limit in (("1", ["--max_experts", "1"]), ("2", [])):
        out = tmp_path / number
        assert run(*TOY, *experts, "--out", str(out), "--Iteration", "0", *limit) == 0
        assert f" {number} experts, on " in caplog.text
        more = ["--out", str(out), "--resume", "--Iteration", "1", "--max_experts"]
        assert run(*more, "2") == 0
        assert ("began with 1 of the 2 experts" in caplog.text) == (number == "1")
        summary = summary_of(out)
        assert summary["experts"]["number"] == int(number)
        final = [store.metadata(expert).accuracy[-1] for expert in range(int(number))]  # of those that are matched
        mean, std = statistics.fmean(final), statistics.stdev(final) if number == "2" else 0.0
        assert summary["accuracy"]["experts"] == pytest.approx({"mean": mean, "std": std, "n": int(number)})
        caplog.clear()
    for others in ([], ["--dry_run"]):
        assert run("--out", str(out), "--resume", "--Iteration", "2", "--max_experts", "1", *others) == 2
        assert "--max_experts 1: expected all 2 experts with which the run in" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_stopped_from_outside_and_continued(experts: list[str], tmp_path: Path, signum: signal.Signals) -> None:
    flags = [*TOY, *experts, "--Iteration", "400", "--eval_it", "400"]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    command = [sys.executable, "-m", "mtt_fast.distill", *flags, "--out", str(stopped)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # another number would round otherwise
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | threads)
    metrics = stopped / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("step") > 5):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signum)
    _, said = process.communicate(timeout=60)
    if signum == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + signum
        assert f"continue with: python -m mtt_fast.distill --out {stopped} --resume" in said
    done = int(json.loads(load_tensors(stopped / "checkpoint.safetensors")[1]["numbers"])["iteration"])
    assert 5 <= done < 400
    assert not (stopped / "summary.json").exists()
    end = str(done + 4)
    assert run("--out", str(stopped), "--resume", "--Iteration", end) == 0
    assert run(*flags, "--out", str(whole), "--Iteration", end) == 0
    assert torch.equal(images_of(whole), images_of(stopped))
    steps = [record["iteration"] for record in metrics_of(stopped) if record["kind"] == "step"]
    assert steps == list(range(1, done + 5))


def test_a_run_with_other_options_is_not_overwritten(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = [*TOY, *experts, "--out", str(out)]
    assert run(*flags) == 0
    before = (out / "synthetic.safetensors").read_bytes()
    assert run(*flags, "--lr_img", "11") == 2
    assert "holds a run with --lr_img 10.0, not 11.0; choose another --out" in capsys.readouterr().err
    assert (out / "synthetic.safetensors").read_bytes() == before


def test_a_run_older_than_an_option_goes_on(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*TOY, *experts, "--out", str(whole)) == 0
    assert run(*TOY, *experts, "--out", str(parts), "--Iteration", "3") == 0
    config = parts / "config.toml"
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith(("precision", "#"))))
    assert run(*TOY, *experts, "--out", str(parts), "--precision", "bf16") == 2
    assert "holds a run with --precision tf32, not bf16" in capsys.readouterr().err
    assert run("--out", str(parts), "--resume", "--Iteration", "6") == 0
    assert torch.equal(images_of(whole), images_of(parts))
    assert summary_of(parts)["arithmetic"].endswith("Student, fp32 (a CPU computes in float32)")


def test_a_run_goes_on_in_the_precision_with_which_it_began(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run")]
    config = tmp_path / "run" / "config.toml"
    assert run(*TOY, *experts, *out, "--Iteration", "1", "--precision", "tf32") == 0
    for command in ([*TOY, *experts, *out, "--Iteration", "2"], [*out, "--resume", "--Iteration", "3"]):
        assert run(*command) == 0
        assert 'precision = "tf32"' in config.read_text()
    assert run(*TOY, *experts, *out, "--Iteration", "4", "--precision", "auto") == 2
    assert "holds a run with --precision tf32, not auto" in capsys.readouterr().err
    assert run(*TOY, *experts, "--out", str(tmp_path / "new"), "--Iteration", "1") == 0
    assert 'precision = "auto"' in (tmp_path / "new" / "config.toml").read_text()


def test_one_process_a_run_and_leftovers_are_cleared(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / ".summary.json.x.partial").write_text("half of a su")
    flags = [*TOY, *experts, "--out", str(out), "--Iteration", "0"]
    with FileLock(out / ".lock"):
        assert run(*flags) == 2
    assert "another process is writing to this run" in capsys.readouterr().err
    assert run(*flags) == 0
    assert not list(out.glob(".*.partial"))


def test_a_broken_checkpoint_is_named(experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run(*TOY, *experts, "--out", str(out)) == 0
    checkpoint = out / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    assert run("--out", str(out), "--resume", "--Iteration", "8") == 2
    assert "checkpoint.safetensors: truncated" in capsys.readouterr().err


EVERY_TENSOR = "--ipc 2 --msz_per_channel 16 --ema_decay 0.5 --lr_y 0.1 --cam_model ConvNetD1W4 --Iteration 1".split()


def test_a_checkpoint_with_a_tensor_of_another_form_is_named(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, flags in (("every", EVERY_TENSOR), ("plain", ["--Iteration", "1"])):
        assert run(*TOY, *experts, *flags, "--out", str(tmp_path / name)) == 0
    tensors, metadata = load_tensors(tmp_path / "every" / "checkpoint.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    plain, of_plain = load_tensors(tmp_path / "plain" / "checkpoint.safetensors")
    plain = {name: tensor.clone() for name, tensor in plain.items()}
    assert set(tensors) == {
        "images", "labels", "lr", "images_velocity", "lr_velocity", "labels_velocity", "ema", "pixel_weights", "frequencies"
    }  # fmt: skip

    def refused(folder: str, name: str, changed: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        save_tensors(tmp_path / folder / "checkpoint.safetensors", changed, metadata)
        for more in ([], ["--dry-run"]):
            assert run("--out", str(tmp_path / folder), "--resume", "--Iteration", "2", *more) == 2
            *_, error = capsys.readouterr().err.strip().splitlines()
            assert f"checkpoint.safetensors: {name}: expected " in error

    for name, tensor in tensors.items():
        for other in (tensor[None], tensor.double(), tensor.flatten()[:-1]):
            refused("every", name, tensors | {name: other}, metadata)
    for name in ("labels_velocity", "ema", "frequencies"):
        refused("every", name, {other: tensor for other, tensor in tensors.items() if other != name}, metadata)
    for name in ("labels_velocity", "ema", "frequencies", "pixel_weights"):
        refused("plain", name, plain | {name: tensors[name]}, of_plain)
    save_tensors(tmp_path / "every" / "checkpoint.safetensors", tensors, metadata)
    assert run("--out", str(tmp_path / "every"), "--resume", "--Iteration", "2") == 0


@pytest.mark.parametrize(
    ("began", "resumed"),
    [
        ("--microbatch 4", "--memory_budget 1GiB --microbatch None"),
        ("--memory_budget 1GiB", "--microbatch 4 --memory_budget auto"),
    ],
)
def test_a_run_with_one_limit_of_memory_goes_on_with_the_other(
    began: str, resumed: str, experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert cli.run(main, [*TOY, *experts, *out, "--Iteration", "0", *began.split()]) == 0
    line = [*out, "--resume", "--Iteration", "1"]
    assert cli.run(main, [*line, *resumed.split()[:2]]) == 2
    error = capsys.readouterr().err
    assert "--microbatch, --memory_budget: expected one of them, found both" in error
    assert "by --microbatch None or --memory_budget auto" in error
    assert cli.run(main, [*line, *resumed.split()]) == 0
