"""Compare every number that the paper reports, transcribed a second time, with commands/published.toml."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mtt_fast.commands
from mtt_fast.commands.published import published_numbers
from mtt_fast.data.catalogue import dataset_info
from mtt_fast.networks.by_name import network_by_name

FILE = Path(mtt_fast.commands.__file__).parent / "published.toml"
SUBSETS = ("imagenette", "imagewoof", "imagefruit", "imagemeow", "imagesquawk", "imageyellow")

# As the paper prints it: "*" with ZCA, "–" a dash, nothing where it could not be read with certainty.
TABLE_1 = """
        | Random     | Herding    | Forgetting | DD         | LD         | DC         | DSA        | DM         | CAFE       | CAFE+DSA   | MTT
CIFAR10
1       |            |            | 13.5 ± 1.2 | –          |            |            |            |            |            |            | 46.3 ± 0.8 *
10      | 26.0 ± 1.2 | 31.6 ± 0.7 | 23.3 ± 1.0 | 36.8 ± 1.2 | 38.3 ± 0.4 |            | 52.1 ± 0.5 | 48.9 ± 0.6 |            | 50.9 ± 0.5 | 65.3 ± 0.7 *
50      |            |            | 23.3 ± 1.1 | –          |            |            |            |            |            |            | 71.6 ± 0.2
CIFAR100
1       |            |            | 4.5 ± 0.2  | –          | 11.5 ± 0.4 |            |            |            | 12.9 ± 0.3 |            | 24.3 ± 0.3 *
10      | 14.6 ± 0.5 | 17.3 ± 0.3 | 15.1 ± 0.3 | –          | –          | 25.2 ± 0.3 | 32.3 ± 0.3 | 29.7 ± 0.3 | 27.8 ± 0.3 | 31.5 ± 0.2 | 40.1 ± 0.4
50      |            |            | 30.5 ± 0.3 | –          | –          |            |            |            | 37.9 ± 0.3 |            | 47.7 ± 0.2 *
Tiny
1       |            |            | 1.6 ± 0.1  | –          | –          | –          | –          | 3.9 ± 0.2  | –          | –          | 8.8 ± 0.3
10      |            |            | 5.1 ± 0.2  | –          | –          | –          | –          | 12.9 ± 0.4 | –          | –          | 23.2 ± 0.2
50      |            |            | 15.0 ± 0.3 | –          | –          | –          | –          | 24.1 ± 0.3 | –          | –          | 28.0 ± 0.3
"""
FULL_DATA = {"CIFAR10": "84.8 ± 0.1", "CIFAR100": "56.2 ± 0.3", "Tiny": "37.6 ± 0.4"}
TABLE_2 = {  # KIP at width 1024, KIP at width 128, MTT at width 128
    "CIFAR10": {"1": "49.9 38.3 46.3", "10": "62.7 57.6 65.3", "50": "68.6 65.8 71.5"},
    "CIFAR100": {"1": "15.7 18.2 24.3", "10": "28.3 32.8 39.4"},
}
TABLE_3 = {  # CIFAR-10, 10 per class
    "MTT": "64.3 ± 0.7 / 46.4 ± 0.6 / 50.3 ± 0.8 / 34.2 ± 2.6",
    "DSA": "52.1 ± 0.4 / 42.8 ± 1.0 / 43.2 ± 0.5 / 35.9 ± 1.3",
    "KIP": "47.6 ± 0.9 / 36.8 ± 1.0 / 42.1 ± 0.4 / 24.4 ± 3.9",
}
TABLE_4 = {  # 1 per class, 10 per class, all real images
    "imagenette": "47.7 ± 0.9 / 63.0 ± 1.3 / 87.4 ± 1.0",
    "imagewoof": "28.6 ± 0.8 / 35.8 ± 1.8 / 67.0 ± 1.3",
    "imagefruit": "26.6 ± 0.8 / 40.3 ± 1.3 / 63.9 ± 2.0",
    "imagemeow": "30.7 ± 1.6 / 40.4 ± 2.2 / 66.7 ± 1.1",
    "imagesquawk": "39.4 ± 1.5 / 52.3 ± 1.0 / 87.5 ± 0.3",
    "imageyellow": "45.2 ± 0.8 / 60.0 ± 1.5 / 84.4 ± 0.6",
}
BEST_BEFORE = {("DSA", "1"): 28.8, ("DM", "50"): 63.0, ("KIP", "1"): 36.1, ("KIP", "50"): 46.5}  # CIFAR-10

Cell = tuple[str, str, str, str, str]
"""Table, data set, network, method, images per class."""


def numbers(text: str) -> list[float]:
    return [float(word) for word in re.findall(r"\d+\.\d+", text)]


def cells_of_table_1() -> Iterator[tuple[Cell, str]]:
    header, *lines = TABLE_1.strip("\n").splitlines()
    methods = [word.strip() for word in header.split("|")[1:]]
    dataset = ""
    for line in lines:
        ipc, *texts = (word.strip() for word in line.split("|"))
        if not texts:
            dataset = ipc
            continue
        assert len(texts) == len(methods)
        for method, text in zip(methods, texts, strict=True):
            yield ("1", dataset, network_of_table_1(dataset, method), method, ipc), text


def network_of_table_1(dataset: str, method: str) -> str:
    if method in ("DD", "LD"):  # with networks of their own
        return "AlexNet" if dataset == "CIFAR10" else "not said"
    return "ConvNetD4" if dataset == "Tiny" else "ConvNet"


def transcribed() -> dict[Cell, str]:
    """Return the cells of the paper's tables in the words of this file, without blank ones."""
    cells = {cell: text for cell, text in cells_of_table_1() if text}
    for dataset, text in FULL_DATA.items():
        cells["1", dataset, network_of_table_1(dataset, "MTT"), "all real images", "all"] = text
    for dataset, by_ipc in TABLE_2.items():
        for ipc, texts in by_ipc.items():
            for (model, method), text in zip(
                (("ConvNetKIP", "KIP"), ("ConvNet", "KIP"), ("ConvNet", "MTT")), texts.split(), strict=True
            ):
                cells["2", dataset, model, method, ipc] = text
    for method, texts in TABLE_3.items():
        for model, text in zip(("ConvNet", "ResNet18", "VGG11", "AlexNet"), texts.split(" / "), strict=True):
            cells["3", "CIFAR10", model, method, "10"] = f"{text} *" if method == "KIP" else text
    for dataset, texts in TABLE_4.items():
        of = (("MTT", "1"), ("MTT", "10"), ("all real images", "all"))
        for (method, ipc), text in zip(of, texts.split(" / "), strict=True):
            cells["4", dataset, "ConvNetD5", method, ipc] = text
    return cells


def in_the_file() -> dict[Cell, tuple[list[float], bool]]:
    """Return the cells of the file's rows without a source, read without the loader: numbers, and whether with ZCA."""
    content: dict[str, Any] = tomllib.loads(FILE.read_text(encoding="utf-8"))
    cells = {}
    for table, rows in content["rows"].items():
        for row in rows:
            if "source" not in row:
                for ipc, values in row["accuracy"].items():
                    cell = (table, row["dataset"], row["model"], row["method"], ipc)
                    assert cell not in cells
                    cells[cell] = ([float(value) for value in values], ipc in map(str, row.get("zca", [])))
    return cells


def test_every_cell_of_the_papers_tables_and_no_other() -> None:
    assert in_the_file() == {cell: (numbers(text), text.endswith("*")) for cell, text in transcribed().items()}
    counted = {"1": 15 + 21 + 27 + 3, "2": 9 + 6, "3": 12, "4": 18}  # by hand; Table 1 by data set, and the full data
    assert Counter(table for table, *_ in transcribed()) == counted


def test_the_loader_says_what_the_file_says() -> None:
    loaded: dict[Cell, tuple[list[float], bool]] = {}
    for row in published_numbers().rows:
        if row.of_paper:
            assert row.source == f"Table {row.table} of the paper"
            key = (row.table, row.dataset, row.model, row.method)
            loaded |= {(*key, ipc): ([], False) for ipc in row.dashes}
            for ipc, accuracy in row.accuracy.items():
                loaded[*key, ipc] = ([round(100 * value, 3) for value in accuracy.values()], ipc in row.whitened)
                assert list(accuracy) == ["mean", "std"][: len(accuracy)]
    assert loaded == in_the_file()


def test_what_the_text_and_later_papers_say_stands_beside() -> None:
    said: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for row in published_numbers().rows:
        for ipc, accuracy in row.accuracy.items():
            by_source = said.setdefault((row.table, row.dataset, row.method, ipc), {})
            by_source[row.source] = round(100 * accuracy["mean"], 3)
    pad = "Table 1 of PAD (arXiv 2408.03360)"
    assert said["1", "CIFAR10", "MTT", "50"] == {"Table 1 of the paper": 71.6, "the text of the paper": 71.5, pad: 71.6}
    assert said["1", "CIFAR100", "MTT", "10"] == {"Table 1 of the paper": 40.1, "Table 2 of the paper": 39.4, pad: 39.7}
    assert said["1", "CIFAR10", "MTT", "1"] == {"Table 1 of the paper": 46.3, pad: 46.2}
    assert said["1", "CIFAR10", "MTT", "10"] == {"Table 1 of the paper": 65.3, pad: 65.4}
    for (method, ipc), value in BEST_BEFORE.items():
        assert said["1", "CIFAR10", method, ipc]["the text of the paper"] == value
    for dataset, other in zip(SUBSETS, (87.8, 66.5, 64.4, 65.2, 86.4, 83.2), strict=True):
        assert other in said["4", dataset, "all real images", "all"].values()
        assert len(said["4", dataset, "all real images", "all"]) == 2
    unnamed = [row for row in published_numbers().rows if not row.source]
    assert not unnamed


def test_shares_are_those_of_the_data_sets() -> None:
    assert published_numbers().shares == {
        "CIFAR10": {"1": 0.02, "10": 0.2, "50": 1},
        "CIFAR100": {"1": 0.2, "10": 2, "50": 10},
        "Tiny": {"1": 0.2, "10": 2, "50": 10},
    }
    for dataset, shares in published_numbers().shares.items():
        info = dataset_info(dataset)
        for ipc, share in shares.items():
            assert 100 * int(ipc) * info.num_classes / info.num_train == pytest.approx(share)


def test_the_costs_are_those_of_the_paper() -> None:
    names = ("seconds_per_epoch", "experts", "gpu_hours", "megabytes_per_expert")
    assert published_numbers().costs == {
        "CIFAR": dict(zip(names, (3, 200, 8, 60), strict=True)),
        "ImageNet subsets": dict(zip(names, (11, 100, 15, 120), strict=True)),
    }


def test_names_are_those_of_the_options() -> None:
    """Check that a measurement finds its row by these names."""
    for row in published_numbers().rows:
        info = dataset_info(row.dataset)
        if row.model != "not said":
            network_by_name(row.model, info.image_shape, info.num_classes)
