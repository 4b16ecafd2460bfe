"""Test the checks of a distilled set: the same refusals on reading, on writing, and where it meets its data."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtt_fast import InputError, SyntheticDataset, Whitening, evaluate
from mtt_fast.augmentation.texture import Canvas
from mtt_fast.commands import cli
from mtt_fast.cross import command as cross
from mtt_fast.data.set_checks import MAX_CLASSES, are_probabilities, check_classes, check_images_and_labels, check_set
from mtt_fast.interop import SET_KINDS, as_synthetic, as_tensor_set, read_set, write_set
from mtt_fast.interop.tensor_set import SourceInfo, TensorSet, guess_label_kind, tensor_set
from mtt_fast.storage.tensor_files import load_tensors, save_tensors
from tests.interop.helpers import CLASSES, N, distilled

SQUARE = torch.eye(60)
UNSOUND: dict[str, tuple[dict[str, Any], str]] = {
    "images of five dimensions": ({"images": torch.randn(N, 3, 4, 5, 1)}, r"images: expected float32 \(n, C, H, W\)"),
    "no images": ({"images": torch.randn(0, 3, 4, 5)}, "images: expected float32"),
    "no channels": ({"images": torch.randn(N, 0, 4, 5)}, "images: expected float32"),
    "images float64": ({"images": torch.randn(N, 3, 4, 5).double()}, "found Tensor float64"),
    "images uint8": ({"images": torch.zeros(N, 3, 4, 5).byte()}, "found Tensor uint8"),
    "one NaN": ({"images": torch.randn(N, 3, 4, 5).index_fill(0, torch.tensor(1), math.nan)}, "found 60 of 360"),
    "infinite images": ({"images": torch.full((N, 3, 4, 5), math.inf)}, "images: expected finite numbers"),
    "too few labels": ({"labels": torch.zeros(N - 1).long()}, f"labels: expected one for each of {N} images"),
    "a label that is no list": ({"labels": torch.tensor(1)}, "labels: expected one for each"),
    "labels from 1": ({"labels": 1 + torch.arange(CLASSES).repeat_interleave(2)}, "from 0 to 2, found 1 to 3; they seem .* subtract 1"),
    "negative labels": ({"labels": torch.arange(N) % 3 - 1}, "counted from 0, found -1 to 1"),
    "large labels": ({"labels": torch.full((N,), 2**62)}, "counted from 0, found 4611686018427387904"),
    "too many classes": ({"labels": torch.full((N,), 7)}, "from 0 to 2, found 7 to 7"),
    "bool labels": ({"labels": torch.ones(N).bool()}, r"expected class indices, int64 \(n,\), found Tensor bool"),
    "uint8 labels": ({"labels": torch.zeros(N).byte()}, "found Tensor uint8"),
    "whole floating-point labels": ({"labels": torch.zeros(N)}, "found Tensor float32"),
    "soft labels that are called indices": ({"labels": torch.rand(N, CLASSES)}, "expected class indices, int64 .*; soft labels need the `label_kind`"),
    "indices that are called logits": ({"label_kind": "logits"}, r"expected logits, float32 \(n, classes\)"),
    "no such kind": ({"label_kind": "soft"}, "label_kind: expected indices, probabilities, weights, logits, found 'soft'"),
    "soft labels of another width": ({"labels": torch.rand(N, CLASSES + 1), "label_kind": "logits"}, "expected soft labels of 3 classes, found 4"),
    "one column": ({"labels": torch.ones(N, 1), "label_kind": "logits"}, "of two or more classes"),
    "probabilities below 0": ({"labels": torch.tensor([[1.5, -0.5, 0]] * N), "label_kind": "probabilities"}, "a least value of -0.5 .* are they logits"),
    "weights below 0": ({"labels": torch.tensor([[1.5, -0.5, 0]] * N), "label_kind": "weights"}, "at least 0, found -0.5"),
    "probabilities of another sum": ({"labels": torch.full((N, 3), 0.4), "label_kind": "probabilities"}, "sums from 1.2 to 1.2; are they weights"),
    "infinite logits": ({"labels": torch.full((N, 3), math.inf), "label_kind": "logits"}, "labels: expected finite numbers"),
    "a number as rate": ({"lr": 0.1}, r"found 0\.1; give the .* made with, as a floating-point tensor \(\)"),
    "rate 0": ({"lr": torch.tensor(0.0)}, "lr: expected one learning rate, finite and above 0, found 0"),
    "rate below 0": ({"lr": torch.tensor(-0.1)}, "lr: expected one learning rate"),
    "rate NaN": ({"lr": torch.tensor(math.nan)}, "found nan"),
    "rate infinite": ({"lr": torch.tensor(math.inf)}, "found inf"),
    "two rates": ({"lr": torch.rand(2)}, r"found Tensor float32 \(2,\)"),
    "whole rate": ({"lr": torch.tensor(1)}, "lr: expected one learning rate"),
    "a rate of a step 0": ({"lr_per_step": torch.tensor([0.1, 0])}, "lr_per_step: expected a learning rate for each step"),
    "no rates of steps": ({"lr_per_step": torch.rand(0)}, "lr_per_step"),
    "one rate for all steps": ({"lr_per_step": torch.tensor(0.1)}, "lr_per_step"),
    "std 0": ({"std": (0.1, 0.0, 0.1)}, "std: expected a finite number above 0 of each of 3 channels"),
    "std NaN": ({"std": (0.1, math.nan, 0.1)}, "std: expected"),
    "mean infinite": ({"mean": (math.inf, 0.0, 0.0)}, "mean: expected a finite number of each of 3 channels"),
    "mean of one channel": ({"mean": (0.5,)}, r"mean: .* found \(0\.5\)"),
    "mean in words": ({"mean": ("a", "b", "c")}, "mean: expected"),
    "a name twice": ({"class_names": ("cat", "dog", "cat")}, "class_names: expected each name once, found 'cat' twice"),
    "names that are numbers": ({"class_names": (1, 2, 3)}, "class_names: expected the classes' names"),
    "no names": ({"class_names": ()}, "class_names: expected"),
    "canvas that does not divide the width": ({"canvas": Canvas(2)}, "canvas: expected a size that divides 4 and 5 pixels, found 2"),
    "canvas that does not divide the height": ({"canvas": Canvas(5)}, "canvas: expected a size that divides 4 and 5 pixels, found 5"),
    "canvas 0": ({"canvas": Canvas(0)}, "canvas: expected its size and samples as whole numbers"),
    "canvas of no samples": ({"canvas": Canvas(1, 0)}, "canvas: expected its size"),
    "sparse images": ({"images": torch.zeros(N, 3, 4, 5).to_sparse()}, r"images: expected an ordinary tensor, found a tensor of layout"),
    "float8 rates": ({"lr_per_step": torch.ones(2).to(torch.float8_e5m2)}, "lr_per_step: .* found a tensor of float8_e5m2"),
    "images without numbers": ({"images": torch.zeros(N, 3, 4, 5, device="meta")}, "images: expected .* on the device meta"),
    "labels without numbers": ({"labels": torch.zeros(N, dtype=torch.long, device="meta")}, "labels: expected .* on the device meta"),
    "rate without a number": ({"lr": torch.zeros((), device="meta")}, "lr: expected .* on the device meta"),
    "rates without numbers": ({"lr_per_step": torch.zeros(2, device="meta")}, "lr_per_step: expected .* on the device meta"),
    "no mean": ({"mean": None}, "mean: expected a number of each of 3 channels, found None"),
    "one std": ({"std": 0.5}, r"std: expected a number of each of 3 channels, found 0\.5"),
    "names that are none": ({"class_names": 3}, "class_names: expected the classes' names, found 3"),
    "whitening in words": ({"whitening": "zca"}, r"whitening\.mean: expected floating point \(60,\)"),
    "canvas that is none": ({"canvas": (2, 1)}, "canvas: expected its size and samples as whole numbers"),
    "canvas 1.5": ({"canvas": Canvas(1.5)}, "canvas: expected its size"),  # type: ignore[arg-type]
    "whitening of other images": ({"whitening": Whitening(torch.zeros(48), torch.eye(48), torch.eye(48))}, r"whitening\.mean: expected floating point \(60,\)"),
    "whitening whose matrix is none": ({"whitening": Whitening(torch.zeros(60), torch.ones(60), SQUARE)}, r"whitening\.matrix: expected"),
    "whitening with NaN": ({"whitening": Whitening(torch.zeros(60), SQUARE, SQUARE * math.nan)}, r"whitening\.inverse: expected finite"),
    "parameters that are none": ({"parameters": [torch.zeros(2)]}, "parameters: expected a dictionary of tensors by name, found"),
    "a parameter that is a number": ({"parameters": {"scale": 2.0}}, r"parameters: expected tensors by name, found 2\.0 as 'scale'"),
    "a parameter without a name": ({"parameters": {0: torch.zeros(2)}}, r"parameters: expected tensors by name, found Tensor float32 \(2,\) as 0"),
    "a parameter with NaN": ({"parameters": {"scale": torch.tensor([0, math.nan])}}, r"parameters\.scale: expected finite numbers, found 1 of 2"),
    "a parameter without numbers": ({"parameters": {"scale": torch.zeros(2, device="meta")}}, r"parameters\.scale: expected .* on the device meta"),
    "recipe that is none": ({"recipe": []}, "recipe: expected a dictionary"),
    "no share": ({"recipe": {"distilled_share": "0.5"}}, "expected a distilled_share above 0 and at most 1, found"),
    "share of none": ({"recipe": {"distilled_share": 0}}, "expected a distilled_share above 0 and at most 1, found 0"),
    "share of uneven classes": (
        {"recipe": {"distilled_share": 0.5}, "labels": torch.tensor([0, 0, 0, 1, 1, 2])},
        "expected the same number of images of each of 3 classes with a `distilled_share`, found 6 images, more of some",
    ),
    "share of two classes of three": (
        {"recipe": {"distilled_share": 0.5}, "labels": torch.tensor([0, 0, 0, 1, 1, 1])},
        "expected the same number of images of each of 3 classes with a `distilled_share`, found 6 images, more of some",
    ),
    "share that leaves none": (
        {"recipe": {"distilled_share": 0.4}},
        "expected a `distilled_share` that is at least one of the 2 images of a class, found 0.4",
    ),
    "share of unsorted images": (
        {"recipe": {"distilled_share": 0.5}, "labels": torch.tensor([0, 1, 2, 0, 1, 2])},
        "expected images sorted by class with a `distilled_share`",
    ),
    "share of more": ({"recipe": {"distilled_share": 1.5}}, "expected a distilled_share above 0 and at most 1, found 1.5"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNSOUND)
def test_an_unsound_set_is_not_written(tmp_path: Path, what: str) -> None:
    changes, message = UNSOUND[what]
    unsound = replace(distilled(), **changes)
    with pytest.raises(InputError, match=rf"^here: .*{message}|^here: {message}"):
        check_set(unsound, "here")
    with pytest.raises(InputError, match=f"not written: .*{message}"):
        unsound.save(tmp_path / "set.safetensors")
    for kind in SET_KINDS:
        with pytest.raises(InputError, match=f"not written: .*{message}"):
            unsound.export(kind, tmp_path / kind)
    assert not list(tmp_path.iterdir())


def spoiled(path: Path, **changes: Tensor) -> Path:
    """Write a sound set with other tensors in its file, past the check."""
    distilled("probabilities").save(path)
    tensors, metadata = load_tensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    kept = {name: text for name, text in metadata.items() if not name.startswith("checksum")}
    save_tensors(path, tensors | changes, kept)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": torch.tensor(math.nan)}, "lr: expected"),
        ({"labels": torch.zeros(N).long()}, "labels: expected probabilities"),
        ({"labels": torch.rand(N, 4).softmax(1)}, "labels: expected soft labels of 3 classes, found 4"),
        ({"images": torch.full((N, 3, 4, 5), math.nan)}, "images: expected finite"),
        ({"lr_per_step": torch.zeros(3)}, "lr_per_step"),
        ({"parameters.scale": torch.tensor(math.inf)}, r"parameters\.scale: expected finite"),
    ],
)
def test_an_unsound_set_is_not_read(tmp_path: Path, changes: dict[str, Tensor], message: str) -> None:
    path = spoiled(tmp_path / "set.safetensors", **changes)
    with pytest.raises(InputError, match=rf"set\.safetensors: {message}"):
        SyntheticDataset.load(path)


def test_a_sound_set_passes_whatever_it_has() -> None:
    white = Whitening(torch.zeros(60), SQUARE, SQUARE)
    for kind in ("indices", "probabilities", "weights", "logits"):
        check_set(distilled(kind, whitening=white, lr_per_step=torch.rand(3) + 0.1), "here")
    check_set(distilled(parameters={"scale": torch.ones(()), "none": torch.zeros(0, 3)}), "here")
    check_set(distilled(images=torch.randn(N, 3, 4, 6), canvas=Canvas(2, 3)), "here")
    check_set(distilled(labels=torch.zeros(N).long()), "here")  # classes may be left out


def test_labels_of_other_classes_than_the_datas_are_refused() -> None:
    assert check_classes(torch.tensor([0, 8, 3]), 10, "x") == 3
    assert check_classes(torch.rand(2, 10), 10, "x") == 10
    for labels in (torch.tensor([0, 10]), torch.tensor([-1, 2]), torch.rand(2, 9), torch.rand(2, 11)):
        with pytest.raises(InputError, match=r"^x: labels: "):
            check_classes(labels, 10, "x")
    with pytest.raises(InputError, match="found 0 to 1048576"):
        check_images_and_labels(torch.zeros(2, 1, 1, 1), torch.tensor([0, MAX_CLASSES]), "indices", "x")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_probabilities_are_known_in_every_precision(dtype: torch.dtype, classes: int) -> None:
    soft = torch.randn(50, classes).mul(3)
    assert are_probabilities(soft.softmax(1).to(dtype))
    assert guess_label_kind(soft.softmax(1).to(dtype)) == "probabilities"
    assert guess_label_kind(soft.to(dtype)) == "logits"


def test_rows_whose_sum_is_two_hundredths_from_one_are_no_probabilities() -> None:
    for row in ([0.5, 0.48], [0.5, 0.52], [0.5, 0.4]):
        labels = torch.tensor([[0.5, 0.5], row])
        assert guess_label_kind(labels) == "logits"
        with pytest.raises(InputError, match="x: labels: expected rows of probabilities"):
            check_images_and_labels(torch.zeros(2, 1, 1, 1), labels, "probabilities", "x")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.ones(2).bool(), "that are neither"),
        (torch.tensor([0.5, 1]), "that are neither"),
        (torch.tensor([math.nan, 1]), "that are neither"),
        (torch.tensor([1e30, 1]), "counted from 0"),
        (torch.ones(2, 3).long(), "that are neither"),
        (torch.tensor(1), "with n labels"),
        ([0, 1], "labels: expected a tensor, found a list|labels: expected a tensor, found"),
        (torch.ones(2).to(torch.complex64), "expected a dense tensor of real numbers"),
        (torch.eye(2).to_sparse(), "expected an ordinary tensor, found a tensor of layout"),
        (torch.ones(1).expand(2, 10**9), "bytes claimed of a storage of 4"),
        (torch.ones(2, device="meta"), "found one on the device meta"),
    ],
)
def test_labels_of_other_software_are_checked(labels: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^x: .*{message}"):
        tensor_set(torch.zeros(2, 1, 2, 2), labels, None, "x")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.float16, torch.float64])
def test_whole_labels_of_any_width_are_indices(dtype: torch.dtype) -> None:
    distilled = tensor_set(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1], dtype=dtype), None, "x")
    assert distilled.labels.dtype == torch.int64
    assert distilled.labels.tolist() == [0, 1]


def test_images_that_float32_cannot_hold_are_refused() -> None:
    with pytest.raises(InputError, match="images: expected finite numbers"):
        tensor_set(torch.full((2, 1, 2, 2), 1e300, dtype=torch.float64), torch.arange(2), None, "x")


@pytest.mark.parametrize("label_kind", ["indices", "logits"])
def test_a_set_and_its_data_agree_on_the_classes(label_kind: str) -> None:
    def info(count: int) -> SourceInfo:
        return SourceInfo(tuple(map(str, range(count))), (0.5,) * 3, (0.5,) * 3, None)

    plain = as_tensor_set(distilled(label_kind))
    assert as_synthetic(plain, info(3), 0.1, {}, {}).label_kind == label_kind
    with pytest.raises(InputError, match=r"and 2 classes, found .* of 3 classes"):
        as_synthetic(plain, info(2), 0.1, {}, {})
    if label_kind == "indices":  # classes may be left out
        assert len(as_synthetic(plain, info(4), 0.1, {}, {}).class_names) == 4
    else:
        with pytest.raises(InputError, match=r"and 4 classes, found .* of 3 classes"):
            as_synthetic(plain, info(4), 0.1, {}, {})


def test_no_kind_writes_what_its_reader_refuses(tmp_path: Path) -> None:
    unsound = replace(as_tensor_set(distilled()), lr=torch.tensor(-1.0))
    for kind in ("mtt", "ddranking", "dc", "dc_benchmark"):
        with pytest.raises(InputError, match="not written: lr"):
            write_set(tmp_path / kind, unsound, kind, dataset="CIFAR10")
    for name in ("mine.pt", "images_zca_best.pt", "images_best_3.pt"):
        with pytest.raises(InputError, match="expected a file name that contains images"):
            write_set(tmp_path / name, distilled(), "mtt")
    with pytest.raises(
        InputError, match=r"not written: parameters\.code: expected float64, .*, found complex64; convert"
    ):
        distilled(parameters={"code": torch.zeros(2, dtype=torch.complex64)}).save(tmp_path / "set.safetensors")
    two = distilled(images=torch.randn(N, 2, 4, 5), mean=(0.5, 0.5), std=(0.5, 0.5))
    with pytest.raises(InputError, match="1 or 3 channels"):
        write_set(tmp_path / "png", two, "png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["png", "parquet"])
def test_canvases_survive_as_pictures(tmp_path: Path, kind: str) -> None:
    textures = distilled(images=torch.randn(N, 3, 4, 6), canvas=Canvas(2, 3))
    textures.export(kind, tmp_path)
    back = read_set(tmp_path)
    assert isinstance(back, SyntheticDataset)
    assert back.canvas == Canvas(2, 3)


def test_a_picture_that_was_exchanged_is_noticed(tmp_path: Path) -> None:
    distilled().export("png", tmp_path)
    one, other, *_ = sorted(tmp_path.glob("*/*.png"))
    one.write_bytes(other.read_bytes())
    with pytest.raises(InputError, match=r"labels\.json: damaged: its checksum is of other labels or pictures"):
        read_set(tmp_path)


def test_a_set_of_tensors_alone_is_checked() -> None:
    for lr in (torch.ones(3), torch.tensor(True)):
        with pytest.raises(InputError, match="expected one learning rate above 0"):
            tensor_set(torch.zeros(2, 1, 2, 2), torch.arange(2), lr, "x")
    distilled = tensor_set(torch.zeros(2, 1, 2, 2), torch.arange(2), torch.tensor([[0.5]]), "x")
    assert isinstance(distilled, TensorSet)
    assert torch.equal(distilled.images, torch.zeros(2, 1, 2, 2))
    assert torch.equal(distilled.labels, torch.arange(2))
    assert distilled.label_kind == "indices"
    assert distilled.lr is not None
    assert torch.equal(distilled.lr, torch.tensor(0.5))


TOY = "--dataset digits --model ConvNetD1W4 --num_eval 1 --epoch_eval_train 1".split()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            torch.arange(1, 11),
            r"x\.pt: labels: expected class indices from 0 to 9, found 1 to 10; they seem .* subtract 1",
        ),
        (torch.arange(10) * 2, r"x\.pt: labels: expected class indices from 0 to 9, found 0 to 18"),
        (torch.randn(10, 9), r"x\.pt: labels: expected soft labels of 10 classes, found 9"),
        (torch.randn(10, 11).softmax(1), r"x\.pt: labels: expected soft labels of 10 classes, found 11"),
        (-torch.arange(10), r"x\.pt: labels: expected class indices, counted from 0, found -9 to 0"),
        (torch.full((10,), 1e30), r"x\.pt: labels: expected class indices"),
        (torch.full((10,), math.nan), r"x\.pt: expected labels that are class indices"),
        (torch.ones(10).bool(), r"x\.pt: expected labels that are class indices"),
    ],
)
def test_evaluate_and_cross_refuse_labels_of_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], labels: Tensor, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(torch.randn(10, 1, 8, 8), "images_x.pt")
    torch.save(labels, "labels_x.pt")
    for job, flags in ((evaluate.main, []), (cross.main, ["--models", "MLP"])):
        assert cli.run(job, ["images_x.pt", *TOY, *flags, "--out", "out"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert re.search(message, error), error


def test_classes_that_a_set_lacks_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(torch.randn(9, 1, 8, 8), "images_x.pt")
    torch.save(torch.arange(9), "labels_x.pt")
    with caplog.at_level("INFO"):
        assert cli.run(evaluate.main, ["images_x.pt", *TOY]) == 0
    assert "images_x.pt: has images of 9 of the 10 classes of digits" in caplog.messages
