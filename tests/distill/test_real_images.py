"""Distil CIFAR-10's real images, at a size that two cores manage: the set is better than real images."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from mtt_fast import evaluate
from mtt_fast.commands import cli
from mtt_fast.distill import command as distill

ARCHIVE = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10.tar.xz"
TRAIN, TEST = 150, 50  # images per class


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an image folder of a subset of CIFAR-10."""
    if not ARCHIVE.exists():
        pytest.skip(f"the images are not here: no file {ARCHIVE}")
    folder = tmp_path_factory.mktemp("cifar")
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            parts = Path(member.name).parts[-3:]
            if (
                member.isfile()
                and len(parts) == 3
                and int(Path(parts[2]).stem) < {"train": TRAIN, "test": TEST}[parts[0]]
            ):
                archive.extract(member, folder, filter="data")
    return next(path.parent for path in folder.rglob("train"))


@pytest.mark.data
@pytest.mark.slow
def test_distilled_images_beat_real_ones(cifar: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = (
        f"--dataset {cifar} --data_path {tmp_path} --buffer_path {tmp_path / 'buffers'} --out {out} "
        "--model ConvNetD3W32 --num_experts 2 --train_epochs 8 --batch_real 64 --max_start_epoch 5 --expert_epochs 3 "
        "--syn_steps 20 --lr_img 300 --lr_lr 1e-6 --lr_teacher 0.02 --ipc 1 --Iteration 60 --eval_it 60 "
        "--num_eval 3 --epoch_eval_train 200"
    ).split()
    assert cli.run(distill.main, flags) == 0
    summary = json.loads((out / "summary.json").read_text())
    losses = [
        record["loss"]
        for record in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if record["kind"] == "step"
    ]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    distilled, real = summary["accuracy"]["distilled"], summary["accuracy"]["random_real_images"]
    assert distilled["mean"] > real["mean"] + 0.02

    # the saved file, evaluated by the other command, says the same
    report = tmp_path / "evaluation.json"
    assert cli.run(evaluate.main, [str(out), "--out", str(report)]) == 0
    again = json.loads(report.read_text())["accuracy"]
    assert again["mean"] == pytest.approx(distilled["mean"], abs=0.04)
