"""Test the conversion of experts end to end on the digits: guesses, files, log and refusals."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mtt_fast import ConvNet, TrajectoryStore
from mtt_fast.commands import cli
from mtt_fast.compress import main as compress
from mtt_fast.convert.experts import options_in_path
from mtt_fast.data import load
from mtt_fast.distill.command import main as distill
from mtt_fast.experts.command import main as experts
from mtt_fast.interop import buffer_files
from mtt_fast.storage.expert_metadata import ExpertMetadata
from mtt_fast.storage.trajectories import write_expert
from mtt_fast.testing import reference_convnet
from tests.convert.files import DIGITS, convert, save_public_buffer

pytestmark = pytest.mark.usefixtures("no_curves")

DISTIL = (
    "--dataset digits --model ConvNetD1W4 --num_experts 2 --max_start_epoch 1 --expert_epochs 1 --syn_steps 2 --Iteration 1 "
    "--eval_it 1 --num_eval 1 --epoch_eval_train 1"
).split()


@pytest.mark.parametrize("place", ["buffers/digits/ConvNetD1W4", "elsewhere"])
def test_experts_of_the_public_code_are_distilled_from(place: str, caplog: pytest.LogCaptureFixture) -> None:
    save_public_buffer(place)
    caplog.set_level("INFO")
    assert convert(place, "ours", *([] if place.startswith("buffers") else DIGITS), "--measure", "all") == 0
    store = TrajectoryStore("ours/digits/ConvNetD1W4")
    assert len(store) == 2
    metadata = store.metadata(0)
    assert (metadata.dataset, metadata.whitening, len(metadata.accuracy)) == ("digits", "none", 3)
    module = reference_convnet(1, 10, 8, 4, 1)
    nn.utils.vector_to_parameters(store.read(0, 2), module.parameters())
    data = load("digits", data_path="data", progress=False)
    seen = (data.test.images.float() / 255 - data.mean[0]) / data.std[0]
    right = (module(seen).argmax(1) == data.test.labels).float().mean()
    assert metadata.accuracy[-1] == pytest.approx(float(right))
    assert "hardly more than guessing" in caplog.text
    assert "--buffer_path ours --dataset digits --data_path data --model ConvNetD1W4 --num_experts 2" in caplog.text
    assert cli.run(distill, [*DISTIL, "--buffer_path", "ours", "--out", "run"]) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    final = [store.metadata(expert).accuracy[-1] for expert in range(2)]
    assert summary["accuracy"]["experts"]["mean"] == pytest.approx(sum(final) / 2)
    assert f"their test accuracy is {sum(final) / 2:.4f}" in caplog.text


def test_experts_may_lie_beside_the_buffers_that_they_were_read_from(caplog: pytest.LogCaptureFixture) -> None:
    folder = "buffers/digits/ConvNetD1W4"
    save_public_buffer(folder)
    for time in range(2):  # the same command continues where it was stopped, and finds all of them here
        assert convert(folder, "buffers") == 0
        assert len(TrajectoryStore(folder)) == 2
        warned = f"{folder}: other experts (mtt_fast's: expert_NNNN.safetensors, one file an expert) are not read; --from experts"
        assert (warned in caplog.text) == (time == 1)
    caplog.clear()
    assert convert(folder, "theirs", "--from", "experts") == 0
    assert "are not read" not in caplog.text


def test_buffers_that_are_missing_or_copied_are_told(caplog: pytest.LogCaptureFixture) -> None:
    save_public_buffer("theirs")
    first = Path("theirs/replay_buffer_0.pt")
    first.with_name("replay_buffer_2.pt").write_bytes(first.read_bytes())
    assert convert("theirs", "buffers", "--dataset", "digits", "--model", "ConvNetD1W4") == 0
    assert "theirs: replay_buffer_1.pt is not there, of those up to 2; the others are read" in caplog.text
    first.rename(first.with_name("replay_buffer_20260101120000.pt"))
    assert [path.name for path in buffer_files("theirs")] == ["replay_buffer_2.pt", "replay_buffer_20260101120000.pt"]
    assert "replay_buffer_0.pt is not there, of those up to 20260101120000" in caplog.text
    assert "the same trajectory as expert 0, so it counts twice; was a buffer copied?" in caplog.text


def test_only_the_last_epoch_is_measured_unless_all_are_asked_for(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    save_public_buffer("theirs")
    caplog.set_level("INFO")
    assert convert("theirs", "ours", "--zca", *DIGITS) == 0
    assert (
        "--buffer_path ours --dataset digits --data_path data --model ConvNetD1W4 --zca --num_experts 2" in caplog.text
    )
    metadata = TrajectoryStore("ours/digits_ZCA/ConvNetD1W4").metadata(1)
    assert [math.isnan(value) for value in metadata.accuracy] == [True, True, False]
    assert metadata.whitening == "zca"
    assert cli.run(distill, [*DISTIL, "--buffer_path", "ours", "--out", "run", "--zca"]) == 0
    Path("ours/digits_ZCA").rename("ours/digits")
    assert cli.run(distill, [*DISTIL, "--buffer_path", "ours", "--out", "other"]) == 2
    assert (
        "whitened in another way: expected normalised images, found ZCA-whitened images; give --zca"
        in capsys.readouterr().err
    )


def test_experts_come_back_from_buffers() -> None:
    assert cli.run(experts, [*DIGITS, "--num_experts", "3", "--train_epochs", "1", "--batch_train", "512"]) == 0
    assert convert("buffers/digits/ConvNetD1W4", "theirs", "--experts_per_file", "2") == 0
    folder = Path("theirs/digits/ConvNetD1W4")
    assert sorted(path.name for path in folder.iterdir()) == ["replay_buffer_0.pt", "replay_buffer_1.pt"]
    assert convert(str(folder), "back") == 0
    before, after = TrajectoryStore("buffers/digits/ConvNetD1W4"), TrajectoryStore("back/digits/ConvNetD1W4")
    for expert in range(3):
        assert before.metadata(expert).accuracy[-1] == after.metadata(expert).accuracy[-1]
        for epoch in range(2):
            assert torch.equal(before.read(expert, epoch), after.read(expert, epoch))
    assert convert("buffers/digits/ConvNetD1W4", "theirs") == 2


@pytest.mark.parametrize("flags", [[], ["--zca"]])
def test_experts_are_measured_after_each_epoch_on_the_images_that_they_were_trained_on(
    flags: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = [*DIGITS, *flags]
    assert cli.run(experts, [*data, "--num_experts", "1", "--train_epochs", "2", "--batch_train", "128"]) == 0
    (folder,) = Path("buffers").glob("*/ConvNetD1W4")
    assert convert(str(folder), "theirs") == 0
    caplog.set_level("INFO")
    assert convert("theirs/digits/ConvNetD1W4", "back", *data, "--measure", "all", "--store_dtype", "bfloat16") == 0
    assert "the folder's name says --dataset digits, --model ConvNetD1W4" in caplog.text
    assert "is it another?" not in caplog.text
    before, after = (
        TrajectoryStore(root / folder.parent.name / folder.name) for root in (Path("buffers"), Path("back"))
    )
    expected = before.metadata(0).accuracy
    assert len(set(expected)) == 3
    assert after.metadata(0).accuracy == expected
    assert after.dtype(0) == torch.bfloat16


def test_experts_that_are_written_anew_keep_their_numbers_and_their_type() -> None:
    save_public_buffer("theirs")
    assert convert("theirs", "ours", *DIGITS, "--store_dtype", "bfloat16") == 0
    Path("ours/digits/ConvNetD1W4/expert_0000.safetensors").unlink()
    assert convert("ours/digits/ConvNetD1W4", "anew", "--to", "experts") == 0
    store = TrajectoryStore("anew/digits/ConvNetD1W4")
    assert (store.indices, store.dtype(0)) == ((1,), torch.bfloat16)
    assert convert("ours/digits/ConvNetD1W4", "anew", "--to", "experts") == 2  # nothing is written over


@pytest.mark.usefixtures("default_signals")
def test_a_stopped_conversion_of_experts_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_public_buffer("theirs")
    assert convert("theirs", "ours", *DIGITS) == 0

    def stopped_after_the_first(*arguments: Any) -> None:
        write_expert(*arguments)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("mtt_fast.convert.experts.write_expert", stopped_after_the_first)
    assert convert("ours/digits/ConvNetD1W4", "anew", "--to", "experts") == 128 + signal.SIGINT
    assert "stopped; nothing was written" in capsys.readouterr().err
    assert not Path("anew").exists()


def test_experts_of_a_renamed_folder_are_written_where_their_readers_look() -> None:
    save_public_buffer("theirs")
    assert convert("theirs", "ours", *DIGITS, "--zca") == 0
    assert cli.run(compress, ["ours/digits_ZCA/ConvNetD1W4", "--num_interpolation", "2", "--out", "few"]) == 0
    Path("ours/digits_ZCA/ConvNetD1W4").rename("renamed")
    for source, kind, file in (
        ("renamed", "buffer", "digits/ConvNetD1W4/replay_buffer_0.pt"),
        ("renamed", "experts", "digits_ZCA/ConvNetD1W4/expert_0000.safetensors"),
        ("few", "waypoints", "digits/ConvNetD1W4/waypoint_buffer_0.pt"),
        ("few", "experts", "digits_ZCA/ConvNetD1W4/waypoints_2/expert_0000.safetensors"),
    ):
        assert convert(source, f"{source}-{kind}", "--to", kind) == 0
        assert file in [str(path.relative_to(f"{source}-{kind}")) for path in Path(f"{source}-{kind}").rglob("*0.*")]
    few, copied = TrajectoryStore("few"), TrajectoryStore("few-experts/digits_ZCA/ConvNetD1W4/waypoints_2")
    for epoch in (0, 1, 2):
        assert torch.equal(copied.read(1, epoch), few.read(1, epoch))


def test_experts_that_are_there_are_not_taken_for_others(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Check what is said where the same experts are imported again, to be stored or measured otherwise."""
    save_public_buffer("theirs")
    assert convert("theirs", "ours", *DIGITS) == 0
    assert convert("theirs", "ours", *DIGITS, "--measure", "all") == 0
    assert (
        "--measure all: has no effect on 2 experts that were there already, such as "
        "ours/digits/ConvNetD1W4/expert_0000.safetensors, of which the last epoch was measured; delete them first"
        in caplog.text
    )
    assert convert("theirs", "ours", *DIGITS, "--store_dtype", "bfloat16") == 2
    assert "expert_0000.safetensors: stored as float32, not bfloat16; choose another" in capsys.readouterr().err
    caplog.clear()
    assert convert("theirs", "measured", *DIGITS, "--measure", "all") == 0
    assert "--measure" not in caplog.text


def test_compressed_experts_come_back(caplog: pytest.LogCaptureFixture) -> None:
    save_public_buffer("theirs")
    assert convert("theirs", "ours", *DIGITS, "--store_dtype", "bfloat16") == 0
    assert cli.run(compress, ["ours/digits/ConvNetD1W4", "--num_interpolation", "3"]) == 0
    before = TrajectoryStore("ours/digits/ConvNetD1W4/waypoints_3")
    assert convert(str(before.folder), "mct") == 0
    names = sorted(path.name for path in Path("mct/digits/ConvNetD1W4").iterdir())
    assert names == ["step_buffer_ip3_0.pt", "waypoint_buffer_ip3_0.pt"]
    caplog.set_level("INFO")
    assert convert("mct/digits/ConvNetD1W4", "back") == 0
    assert "--num_interpolation 3" in caplog.text
    after = TrajectoryStore("back/digits/ConvNetD1W4/waypoints_3")
    for epoch in (0, 0.5, 1, 1.75, 2):
        torch.testing.assert_close(after.read(1, epoch), before.read(1, epoch))
    assert cli.run(distill, [*DISTIL, "--num_interpolation", "3", "--buffer_path", "back", "--out", "run"]) == 0
    assert convert(str(before.folder), "anew", "--to", "experts") == 0
    anew = TrajectoryStore("anew/digits/ConvNetD1W4/waypoints_3")
    assert anew.dtype(1) == before.dtype(1)
    for epoch in (0, 0.5, 1, 1.75, 2):
        assert torch.equal(anew.read(1, epoch), before.read(1, epoch))
    assert convert(str(before.folder), "whole", "--to", "buffer") == 0
    buffer = torch.load("whole/digits/ConvNetD1W4/replay_buffer_0.pt", weights_only=True)
    assert torch.equal(nn.utils.parameters_to_vector(buffer[1][1]), before.read(1, 1))


@pytest.mark.parametrize(
    ("dataset", "whitening", "folder", "compressed"),
    [
        ("CIFAR10", "none", "CIFAR10_NO_ZCA", "CIFAR10_NO_ZCA"),
        ("CIFAR100", "none", "CIFAR100_NO_ZCA", "CIFAR100_NO_ZCA"),
        ("CIFAR10", "zca", "CIFAR10", "CIFAR10"),
        ("Tiny", "none", "Tiny", "Tiny_NO_ZCA"),  # MCT's code alone writes it so
        ("Tiny", "zca", "Tiny", "Tiny"),
        ("MNIST", "none", "MNIST", "MNIST"),
        ("imagefruit-64", "none", "ImageNet/imagefruit/64", "ImageNet/imagefruit/64"),
        ("imagenet-a-64", "none", "ImageNet/imagenet-a/64", "ImageNet/imagenet-a/64"),
    ],
)
def test_experts_are_written_where_the_public_code_looks(
    dataset: str, whitening: str, folder: str, compressed: str
) -> None:
    net = ConvNet(in_channels=1, num_classes=10, image_size=8, width=4, depth=1)
    metadata = ExpertMetadata(
        network=net.describe(), layout=net.layout.describe(), dataset=dataset, fingerprint="f00d", whitening=whitening,
        hyperparameters={}, seed=0, accuracy=[math.nan, math.nan, 0.5], versions={},
    )  # fmt: skip
    write_expert("ours/ConvNetD1W4", 0, torch.randn(3, net.layout.num_parameters), metadata)
    assert convert("ours/ConvNetD1W4", "theirs") == 0
    assert Path("theirs", folder, "ConvNetD1W4", "replay_buffer_0.pt").exists()
    assert cli.run(compress, ["ours/ConvNetD1W4", "--num_interpolation", "2"]) == 0
    assert convert("ours/ConvNetD1W4/waypoints_2", "mct") == 0
    assert Path("mct", compressed, "ConvNetD1W4", "waypoint_buffer_0.pt").exists()


@pytest.mark.parametrize(
    ("folder", "found"),
    [
        ("CIFAR10/ConvNet", {"dataset": "CIFAR10", "zca": True, "model": "ConvNet"}),
        ("CIFAR100_NO_ZCA/ConvNetD3", {"dataset": "CIFAR100", "zca": False, "model": "ConvNetD3"}),
        ("Tiny/ConvNetD4", {"dataset": "Tiny", "model": "ConvNetD4"}),  # whitened or not: the public code writes both there
        ("Tiny_NO_ZCA/ConvNetD4", {"dataset": "Tiny", "zca": False, "model": "ConvNetD4"}),
        ("ImageNet/imagefruit/128/ConvNetD5",
         {"dataset": "ImageNet", "subset": "imagefruit", "res": 128, "model": "ConvNetD5"}),
        ("ImageNet/imagefruit/128²/ConvNetD5", {}),
        ("somewhere/ConvNet", {}),
        ("CIFAR10/else", {}),
    ],
)  # fmt: skip
def test_the_public_codes_folders_tell_their_options(
    folder: str, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("buffers", folder).mkdir(parents=True)
    assert options_in_path(Path("buffers", folder)) == found
    assert options_in_path(Path("buffers", folder, "replay_buffer_0.pt")) == found
    monkeypatch.chdir(Path("buffers", folder))
    assert options_in_path(Path()) == found
