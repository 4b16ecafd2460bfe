"""Test the conversion of distilled sets end to end on the digits: guesses, files, log and refusals."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mtt_fast import SyntheticDataset
from mtt_fast.augmentation.texture import Canvas
from mtt_fast.commands import cli
from mtt_fast.data import load
from mtt_fast.data.class_lists import SUBSETS
from mtt_fast.evaluate import main as evaluate
from tests.convert.files import DIGITS, convert, distilled, save_public_buffer, save_public_pair


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
    caplog.set_level("INFO")
    expected = evaluated("data_100.pt")
    assert "each image is taken for 2 × 2 smaller ones" in caplog.text
    assert expected[0] == 10  # the stored ones
    caplog.clear()
    assert evaluated("data_100.pt", "--factor", "1")[0] == 10
    assert "each image is taken for" not in caplog.text
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


def test_classes_without_a_folder_are_told(caplog: pytest.LogCaptureFixture) -> None:
    whole = distilled()
    whole.save("whole.safetensors")
    dataclasses.replace(whole, images=whole.images[2:], labels=whole.labels[2:]).save("part.safetensors")
    for name, expected in (("whole", False), ("part", True)):
        caplog.clear()
        assert convert(f"{name}.safetensors", name, "--to", "png") == 0
        assert ("2 of the 10 classes have no images, and so no folder" in caplog.text) is expected


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
    assert "smaller ones" not in caplog.text  # its images are whole
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


@pytest.mark.parametrize("kind", ["png", "parquet"])
def test_pictures_of_other_software_get_what_the_options_say(
    kind: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    classes = [number // 2 for number in range(20)]
    for number, label in enumerate(classes):
        Path(f"pictures/{label}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(f"pictures/{label}/{number:02d}.png")
    source = "pictures"
    if kind == "parquet":
        arrow, source = pytest.importorskip("pyarrow"), "theirs.parquet"
        images = [{"bytes": path.read_bytes()} for path in sorted(Path("pictures").glob("*/*"))]
        importlib.import_module("pyarrow.parquet").write_table(arrow.table({"image": images, "label": classes}), source)
    given = [*DIGITS, "--lr_teacher", "0.03", "--distilled_share", "0.5", "--factor", "2"]
    assert convert(source, "ours.safetensors", *given) == 0
    ours = SyntheticDataset.load("ours.safetensors")
    assert ours.recipe == {
        "dataset": "digits", "subset": None, "res": None, "data_path": "data", "packed_path": None, "zca": False,
        "model": "ConvNetD1W4", "ipc": 2, "imported_from": source, "distilled_share": 0.5, "factor": 2,
    }  # fmt: skip
    assert ours.versions
    assert float(ours.lr) == pytest.approx(0.03)
    assert cli.run(evaluate, ["ours.safetensors", "--num_eval", "1", "--epoch_eval_train", "1"]) == 0  # as convert says
    caplog.set_level("INFO")
    assert convert(source, "mtt", "--to", "mtt", *DIGITS, "--lr_teacher", "0.07", "--data_path", "data") == 0
    assert float(torch.load("mtt/lr_best.pt", weights_only=True)) == pytest.approx(0.07)
    assert "--data_path data has no effect" not in caplog.text
    # a record of ours says all that, so that the options would be in vain
    assert convert("ours.safetensors", "record", "--to", kind) == 0
    for option, value in (("lr_teacher", "0.5"), ("distilled_share", "0.25"), ("factor", "3")):
        assert convert("record", "back", *DIGITS, f"--{option}", value) == 2
        assert f"--{option} {value}: has no effect" in capsys.readouterr().err
    assert convert("record", "back", "--dataset", "digits", "--model", "ConvNetD2") == 0
    assert "--model ConvNetD2 has no effect on pictures, whose record contains it" in caplog.text
    assert SyntheticDataset.load("back/synthetic.safetensors").recipe == ours.recipe


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


def test_commands_to_copy_are_quoted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    save_public_buffer("theirs")
    assert convert("theirs", "my $buffers", *DIGITS, "--data_path", "my data") == 0
    words = "--dataset digits --data_path 'my data' --model ConvNetD1W4 --num_experts 2 …"
    assert f"python -m mtt_fast.distill --buffer_path 'my $buffers' {words}" in caplog.text
    save_public_pair(torch.arange(10), "pair")
    assert convert("pair", "my set", *DIGITS) == 0
    assert "python -m mtt_fast.evaluate 'my set/synthetic.safetensors'" in caplog.text


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
