"""Test the distillation end to end on the embedded digits at toy size: files, stops, continuations, mistakes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from PIL import Image

from mtt_fast import InputError, SyntheticDataset, TrajectoryStore
from mtt_fast.commands import cli, parsing
from mtt_fast.distill.command import main
from mtt_fast.distill.options import DistillOptions, parse_options
from mtt_fast.distill.segments import student_batches
from mtt_fast.engine.fused import FusedConvNetStudent
from mtt_fast.engine.student import GenericStudent
from mtt_fast.storage.files import load_tensors
from mtt_fast.storage.trajectories import write_expert

TOY = (
    "--dataset digits --model ConvNetD1W4 --num_experts 2 --train_epochs 3 --max_start_epoch 2 --expert_epochs 1 "
    "--syn_steps 3 --Iteration 6 --eval_it 3 --num_eval 2 --epoch_eval_train 2 --batch_real 512 --lr_img 10 "
    "--save_seconds 0"
).split()


def run(*arguments: str) -> int:
    return cli.run(main, arguments)


def images_of(folder: Path) -> torch.Tensor:
    return SyntheticDataset.load(folder / "synthetic.safetensors").images


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_files(experts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(*TOY, *experts, "--out", str(out)) == 0
    summary = json.loads((out / "summary.json").read_text())
    for kind in ("distilled", "random_real_images", "experts"):
        assert 0 < summary["accuracy"][kind]["mean"] <= 1
        assert summary["accuracy"][kind]["n"] == 2
    assert summary["iterations"] == 6
    assert summary["peak_memory_bytes"] > 2**20
    assert summary["versions"]["torch"] == torch.__version__
    assert "--syn_steps 3" in summary["command"]
    kinds = [record["kind"] for record in metrics_of(out)]
    assert kinds == [
        "evaluation",
        "step",
        "step",
        "step",
        "evaluation",
        "step",
        "step",
        "step",
        "evaluation",
        "baseline",
    ]
    distilled = SyntheticDataset.load(out / "synthetic.safetensors")
    assert distilled.images.shape == (10, 1, 8, 8)
    assert distilled.labels.tolist() == list(range(10))
    assert distilled.recipe["lr_img"] == 10
    assert float(distilled.lr) == pytest.approx(metrics_of(out)[-3]["lr"])
    for name in ("images.png", "curves.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 500
    snapshots = sorted((out / "history").iterdir())
    assert [path.name for path in snapshots] == [f"iteration_{i:06d}.png" for i in (0, 3, 6)]
    with Image.open(snapshots[-1]) as picture:
        shown = torch.tensor(list(picture.convert("L").get_flattened_data())).view(8, 10, 8) / 255
    wanted = distilled.pictures()[:, 0].transpose(0, 1)  # (H, class, W)
    assert float((shown - wanted).abs().max()) < 0.5 / 255 + 1e-6
    assert any((out / "events").iterdir())
    assert not list(out.glob(".*.partial"))


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
    assert torch.equal(images_of(whole), images_of(parts))
    steps = [[record for record in metrics_of(out) if record["kind"] == "step"] for out in (whole, parts)]
    assert steps[0] == steps[1]


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


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_from_outside_and_continued(experts: list[str], tmp_path: Path, signum: signal.Signals) -> None:
    flags = [*TOY, *experts, "--Iteration", "400", "--eval_it", "400"]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    command = [sys.executable, "-m", "mtt_fast.distill", *flags, "--out", str(stopped)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
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


def test_a_learning_rate_that_would_turn_negative_is_kept(
    experts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(*TOY, *experts, "--out", str(tmp_path / "run"), "--lr_lr", "1e6") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["learning_rate_kept"] > 0
    assert summary["learning_rate"] > 0
    assert "would make the student's learning rate negative" in caplog.text
    assert all(record["lr"] > 0 for record in metrics_of(tmp_path / "run") if record["kind"] == "step")


def test_a_diverged_student_is_skipped_and_told(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    assert run(*TOY, *experts, "--out", str(out), "--lr_teacher", "1e38", "--Iteration", "40", "--eval_it", "40") == 2
    assert "25 iterations in a row diverged" in capsys.readouterr().err
    assert "the student diverged" in caplog.text
    tensors, _ = load_tensors(out / "checkpoint.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert not (out / "summary.json").exists()


def test_noise_no_augmentation_micro_batches_and_whitening(experts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--pix_init", "noise", "--no_aug", "--microbatch", "3", "--batch_syn", "7", "--zca", "--Iteration", "2"]
    assert run(*TOY, *experts, "--out", str(out), *flags) == 0
    distilled = SyntheticDataset.load(out / "synthetic.safetensors")
    assert distilled.whitening is not None
    pictures = distilled.pictures()
    assert 0 <= float(pictures.min()) <= float(pictures.max()) <= 1


def test_memory_budget_gives_the_same_run(experts: list[str], tmp_path: Path) -> None:
    for name, flags in (("all", []), ("cut", ["--microbatch", "4"])):
        assert run(*TOY, *experts, "--out", str(tmp_path / name), "--Iteration", "1", *flags) == 0
    torch.testing.assert_close(images_of(tmp_path / "all"), images_of(tmp_path / "cut"), rtol=1e-3, atol=1e-4)


def test_where_memory_runs_out_the_iteration_is_repeated_in_pieces(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert run(*TOY, *experts, "--out", str(tmp_path / "cut"), "--microbatch", "5") == 0
    assert any(record.message.startswith("memory plan: ") for record in caplog.records)
    for student in (FusedConvNetStudent, GenericStudent):
        whole = student.gradient_jvp

        def short_of_memory(self: Any, theta: Any, images: torch.Tensor, *rest: Any, whole: Any = whole) -> Any:
            if len(images) > 5 and images.device.type != "meta":  # on which an evaluation counts bytes
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(self, theta, images, *rest)

        monkeypatch.setattr(student, "gradient_jvp", short_of_memory)
    assert run(*TOY, *experts, "--out", str(tmp_path / "run")) == 0
    repeated = [record for record in caplog.records if record.message.startswith("out of memory; repeated exactly")]
    assert 1 <= len(repeated) <= 2  # in the first iteration alone: the second one begins with what did
    assert torch.equal(images_of(tmp_path / "cut"), images_of(tmp_path / "run"))


def test_student_batches_are_the_public_codes() -> None:
    batches = student_batches(10, 4, 8, torch.Generator().manual_seed(0))
    # 4 + 4 + 2, used from the end; then a new permutation
    assert [len(batch) for batch in batches] == [2, 4, 4, 2, 4, 4, 2, 4]
    for begin in (0, 3):
        assert sorted(torch.cat(batches[begin : begin + 3]).tolist()) == list(range(10))
    assert [len(batch) for batch in student_batches(10, None, 2, torch.Generator())] == [10, 10]


def test_options_come_from_the_recipe_then_the_file_then_the_flags(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text("lr_img = 5\nsyn-steps = 7\n".replace("-", "_"))
    options = parse_options(["--recipe", "digits", "--config", str(config), "--syn-steps", "9"])
    assert (options.dataset, options.lr_img, options.syn_steps) == ("digits", 5, 9)
    config.write_text('recipe = "quick-digits-datm"\nlr_y = 3\n')
    named = parse_options(["--config", str(config)])
    assert (named.recipe, named.lr_y, named.label_init) == ("quick-digits-datm", 3, "experts")
    public = parse_options(["--dataset", "CIFAR10"])  # the public code's defaults
    assert (public.recipe, public.syn_steps, public.lr_img, public.max_start_epoch) == (None, 20, 1000.0, 25)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--device cpu",
        "--out elsewhere",
        "--out elsewhere --dry_run",
        "--ipc 2 --lr_img 7",
        "--config mine.toml",
        "--config out.toml",
        "--config mine.toml --out elsewhere --model ConvNetD1W4",
    ],
)
def test_without_a_data_set_it_is_the_digits_recipe(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text("syn_steps = 7\nnum_eval = 2\n")
    Path("out.toml").write_text('out = "elsewhere"\n')
    options, recipe = parse_options(words.split()), parse_options(["--recipe", "digits"])
    given = {"device", "out", "dry_run", "ipc", "lr_img", "config", "model"} & parsing.given(
        DistillOptions, words.split()
    )
    given |= {"syn_steps", "num_eval"} if "mine.toml" in words else {"out"} if "out.toml" in words else set()
    assert options == dataclasses.replace(recipe, **{name: getattr(options, name) for name in given})
    assert options.recipe == "digits"


@pytest.mark.parametrize(
    "words", ["--dataset digits --out elsewhere", "--config mine.toml", "--config mine.toml --ipc 2"]
)
def test_with_a_data_set_it_is_no_recipe(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text('dataset = "digits"\n')
    options = parse_options(words.split())
    assert (options.recipe, options.dataset, options.syn_steps, options.lr_img) == (None, "digits", 20, 1000.0)


@pytest.mark.parametrize("words", ["--out run --resume", "--config mine.toml --resume"])
def test_a_run_goes_on_with_its_own_options(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text('out = "run"\n')
    Path("run").mkdir()
    Path("run/config.toml").write_text('dataset = "MNIST"\nsyn_steps = 3\n')
    options = parse_options(words.split())
    assert (options.recipe, options.dataset, options.syn_steps, options.lr_img) == (None, "MNIST", 3, 1000.0)
    assert (options.resume, options.folder()) == (True, Path("run"))


def test_what_is_to_be_resumed_is_named() -> None:
    with pytest.raises(
        InputError, match="--resume: expected the run's folder with --out, or its --recipe, found neither"
    ):
        parse_options("--dataset digits --resume".split())


MISTAKES = [
    pytest.param(["--recipe", "digit"], r"no such recipe \(did you mean digits\?\)", id="recipe"),
    pytest.param(["--syn_stepz", "3"], r"unknown option \(did you mean --syn_steps\?\)", id="flag"),
    pytest.param(["--dataset", "CIFAR11"], r"CIFAR11", id="data-set"),
    pytest.param(["--data_path", "nowhere", "--dataset", "CIFAR10"], r"nowhere", id="no-data"),
    pytest.param(["--batch_syn", "11"], r"--batch_syn 11: expected at most the 10 synthetic images", id="batch"),
    pytest.param(["--max_start_epoch", "3"], r"--max_start_epoch.*epoch 4", id="beyond-the-experts"),
    pytest.param(["--model", "ConvNetD9"], r"depth 9", id="too-deep"),
    pytest.param(["--ipc", "5000"], r"ipc 5000: class 0 has only", id="too-many"),
    pytest.param(["--Iteration", "-1"], r"--Iteration -1: expected at least 0", id="negative"),
    pytest.param(["--lr_teacher", "0"], r"--lr_teacher 0.0: expected more than 0", id="rate"),
    pytest.param(["--memory_budget", "much"], r"--memory_budget much: expected a number of bytes", id="budget-text"),
    pytest.param(["--memory_budget", "1KiB"], r"memory budget 1KiB: expected at least", id="budget"),
    pytest.param(["--dsa_strategy", "blur"], r"--dsa_strategy blur", id="augmentation"),
    pytest.param(["--networks_at_once", "0"], r"--networks_at_once 0: expected at least 1", id="networks-at-once"),
    pytest.param(["--device", "cuda:99"], r"--device cuda:99", id="device"),
    pytest.param(["--device", "toaster"], r"--device toaster", id="no-device"),
    pytest.param(["--config", "missing.toml"], r"missing.toml: cannot be read", id="config"),
    pytest.param(["--resume"], r"there is no run in", id="nothing-to-resume"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_mistakes_are_told_in_one_line(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    out = tmp_path / "run"
    assert run(*TOY, *experts, "--out", str(out), *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error)
    assert not (out / "summary.json").exists()


WASTED = [
    (["--ipc", "200"], "--ipc 200: class 0 has only 143 real images of the 200 that each begins with"),
    (["--ipc", "40", "--texture"], "--ipc 40, --canvas_size 2: class 0 has only 143 real images of the 160"),
    (["--num_interpolation", "5"], "--num_interpolation 5: expected from 2 waypoints (the ends) to the 4 recorded"),
    (["--max_start_epoch", "3"], "--max_start_epoch 3 + --expert_epochs 1: experts of --train_epochs 3 end before"),
    (["--batch_syn", "11"], "--batch_syn 11: expected at most the 10 synthetic images"),
    (
        ["--eval_mode", "M"],
        "VGG11: nothing is left of images (1, 8, 8); use larger images, or another --model, --models or --eval_mode",
    ),
]


@pytest.mark.parametrize(("flags", "message"), WASTED)
def test_no_expert_is_trained_for_a_run_that_cannot_be(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    arguments = [*TOY, *experts, *flags, "--buffer_path", str(tmp_path / "buffers"), "--out", str(tmp_path / "run")]
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    if "--ipc" not in flags:  # how many images there are of a class is not known without them
        assert run(*arguments, "--dry_run") == 2
        assert message in capsys.readouterr().err


def test_a_dry_run_refuses_what_the_run_would(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TOY, *experts, "--out", str(tmp_path / "run")]
    assert run(*flags) == 0
    for other, message in (
        (["--ema_decay", "0.9"], "holds a run without --ema_decay, not with --ema_decay 0.9; choose another --out"),
        (["--zca"], "holds a run without --zca, not with --zca"),
        (["--out", "new", "--rho_max", "0.1"], "trained with rho_max 0.0, not 0.1; choose another --buf"),
        (["--out", "new", "--max_start_epoch", "3"], "reach epoch 4, but the expert ends at epoch 3"),
    ):
        assert run(*flags, *other, "--dry_run") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folder", "flags", "message"),
    [
        ("digits/ConvNetD1W5", ["--model", "ConvNetD1W5"], "expert_0000.safetensors: the expert is of another network"),
        (
            "digits_ZCA/ConvNetD1W4",
            ["--zca"],
            "expert_0000.safetensors: whitened otherwise: expected ZCA-whitened images, found normalised images; leave out --zca",
        ),
    ],
)
def test_experts_of_something_else_are_refused(
    experts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    folder: str,
    flags: list[str],
    message: str,
) -> None:
    shutil.copytree(Path(experts[-1]) / "digits" / "ConvNetD1W4", tmp_path / "buffers" / folder)
    flags = [*TOY, *experts, *flags, "--buffer_path", str(tmp_path / "buffers"), "--out", str(tmp_path / "run")]
    assert run(*flags) == 2
    assert message in capsys.readouterr().err


def test_a_truncated_trajectory_is_named(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(experts[-1], tmp_path / "buffers")
    broken = next((tmp_path / "buffers").rglob("expert_0001.safetensors"))
    broken.write_bytes(broken.read_bytes()[:-100])
    assert run(*TOY, *experts, "--buffer_path", str(tmp_path / "buffers"), "--out", str(tmp_path / "run")) == 2
    assert "expert_0001.safetensors: truncated" in capsys.readouterr().err


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
    assert json.loads((parts / "summary.json").read_text())["arithmetic"].endswith(
        "Student, fp32 (a CPU computes in float32)"
    )


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


def test_an_expert_that_did_not_move_is_named(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(experts[-1], tmp_path / "buffers")
    folder = next((tmp_path / "buffers").rglob("expert_0001.safetensors")).parent
    store = TrajectoryStore(folder)
    still = torch.stack([store.read(1, epoch) for epoch in (0, 0, 0, 3)])
    write_expert(folder, 1, still, store.metadata(1))
    assert run(*TOY, *experts, "--buffer_path", str(tmp_path / "buffers"), "--out", str(tmp_path / "run")) == 2
    assert "expert 1 did not move between epochs" in capsys.readouterr().err


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


FULL_DISK = """
import resource, sys
from mtt_fast.commands import cli, parsing
from mtt_fast.distill.command import main
import mtt_fast.evaluate, matplotlib.backends.backend_agg, tensorboard.summary.writer.record_writer
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
sys.exit(cli.run(main, sys.argv[1:]))
"""


def test_a_full_disk_is_told_and_nothing_is_half_written(experts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = [*TOY, *experts, "--out", str(out)]
    assert run(*flags, "--Iteration", "3") == 0
    before = (out / "synthetic.safetensors").read_bytes()
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FULL_DISK, *flags],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert found.returncode == 2
    assert "cannot be written" in found.stderr
    assert (out / "synthetic.safetensors").read_bytes() == before
    assert not list(out.glob(".*.partial"))
    assert run(*flags) == 0  # with space again, it goes on
