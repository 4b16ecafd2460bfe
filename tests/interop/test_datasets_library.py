"""Load what `convert` writes with Hugging Face's library `datasets`, and read what that library writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtt_fast import InputError, SyntheticDataset, Whitening
from mtt_fast.commands import cli
from mtt_fast.convert.command import main
from mtt_fast.data.class_lists import CIFAR10, CIFAR100, MNIST
from mtt_fast.interop import image_data_from, read_set
from mtt_fast.interop.tensor_set import SourceInfo
from tests.interop.helpers import distilled

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def some_set(label_kind: str, class_names: tuple[str, ...], shape: tuple[int, ...], **changes: Any) -> SyntheticDataset:
    count, (channels, *_) = len(class_names), shape
    soft = torch.randn(2 * count, count)
    kinds = {"probabilities": soft.softmax(1), "weights": 2 * soft.relu(), "logits": soft}
    labels = kinds.get(label_kind, torch.arange(count).repeat_interleave(2))
    given = {"mean": (0.5,) * channels, "std": (0.2,) * channels, "class_names": class_names}
    return distilled(label_kind, labels=labels, images=torch.randn(2 * count, *shape), **given | changes)


def whitened() -> SyntheticDataset:
    whitening = Whitening.fit(torch.rand(100, 3, 8, 8))
    return some_set("indices", CIFAR10, (3, 8, 8), whitening=whitening)


SETS = {
    "classes": lambda: some_set("indices", CIFAR10, (3, 32, 32)),
    "probabilities": lambda: some_set("probabilities", CIFAR10, (3, 32, 32)),
    "weights": lambda: some_set("weights", CIFAR10, (3, 32, 32)),
    "logits at 128 pixels": lambda: some_set("logits", ("cat", "dog / wolf", "owl"), (3, 128, 128)),
    "grey": lambda: some_set("indices", MNIST, (1, 28, 28)),
    "grey, logits": lambda: some_set("logits", MNIST, (1, 28, 28)),
    "whitened": whitened,
    "numbers for names": lambda: some_set("indices", tuple(map(str, range(12))), (3, 8, 8)),
    "a class called train": lambda: some_set("indices", CIFAR100, (3, 8, 8)),
}


def loaded(destination: str, caplog: pytest.LogCaptureFixture, *flags: str) -> Any:
    """Return what the call gives that `convert` tells for the set in run/."""
    caplog.set_level("INFO")
    caplog.clear()
    assert cli.run(main, ["run", destination, *flags]) == 0
    (call,) = re.findall(r"datasets\.load_dataset\(.*?\)", caplog.text)
    return eval(call, {"datasets": datasets})


def pixels_of(rows: Any) -> Tensor:
    images = torch.stack([torch.from_numpy(np.array(row["image"])) for row in rows])
    return images[:, None] if images.dim() == 3 else images.movedim(-1, 1)


def info_of(synthetic: SyntheticDataset) -> SourceInfo:
    return SourceInfo(synthetic.class_names, synthetic.mean, synthetic.std, synthetic.whitening)


@pytest.mark.parametrize("name", SETS)
def test_datasets_loads_what_convert_writes_by_the_call_that_it_tells(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    synthetic = SETS[name]()
    synthetic.save("run/synthetic.safetensors")
    pictures = (synthetic.pictures() * 255).round().byte()

    rows = loaded("out.parquet", caplog)
    assert isinstance(rows.features["image"], datasets.Image)
    assert rows.features["label"] == datasets.ClassLabel(names=list(synthetic.class_names))
    assert torch.equal(pixels_of(rows), pictures)
    assert rows["label"][:] == synthetic.classes.tolist()
    assert ("soft_label" in rows.features) is (synthetic.label_kind != "indices")
    if "soft_label" in rows.features:
        assert torch.equal(rows.with_format("torch")["soft_label"][:], synthetic.labels)
        assert f"soft_label holds {synthetic.label_kind}" in caplog.text

    rows = loaded("out[1]", caplog, "--to", "png")
    names = rows.features["label"].names
    assert [name.partition("-")[0] for name in names] == [
        f"{number:03d}" for number in range(len(synthetic.class_names))
    ]
    assert torch.equal(pixels_of(rows), pictures)
    assert rows["label"][:] == synthetic.classes.tolist()
    assert ("without the " in caplog.text) is (synthetic.label_kind != "indices")


@pytest.mark.parametrize("name", ["classes", "probabilities", "weights", "grey, logits", "whitened"])
def test_a_set_comes_back_from_the_parquet_file_that_datasets_writes(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    synthetic = SETS[name]()
    synthetic.save("run/synthetic.safetensors")
    rows = loaded("out.parquet", caplog)
    rows.to_parquet("theirs.parquet")
    with pytest.raises(InputError, match=r"theirs\.parquet: another program's file.*name the real images"):
        read_set("theirs.parquet")
    kind = None if synthetic.label_kind == "indices" else synthetic.label_kind
    back = read_set("theirs.parquet", info=info_of(synthetic), label_kind=kind)
    assert isinstance(back, SyntheticDataset)
    assert back.label_kind == synthetic.label_kind
    assert torch.equal(back.labels, synthetic.labels)
    assert torch.equal((back.pictures() * 255).round(), (synthetic.pictures() * 255).round())


def test_what_datasets_writes_in_another_way_is_refused_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    synthetic = SETS["classes"]()
    synthetic.save("run/synthetic.safetensors")
    rows = loaded("out", caplog, "--to", "png")
    rows.to_parquet("paths.parquet")
    rows.save_to_disk("saved")
    datasets.DatasetDict(train=rows).save_to_disk("splits")
    for source, message in {
        "paths.parquet": "expected the bytes of an image, found none; put the images into the file, or name their folder",
        "saved": "found a folder as save_to_disk of the library datasets writes it",
        "splits": "found a folder as save_to_disk of the library datasets writes it",
    }.items():
        with pytest.raises(InputError, match=rf"^{source}: .*{message}"):
            read_set(source, info=info_of(synthetic))


def test_its_datasets_are_real_images(caplog: pytest.LogCaptureFixture) -> None:
    synthetic = SETS["classes"]()
    synthetic.save("run/synthetic.safetensors")
    rows = loaded("out.parquet", caplog)
    pictures = (synthetic.pictures() * 255).round().byte()
    rows.save_to_disk("saved")
    for train in (
        rows,
        rows.with_format("torch"),
        rows.rename_column("image", "img"),
        datasets.load_from_disk("saved"),
    ):
        data = image_data_from(train, rows)
        assert torch.equal(data.train.images, pictures)
        assert data.train.labels.tolist() == synthetic.labels.tolist()
        assert data.class_names == CIFAR10
    for train, message in (
        (datasets.DatasetDict(train=rows), "expected the images of one split, found a dictionary with train"),
        (rows.to_iterable_dataset(), "expected a map-style dataset, with a length and items, found IterableDataset"),
        (rows.rename_column("label", "fine_label"), r"expected image \(or img\) and label, found image, fine_label"),
    ):
        with pytest.raises(InputError, match=rf"^dataset, train: {message}"):
            image_data_from(train, rows)
