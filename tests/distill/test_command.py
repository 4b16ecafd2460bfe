"""Test the distillation end to end on the embedded digits at toy size: files, stops, continuations."""

from __future__ import annotations

import json
import os
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

from mtt_fast import SyntheticDataset, TrajectoryStore
from mtt_fast.distill.segments import student_batches
from mtt_fast.engine.fused import FusedConvNetStudent
from mtt_fast.engine.student import GenericStudent
from mtt_fast.storage.files import load_tensors
from mtt_fast.storage.trajectories import write_expert
from tests.distill.command_runs import TOY, images_of, metrics_of, run


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


def _as_in_a_terminal() -> None:
    """Ignore no signal, though the tests may run in the background or under nohup."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_stopped_from_outside_and_continued(experts: list[str], tmp_path: Path, signum: signal.Signals) -> None:
    flags = [*TOY, *experts, "--Iteration", "400", "--eval_it", "400"]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    command = [sys.executable, "-m", "mtt_fast.distill", *flags, "--out", str(stopped)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # another number would round otherwise
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=_as_in_a_terminal, env=os.environ | threads
    )
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
