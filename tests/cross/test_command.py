"""Test the cross-architecture table at toy size: a cell that is measured once is not measured again."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mtt_fast import SyntheticDataset, evaluate
from mtt_fast.augmentation.texture import Canvas
from mtt_fast.commands import cli
from mtt_fast.commands.evaluated_set import EvaluatedSet
from mtt_fast.cross import command as cross
from mtt_fast.training.evaluation import Accuracy
from mtt_fast.training.protocols import EvaluationProtocol

TOY = "--num_eval 2 --epoch_eval_train 2 --models ConvNetD1W4 MLP --out table".split()
ACCURACY = {"mean": 0.5, "std": 0.1, "n": 2, "values": [0.5, 0.5]}
CELL = {"accuracy": ACCURACY, "text": "50 %", "seconds": 1.0, "device": "a device"}


@pytest.fixture(autouse=True)
def _two_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtt_fast.data import load

    monkeypatch.chdir(tmp_path)
    data = load("digits", data_path="data", progress=False)
    recipe: dict[str, Any] = {"dataset": "digits", "model": "ConvNetD1W4", "num_eval": 7, "epoch_eval_train": 3}
    for name in ("run/synthetic", "b"):
        SyntheticDataset(
            torch.randn(20, 1, 8, 8), torch.arange(10).repeat_interleave(2), torch.tensor(0.02), data.class_names, data.mean,
            data.std, recipe=recipe,
        ).save(f"{name}.safetensors")  # fmt: skip


def table() -> list[dict[str, Any]]:
    return list(json.loads(Path("table/cross.json").read_text())["cells"])


def test_only_the_set_of_smaller_images_is_cut() -> None:
    """Check that the first set's factor is not that of the others, which take its other settings."""
    whole = SyntheticDataset.load("b.safetensors")
    dataclasses.replace(whole, recipe=whole.recipe | {"factor": 2}).save("parts.safetensors")
    whole.export("mtt", "pair")
    flags = "--num_eval 1 --epoch_eval_train 1 --models ConvNetD1W4 --out table".split()
    assert cli.run(cross.main, ["parts.safetensors", "pair/images_best.pt", "random", *flags]) == 0
    assert [cell["question"]["ipc"] for cell in table()] == [8, 2, 2]
    rows = Path("table/cross.md").read_text().splitlines()[2:5]
    assert [row.split(" | ")[2] for row in rows] == ["2", "2", "2"]  # as papers count


def test_a_table_measures_only_what_is_added_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.run(cross.main, ["run", "random", *TOY]) == 0
    cells = table()
    assert [cell["question"]["network"] for cell in cells] == ["ConvNetD1W4", "MLP"] * 2
    assert all(0 < cell["seconds"] < 60 for cell in cells)
    assert all(cell["accuracy"]["n"] == 2 and cell["question"]["ipc"] == 2 for cell in cells)
    assert (cells[0]["question"]["lr"], cells[2]["question"]["lr"]) == (pytest.approx(0.02), 0.01)
    lines = Path("table/cross.md").read_text().splitlines()
    assert lines[0] == "| set | data set | images per class | ConvNetD1W4 | MLP |"
    accuracy = cells[1]["accuracy"]
    assert f"| {100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f} |" in lines[2]
    assert lines[3].startswith("| random | digits | 2 |")
    assert "mean ± standard deviation over 2 networks; protocol mtt: 3 epochs" in lines[5]
    with Image.open("table/cross.png") as picture:
        assert picture.width > 300

    alone = ["run", "--num_eval", "2", "--epoch_eval_train", "2", "--model", "MLP", "--out", "one.json"]
    assert cli.run(evaluate.main, alone) == 0
    assert json.loads(Path("one.json").read_text())["accuracy"] == cells[1]["accuracy"]

    measured = []
    monkeypatch.setattr(cross, "_measure", lambda *args: measured.append(args[4]) or cells[0])  # type: ignore[func-returns-value]
    assert cli.run(cross.main, ["run", "b.safetensors", "random", *TOY]) == 0
    assert measured == ["ConvNetD1W4", "MLP"]  # of the new set
    assert cli.run(cross.main, ["random", *TOY, "--dataset", "digits", "--ipc", "2"]) == 0
    assert len(measured) == 2
    assert cli.run(cross.main, ["run", *TOY, "--protocol", "datm"]) == 0
    assert len(measured) == 4  # another protocol is another question


@pytest.mark.parametrize(
    "flags",
    ["--seed 1", "--num_eval 1", "--epoch_eval_train 4", "--lr_teacher 0.5", "--batch_train 5", "--protocol datm", "--best_epoch"],
)  # fmt: skip
def test_a_set_in_another_setting_is_measured_again(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(*arguments: Any) -> dict[str, Any]:
        measured.append(arguments)
        return CELL

    monkeypatch.setattr(cross, "_measure", measure)
    words = ["run", *TOY, "--models", "MLP"]
    for _ in range(2):
        assert cli.run(cross.main, words) == 0
    assert len(measured) == 1
    assert cli.run(cross.main, [*words, *flags.split()]) == 0
    assert len(measured) == 2


def test_a_network_in_bfloat16_is_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(cross, "_measure", lambda *arguments: measured.append(arguments) or CELL)  # type: ignore[func-returns-value]
    monkeypatch.setattr(cross, "save_plot", lambda *_: None)
    for count, precision in ((1, "fp32"), (1, "tf32"), (2, "bf16"), (2, "bf16"), (2, "fp16")):
        monkeypatch.setattr(cross, "precision_on", lambda *_, precision=precision: precision)
        assert cli.run(cross.main, ["run", *TOY, "--models", "MLP"]) == 0
        assert len(measured) == count


def test_a_table_of_another_seed_has_its_networks() -> None:
    flags = "--num_eval 2 --epoch_eval_train 2 --seed 3".split()
    assert cli.run(cross.main, ["run", *flags, "--models", "MLP", "--out", "table"]) == 0
    assert cli.run(evaluate.main, ["run", *flags, "--model", "MLP", "--out", "one.json"]) == 0
    assert json.loads(Path("one.json").read_text())["accuracy"] == table()[0]["accuracy"]


def test_a_set_brings_its_batch_size_and_the_table_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(
        network: Any, train: Any, test: Any, lr: float, protocol: EvaluationProtocol, **others: Any
    ) -> Accuracy:
        named = ("num_networks", "seed", "precision", "at_once")
        asked.append((round(lr, 6), protocol.epochs, protocol.batch_size, *(others[name] for name in named)))
        return Accuracy((0.5,))

    monkeypatch.setattr(cross, "evaluate", measured)
    monkeypatch.setattr(cross, "precision_on", lambda *_: "tf32")  # a CPU's is always fp32
    ours = SyntheticDataset.load("b.safetensors")
    recipe = ours.recipe | {"seed": 9, "batch_train": 4, "protocol": "datm", "best_epoch": True}
    replace(ours, recipe=recipe).save("c.safetensors")
    words = ["c.safetensors", "b.safetensors", "--models", "MLP", "--out", "table"]
    assert cli.run(cross.main, words) == 0
    assert asked == [(0.02, 1000, 4, 5, 0, "tf32", None), (0.02, 1000, 256, 5, 0, "tf32", None)]
    assert cli.run(cross.main, [*words, "--networks_at_once", "2", "--seed", "4"]) == 0
    assert asked[2:] == [(0.02, 1000, 4, 5, 4, "tf32", 2), (0.02, 1000, 256, 5, 4, "tf32", 2)]
    assert [cell["question"]["protocol"]["name"] for cell in table()] == ["mtt"] * 4


def test_a_table_says_the_protocol_of_each_set(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    ours = SyntheticDataset.load("b.safetensors")
    replace(ours, recipe=ours.recipe | {"batch_train": 4, "dsa": False}).save("c.safetensors")
    assert cli.run(cross.main, ["c.safetensors", *TOY, "--models", "MLP"]) == 0
    of_c = "protocol mtt: 3 epochs in batches of 4, SGD with momentum 0.9 and weight decay 0.0005, the set's learning rate, "
    note = Path("table/cross.md").read_text().splitlines()[-1]
    assert f"over 2 networks; {of_c}" in note
    assert "augmentation none; the last epoch is reported." in note
    assert cli.run(cross.main, ["c.safetensors", "run", "b.safetensors", *TOY, "--models", "MLP"]) == 0
    note = Path("table/cross.md").read_text().splitlines()[-1]
    assert f"over 2 networks; c.safetensors: {of_c}" in note
    assert "; run, b.safetensors: protocol mtt: 3 epochs in batches of 256, " in note
    assert f"{note.partition('networks; ')[2].removesuffix('.')}" in caplog.messages


def test_a_file_whose_classes_differ_has_a_mean_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross, "_measure", lambda *_: CELL)
    torch.save(torch.randn(15, 1, 8, 8), "images_best.pt")
    torch.save(torch.arange(15) % 10, "labels_best.pt")
    assert cli.run(cross.main, ["images_best.pt", "run", *TOY, "--dataset", "digits"]) == 0
    lines = Path("table/cross.md").read_text().splitlines()
    assert lines[2].startswith("| images_best.pt | digits | 1.5 | 50.0 ")
    assert lines[3].startswith("| run | digits | 2 | 50.0 ")


def test_other_labels_other_whitening_and_other_data_are_other_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross, "_measure", lambda *arguments: CELL)
    ours = SyntheticDataset.load("b.safetensors")
    replace(ours, labels=ours.labels.flip(0)).save("c.safetensors")
    assert cli.run(cross.main, ["b.safetensors", "c.safetensors", *TOY, "--models", "MLP"]) == 0
    assert len(table()) == 2
    random_set = ["random", *TOY, "--models", "MLP", "--dataset", "digits"]
    for count, flags in ((3, []), (4, ["--zca"]), (5, ["--lr_teacher", "0.5"])):
        assert cli.run(cross.main, [*random_set, *flags]) == 0
        assert len(table()) == count
    replace(ours, mean=(0.1,)).save("d.safetensors")  # which test images are normalised with
    for count, name in ((6, "b"), (7, "d")):
        assert cli.run(cross.main, [f"{name}.safetensors", *TOY, "--models", "MLP", "--other_data"]) == 0
        assert len(table()) == count
    load_data = EvaluatedSet.load_data
    monkeypatch.setattr(EvaluatedSet, "load_data", lambda self: replace(load_data(self), fingerprint="beef"))
    assert cli.run(cross.main, random_set) == 0
    assert len(table()) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected runs' folders, files, or the word random"),
        (["run", "run"], "run: expected each set once"),
        (["nothing"], "nothing: cannot be read"),
        (["run", "--models", "ConvNetD1W4", "VGG11"], "VGG11: nothing is left of images"),
        (["run", "--eval_mode", "X"], "--eval_mode X: expected one of"),
        (["run", "--out", "broken"], "cross.json: expected a table of this command, found it damaged"),
    ],
)
def test_mistakes_are_told(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    Path("broken").mkdir()
    Path("broken/cross.json").write_text("[]")
    assert cli.run(cross.main, arguments) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs/cross/cross.json").exists()


def test_sets_that_differ_in_their_crops_are_two_questions() -> None:
    """Use the same canvases with other crops: a measurement of one says nothing about the other."""
    from mtt_fast.data import load

    data = load("digits", data_path="data", progress=False)
    images = torch.randn(10, 1, 16, 16)
    for samples in (1, 3):
        SyntheticDataset(
            images, torch.arange(10), torch.tensor(0.02), data.class_names, data.mean, data.std,
            recipe={"dataset": "digits"}, canvas=Canvas(2, samples),
        ).save(f"{samples}.safetensors")  # fmt: skip
    flags = "--num_eval 1 --epoch_eval_train 1 --models ConvNetD1W4 --out table".split()
    assert cli.run(cross.main, ["1.safetensors", "3.safetensors", *flags]) == 0
    assert [cell["question"]["canvas"] for cell in table()] == [{"size": 2, "samples": samples} for samples in (1, 3)]


def test_sets_that_differ_in_what_is_real_are_two_questions_where_real_images_are_augmented_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cross, "_measure", lambda *arguments: CELL)
    monkeypatch.setattr(cross, "save_plot", lambda *_: None)
    ours = SyntheticDataset.load("b.safetensors")
    replace(ours, recipe=ours.recipe | {"distilled_share": 0.5}).save("half.safetensors")
    for count, protocol in ((1, "mtt"), (3, "selmatch")):
        assert (
            cli.run(cross.main, ["b.safetensors", "half.safetensors", *TOY, "--models", "MLP", "--protocol", protocol])
            == 0
        )
        assert len(table()) == count


def test_an_unknown_network_is_told_by_the_option_that_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(cross.main, ["run", "--models", "MLP", "RestNet18", "--out", "table"]) == 2
    assert "error: --models RestNet18: expected ConvNet" in capsys.readouterr().err
