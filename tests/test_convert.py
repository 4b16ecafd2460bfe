"""Test the command mtt_fast convert end to end on the digits: its guesses, files, log and refusals; all commands by one name."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import mtt_fast
from mtt_fast import ConvNet, SyntheticDataset, TrajectoryStore
from mtt_fast.__main__ import main as all_jobs
from mtt_fast.augmentation.texture import Canvas
from mtt_fast.commands import cli
from mtt_fast.compress import main as compress
from mtt_fast.convert.command import main
from mtt_fast.convert.experts import options_in_path
from mtt_fast.data import load
from mtt_fast.data.class_names import SUBSETS
from mtt_fast.distill.command import main as distill
from mtt_fast.evaluate import main as evaluate
from mtt_fast.experts import main as experts
from mtt_fast.storage.trajectories import ExpertMetadata, write_expert
from mtt_fast.testing import reference_convnet

DIGITS = "--dataset digits --model ConvNetD1W4".split()
DISTIL = (
    "--dataset digits --model ConvNetD1W4 --num_experts 2 --max_start_epoch 1 --expert_epochs 1 --syn_steps 2 --Iteration 1 "
    "--eval_it 1 --num_eval 1 --epoch_eval_train 1"
).split()


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def convert(*arguments: str) -> int:
    return cli.run(main, arguments)


def distilled(label_kind: str = "indices", **changes: Any) -> SyntheticDataset:
    data = load("digits", data_path="data", progress=False)
    labels = torch.arange(10)
    arguments: dict[str, Any] = {
        "images": torch.randn(10, 1, 8, 8),
        "labels": labels if label_kind == "indices" else torch.randn(10, 10).softmax(1),
        "lr": torch.tensor(0.02),
        "class_names": data.class_names,
        "mean": data.mean,
        "std": data.std,
        "label_kind": label_kind,
        "recipe": {"dataset": "digits", "model": "ConvNetD1W4"},
    }
    return SyntheticDataset(**arguments | changes)


def save_public_pair(labels: Tensor, folder: str = "theirs") -> Tensor:
    Path(folder).mkdir(exist_ok=True)
    images = torch.randn(len(labels), 1, 8, 8)
    torch.save(images.requires_grad_(), f"{folder}/images_best.pt")
    torch.save(labels.requires_grad_(labels.is_floating_point()), f"{folder}/labels_best.pt")
    return images.detach()


def save_public_buffer(folder: str) -> None:
    """Save two experts of two epochs as buffer.py saves them on a GPU."""
    Path(folder).mkdir(parents=True)
    trajectories = []
    for seed in range(2):
        torch.manual_seed(seed)
        net = reference_convnet(1, 10, 8, 4, 1)
        timestamps = [[p.detach().clone() for p in net.parameters()]]
        for _ in range(2):
            for p in net.parameters():
                p.data += 0.01 * torch.randn_like(p)
            timestamps.append([p.detach().clone() for p in net.parameters()])
        trajectories.append(timestamps)
    torch.save(trajectories, f"{folder}/replay_buffer_0.pt")


def test_a_public_pair_becomes_a_set_that_can_be_evaluated(caplog: pytest.LogCaptureFixture) -> None:
    images = save_public_pair(torch.arange(10).flip(0))
    caplog.set_level("INFO")
    assert convert("theirs", "ours", *DIGITS, "--lr_teacher", "0.03") == 0
    synthetic = SyntheticDataset.load("ours/synthetic.safetensors")
    assert torch.equal(synthetic.images, images.flip(0))  # class by class
    assert synthetic.labels.tolist() == list(range(10))
    assert float(synthetic.lr) == pytest.approx(0.03)
    assert synthetic.recipe == {
        "dataset": "digits", "subset": None, "res": None, "data_path": "data", "packed_path": None, "zca": False,
        "model": "ConvNetD1W4", "ipc": 1, "imported_from": "theirs",
    }  # fmt: skip
    assert synthetic.mean == load("digits", data_path="data", progress=False).mean
    said = caplog.text
    for words in ("images_*.pt, labels_*.pt", "10 images (1, 8, 8) of 10 classes, labels: indices, learning rate: none",
                  "no learning rate", "reordered: class by class", "wrote ours/synthetic.safetensors",
                  "python -m mtt_fast.evaluate ours/synthetic.safetensors"):  # fmt: skip
        assert words in said
    assert cli.run(evaluate, ["ours", "--num_eval", "1", "--epoch_eval_train", "1"]) == 0


def test_soft_labels_keep_their_order_and_kind(caplog: pytest.LogCaptureFixture) -> None:
    labels = torch.randn(10, 10) + 9 * torch.eye(10).roll(3, dims=0)
    images = save_public_pair(labels)
    caplog.set_level("INFO")
    assert convert("theirs/images_best.pt", "ours.safetensors", *DIGITS) == 0
    synthetic = SyntheticDataset.load("ours.safetensors")
    assert synthetic.label_kind == "logits"
    assert torch.equal(synthetic.labels, labels)
    assert torch.equal(synthetic.images, images)
    assert "the largest label is the class of their place; --reorder sorts by it" in caplog.text
    assert convert("theirs", "sorted.safetensors", "--reorder", *DIGITS) == 0
    order = labels.argmax(1).argsort(stable=True)
    assert torch.equal(SyntheticDataset.load("sorted.safetensors").labels, labels[order])
    assert convert("theirs", "hard.safetensors", "--hard_labels", *DIGITS) == 0
    assert SyntheticDataset.load("hard.safetensors").labels.tolist() == list(range(10))
    assert convert("theirs", "both.safetensors", "--reorder", "--hard_labels", *DIGITS) == 0
    both = SyntheticDataset.load("both.safetensors")
    assert both.labels.tolist() == list(range(10))
    assert torch.equal(both.images, images[order])


def test_whole_images_stay_whole_in_files_of_ncfm(caplog: pytest.LogCaptureFixture) -> None:
    """Check that a set that goes there and back is not taken for one of smaller images."""
    distilled().save("run.safetensors")
    assert convert("run.safetensors", "data_ipc1.pt", "--to", "ncfm") == 0
    assert "files of this kind do not say their --factor: it is 1 here, and taken for 2 if not given" in caplog.text
    assert "files of this kind hold no learning rate" in caplog.text
    assert convert("data_ipc1.pt", "back", "--factor", "1", *DIGITS) == 0
    assert "factor" not in SyntheticDataset.load("back/synthetic.safetensors").recipe
    assert convert("data_ipc1.pt", "parts", *DIGITS) == 0
    assert SyntheticDataset.load("parts/synthetic.safetensors").recipe["factor"] == 2


def test_a_set_of_ncfm_is_evaluated_as_its_file(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluate the file, and what is made of it: both of 2 × 2 parts, which files of MTT do not say."""
    settings = [*DIGITS, "--protocol", "ncfm", "--num_eval", "1", "--epoch_eval_train", "2"]

    def evaluated(source: str, *more: str) -> tuple[int, dict[str, Any]]:
        assert cli.run(evaluate, [source, *settings, *more, "--out", "result.json"]) == 0
        result = json.loads(Path("result.json").read_text())
        return result["images"], result["accuracy"]

    load("digits", data_path="data", progress=False)
    torch.save([torch.rand(10, 1, 8, 8), torch.arange(10)], "data_100.pt")
    expected = evaluated("data_100.pt")
    assert expected[0] == 40
    assert evaluated("data_100.pt", "--factor", "1")[0] == 10
    caplog.set_level("INFO")
    assert convert("data_100.pt", "ours", *DIGITS) == 0
    assert evaluated("ours") == expected
    assert "ours: each image is taken for 2 × 2 smaller ones (--factor)" in caplog.text
    assert convert("data_100.pt", "theirs", "--to", "mtt", "--dataset", "digits") == 0
    assert "do not say that each image consists of 2 × 2 smaller ones (evaluate, convert: --factor 2)" in caplog.text
    assert evaluated("theirs/images_best.pt", "--factor", "2") == expected
    assert convert("ours", "data_ipc1.pt", "--to", "ncfm") == 0
    assert "NCFM's evaluation_script.py takes it as --load_path data_ipc1.pt, with factor: 2 in" in caplog.text
    assert convert("theirs/images_best.pt", "again", "--factor", "2", *DIGITS) == 0
    assert evaluated("again") == expected
    assert convert("data_100.pt", "unnamed") == 2
    assert (
        "expected the properties of the real images, with which its pictures are normalised; name them with --dataset"
        in capsys.readouterr().err
    )


def test_a_share_of_classes_of_several_sizes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Check that images of which the place does not tell the class are not taken for real ones."""
    share = ["--dataset", "digits", "--distilled_share"]
    save_public_pair(torch.tensor([0] * 11 + list(range(1, 10))))
    save_public_pair(torch.arange(10), "even")
    settings = ["--protocol", "selmatch", "--num_eval", "1", "--epoch_eval_train", "1"]
    for source, value, problem in (
        ("theirs", "0.5", "expected the same number of images of"),
        ("even", "0.5", "expected a --distilled_share that is at least one of the 1 images of a class, found 0.5"),
    ):
        assert convert(source, "ours", *share, value) == 2
        assert problem in capsys.readouterr().err
        assert cli.run(evaluate, [f"{source}/images_best.pt", *share, value, *settings]) == 2
        assert problem in capsys.readouterr().err
    assert not Path("ours").exists()


def test_learned_labels_do_not_reorder_a_set(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that images keep their classes where a learned label of class 8 favours class 5."""
    labels = 9 * torch.eye(10)
    labels[8, 5] = 10
    save_public_pair(labels)
    caplog.set_level("INFO")
    assert convert("theirs", "ours.safetensors", *DIGITS) == 0
    assert "in 9 of 10 images the largest label is the class of their place" in caplog.text
    assert "--reorder" not in caplog.text
    assert convert("theirs", "hard.safetensors", "--reorder", "--hard_labels", *DIGITS) == 2
    expected = "--reorder: expected every class to be the largest label of as many images, found 0 to 2; leave it out"
    assert expected in capsys.readouterr().err
    assert not Path("hard.safetensors").exists()


def test_a_set_with_real_images_is_not_reordered(capsys: pytest.CaptureFixture[str]) -> None:
    save_public_pair(9 * torch.eye(10).roll(3, dims=0).repeat(2, 1))
    assert convert("theirs", "ours.safetensors", "--distilled_share", "0.5", "--reorder", *DIGITS) == 2
    assert (
        "--reorder: expected a set without real images, found one with --distilled_share 0.5" in capsys.readouterr().err
    )
    assert convert("theirs", "ours.safetensors", "--distilled_share", "0.5", *DIGITS) == 0
    assert convert("ours.safetensors", "again.safetensors", "--reorder") == 2
    assert "--reorder: expected a set without real images" in capsys.readouterr().err


def test_names_tell_the_method_that_made_the_set(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for made_by, name in {"DSA": "DSA", "MTT": "TM", "Random": "random"}.items():
        ours = distilled("indices")
        dataclasses.replace(ours, recipe=ours.recipe | {"method": made_by}).save(f"{made_by}/synthetic.safetensors")
        assert convert(made_by, f"{made_by}-dc", "--to", "dc") == 0
        assert [path.name for path in Path(f"{made_by}-dc").iterdir()] == [f"res_{name}_digits_ConvNet_1ipc.pt"]
    assert convert("DSA", "named", "--to", "dc", "--method", "DM") == 0
    assert Path("named/res_DM_digits_ConvNet_1ipc.pt").exists()


def test_canvases_are_told_to_be_such(caplog: pytest.LogCaptureFixture) -> None:
    ours = dataclasses.replace(distilled("indices"), images=torch.randn(10, 1, 16, 16), canvas=Canvas(2, 1))
    ours.save("run/synthetic.safetensors")
    caplog.set_level("INFO")
    assert convert("run", "out") == 0
    assert "The images are canvases of 2 by 2 images: train on random crops" in caplog.text


def test_learning_rates_that_the_files_do_not_hold_are_told(caplog: pytest.LogCaptureFixture) -> None:
    ours = dataclasses.replace(distilled("indices"), lr=torch.tensor(0.03), lr_per_step=torch.tensor([0.02, 0.04]))
    ours.save("run/synthetic.safetensors")
    none, mean = "hold no learning rate: train on these images at the set's own, 0.03 ", "the mean was written"
    for kind, told in {
        "dc": f"files of this kind {none}",
        "dc_benchmark --method DM": f"files of this kind {none}",
        "dc_benchmark --method random": f"of the 2 learned for each step, 0.02 to 0.04, {mean}",
        "mtt": f"of the 2 learned for each step, 0.02 to 0.04, {mean}",
        "png": "",
    }.items():
        caplog.clear()
        assert convert("run", kind, "--to", *kind.split()) == 0
        warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) == bool(told)
        assert told in "".join(warnings)


def test_parameters_of_the_images_that_are_not_written_are_told(caplog: pytest.LogCaptureFixture) -> None:
    ours = dataclasses.replace(distilled("logits"), labels=9 * torch.eye(10).roll(3, dims=0))
    dataclasses.replace(ours, parameters={"tokens": torch.ones(4, 300), "scale": torch.ones(())}).save(
        "run.safetensors"
    )
    told = "hold the images alone, not the 1,201 learned parameters that they were computed from"
    for kind in ("mtt", "dc", "png"):
        caplog.clear()
        assert convert("run.safetensors", kind, "--to", kind) == 0
        assert told in caplog.text
    caplog.clear()
    assert convert("run.safetensors", "same.safetensors") == 0
    assert "parameters" not in caplog.text
    assert SyntheticDataset.load("same.safetensors").parameters.keys() == {"tokens", "scale"}
    assert convert("run.safetensors", "sorted.safetensors", "--reorder") == 0
    assert "the learned parameters are left out: they give the images in their former order" in caplog.text
    assert not SyntheticDataset.load("sorted.safetensors").parameters


def test_a_folder_of_the_library_datasets_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("saved").mkdir()
    Path("saved/dataset_info.json").write_text("{}")
    assert convert("saved", "ours") == 2
    assert (
        "saved: expected files of a known kind, found a folder as save_to_disk of the library datasets"
        in capsys.readouterr().err
    )


def test_a_whitened_set_is_not_what_dc_benchmark_tests(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    save_public_pair(torch.arange(10))
    told = "dc_benchmark does not whiten its test images"
    assert convert("theirs", "normalised", "--to", "dc_benchmark", "--dataset", "digits") == 0
    assert told not in caplog.text
    assert convert("theirs", "whitened", "--to", "dc_benchmark", "--dataset", "digits", "--zca") == 0
    assert told in caplog.text
    assert convert("theirs", "ours", "--zca", "--lr_teacher", "0.07", *DIGITS) == 0
    caplog.clear()
    assert convert("ours", "bench", "--to", "dc_benchmark") == 0
    assert told in caplog.text
    assert "trains at its --lr_net, 0.01 if not given (the set's own: 0.07)" in caplog.text


@pytest.mark.parametrize(
    ("destination", "flags", "files", "words"),
    [
        ("out", [], ["images_best.pt", "labels_best.pt", "lr_best.pt"], "images are normalised, labels are probabilities"),
        ("images_7.pt", [], ["images_7.pt", "labels_7.pt", "lr_7.pt"], "torch.load reads each"),
        ("res_x.pt", [], ["res_x.pt"], "['data'][-1]"),
        ("x.parquet", [], ["x.parquet"], "load_dataset('parquet'"),
        ("out", ["--to", "png"], ["labels.json"], "rounded to 8 bits"),
        ("out", ["--to", "ddranking"], ["images.pt", "labels.pt", "lr.pt"], "not digits"),
        ("out", ["--to", "dc_benchmark", "--hard_labels"], ["TM/digits/IPC1/images_best.pt"], "dc_benchmark's root is out"),
    ],
)  # fmt: skip
def test_a_set_is_written_for_other_software(
    caplog: pytest.LogCaptureFixture, destination: str, flags: list[str], files: list[str], words: str
) -> None:
    distilled("probabilities").save("run/synthetic.safetensors")
    caplog.set_level("INFO")
    assert convert("run", destination, *flags) == 0
    folder = Path(destination) if "." not in destination else Path()
    assert all((folder / file).exists() for file in files)
    assert words in caplog.text
    assert convert("run", destination, *flags) == 2  # nothing is written over


def test_pictures_come_back_with_the_real_images_whitening() -> None:
    save_public_pair(torch.arange(10))
    assert convert("theirs", "ours", "--zca", *DIGITS) == 0
    synthetic = SyntheticDataset.load("ours/synthetic.safetensors")
    assert synthetic.whitening is not None
    assert convert("ours", "pictures", "--to", "png") == 0
    assert convert("pictures", "back") == 2
    assert convert("pictures", "back", "--zca", *DIGITS) == 0
    back = SyntheticDataset.load("back/synthetic.safetensors")
    assert torch.equal((back.pictures() * 255).round(), (synthetic.pictures() * 255).round())


def test_folders_of_wordnet_ids_get_the_subsets_labels() -> None:
    """Check a subset of which no class is where its folder's rank is."""
    for number, wnid in enumerate(SUBSETS["imagewoof"]):
        for split in ("train", "val"):
            Path(f"woof/{split}/{wnid}").mkdir(parents=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(f"woof/{split}/{wnid}/0.png")
    flags = "--dataset ImageNet --subset imagewoof --res 8 --data_path woof --packed_path packed".split()
    assert convert("woof/train", "ours.safetensors", *flags, "--lr_teacher", "0.05") == 0
    assert Path("packed").is_dir()
    assert not Path("woof/packed").exists()
    synthetic = SyntheticDataset.load("ours.safetensors")
    assert float(synthetic.lr) == pytest.approx(0.05)
    assert (synthetic.pictures()[:, 0, 0, 0] * 255).round().tolist() == synthetic.labels.tolist() == list(range(10))
    assert synthetic.class_names == tuple(SUBSETS["imagewoof"].values())


def test_tensors_need_no_data_set_to_become_others() -> None:
    labels = torch.randn(10, 10).softmax(1)
    images = save_public_pair(labels)
    assert convert("theirs", "dd", "--to", "ddranking") == 0
    assert torch.equal(torch.load("dd/images.pt", weights_only=True), images)
    assert torch.equal(torch.load("dd/labels.pt", weights_only=True), labels.detach().log())
    assert not Path("dd/lr.pt").exists()
    assert convert("theirs", "bench", "--to", "dc_benchmark", "--hard_labels", "--dataset", "MNIST") == 0
    assert Path("bench/TM/MNIST/IPC1/images_best.pt").exists()
    assert not Path("data").exists()


def test_files_that_speak_against_the_options_are_told(caplog: pytest.LogCaptureFixture) -> None:
    images = save_public_pair(torch.arange(10))
    torch.save(images, "theirs/images_zca_best.pt")
    assert convert("theirs", "ours", *DIGITS) == 0
    assert "written where a set was distilled from whitened images; should they be taken with --zca?" in caplog.text
    caplog.clear()
    assert convert("theirs", "whitened", *DIGITS, "--zca") == 0
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_options_that_the_folders_name_contradicts_are_told(caplog: pytest.LogCaptureFixture) -> None:
    save_public_buffer("buffers/MNIST/ConvNetD1W4")
    assert convert("buffers/MNIST/ConvNetD1W4", "ours", "--dataset", "digits") == 0
    assert "--dataset digits: the folder's name says MNIST; is it another?" in caplog.text
    assert "--model" not in caplog.text


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


def test_commands_to_copy_are_quoted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    save_public_buffer("theirs")
    assert convert("theirs", "my $buffers", *DIGITS, "--data_path", "my data") == 0
    words = "--dataset digits --data_path 'my data' --model ConvNetD1W4 --num_experts 2 …"
    assert f"python -m mtt_fast.distill --buffer_path 'my $buffers' {words}" in caplog.text
    save_public_pair(torch.arange(10), "pair")
    assert convert("pair", "my set", *DIGITS) == 0
    assert "python -m mtt_fast.evaluate 'my set/synthetic.safetensors'" in caplog.text


def test_experts_may_lie_beside_the_buffers_that_they_were_read_from(caplog: pytest.LogCaptureFixture) -> None:
    folder = "buffers/digits/ConvNetD1W4"
    save_public_buffer(folder)
    for time in range(2):  # the same command continues where it was stopped, and finds all of them here
        assert convert(folder, "buffers") == 0
        assert len(TrajectoryStore(folder)) == 2
        warned = f"{folder}: other experts (this software's: expert_NNNN.safetensors, one file an expert) are not read; --from experts"
        assert (warned in caplog.text) == (time == 1)
    caplog.clear()
    assert convert(folder, "theirs", "--from", "experts") == 0
    assert "are not read" not in caplog.text


def test_sets_that_are_not_read_are_told(caplog: pytest.LogCaptureFixture) -> None:
    save_public_buffer("theirs")
    save_public_pair(torch.arange(10), "theirs")
    assert convert("theirs", "buffers", *DIGITS) == 0
    sets = "theirs: other sets (images_*.pt, labels_*.pt and lr_*.pt of MTT and its successors) are not read; --from mtt reads them"
    assert sets in caplog.text
    distilled().save("both/synthetic.safetensors")
    save_public_pair(torch.arange(10), "both")
    assert convert("both", "to", "--to", "dc") == 0
    assert sets.replace("theirs", "both", 1) in caplog.text
    caplog.clear()
    assert convert("both", "from", *DIGITS, "--from", "mtt") == 0
    assert evaluate_quickly("from/synthetic.safetensors") == 0
    assert "are not read" not in caplog.text
    assert evaluate_quickly("both") == 0
    assert "both: other sets (mtt: images_*.pt" in caplog.text


def evaluate_quickly(source: str) -> int:
    return cli.run(evaluate, [source, *DIGITS, "--num_eval", "1", "--epoch_eval_train", "1", "--other_data"])


def test_buffers_that_are_missing_or_copied_are_told(caplog: pytest.LogCaptureFixture) -> None:
    save_public_buffer("theirs")
    first = Path("theirs/replay_buffer_0.pt")
    first.with_name("replay_buffer_2.pt").write_bytes(first.read_bytes())
    assert convert("theirs", "buffers", "--dataset", "digits", "--model", "ConvNetD1W4") == 0
    assert "theirs: replay_buffer_1.pt is not there, of those up to 2; the others are read" in caplog.text
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a source and a destination"),
        (["pair"], "expected a source and a destination"),
        (["nothing", "out"], "nothing: expected files of a known kind, found nothing there"),
        (["empty", "out"], "empty: expected files of a known kind, found other files"),
        (["pair", "out"], "pair: expected the real images that it belongs to"),
        (["pair", "out", "--to", "pgn"], "--to pgn: expected one of"),
        (["pair", "out", "--from", "ddrankin"], "(did you mean ddranking?)"),
        (["pair", "out", "--to", "buffer"], "--to buffer: pair holds a distilled set"),
        (["pair", "out", "--to", "dc_benchmark"], "--dataset: expected the data set's name"),
        (["pair", "out", "--dataset", "digits", "--lr_teacher", "0"], "--lr_teacher 0.0: expected more than 0"),
        (["pair", "full"], "full: exists already"),
        (
            ["pair", "out", "--label_kind", "logits"],
            "has no effect on labels that are classes, as those of pair/images_best.pt",
        ),
        (["buffer", "out"], "buffer: expected the real images that it belongs to"),
        (["buffer", "out", "--to", "mtt"], "--to mtt: buffer holds experts"),
        (["buffer", "out", "--dataset", "digits"], "of another network: expected 14 tensors, found 6"),
        (["buffer", "out", *DIGITS, "--store_dtype", "int8"], "--store_dtype: expected one of 'float32', 'bfloat16'"),
        (["buffer", "out", *DIGITS, "--experts_per_file", "0"], "--experts_per_file 0: expected at least 1"),
        (["pair", "out", "--dataset", "digits", "--zac"], "--zac: unknown option (did you mean --zca?)"),
    ],
)
def test_mistakes_are_told(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    save_public_pair(torch.arange(10), "pair")
    save_public_pair(torch.arange(10), "full")
    save_public_buffer("buffer")
    Path("empty").mkdir()
    assert convert(*arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not Path("out").exists()


def test_a_set_of_other_images_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("rgb").mkdir()
    torch.save(torch.randn(10, 3, 8, 8), "rgb/images_best.pt")
    torch.save(torch.arange(10), "rgb/labels_best.pt")
    assert convert("rgb", "out", *DIGITS) == 2
    assert "expected images of 1 channels and 10 classes, found (3, 8, 8) of 10 classes" in capsys.readouterr().err


def test_a_set_of_normalised_images_is_not_taken_for_a_whitened_one(capsys: pytest.CaptureFixture[str]) -> None:
    distilled().save("run/synthetic.safetensors")
    assert convert("run", "out", "--zca") == 2
    assert "whitened in another way: expected ZCA-whitened images, found normalised images" in capsys.readouterr().err
    assert not Path("out").exists()


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mtt_fast", *arguments])
    return all_jobs()


def test_all_jobs_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        assert command(monkeypatch, *arguments) == 0
        listed = capsys.readouterr().out
        package = Path(mtt_fast.__file__).parent
        for job in re.findall(r"\n  (\w+) ", listed):
            assert (package / f"{job}.py").exists() or (package / job / "__main__.py").exists()
        runs = 'if __name__ == "__main__"'
        jobs = {path.stem for path in package.glob("*.py") if runs in path.read_text()} - {"__main__"}
        jobs |= {path.parent.name for path in package.glob("*/__main__.py")}
        assert set(re.findall(r"\n  (\w+) ", listed)) == jobs
    assert command(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == mtt_fast.__version__
    assert command(monkeypatch, "destill") == 2
    assert "error: destill: expected one of experts, buffer, distill" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # other tests import the jobs
def test_a_job_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "recipes") == 0
    assert "digits" in capsys.readouterr().out
    distilled().save("run/synthetic.safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "mtt_fast", "convert", "run", "out"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "wrote out/images_best.pt, out/labels_best.pt, out/lr_best.pt" in done.stderr
    assert Path("out/images_best.pt").exists()
    assert command(monkeypatch, "env", "--x") == 2
    assert "error: --x: " in capsys.readouterr().err
