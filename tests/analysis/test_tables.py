"""Test the tables of accuracies: what was measured beside the paper, and refusals."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from mtt_fast.analysis.measured import Measured, Setting, measurements
from mtt_fast.analysis.tables import rows_by_table
from mtt_fast.commands.published import published_numbers
from mtt_fast.distill.method_names import marked_method
from mtt_fast.distill.options import DistillOptions
from mtt_fast.recipes import recipe_options
from mtt_fast.storage.text_files import write_json
from tests.analysis.helpers import read, run, summary


def by_network(*networks: str, accuracy: float = 0.7) -> dict[str, Any]:
    return {"accuracy_by_network": {"distilled": {name: {"mean": accuracy, "std": 0.0, "n": 5} for name in networks}}}


def test_the_defaults_are_mtt_itself() -> None:
    assert marked_method("MTT", dataclasses.asdict(DistillOptions())) == "MTT"
    assert marked_method("MTT", {"pix_init": "noise"}) == "MTT"


@pytest.mark.parametrize(
    "option", ["pix_init samples_predicted_correctly", "pix_init window", "lr_decay True", "match_step nearest"]
)
def test_mtt_with_an_option_of_a_successor_is_another_method(option: str) -> None:
    name, value = option.split()
    marked = marked_method("MTT", {name: value == "True" or value})
    assert marked == f"MTT, with --{option.removesuffix(' True')}"


def test_tables_put_what_was_measured_beside_the_paper(tmp_path: Path) -> None:
    runs = {
        "a/seed0": summary(0.40, random=0.15, out="a/seed0", device="cpu", recipe="mine"),
        "a/seed1": summary(0.44, seed=1, random=0.17, out="a/seed1", memory_budget="2GiB"),
        "b": summary(0.30, Iteration=7),
        "datm": summary(0.50, random=0.35, protocol="datm"),
        "best": summary(0.60, best_epoch=True),
        "vgg": summary(0.70, ipc=50, random=0.21, eval_mode="B") | by_network("ConvNetBN", "VGG11BN"),
        "cross": summary(0.48, ipc=10, eval_mode="C") | by_network("VGG11", accuracy=0.48),
        "dm": summary(0.25, method="DM", ipc=10),
        "nette": summary(0.5, dataset="ImageNet", subset="imagenette", res=128, model="ConvNetD5"),
        "small": summary(0.6, dataset="ImageNet", subset="imagenette", res=64, model="ConvNetD5"),
        "textures": summary(0.2, texture=True),
        "frequencies": summary(0.8, ipc=10, msz_per_channel=64),
        "digits": summary(0.9, dataset="digits", model="ConvNetD2W32"),
        "folder": summary(0.3, dataset="/some/where/CIFAR10"),
    }
    for name, content in runs.items():
        write_json(tmp_path / "runs" / name / "summary.json", content)
    assert run("tables", str(tmp_path / "runs"), "--out", str(tmp_path / "out")) == 0
    tables = read(tmp_path / "out" / "tables.json")

    def rows(table: str, dataset: str, method: str) -> list[dict[str, Any]]:
        return [row for row in tables[table]["rows"] if (row["dataset"], row["method"]) == (dataset, method)]

    seeds, other, *tested_on_others = rows("1", "CIFAR10", "MTT")
    assert [(row["model"], row["measured"]["50"]["mean"]) for row in tested_on_others] == [
        ("ConvNetBN", 0.70),
        ("VGG11BN", 0.70),
    ]
    assert seeds["measured"]["1"]["mean"] == pytest.approx(0.42)
    assert seeds["measured"]["1"]["std"] == pytest.approx(math.sqrt(2) * 0.02)
    assert [Path(path).name for path in seeds["measured"]["1"]["runs"]] == ["seed0", "seed1"]
    assert seeds["paper"]["whitened"] == ["1", "10"]
    assert seeds["paper"]["accuracy"]["50"] == pytest.approx({"mean": 0.716, "std": 0.002})
    assert other["measured"]["1"]["mean"] == 0.30
    assert other["paper"] is None
    random, on_bn = rows("1", "CIFAR10", "Random")
    assert random["measured"]["1"]["mean"] == pytest.approx(0.16)
    assert (on_bn["model"], on_bn["measured"]["50"]["mean"]) == ("ConvNetBN", 0.21)  # the first of the tested networks
    for method, mean in (("MTT, protocol datm", 0.50), ("Random, protocol datm", 0.35), ("MTT, best epoch", 0.60)):
        (row,) = rows("1", "CIFAR10", method)
        assert (row["measured"]["1"]["mean"], row["paper"]) == (mean, None)
    assert rows("2", "CIFAR10", "MTT")[0]["measured"]["1"]["n"] == 2
    assert rows("2", "CIFAR10", "KIP")[0]["paper"]["quoted"]
    by_model = {row["model"]: row for row in rows("3", "CIFAR10", "MTT")}
    assert list(by_model) == ["ConvNet", "ResNet18", "VGG11", "AlexNet"]
    assert by_model["VGG11"]["measured"]["10"]["mean"] == 0.48
    assert by_model["VGG11"]["paper"]["accuracy"]["10"] == pytest.approx({"mean": 0.503, "std": 0.008})
    assert by_model["VGG11"]["elsewhere"][0]["accuracy"]["50"] == pytest.approx({"mean": 0.554})
    assert seeds["elsewhere"][0]["source"] == "the text of the paper"
    assert rows("4", "imagenette", "MTT")[0]["measured"]["1"]["mean"] == 0.5
    assert rows("1", "imagenette at 64 px", "MTT")[0]["measured"]["1"]["mean"] == 0.6
    assert rows("1", "CIFAR10", "MTT, textures")[0]["measured"]["1"]["mean"] == 0.2
    # more images for the same numbers, so they do not stand beside the paper's
    (frequencies,) = rows("1", "CIFAR10", "MTT, 64 frequencies")
    assert (frequencies["measured"]["10"]["mean"], frequencies["paper"]) == (0.8, None)
    assert rows("1", "digits", "MTT")[0]["paper"] is None
    assert [row["model"] for row in rows("1", "CIFAR10 (folder)", "MTT")] == ["ConvNet"]
    text = (tmp_path / "out" / "tables.md").read_text()
    for line in (
        "| CIFAR10 | MTT | ConvNet | 42.0 ± 2.8 (2 runs) | 46.3 ± 0.8* | — | 65.3 ± 0.7* | — | 71.6 ± 0.2 | — | — |",
        "| CIFAR10 | DM | ConvNet | — | 26.0 ± 0.8‡ | 25.0 ± 1.0 | 48.9 ± 0.6 |",
        "| CIFAR10 | MTT (b) | ConvNet | 30.0 ± 1.0 | — |",
        "| CIFAR10 | CAFE | ConvNet | — | 30.3 ± 1.1†‡ | — |",
        "| CIFAR10 | DD | AlexNet | — | none | — | 36.8 ± 1.2 | — | none |",
        "| CIFAR10 | MTT | VGG11 | — | — | 48.0 ± 0.0 | 50.3 ± 0.8 | — | 55.4‡ |",
        "| imagesquawk | all real images | ConvNetD5 | — | — | — | — | — | 87.5 ± 0.3 |",
        "\n- Herding (CIFAR10, CIFAR100): Table 1 of AutoPalette",
        "\n- CIFAR10, MTT, ConvNet, 1: 46.2 ± 0.8 in Table 1 of PAD (arXiv 2408.03360)\n",
        "\n- CIFAR100, MTT, ConvNet, 10: 39.4 in Table 2 of the paper\n",
        "\n- CIFAR10: 0.02 % at 1, 0.2 % at 10, 1 % at 50\n",
        "\n- ImageNet subsets: 11 s an epoch, 15 GPU hours for 100, 120 MB each\n",
    ):
        assert line in text
    assert "MTT, ConvNet, 50: 71.6" not in text  # PAD says what the table says


def test_a_row_names_the_run_in_the_folder_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "here" / "summary.json", summary(0.4, method="DM", dataset="digits"))
    monkeypatch.chdir(tmp_path / "here")
    assert run("tables", ".", "--out", "out") == 0
    assert "| digits | DM (here) | ConvNet | 40.0 ± 1.0 |" in Path("out/tables.md").read_text()


def test_a_network_that_the_paper_lacks_stands_in_the_table_of_its_subset() -> None:
    paper = published_numbers()
    setting, mine = Setting("imagenette", "ConvNetD4", "MTT", "1"), Measured(("run",), 0.5, 0.1, 5)
    tables = rows_by_table({setting: [mine]}, paper.rows, list(paper.titles))
    where = [(number, row.model) for number, rows in tables.items() for row in rows if row.measured]
    assert where == [("4", "ConvNetD4")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "expected a run folder, or a folder of runs, found no summary.json in it or below; check the path"),
        ({"summary.json": "{"}, "summary.json: expected the summary of a run"),
        (
            {"summary.json": '{"accuracy": {"distilled": {"mean": 0.5, "std": 0.1, "n": 2}}, "options": {}}'},
            "expected 'dataset' among the options",
        ),
    ],
)
def test_wrong_folders_are_refused(
    files: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    assert run("tables", str(folder), "--out", str(tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_are_averaged_over_seeds_and_not_over_data_or_repetitions() -> None:
    """Check that a repeated seed is one measurement, and that two folders of one name are two settings."""

    def of_run(mean: float, seed: int, fingerprint: str = "f00d", **diverged: int) -> dict[str, Any]:
        options = {"dataset": "digits", "model": "MLP", "ipc": 1, "seed": seed}
        accuracy = {"distilled": {"mean": mean, "std": 0.0, "n": 5} | diverged}
        return {"accuracy": accuracy, "options": options, "data": {"fingerprint": fingerprint}}

    runs = {"a": of_run(0.5, 0), "b": of_run(0.7, 1, diverged=3), "again": of_run(0.9, 1)}
    runs["b"]["options"] = dict(reversed(runs["b"]["options"].items()))  # as another version orders them
    runs["other"] = of_run(0.1, 0, "beef", diverged=2)
    ((both, other),) = measurements({Path(name): run for name, run in runs.items()}).values()
    assert (both.runs, both.n, both.diverged) == (("a", "b"), 2, 1)  # in one of two runs
    assert both.mean == pytest.approx(0.6)
    assert both.std == pytest.approx(0.02**0.5)
    assert (other.runs, other.n, other.mean, other.diverged) == (("other",), 5, 0.1, 2)  # of five networks


def test_runs_with_other_experts_or_scores_are_not_left_out() -> None:
    """Check that imported experts, and those of baselines, part runs; that other own experts are another repetition, and a copied run is none."""

    def of_run(mean: float, experts: dict[str, Any], digest: str, **options: Any) -> dict[str, Any]:
        return summary(mean, random=mean, **options) | {"experts": {"hyperparameters": experts, "digest": digest}}

    own, imported = {"lr": 0.01}, {"imported_from": "replay_buffer_0.pt, expert 0"}
    runs = {
        "imported": of_run(0.1, imported, "a"),
        "imported, others": of_run(0.2, imported, "b", seed=1),
        "own": of_run(0.3, own, "c"),
        "own, trained with another seed": of_run(0.4, own, "d"),
        "own, copied": of_run(0.5, own, "c"),
        "scores": of_run(0.6, own, "c", ipc=50, score_path="cscores.npz"),
        "other scores": of_run(0.7, own, "c", ipc=50, score_path="mine.npz"),
        "herding": summary(0.8, method="Herding", buffer_path="mine"),
        "herding by others": summary(0.9, method="Herding", buffer_path="theirs"),
    }
    measured = measurements({Path(name): run for name, run in runs.items()})
    assert {setting: [value.runs for value in values] for setting, values in measured.items()} == {
        Setting("CIFAR10", "ConvNet", "MTT", "1"): [
            ("imported",),
            ("imported, others",),
            ("own", "own, trained with another seed"),
        ],
        Setting("CIFAR10", "ConvNet", "MTT", "50"): [("scores",), ("other scores",)],
        Setting("CIFAR10", "ConvNet", "Random", "1"): [("imported", "imported, others")],
        Setting("CIFAR10", "ConvNet", "Random", "50"): [("scores",)],
        Setting("CIFAR10", "ConvNet", "Herding", "1"): [("herding",), ("herding by others",)],
    }


def test_spelling_parts_no_runs_and_other_experts_and_scores_do() -> None:
    """Check that a data set's name counts in any case alike, and that no run is left out for another one's experts or scores."""

    def of_run(hyperparameters: dict[str, Any], **options: Any) -> dict[str, Any]:
        return summary(0.5, **options) | {"experts": {"hyperparameters": hyperparameters}}

    plain, curriculum = {"lr": 0.01}, {"lr": 0.01, "sort_method": "sha256:f00d"}
    runs = {
        "a": of_run(plain),
        "b": of_run(plain, dataset="cifar10", seed=1),
        "curriculum": of_run(curriculum),
        "nette": of_run(plain, dataset="imagenet", subset="ImageNette", model="ConvNetD5"),
    }
    measured = measurements({Path(name): run for name, run in runs.items()})
    assert {setting: [value.runs for value in values] for setting, values in measured.items()} == {
        Setting("CIFAR10", "ConvNet", "MTT", "1"): [("a", "b"), ("curriculum",)],
        Setting("imagenette", "ConvNetD5", "MTT", "1"): [("nette",)],
    }
    changed = {"changed": summary(0.5, match_step="nearest", teacher_label=True)}
    (setting,) = measurements({Path(name): run for name, run in changed.items()})
    assert setting.method == "MTT, with --match_step nearest --teacher_label"  # not in MTT's row
    for name, one, another in (
        ("scores_digest", "f00d", "beef"),
        ("code_digest", "f00d", "beef"),
        ("network", {"outputs": [0.5]}, {"outputs": [0.25]}),  # a user's own
    ):
        same_name = [summary(0.5) | {name: value} for value in (one, another, one)]
        ((first, other),) = measurements({Path(str(number)): run for number, run in enumerate(same_name)}).values()
        assert (first.runs, other.runs) == (("0",), ("1",))  # the same seed twice is one measurement
    paper = published_numbers()
    rows = rows_by_table(measured, paper.rows, list(paper.titles))["1"]
    shown = [value.runs for row in rows if row.method == "MTT" for value in row.measured.values()]
    assert shown == [("a", "b"), ("curriculum",)]


def test_a_row_has_one_choice_of_options_for_all_numbers_of_images() -> None:
    """Check that rows do not depend on the order of the folders, and that the recipes of one name are one choice."""

    def of_recipe(recipe: str, **others: Any) -> dict[str, Any]:
        defaults = dataclasses.asdict(DistillOptions()) | recipe_options(recipe)
        return summary(0.5, **(defaults | {"recipe": recipe} | others))

    runs = {
        "a": summary(0.5, lr_img=1.0, lr_lr=1.0, ipc=1),
        "b": summary(0.5, lr_img=2.0, ipc=1),
        "c": summary(0.5, lr_img=2.0, ipc=10),
        "d": summary(0.5, lr_lr=1.0, lr_img=1.0, ipc=10),  # as another version orders its options
        "e": of_recipe("cifar10-ipc1", Iteration=7),
        "f": of_recipe("cifar10-ipc50"),  # with another batch size, and without whitening
        "g": of_recipe("cifar10-ipc1"),
        "h": of_recipe("cifar10-ipc50", ipc=10),  # the paper's settings for another number of images
        "i": of_recipe("cifar10-ipc10", Iteration=7),
    }
    measured = measurements({Path(name): run for name, run in runs.items()})
    paper = published_numbers()
    rows = [row for row in rows_by_table(measured, paper.rows, list(paper.titles))["1"] if row.measured]
    found = [sorted(run for value in row.measured.values() for run in value.runs) for row in rows]
    assert sorted(found) == [["a", "d"], ["b", "c"], ["e", "i"], ["f", "g"], ["h"]]
    assert [bool(row.published) for row in rows] == [True, False, False, False, False]
