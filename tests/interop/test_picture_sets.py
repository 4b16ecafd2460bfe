"""Test distilled sets as pictures, in folders and in parquet files: exact round trips, order of the classes, refusals."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mtt_fast import InputError, SyntheticDataset, Whitening
from mtt_fast.augmentation.texture import Canvas
from mtt_fast.data.class_lists import CIFAR10, CIFAR100, MNIST, SUBSETS
from mtt_fast.data.class_names import imagenet_wnids
from mtt_fast.interop import (
    read_set,
    set_kind_of,
)
from mtt_fast.interop.tensor_set import SourceInfo
from tests.interop.helpers import CLASSES, IPC, N, distilled


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labels", ["indices", "probabilities", "weights", "logits"])
@pytest.mark.parametrize("kind", ["png", "parquet"])
def test_pictures_come_back_exactly_and_with_their_facts(tmp_path: Path, kind: str, labels: str, channels: int) -> None:
    info: dict[str, Any] = {"mean": (0.5,) * channels, "std": (0.2,) * channels, "lr_per_step": torch.rand(4)}
    info |= {"dataset": "CIFAR10", "fingerprint": "f00d", "canvas": Canvas(1, 3)}
    synthetic = distilled(labels, images=torch.randn(N, channels, 4, 5), **info)
    synthetic.export(kind, tmp_path / "x")
    assert set_kind_of(tmp_path / "x") == kind
    back = read_set(tmp_path / "x")
    assert isinstance(back, SyntheticDataset)
    eight_bits = (synthetic.pictures() * 255).round()
    assert torch.equal((back.pictures() * 255).round(), eight_bits)
    torch.testing.assert_close(back.pictures(), eight_bits / 255, rtol=0, atol=1e-6)
    assert torch.equal(back.labels, synthetic.labels)
    assert torch.equal(back.lr, synthetic.lr)
    assert back.lr_per_step is not None
    assert torch.equal(back.lr_per_step, info["lr_per_step"])
    assert (back.class_names, back.mean, back.std) == (synthetic.class_names, synthetic.mean, synthetic.std)
    assert (back.label_kind, back.recipe, back.versions) == (labels, synthetic.recipe, synthetic.versions)
    assert (back.dataset, back.fingerprint, back.canvas) == ("CIFAR10", "f00d", Canvas(1, 3))


@pytest.mark.parametrize("kind", ["png", "parquet"])
def test_images_that_no_picture_holds_are_not_written(tmp_path: Path, kind: str) -> None:
    synthetic = distilled(images=torch.randn(N, 2, 4, 5), mean=(0.5,) * 2, std=(0.2,) * 2)
    with pytest.raises(InputError, match="expected images of 1 or 3 channels, as pictures have, found 2; use `to` mtt"):
        synthetic.export(kind, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["png", "parquet"])
def test_pictures_of_whitened_images_need_the_whitening(tmp_path: Path, kind: str) -> None:
    whitening = Whitening.fit(torch.rand(200, 3, 4, 5))
    labels = torch.tensor([2, 0, 1, 0, 2, 1])  # in this order they stay
    synthetic = distilled(whitening=whitening, images=whitening.apply(torch.rand(N, 3, 4, 5)), labels=labels)
    synthetic.export(kind, tmp_path)
    info = SourceInfo(synthetic.class_names, synthetic.mean, synthetic.std, whitening)
    for without in (None, dataclasses.replace(info, whitening=None)):
        with pytest.raises(InputError, match=r"the set was whitened.*`zca`"):
            read_set(tmp_path, info=without)
    back = read_set(tmp_path, info=info)
    assert isinstance(back, SyntheticDataset)
    assert back.whitening is whitening
    assert back.labels.equal(labels)
    assert torch.equal((back.pictures() * 255).round(), (synthetic.pictures() * 255).round())


@pytest.mark.parametrize(
    ("kind", "module", "fails_at"),
    [("png", "image_folder", "write_json"), ("mtt", "pairs", "save_pickle"), ("ddranking", "pairs", "save_pickle")],
)
def test_a_stop_leaves_no_half_of_a_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: str, fails_at: str
) -> None:
    writer = importlib.import_module(f"mtt_fast.interop.{module}")
    write, calls = getattr(writer, fails_at), []

    def stopped(path: Path, value: Any) -> Any:
        calls.append(path)
        if fails_at == "write_json" or len(calls) == 2:
            raise KeyboardInterrupt
        return write(path, value)

    (tmp_path / "mine.txt").write_text("x")
    monkeypatch.setattr(writer, fails_at, stopped)
    with pytest.raises(KeyboardInterrupt):
        distilled().export(kind, tmp_path)
    assert calls
    assert [path.name for path in tmp_path.rglob("*")] == ["mine.txt"]


def test_pictures_of_another_set_are_not_left_among_those_of_a_set(tmp_path: Path) -> None:
    synthetic = distilled()
    synthetic.export("png", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    synthetic.export("png", tmp_path)
    fewer = dataclasses.replace(synthetic, images=synthetic.images[::IPC], labels=synthetic.labels[::IPC])
    with pytest.raises(InputError, match=r"expected no other pictures, .* found 000-\w+/0000\d\.png; choose another"):
        fewer.export("png", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert torch.equal(read_set(tmp_path).labels, synthetic.labels)


def test_labels_that_no_reader_would_take_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distilled().export("png", tmp_path / "first")
    size = (tmp_path / "first" / "labels.json").stat().st_size
    for module in ("interop.image_folder", "storage.foreign"):
        monkeypatch.setattr(f"mtt_fast.{module}.LARGEST_TEXT", size)
    distilled().export("png", tmp_path / "fits")
    read_set(tmp_path / "fits")
    for module in ("interop.image_folder", "storage.foreign"):
        monkeypatch.setattr(f"mtt_fast.{module}.LARGEST_TEXT", size - 1)
    with pytest.raises(InputError, match=f"large: not written: .* found {size:,}; use `to` parquet"):
        distilled().export("png", tmp_path / "large")
    assert not (tmp_path / "large").exists()


def test_an_image_folder_of_another_method_is_read(tmp_path: Path) -> None:
    for label, name in enumerate(("ape", "bee")):
        (tmp_path / name).mkdir()
        for number in range(2 + label):
            values = np.full((4, 4, 3), 100 * label + number, np.uint8)
            Image.fromarray(values).save(tmp_path / name / f"{number}.png")
    (tmp_path / "notes").mkdir()  # a folder without pictures is no class
    with pytest.raises(InputError, match=r"expected labels\.json"):
        read_set(tmp_path)
    info = SourceInfo(("ape", "bee"), (0.5,) * 3, (0.25,) * 3, None)
    distilled = read_set(tmp_path, info=info, lr=0.05)
    assert isinstance(distilled, SyntheticDataset)
    assert distilled.labels.tolist() == [0, 0, 1, 1, 1]
    assert (distilled.pictures()[:, 0, 0, 0] * 255).round().tolist() == [0, 1, 100, 101, 102]
    assert distilled.lr == pytest.approx(0.05)


def test_sorted_folders_are_in_the_order_of_the_classes(tmp_path: Path) -> None:
    """Check a set of more classes than three digits number: other software counts the sorted folders."""
    names = tuple(f"class {number}" for number in range(1001))
    files = distilled(images=torch.zeros(1001, 1, 1, 1), labels=torch.arange(1001), class_names=names, mean=(0.5,), std=(0.5,)).export("png", tmp_path)  # fmt: skip
    folders = [file.parent.name for file in files[:-1]]
    assert folders == sorted(folders)
    assert folders[7] == "0007-class_7"
    assert read_set(tmp_path).labels.tolist() == list(range(1001))


def coloured_folder(root: Path, names: Sequence[str], value_of: Sequence[int]) -> Path:
    """Write one picture a class folder, whose red is the class that it shows."""
    for name, value in zip(names, value_of, strict=True):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (value, 0, 0)).save(root / name / "0.png")
    return root


WOOF = SUBSETS["imagewoof"]


@pytest.mark.parametrize(
    ("class_names", "names"),
    [
        (tuple(WOOF.values()), tuple(WOOF)),
        (tuple(WOOF.values()), tuple(str(imagenet_wnids().index(wnid)) for wnid in WOOF)),
        (tuple(WOOF), tuple(WOOF.values())),
        (CIFAR10, ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")),
        (CIFAR100, tuple(map(str, range(100)))),
        (CIFAR100, tuple(f"new{number:03d}" for number in range(100))),
        (("10", "9", "cat"), ("10", "9", "cat")),
        (MNIST, tuple(f"{n} - {word}" for n, word in enumerate("zero one two three four five six seven eight nine".split()))),
    ],
    ids=["ids", "ranks", "words of ids", "cifar", "numbers", "numbers with a word", "own", "torchvision's digits"],
)  # fmt: skip
def test_folders_of_another_method_go_by_name(
    tmp_path: Path, class_names: tuple[str, ...], names: tuple[str, ...]
) -> None:
    coloured_folder(tmp_path, names, range(len(names)))
    distilled = read_set(tmp_path, info=SourceInfo(class_names, (0.5,) * 3, (0.25,) * 3, None))
    assert isinstance(distilled, SyntheticDataset)
    assert (distilled.pictures()[:, 0, 0, 0] * 255).round().tolist() == distilled.labels.tolist()
    assert sorted(distilled.labels.tolist()) == list(range(len(names)))
    assert distilled.class_names == class_names


def test_folders_that_mean_no_class_are_refused_and_missing_ones_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    info = SourceInfo(CIFAR10, (0.5,) * 3, (0.25,) * 3, None)
    with pytest.raises(InputError, match=r"a: expected the names of .*found 'dogg' \(nearest: dog.*\); rename it"):
        read_set(coloured_folder(tmp_path / "a", ["cat", "dogg"], [3, 5]), info=info)
    distilled = read_set(coloured_folder(tmp_path / "b", [*CIFAR10[:7], "boat"], range(8)), "png", info=info)
    assert distilled.labels.tolist()[-1] in (6, 8)
    assert "no pictures of 2 classes: horse, truck" in caplog.text


@pytest.mark.parametrize("labels", ["indices", "probabilities", "logits"])
@pytest.mark.parametrize("kind", ["png", "parquet"])
def test_a_set_with_its_classes_in_another_order_is_put_in_the_datas(tmp_path: Path, kind: str, labels: str) -> None:
    synthetic = distilled(labels)
    synthetic.export(kind, tmp_path)
    order = [2, 0, 1]
    info = SourceInfo(tuple(synthetic.class_names[i] for i in order), synthetic.mean, synthetic.std, None)
    read_back = read_set(tmp_path, info=info)
    assert isinstance(read_back, SyntheticDataset)
    assert read_back.class_names == info.class_names
    rows = torch.arange(N).view(CLASSES, IPC)[order].flatten()  # since places tell the classes
    expected = synthetic.labels if labels == "indices" else synthetic.labels[rows][:, order]
    assert torch.equal(read_back.labels, expected)
    assert_pictures(read_back, synthetic, rows)
    other = SourceInfo(("cat", "fox", "owl"), synthetic.mean, synthetic.std, None)
    with pytest.raises(InputError, match="found 'dog / wolf'"):
        read_set(tmp_path, info=other)


def assert_pictures(found: SyntheticDataset, expected: SyntheticDataset, rows: torch.Tensor) -> None:
    """Check that the pictures of `found` are those at `rows` of `expected`, rounded to 8 bits."""
    pictures = [(each.pictures() * 255).round() for each in (found, expected)]
    assert torch.equal(pictures[0], pictures[1][rows])


@pytest.mark.parametrize("names", [None, ("owl", "cat", "dog / wolf")])
def test_the_rows_of_another_programs_file_with_soft_labels_are_put_in_the_order_of_their_classes(
    tmp_path: Path, names: tuple[str, ...] | None
) -> None:
    """Shuffle the rows, as the library `datasets` does; `names` are those of the data set, if it has others than the file."""
    from pyarrow import parquet

    synthetic = distilled("logits")
    (file,) = synthetic.export("parquet", tmp_path)
    table = parquet.read_table(file)
    metadata = {"huggingface": table.schema.metadata[b"huggingface"]}
    parquet.write_table(table.take([5, 2, 0, 3, 4, 1]).replace_schema_metadata(metadata), file)
    info = SourceInfo(names or synthetic.class_names, synthetic.mean, synthetic.std, None)
    back = read_set(file, info=info)
    assert isinstance(back, SyntheticDataset)
    rows = torch.tensor([5, 4, 0, 1, 2, 3] if names else [0, 1, 2, 3, 5, 4])
    assert_pictures(back, synthetic, rows)
    assert torch.equal(back.labels, synthetic.labels[rows][:, [2, 0, 1] if names else [0, 1, 2]])


def foreign_parquet(path: Path, labels: list[Any], names: list[str] | None) -> Path:
    """Write a file as `datasets` writes it; the red of each picture is the number of its row."""
    import pyarrow
    from pyarrow import parquet

    rows = []
    for number in range(len(labels)):
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (number, 0, 0)).save(file, format="PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    features = {"label": {"names": names, "_type": "ClassLabel"}} if names else {"label": {"dtype": "int64"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet.write_table(pyarrow.table({"image": rows, "label": labels}).replace_schema_metadata(metadata), path)
    return path


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([0, 1, 2], ["car", "truck", "plane"], [1, 9, 0]),
        (["car", "truck", "plane"], None, [1, 9, 0]),
        ([0, 1, 2], None, [0, 1, 2]),
    ],
)
def test_parquet_files_go_by_the_names_of_their_classes(
    tmp_path: Path, labels: list[Any], names: list[str] | None, expected: list[int]
) -> None:
    info = SourceInfo(CIFAR10, (0.5,) * 3, (0.25,) * 3, None)
    distilled = read_set(foreign_parquet(tmp_path / "x.parquet", labels, names), info=info)
    assert distilled.labels.tolist() == expected


@pytest.mark.parametrize("label_kind", ["weights", "logits", None])
def test_soft_labels_of_another_programs_parquet_file_are_of_the_kind_that_is_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, label_kind: str | None
) -> None:
    from pyarrow import parquet

    synthetic = distilled("weights")
    (file,) = synthetic.export("parquet", tmp_path)
    table = parquet.read_table(file)
    info = SourceInfo(synthetic.class_names, synthetic.mean, synthetic.std, None)
    if label_kind:
        with pytest.raises(InputError, match=rf"^`label_kind` {label_kind}: .* are known to be weights; leave it out"):
            read_set(file, info=info, label_kind=label_kind)
    parquet.write_table(table.replace_schema_metadata(None), file)
    back = read_set(file, info=info, label_kind=label_kind)
    assert back.label_kind == (label_kind or "logits")
    assert ("are they weights" in caplog.text) is (back.label_kind == "logits")
    assert torch.equal(back.labels, synthetic.labels)


def test_a_call_that_does_not_suit_a_parquet_file_is_refused_before_its_pictures_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = distilled("weights").export("parquet", tmp_path)
    theirs = foreign_parquet(tmp_path / "x.parquet", [0, 1], None)
    monkeypatch.setattr("mtt_fast.interop.parquet.decode_bytes", lambda *_: pytest.fail("pictures were decoded"))
    with pytest.raises(InputError, match="has no effect"):
        read_set(file, label_kind="weights")
    with pytest.raises(InputError, match="another program's file"):
        read_set(theirs)


@pytest.mark.parametrize("name", ["dataset_info.json", "dataset_dict.json"])
def test_what_datasets_saves_to_disk_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(
        InputError, match=r"found a folder as save_to_disk of the library datasets writes it \(its to_parquet"
    ):
        read_set(tmp_path)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0], ["zebra"], "found 'zebra'"),
        ([3], ["car"], r"expected labels in \[0, 1\), one for each class name, found 3 to 3"),
        ([0], ["car", "automobile"], "which both mean 'automobile'"),
    ],
)
def test_parquet_files_of_other_classes_are_refused(
    tmp_path: Path, labels: list[Any], names: list[str], message: str
) -> None:
    info = SourceInfo(CIFAR10, (0.5,) * 3, (0.25,) * 3, None)
    with pytest.raises(InputError, match=rf"x\.parquet: .*{message}"):
        read_set(foreign_parquet(tmp_path / "x.parquet", labels, names), info=info)


def test_transparent_pictures_lie_on_white(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "cat" / "0.png")
    distilled = read_set(tmp_path, info=SourceInfo(CIFAR10, (0.5,) * 3, (0.25,) * 3, None))
    assert isinstance(distilled, SyntheticDataset)
    assert (distilled.pictures() * 255).round().unique().tolist() == [255]


@pytest.mark.parametrize("kind", ["png", "parquet"])
def test_pictures_are_not_taken_for_those_of_other_real_images(tmp_path: Path, kind: str) -> None:
    synthetic = distilled(dataset="CIFAR10", fingerprint="f00d")
    synthetic.export(kind, tmp_path)
    own = SourceInfo(synthetic.class_names, synthetic.mean, synthetic.std, None, "CIFAR10", "f00d")
    assert read_set(tmp_path, info=own).label_kind == "indices"
    others: list[tuple[dict[str, Any], str]] = [
        ({"fingerprint": "beef"}, "made from other images"),
        ({"fingerprint": "", "std": (0.2, 0.25, 0.2)}, "normalised by another std"),
        ({"whitening": Whitening.fit(torch.rand(20, 3, 4, 5))}, "whitened in another way"),
    ]
    for change, message in others:
        with pytest.raises(InputError, match=message):
            read_set(tmp_path, info=dataclasses.replace(own, **change))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda record: record.update(format="other"), "expected the format"),
        (lambda record: record.pop("checksum"), "damaged: its checksum is of other"),
        (lambda record: record.update(format="mtt_fast pictures 1", lr=0.5), "damaged: its checksum is of other"),
        (lambda record: record.pop("files"), "expected the labels of pictures, found a broken file"),
        (lambda record: record["labels"].pop(), "expected a label for each file, found 6 and 5"),
        (lambda record: record.pop("mean"), "expected the record of a distilled set"),
        (lambda record: record.update(mean=[0.5]), "expected the record of a distilled set"),
        (
            lambda record: record.update(label_kind="logits"),
            r"labels: expected logits, float32 \(n, classes\) of two or more classes, found Tensor float32 \(6,\)",
        ),
        (lambda record: record["labels"].__setitem__(0, 3), "labels: expected class indices from 0 to 2, found 0 to 3"),
        (
            lambda record: record["labels"].__setitem__(0, [1, 2]),
            "expected the record of a distilled set, found it broken",
        ),
        (lambda record: record["files"].__setitem__(0, 7), "expected the labels of pictures, found a broken file"),
        (lambda record: record["files"].__setitem__(0, "/etc/x.png"), "expected files in its own folder, found /etc/x"),
        (lambda record: record["files"].__setitem__(0, "a/../../x.png"), "expected files in its own folder, found a/"),
    ],
)
def test_a_broken_labels_file_is_named(tmp_path: Path, spoil: Any, message: str) -> None:
    distilled().export("png", tmp_path)
    record = json.loads((tmp_path / "labels.json").read_text())
    spoil(record)
    (tmp_path / "labels.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=rf"labels\.json: {message}"):
        read_set(tmp_path)


def test_the_schema_is_that_of_hugging_faces_datasets(tmp_path: Path) -> None:
    from pyarrow import parquet

    (file,) = distilled("logits").export("parquet", tmp_path)
    schema = parquet.read_schema(file)
    assert str(schema.field("image").type) == "struct<bytes: binary, path: string>"
    assert (str(schema.field("label").type), str(schema.field("soft_label").type)) == ("int64", "list<element: float>")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {"names": ["cat", "dog / wolf", "owl"], "_type": "ClassLabel"}
    assert set(features) == {"image", "label", "soft_label"}


def test_a_foreign_parquet_file_is_read(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_text("hello")
    for name, found in (("x", "found x; it is another file"), ("y", "found a broken or foreign file")):
        with pytest.raises(InputError, match=rf"{name}\.parquet: expected columns image .*{found}"):
            read_set(tmp_path / f"{name}.parquet")
    with pytest.raises(InputError, match=r"z\.parquet: cannot be read"):
        read_set(tmp_path / "z.parquet")
    (file,) = distilled().export("parquet", tmp_path / "spoilt.parquet")
    table = parquet.read_table(file)
    later = json.loads(table.schema.metadata[b"mtt_fast"]) | {"format": "mtt_fast pictures 3"}
    for text, message in (("{", "columns image"), (json.dumps(later), "the record of .*its format is 'mtt_fast pict")):
        parquet.write_table(table.replace_schema_metadata({"mtt_fast": text}), file)
        with pytest.raises(InputError, match=rf"spoilt\.parquet: expected {message}"):
            read_set(file)
