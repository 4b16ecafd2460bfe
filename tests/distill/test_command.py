"""Test the distillation end to end on the embedded digits at toy size: files, summary, pictures, mistakes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtt_fast import SyntheticDataset, TrajectoryStore
from mtt_fast.distill.command import main
from mtt_fast.distill.command_line import parse_options
from mtt_fast.distill.segments import student_batches
from mtt_fast.engine.students.fused import FusedConvNetStudent
from mtt_fast.engine.students.generic import GenericStudent
from mtt_fast.kernels import Precision, native
from mtt_fast.runtime.provenance import device_name, versions
from mtt_fast.storage.tensor_files import load_tensors
from mtt_fast.storage.trajectories import write_expert
from mtt_fast.training.evaluation import Accuracy
from tests.distill.command_runs import TOY, images_of, metrics_of, run, summary_of


@pytest.mark.usefixtures("curves")
def test_a_run_leaves_its_files(experts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(*TOY, *experts, "--out", str(out)) == 0
    summary = summary_of(out)
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
    assert distilled.versions == summary["versions"]
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


@pytest.mark.parametrize(("chosen", "said"), [(None, "fp32"), ("bf16", "bf16")])
def test_the_options_of_a_run_say_the_precision_of_its_iterations(
    experts: list[str], tmp_path: Path, chosen: Precision | None, said: str
) -> None:
    main([*TOY, *experts, "--out", str(tmp_path), "--Iteration", "1"], precision=chosen)
    assert f"\n# gradient: exact; iterations in {said}\n" in (tmp_path / "config.toml").read_text()


def test_the_summary_and_the_pictures_tell_what_was_evaluated(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put known accuracies in place of those of trained networks, and follow them, and what was asked for, to the end."""
    out, calls, grids, curves = tmp_path / "run", list[Any](), list[Any](), list[Any]()
    first = {"distilled, ConvNetD1W4": (0.1, 0.7, 0.4), "average over the iterations, ConvNetD1W4": (0.2, 0.3, 0.8)}

    def evaluated(network: Any, train: Any, test: Any, lr: float, protocol: Any, **options: Any) -> Accuracy:
        name, indices = options.pop("name"), options.pop("indices")
        options.pop("stop")
        calls.append((name, indices, train(torch.Generator()), lr, protocol, options))
        begin = first[name][indices[0]] if indices else 0.25
        return Accuracy((begin, begin + 0.1, begin + 0.2), diverged=0 if indices else 1)

    monkeypatch.setattr("mtt_fast.commands.run_loop.evaluate", evaluated)
    monkeypatch.setattr("mtt_fast.commands.run_loop.save_grid", lambda _, panels, *__: grids.append(panels))
    monkeypatch.setattr("mtt_fast.commands.run_loop.save_curves", lambda *given: curves.append(given))
    flags = (
        "--Iteration 2 --eval_it 1 --ipc 2 --seed 3 --num_eval 3 --ema_decay 0.9 --max_experts 1 --networks_at_once 5 "
        "--memory_budget 1GiB --protocol datm --precision fp32 --lr_per_step"
    ).split()
    assert run(*TOY, *experts, "--out", str(out), *flags) == 0

    summary, store = (
        summary_of(out),
        TrajectoryStore(next(Path(experts[-1]).glob("*/*"))),
    )
    final = store.metadata(0).accuracy[-1]  # of the only matched expert
    of_experts = {"mean": final, "std": 0.0, "n": 1}

    def accuracy(begin: float, **others: Any) -> dict[str, Any]:
        return {"mean": pytest.approx(begin + 0.1), "std": pytest.approx(0.1), "n": 3} | others

    assert summary["accuracy"] == {
        "distilled": accuracy(0.4),
        "ema": accuracy(0.8),
        "random_real_images": accuracy(0.25, lr=0.01, diverged=1),
        "experts": of_experts,
        "best_evaluation_chosen_on_the_test_images": accuracy(0.7, iteration=1),
        "best_ema_evaluation_chosen_on_the_test_images": accuracy(0.8, iteration=2),
    }
    assert summary["accuracy_by_network"] == {
        "distilled": {"ConvNetD1W4": accuracy(0.4)}, "ema": {"ConvNetD1W4": accuracy(0.8)}
    }  # fmt: skip
    assert summary["text"] == (
        "distilled 50.00 % ± 10.00, average over the iterations 90.00 % ± 10.00, random real images 35.00 % ± 10.00 "
        f"(1 of 3 diverged), experts on all the data {100 * final:.2f} % ± 0.00"
    )
    sets = {
        name: SyntheticDataset.load(out / f"{name}.safetensors") for name in ("synthetic", "ema", "best", "best_ema")
    }
    assert [sets[name].recipe["iterations"] for name in sets] == [2, 2, 1, 2]
    assert (summary["iterations"], summary["learning_rate"]) == (2, pytest.approx(float(sets["synthetic"].lr)))
    rates = sets["synthetic"].lr_per_step
    assert rates is not None
    assert summary["learning_rate_per_step"] == rates.tolist()
    assert summary["learning_rate"] == pytest.approx(float(rates.mean()), rel=1e-6)
    assert rates.unique().numel() == 3
    assert (summary["experts"]["number"], summary["options"]["seed"], summary["method"]) == (1, 3, "MTT")
    student = "FusedConvNetStudent" if native.available else "GenericStudent"
    assert (summary["protocol"]["name"], summary["arithmetic"].split(" (")[0]) == ("datm", f"{student}, fp32")
    assert summary["data"] == sets["synthetic"].identity.record()
    assert (summary["device"], summary["versions"]) == (device_name(torch.device("cpu")), versions())

    names = [(name, indices) for name, indices, *_ in calls]
    assert names == [*((name, (iteration,)) for iteration in range(3) for name in first), ("random real images", ())]
    for *_, protocol, options in calls:
        assert (protocol.name, protocol.batch_size, protocol.epochs) == ("datm", 128, 2)
        assert options == {"num_networks": 3, "seed": 3, "precision": "fp32", "at_once": 5, "memory_budget": "1GiB"}
    trained_on = [calls[number][2:4] for number in (2, -3, -2, -1)]
    for (images, lr), name in zip(trained_on, ("best", "synthetic", "ema"), strict=False):
        assert images.pixels.equal(sets[name].images)
        assert lr == float(sets[name].lr)
    images, lr = trained_on[-1]
    assert (images.labels.bincount().tolist(), lr) == ([2] * 10, 0.01)

    titles = [[title for title, _ in panels] for panels in grids]
    reach = "networks trained on them reach"
    assert titles[1] == [
        f"digits, 2 per class, real images: {reach} 20.00 % ± 10.00",
        f"digits, 2 per class, distilled, 1 iteration: {reach} 80.00 % ± 10.00",
    ]
    assert grids[2][0][1].equal(grids[0][0][1])
    assert grids[2][1][1].equal(sets["synthetic"].pictures())
    assert [given[2] for given in curves] == [None, None, None, pytest.approx(0.35)]


@pytest.mark.parametrize(
    ("option", "at", "otherwise"),
    [
        ("--ema_decay 0.5", "--lr_img 0", "--lr_img 1"),
        ("--cam_model ConvNetD2W4", "--lr_img 0", "--lr_img 1"),
        ("--mom_y 0.5", "--lr_y 0", "--lr_y 1"),
        ("--match_step nearest", "--syn_steps 1", "--syn_steps 2"),
        ("--student_mom 0.5", "--syn_steps 1", "--syn_steps 2"),
        ("--lr_per_step", "--syn_steps 1", "--syn_steps 2"),
        ("--lr_per_step", "--lr_lr 0", "--lr_lr 1"),
        ("--gradient truncated", "--syn_steps 1", "--syn_steps 2"),
        ("--no_aug", "--dsa_strategy none", "--dsa_strategy flip"),
        ("--mom_img 0.9", "--lr_img 0 --lr_lr 0", "--lr_img 0 --lr_lr 1"),
        ("--current_max_start_epoch 2 --expansion_end_epoch 2", "--max_start_epoch 2", "--max_start_epoch 3"),
        ("--window_start 0.5", "--pix_init window --score_path s.npy", "--pix_init window --score_path s.npy --ipc 2"),
    ],
)
def test_an_option_without_effect_at_the_value_of_another_is_told(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    option: str, at: str, otherwise: str,
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    np.save("s.npy", np.linspace(0, 1, 1442))
    message = " ".join(option.split()[:2]) + " has no effect at "
    parse_options(["--dataset", "digits", *option.split(), *otherwise.split()])
    assert message not in caplog.text
    flags = [*TOY, *experts, "--lr_lr", "1e-3", "--Iteration", "3", *at.split()]
    assert run(*flags, "--out", "without") == 0
    assert message not in caplog.text
    assert run(*flags, *option.split(), "--out", "with") == 0
    assert message in caplog.text
    one, other = (SyntheticDataset.load(f"{name}/synthetic.safetensors") for name in ("with", "without"))
    for values in ("images", "labels", "lr"):  # up to rounding: a velocity is computed in another order
        torch.testing.assert_close(getattr(one, values), getattr(other, values), rtol=1e-5, atol=1e-6)


def test_a_learning_rate_that_would_turn_negative_is_kept(
    experts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(*TOY, *experts, "--out", str(tmp_path / "run"), "--lr_lr", "1e6") == 0
    summary = summary_of(tmp_path / "run")
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
            "expert_0000.safetensors: whitened in another way: expected ZCA-whitened images, found normalised images; leave out --zca",
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
    assert run(*flags) == 0  # with free space the run continues
